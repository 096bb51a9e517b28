"""Do the codes help a click model? A small one that sees items through their codes only.

An item is F categorical fields: a code per level, prefixes of codes, or both. Every field has an embedding of width w;
a user is the mean over their history, field by field. With t_f the field vectors of the item asked about and h_f those
of the history, the logit is

    sum_f <t_f, h_f>  +  MLP([t, h, t * h]),

the factorisation term of DeepFM beside a feed-forward network. All methods get the same cases, width, steps and seeds;
the moment to stop is chosen on validation, several times per epoch. The number is an AUC against items of equal
popularity: .5 is what one gets without knowing items (the floor `no-item`), `item-id` what one gets from an identity
per item and no content.

Source: semantic_ids 2.4 (fields, prefixes, pooling over the history: our design). Prefixes are numbered, not hashed to
2^20 as `item_features` does, so two prefixes never share a row.
Not covered: a production click model; generative retrieval.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from recollect.errors import InputError, TrainingDiverged
from recollect.rng import call_seed, stream
from recollect.tokenize.downstream_cases import Cases, CaseSets
from recollect.tokenize.item_features import Fields


@dataclass(frozen=True)
class ProbeBudget:
    """What every method may spend: width of a field, hidden layers, epochs, most clicks per step, step size, looks.

    A step takes a hundredth of the training clicks, at least 32 and at most `batch`, so that small logs are learnt too.
    validations: per epoch. With one, most rows were best at the second, with large steps from one to the next.
    """

    width: int = 16
    hidden: tuple[int, ...] = (64, 32)
    epochs: int = 6
    batch: int = 512
    learning_rate: float = 3e-3
    validations: int = 4


@dataclass(frozen=True)
class ProbeResult:
    """What the probe found on the test cases.

    clicked: (C,) float32 logits of the clicks.  skipped: (C, M) float32 of the non-clicks.  valid_auc: at each
    validation.  best_epoch: epochs made at the best of them, e.g. 1.25.  seconds: wall time.  parameters: how many.
    """

    clicked: np.ndarray
    skipped: np.ndarray
    valid_auc: tuple[float, ...]
    best_epoch: float
    seconds: float
    parameters: int


def numbered_fields(codes: np.ndarray, fields: Fields = "both") -> np.ndarray:
    """Codes (N, L) as fields (N, F) int64 of this comparison, each numbered from 0 over the values these items have.

    "levels": c_1 … c_L; "prefixes": (c_1), (c_1, c_2), …; "both": the levels, then the prefixes of two and more.
    For one fixed table of items only: another table numbers the same code otherwise. `item_features.ctr_fields` does
    not, but its tables have rows for what no item has; with them the start of the weights would be drawn otherwise, and
    results no longer compare with earlier ones.
    """
    levels = [_numbered(codes[:, [level]]) for level in range(codes.shape[1])]
    prefixes = [_numbered(codes[:, : length + 1]) for length in range(codes.shape[1])]
    chosen = {"levels": levels, "prefixes": prefixes, "both": levels + prefixes[1:]}[fields]
    return np.stack(chosen, axis=1).astype(np.int64)


def _numbered(rows: np.ndarray) -> np.ndarray:
    """(N,) number of each distinct row, from 0."""
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


class ItemFields(nn.Module):
    """Items as F embedding rows each: (…,) item indices to (…, F, w)."""

    table: Tensor

    def __init__(self, fields: np.ndarray, width: int) -> None:
        """fields: (N, F) from 0."""
        super().__init__()
        sizes = fields.max(axis=0) + 1
        self.register_buffer("rows", torch.from_numpy(fields + np.r_[0, np.cumsum(sizes)[:-1]]))
        self.embedding = nn.Embedding(int(sizes.sum()), width)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.n_fields = fields.shape[1]

    def forward(self, items: Tensor) -> Tensor:
        return self.embedding(self.rows[items])  # type: ignore[index]  # a buffer


class Probe(nn.Module):
    """The click model of this module's text."""

    def __init__(self, fields: np.ndarray, budget: ProbeBudget) -> None:
        super().__init__()
        self.items = ItemFields(fields, budget.width)
        sizes = [3 * self.items.n_fields * budget.width, *budget.hidden]
        layers: list[nn.Module] = []
        for size, following in itertools.pairwise(sizes):
            layers += [nn.Linear(size, following), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, history: Tensor, asked: Tensor) -> Tensor:
        """Logits (B, M) of items asked (B, M) given histories (B, H), -1 = no item."""
        there = (history >= 0).float()[..., None, None]  # (B, H, 1, 1)
        pooled = (self.items(history.clamp(min=0)) * there).sum(1) / there.sum(1).clamp(min=1.0)  # (B, F, w)
        target = self.items(asked)  # (B, M, F, w)
        pooled = pooled[:, None].expand_as(target)
        product = target * pooled
        deep = self.network(torch.cat([target, pooled, product], dim=-1).flatten(2))[..., 0]  # (B, M)
        return product.sum((-1, -2)) + deep


