"""Whether the items that come in still look like those the codebooks were fitted on.

Per level: the mean negative log-likelihood of what the levels above left (mixtures), its squared distance to the mean
of the emitted code (other chains of codebooks) or the squared error after the level (the rest), of new items against
the value at fit time; and which codes the new items use. Our design.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch

from recollect.errors import InputError
from recollect.tokenize.digit_costs import ReconstructionCosts
from recollect.tokenize.protocol import ItemTokenizer
from recollect.tokenize.residual import ResidualTokenizer
from recollect.tokenize.rows import ArrayRows
from recollect.tokenize.rq_gmm import GaussianLevel

_ROWS = 16384  # items measured at a time

Measure = Literal["negative_log_likelihood", "squared_error"]


@dataclass(frozen=True)
class DriftBaseline:
    """What is usual, measured at fit time; stored with the codebooks.

    measure: what `mean` is of.  mean, deviation: (L,) float64 over the fitted items.  uses: per level (K_l,) int64
    items per code.  n_items: how many there were.
    """

    measure: Measure
    mean: np.ndarray
    deviation: np.ndarray
    uses: tuple[np.ndarray, ...]
    n_items: int

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "measure": self.measure,
            "mean": self.mean.tolist(),
            "deviation": self.deviation.tolist(),
            "uses": [uses.tolist() for uses in self.uses],
            "n_items": self.n_items,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Inverse of `to_json`."""
        return cls(
            value["measure"],
            np.asarray(value["mean"], dtype=np.float64),
            np.asarray(value["deviation"], dtype=np.float64),
            tuple(np.asarray(uses, dtype=np.int64) for uses in value["uses"]),
            value["n_items"],
        )


@dataclass(frozen=True)
class Drift:
    """New items against the baseline, per level, all (L,) float64.

    mean: of the new items.  growth: `mean` less the baseline's.  standard_errors: growth in units of the standard error
    of a mean of that many usual items; 0 where usual items do not differ and nothing grew.  utilisation: share of the
    codes the new items use.  unused_before: share of new items on codes that no fitted item had.
    """

    measure: Measure
    mean: np.ndarray
    growth: np.ndarray
    standard_errors: np.ndarray
    utilisation: np.ndarray
    unused_before: np.ndarray
    n_items: int

    def to_json(self) -> dict[str, Any]:
        """JSON values; an infinite number of standard errors is null."""
        errors = [value if np.isfinite(value) else None for value in self.standard_errors.tolist()]
        return {
            "measure": self.measure,
            "mean": self.mean.tolist(),
            "growth": self.growth.tolist(),
            "standard_errors": errors,
            "utilisation": self.utilisation.tolist(),
            "unused_before": self.unused_before.tolist(),
            "n_items": self.n_items,
        }


def drift_baseline(
    tokenizer: ItemTokenizer, embeddings: np.ndarray, *, mask: np.ndarray | None = None
) -> DriftBaseline:
    """Measure the items a tokenizer was fitted on.

    Args:
        tokenizer: fitted.
        embeddings: (N, D), may be memory-mapped.
        mask: (N,) bool, those it was fitted on; default all.

    Raises:
        InputError: not fitted; no item; a method with neither density nor reconstruction.
    """
    rows = np.arange(len(embeddings)) if mask is None else np.flatnonzero(mask)
    measure, total, squares, uses = _measured(tokenizer, embeddings, rows)
    mean = total / len(rows)
    return DriftBaseline(measure, mean, np.sqrt(np.maximum(squares / len(rows) - mean**2, 0)), uses, len(rows))


def measure_drift(tokenizer: ItemTokenizer, embeddings: np.ndarray, baseline: DriftBaseline) -> Drift:
    """Compare new items (M, D) with the baseline of the same tokenizer.

    Raises:
        InputError: as `drift_baseline`; the baseline is of a tokenizer with other levels, codes or measure.
    """
    rows = np.arange(len(embeddings))
    measure, total, _, uses = _measured(tokenizer, embeddings, rows)
    sizes = [len(known) for known in baseline.uses]
    if measure != baseline.measure or sizes != list(tokenizer.codebook_sizes):
        raise InputError(
            f"the baseline is of {baseline.measure} with {sizes} codes, the tokenizer gives {measure} with "
            f"{list(tokenizer.codebook_sizes)}; measure it again with drift_baseline"
        )
    mean = total / len(rows)
    growth = mean - baseline.mean
    usual = baseline.deviation / np.sqrt(len(rows))
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.where(growth == 0, 0.0, growth / usual)
    unused = [found[known == 0].sum() / len(rows) for found, known in zip(uses, baseline.uses, strict=True)]
    used = [(found > 0).mean() for found in uses]
    return Drift(measure, mean, growth, errors, np.array(used), np.array(unused, dtype=np.float64), len(rows))


def _measured(
    tokenizer: ItemTokenizer, embeddings: np.ndarray, rows: np.ndarray
) -> tuple[Measure, np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Per level the sum and the sum of squares of the measure over items `rows`, and the uses of each code."""
    tokenizer.check_rows(embeddings)
    if not len(rows):
        raise InputError("there is no item to measure drift on; give at least one")
    if not isinstance(tokenizer, ResidualTokenizer) and not tokenizer.reconstructs:
        raise InputError(f"{tokenizer.name} has neither a density nor a reconstruction, so drift cannot be measured")
    sizes = tokenizer.codebook_sizes
    total, squares = np.zeros(len(sizes)), np.zeros(len(sizes))
    uses = [np.zeros(size, dtype=np.int64) for size in sizes]
    for start in range(0, len(rows), _ROWS):
        block = np.asarray(embeddings[rows[start : start + _ROWS]])
        codes = tokenizer.encode(block).codes
        if isinstance(tokenizer, ResidualTokenizer):
            values = _chain_values(tokenizer, block, codes)
        else:
            values = _errors(tokenizer, block, codes)
        total += values.sum(axis=0)
        squares += np.square(values).sum(axis=0)
        for level, size in enumerate(sizes):
            uses[level] += np.bincount(codes[:, level], minlength=size)
    return _measure_of(tokenizer), total, squares, tuple(uses)


def _measure_of(tokenizer: ItemTokenizer) -> Measure:
    is_mixture = isinstance(tokenizer, ResidualTokenizer) and isinstance(tokenizer.levels[0], GaussianLevel)
    return "negative_log_likelihood" if is_mixture else "squared_error"


def _chain_values(tokenizer: ResidualTokenizer, block: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(B, L) float64 of rows (B, D) and their codes, each level on what the ones above left."""
    residual = ArrayRows(block, None, tokenizer.preprocess.apply).block(0, len(block)).to(tokenizer.device)
    values = []
    for level, fitted in enumerate(tokenizer.levels):
        emitted = torch.from_numpy(codes[:, level].astype(np.int64)).to(tokenizer.device)
        if isinstance(fitted, GaussianLevel):
            values.append(-fitted.log_likelihood(residual))
        else:
            values.append((residual.double() - fitted.means[emitted].double()).square().sum(dim=1))
        residual = fitted.remainder(residual, emitted)
    return torch.stack(values, dim=1).cpu().numpy()


def _errors(tokenizer: ItemTokenizer, block: np.ndarray, codes: np.ndarray) -> np.ndarray:
    costs = ReconstructionCosts(tokenizer, block)
    everyone = np.arange(len(block))
    return np.stack([costs.of_codes(everyone, codes[:, : level + 1]) for level in range(codes.shape[1])], axis=1)
