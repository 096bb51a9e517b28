"""Do the codes help a model that writes them? A small generator is trained on histories and asked for the next item.

IDs are made unique first: items that share a code tuple get one more digit, their rank inside the group (`suffix`, as
TIGER does), so the list of IDs is a list of items. A user's last event is the test, the one before it validation.
A beam search over the tree of the candidates' IDs gives the list; the evaluator of every other recommender measures it
(full ranking, history masked or not, the target never masked). A target outside the beam counts as missed.
The epoch is chosen on validation users by NDCG@10 through the same search. All methods get the same windows, size,
steps and seeds.

`popularity` and `markov` are measured on the same users by the same evaluator: the rows such a table needs.
Source: semantic_ids 3 and 7; generative_recommendation 1, 3 and 4; recsys_evaluation 3.
Not covered: augmented IDs, text, a tuned sequence model beside it (`recollect evaluate` has those).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recollect.config import to_dict
from recollect.data.examples import held_out_cases, training_sequences
from recollect.errors import ConfigError, InputError
from recollect.eval.case_table import CaseTable
from recollect.eval.ranking import evaluate_ranker
from recollect.eval.ranking_inputs import evaluate_lists
from recollect.loop import LoopConfig, train
from recollect.progress import Progress, SilentProgress
from recollect.recommenders.markov import Markov
from recollect.recommenders.popularity import Popularity
from recollect.rng import call_seed, stream
from recollect.tokenize.checkpoint import array_sha256
from recollect.tokenize.collisions import resolve_collisions
from recollect.tokenize.constrained import beam_search
from recollect.tokenize.generator import CodeDecoder, CodeTransformer, GeneratorShape
from recollect.tokenize.generator_windows import WindowBatches, cut_windows
from recollect.tokenize.trie import PrefixTrie
from recollect.types import Dataset, Split

KS = (1, 5, 10)
COLUMNS = tuple(f"{metric}@{k}" for k in KS for metric in ("hr", "ndcg"))
UNMASKED = "_unmasked"
"""Ending of the columns in which items of the history may be listed."""

_REQUESTS = 256
_ALLOWED_CELLS = 2**22  # of the (requests, items) table of what may be listed


@dataclass(frozen=True)
class GenerativeBudget:
    """What every method may spend on its generator.

    epochs: at most.  patience: validations without improvement before the end.  valid_users: drawn for choosing the
    epoch.  beams: IDs kept per step while testing; `valid_beams` while choosing.
    """

    shape: GeneratorShape = field(default_factory=GeneratorShape)
    epochs: int = 24
    patience: int = 3
    validate_every: int = 3
    batch: int = 128
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    valid_users: int = 2000
    beams: int = 20
    valid_beams: int = 10

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "validate_every", "batch", "valid_users", "beams", "valid_beams"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class GenerativeResult:
    """What a generator found on the test users.

    columns: {"hr@10": (C,), …, "hr@10_unmasked": (C,), …} float64.  lists: (C, 10) int64, history masked.
    best_epoch, epochs: chosen and made.  valid_ndcg: at the chosen one.  extra_digit: codes of the digit that tells
    colliding items apart, 1 = there is none.  parameters: how many.  seconds: {"train", "decode"}, wall time.
    """

    columns: dict[str, np.ndarray]
    lists: np.ndarray
    best_epoch: int
    epochs: int
    valid_ndcg: float
    extra_digit: int
    parameters: int
    seconds: dict[str, float]


def unique_codes(
    codes: np.ndarray, codebook_sizes: Sequence[int], item_ids: Sequence[str]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Codes (N, L) or (N, L + 1) under which every item has its own tuple, and their codebook sizes.

    The extra digit is the rank inside a group of equal tuples, by item id; left out where no two items share one.
    """
    found = resolve_collisions(codes, "suffix", codebook_sizes=codebook_sizes, item_ids=item_ids)
    if found.codebook_sizes[-1] == 1:
        return found.codes[:, :-1], found.codebook_sizes[:-1]
    return found.codes, found.codebook_sizes