def run_probe(fields: np.ndarray, cases: CaseSets, budget: ProbeBudget = ProbeBudget(), *, seed: int) -> ProbeResult:
    """Fit the probe on items described by `fields` (N, F) and score the test cases.

    Raises:
        InputError: the cases speak of items that have no fields.
        TrainingDiverged: the loss became NaN or infinite.
    """
    highest = max(int(part.skipped.max(initial=0)) for part in (cases.train, cases.valid, cases.test))
    if highest >= len(fields):
        raise InputError(f"the cases speak of item {highest} where there are codes of {len(fields)} items")
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(call_seed(seed, "downstream", "initial weights"))
        probe = Probe(fields, budget)
    probe.to(device)
    optimiser = torch.optim.Adam(probe.parameters(), lr=budget.learning_rate)
    best: tuple[float, float, dict[str, Tensor]] | None = None
    curve = []
    batch = min(budget.batch, max(32, len(cases.train) // 100))
    steps = -(-len(cases.train) // batch)
    ends = sorted({-(-steps * part // budget.validations) for part in range(1, budget.validations + 1)})
    for epoch in range(budget.epochs):
        order = stream(seed, "downstream", "order", epoch + 1).permutation(len(cases.train))
        for first, end in itertools.pairwise([0, *ends]):
            _train(probe, optimiser, cases.train, order[first * batch : end * batch], batch, device)
            found = auc(*scores_of(probe, cases.valid, device))
            curve.append(found)
            if best is None or found > best[0]:
                state = {name: value.clone() for name, value in probe.state_dict().items()}
                best = (found, round(epoch + end / steps, 2), state)
    assert best is not None
    probe.load_state_dict(best[2])
    clicked, skipped = scores_of(probe, cases.test, device)
    return ProbeResult(
        clicked=clicked,
        skipped=skipped,
        valid_auc=tuple(curve),
        best_epoch=best[1],
        seconds=time.perf_counter() - started,
        parameters=sum(value.numel() for value in probe.parameters()),
    )


def _train(
    probe: Probe, optimiser: torch.optim.Optimizer, cases: Cases, order: np.ndarray, batch: int, device: str
) -> None:
    """Steps on the cases `order` (n,)."""
    probe.train()
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        history, asked = _tensors(cases, chosen, device)
        logits = probe(history, asked)
        labels = torch.zeros_like(logits)
        labels[:, 0] = 1.0
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        if not torch.isfinite(loss):
            raise TrainingDiverged(f"the downstream probe's loss became {loss.item()!r}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()


def _tensors(cases: Cases, rows: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    asked = np.concatenate([cases.clicked[rows, None], cases.skipped[rows]], axis=1)
    return torch.from_numpy(cases.history[rows].astype(np.int64)).to(device), torch.from_numpy(asked).to(device)


@torch.inference_mode()
def scores_of(probe: Probe, cases: Cases, device: str = "cpu", batch: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the clicks (C,) and non-clicks (C, M), float32, rounded to five decimals."""
    probe.eval()
    found = [
        probe(*_tensors(cases, np.arange(start, min(start + batch, len(cases))), device)).cpu().numpy()
        for start in range(0, len(cases), batch)
    ]
    # Equal items get equal scores up to the order of a product's sums; that must not decide a tie.
    table = np.round(np.concatenate(found), 5)
    return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1:])


def auc(clicked: np.ndarray, skipped: np.ndarray) -> float:
    """Probability that a random click scores above a random non-click; ties count one half."""
    return float(_above(clicked, skipped.ravel()).mean())


def auc_by_user(clicked: np.ndarray, skipped: np.ndarray) -> np.ndarray:
    """Pseudo-values (C,) float64 whose mean is the AUC and whose spread is its uncertainty over users.

    V_u = P(click of u above any non-click) + P(any click above the non-clicks of u) - AUC, the placements of DeLong
    et al. (1988) with a user's click and non-clicks as one cluster. Resampling them is resampling users to first order
    (the error is of order 1 / C).
    """
    of_click = _above(clicked, skipped.ravel())
    of_skips = 1.0 - _above(skipped.ravel(), clicked).reshape(skipped.shape).mean(axis=1)
    return of_click + of_skips - of_click.mean()


def wins_by_user(clicked: np.ndarray, skipped: np.ndarray) -> np.ndarray:
    """Share (C,) of a user's own non-clicks below the click, ties one half; its mean is the AUC within users."""
    return ((clicked[:, None] > skipped) + 0.5 * (clicked[:, None] == skipped)).mean(axis=1)


def _above(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of `others` below each value, ties one half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, values, side="left")
    through = np.searchsorted(ordered, values, side="right")
    return (below + through) / (2.0 * len(ordered))