def run_generative(
    codes: np.ndarray,
    codebook_sizes: Sequence[int],
    dataset: Dataset,
    split: Split,
    budget: GenerativeBudget | None = None,
    *,
    seed: int,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> GenerativeResult:
    """Train a generator on codes (N, L) of the items of a log and rank the catalogue for its test users.

    Args:
        codebook_sizes: K_0..K_{L-1}.
        split: leave-one-out; training windows come from `split.train` alone.
        folder: where the state of training is kept, so that an interrupted run goes on with the same result.

    Raises:
        InputError: no user is long enough, or codes of another number of items than the log has.
        TrainingDiverged: a loss became NaN or infinite.
    """
    budget, progress = budget or GenerativeBudget(), progress or SilentProgress()
    if len(codes) != dataset.n_items:
        raise InputError(f"there are codes of {len(codes)} items where the log has {dataset.n_items}")
    ids, sizes = unique_codes(codes, codebook_sizes, tuple(str(name) for name in dataset.catalog.item_ids))
    windows = cut_windows(training_sequences(dataset, split.train), budget.shape.history + 1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(call_seed(seed, "generative", "initial weights"))
        model = CodeTransformer(ids, sizes, budget.shape)
    retriever = Retriever(model, dataset)
    chosen = _validation_users(dataset, split, budget.valid_users, seed)
    result = train(
        model,
        batches=WindowBatches(windows, budget.batch, seed),
        loss=model.training_loss,
        config=LoopConfig(
            epochs=budget.epochs,
            learning_rate=budget.learning_rate,
            weight_decay=budget.weight_decay,
            warmup_steps=50,
            clip_norm=1.0,
            patience=budget.patience,
            validate_every=budget.validate_every,
            seed=call_seed(seed, "generative", "steps"),
        ),
        validate=lambda: retriever.validation_ndcg(split, chosen, budget.valid_beams),
        folder=folder,
        progress=progress,
        identity={
            **to_dict(budget),
            "codes": array_sha256(ids),
            "windows": array_sha256(windows),
            "valid": array_sha256(chosen),
        },
    )
    progress.stage("beam search over the items' codes")
    started = time.perf_counter()
    masked = retriever.evaluated(split, beams=budget.beams, mask="history", seed=seed)
    unmasked = retriever.evaluated(split, beams=budget.beams, mask="none", seed=seed)
    assert result.best_validation is not None  # there is a validation
    return GenerativeResult(
        columns=columns_of(masked, unmasked),
        lists=masked.top(max(KS)),
        best_epoch=result.best_epoch,
        epochs=result.epochs,
        valid_ndcg=result.best_validation,
        extra_digit=sizes[-1] if len(sizes) > codes.shape[1] else 1,
        parameters=sum(value.numel() for value in model.parameters()),
        seconds={"train": result.wall_seconds, "decode": time.perf_counter() - started},
    )


def columns_of(masked: CaseTable, unmasked: CaseTable) -> dict[str, np.ndarray]:
    """The columns of `GenerativeResult` from the two evaluations of a model."""
    found = {name: np.asarray(masked.metrics[name], dtype=np.float64) for name in COLUMNS}
    return found | {name + UNMASKED: np.asarray(unmasked.metrics[name], dtype=np.float64) for name in COLUMNS}


def _validation_users(dataset: Dataset, split: Split, count: int, seed: int) -> np.ndarray:
    """(c,) positions of the validation cases the epoch is chosen on."""
    n_cases = len(held_out_cases(dataset, split, "valid"))
    if not n_cases:
        raise InputError(f"{dataset.name!r} has no user with enough events to choose and test a generator on")
    if n_cases <= count:
        return np.arange(n_cases)
    return np.sort(stream(seed, "generative", "validation users").choice(n_cases, count, replace=False))


class Retriever:
    """A generator over the items that occur in a log.

    Items without an event are no candidates (recsys_evaluation 3.4), so their IDs are not in the tree.
    """

    def __init__(self, model: CodeTransformer, dataset: Dataset) -> None:
        self._model, self._dataset = model, dataset
        self._candidates = np.flatnonzero(np.bincount(dataset.interactions.item, minlength=dataset.n_items))
        codes = model.tokens.cpu().numpy() - np.asarray(model.first)
        self._trie = PrefixTrie(codes[self._candidates], model.codebook_sizes)

    def lists(
        self,
        histories: Sequence[np.ndarray],
        beams: int,
        *,
        masked: Sequence[np.ndarray] | None = None,
        progress: Progress | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Items (B, beams) int64, best first, -1 where there are no more, and log-probabilities (B, beams) float32.

        Args:
            histories: items of each request, oldest first; the last ones the model reads are read.
            beams: width of the search; as wide as the catalogue it is exhaustive.
            masked: items each request may not get.
        """
        model = self._model.eval()
        device = model.tokens.device
        trie = self._trie.to(device)
        kept = np.array([min(len(history), model.shape.history) for history in histories], dtype=np.int64)
        items = np.full((len(histories), beams), -1, dtype=np.int64)
        scores = np.full((len(histories), beams), -np.inf, dtype=np.float32)
        n_candidates = len(self._candidates)
        requests = max(1, min(_REQUESTS, _ALLOWED_CELLS // n_candidates if masked is not None else _REQUESTS))
        for length in np.unique(kept).tolist():  # histories of one length need no padding
            of_length = np.flatnonzero(kept == length)
            for start in range(0, len(of_length), requests):
                rows = of_length[start : start + requests]
                read = np.array([histories[row][len(histories[row]) - length :] for row in rows], dtype=np.int64)
                decoder = CodeDecoder(model, torch.from_numpy(read.reshape(len(rows), length)).to(device))
                allowed = None if masked is None else self._allowed([masked[row] for row in rows]).to(device)
                found = beam_search(decoder, trie, model.vocabulary, beams, allowed=allowed)
                slot, item = trie.leaf_items(found.leaves.flatten())  # IDs are unique: at most one item a leaf
                flat = np.full(found.leaves.numel(), -1, dtype=np.int64)
                flat[slot.cpu().numpy()] = self._candidates[item.cpu().numpy()]
                items[rows] = flat.reshape(len(rows), beams)
                scores[rows] = found.scores.cpu().numpy()
                if progress is not None:
                    progress.advance(len(rows))
        return items, scores

    def _allowed(self, masked: Sequence[np.ndarray]) -> torch.Tensor:
        """(B, candidates) bool."""
        allowed = np.ones((len(masked), self._dataset.n_items), dtype=bool)
        for row, items in enumerate(masked):
            allowed[row, items] = False
        return torch.from_numpy(allowed[:, self._candidates])

    def evaluated(self, split: Split, *, beams: int, mask: Any, seed: int | None = None) -> CaseTable:
        """The test cases' lists under the evaluator; `mask` "history" or "none".

        Raises:
            ConfigError: a beam narrower than the longest cut-off.
        """
        if beams < max(KS):
            raise ConfigError(f"beams must be at least {max(KS)} for lists of {max(KS)}, got {beams!r}")
        cases = held_out_cases(self._dataset, split, "test")
        histories = cases.histories()
        masked = None
        if mask == "history":  # what is in the history may still be the target, which is never masked
            masked = [
                history[history != target] for history, target in zip(histories, cases.target.tolist(), strict=True)
            ]
        items, scores = self.lists(histories, beams, masked=masked)
        return evaluate_lists(items, self._dataset, split, name="generator", scores=scores, ks=KS, mask=mask, seed=seed)

    def validation_ndcg(self, split: Split, chosen: np.ndarray, beams: int, k: int = 10) -> float:
        """Mean NDCG@k over the chosen validation cases, history masked."""
        cases = held_out_cases(self._dataset, split, "valid").take(chosen)
        histories, target = cases.histories(), cases.target
        masked = [history[history != item] for history, item in zip(histories, target.tolist(), strict=True)]
        items, _ = self.lists(histories, beams, masked=masked)
        is_target = items[:, :k] == target[:, None]
        gains = 1.0 / np.log2(np.arange(is_target.shape[1]) + 2.0)
        return float((is_target * gains).sum(axis=1).mean())


def reference_columns(dataset: Dataset, split: Split) -> dict[str, dict[str, np.ndarray]]:
    """{"popularity" and "markov": columns as of a `GenerativeResult`}, of the same test cases."""
    found = {}
    for label, model in (("popularity", Popularity()), ("markov", Markov())):
        model.fit(dataset, split)
        masked = evaluate_ranker(model, dataset, split, ks=KS, mask="history")
        unmasked = evaluate_ranker(model, dataset, split, ks=KS, mask="none")
        found[label] = columns_of(masked, unmasked)
    return found
