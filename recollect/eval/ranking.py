"""Full-ranking evaluation of anything that scores the whole catalogue.

Every item of the filtered log is a candidate, seen items are masked, the target never is, ties count in expectation.
Ranks come from counting, lists from a bounded selection, so nothing of the catalogue's size is ever sorted.

The other two forms of input (ranked lists, streamed counts) are in `ranking_inputs`; all three give the same metrics.
Source: recsys_evaluation 2-4.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.errors import ConfigError, InputError
from recollect.eval.case_table import CaseTable
from recollect.eval.metrics import Tie, counts_around
from recollect.eval.setting import KS, Mask, Setting, evaluation_setting
from recollect.eval.topk import top_items
from recollect.types import Dataset, Ranker, Split

if TYPE_CHECKING:
    from recollect.data.examples import History, Part
    from recollect.progress import Progress

logger = logging.getLogger(__name__)

_MULTI_TARGET_CELLS = 8_000_000
_CACHED_CELLS = 1 << 18
_FEWEST_ROWS = 8


def evaluate_ranker(
    model: Ranker,
    dataset: Dataset,
    split: Split,
    *,
    part: Part = "test",
    history: History = "train+val",
    mask: Mask = "history",
    ks: Sequence[int] = KS,
    tie: Tie = "expectation",
    batch_size: int = 256,
    list_length: int | None = None,
    rows: np.ndarray | None = None,
    seed: int | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> CaseTable:
    """Rank the whole catalogue for every held-out case.

    Args:
        model: its `score(histories)` gives (B, n_items), higher is better, seen items not masked. float32 and float64
            are compared as they are; anything narrower becomes float32 with a warning that counts the ties. One with a
            true `reads_times` is asked `score(histories, times=...)`: when the history's events were, in Unix seconds.
        dataset, split: the cases; `part` "valid" or "test".
        history: "train+val" is every earlier event of the user, "train" hides the validation event.
        mask: "history" takes the items the model is shown off the ranking, "train" the user's training items, "none"
            nothing. The target is never masked, even where it recurs in the history.
        ks: cut-offs of hr, ndcg and mrr (several targets per case: hr, recall, precision, ndcg and map).
        tie: how equal scores count, see `recollect.eval.metrics.rank_counts`; lists are always cut by item index.
        batch_size: cases scored at once; changes no number of a model that scores each case by itself.
        list_length: of the recommended lists kept; default max(ks).
        rows: (N,) bool, the rows the model was fitted on, for popularity and the leak check; default `split.train`.
        seed: of the fitted model, recorded in the protocol; default its own `seed` if it has one.
        name: of the row; default the model's `name`, else its class.
        progress: told one step per case.

    Returns:
        A `CaseTable` with (C,) columns "hr@k", "ndcg@k", "mrr@k", "mrr" and lists (C, list_length).

    Raises:
        InputError: NaN scores or scores of another shape (the message names case and model), or no case.
        ConfigError: an illegal option.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size!r}")
    setting = evaluation_setting(
        dataset, split, part=part, history=history, mask=mask, ks=ks, tie=tie, list_length=list_length, rows=rows
    )
    name = name or str(getattr(model, "name", type(model).__name__))
    seed = getattr(model, "seed", None) if seed is None else seed
    n_cases = len(setting.cases)
    lists = np.empty((n_cases, setting.list_length), dtype=np.int64)
    greater, equal = (np.empty(len(setting.target), dtype=np.int64) for _ in range(2))
    scored = _Scored(name, setting)
    if progress is not None:
        progress.stage(f"evaluating {name}", n_cases)
    for start in range(0, n_cases, batch_size):
        stop = min(start + batch_size, n_cases)
        batch = scored.checked(scores_of(model, setting, start, stop), start, stop)
        row, item = setting.masked(start, stop)
        # Counting and listing pass over the scores several times; a few rows at a time stay in the cache.
        cuts = np.searchsorted(row, np.arange(0, stop - start + scored.rows, scored.rows))
        for low, first, last in zip(range(start, stop, scored.rows), cuts[:-1], cuts[1:], strict=True):
            high = min(low + scored.rows, stop)
            masked = row[first:last] - (low - start), item[first:last]
            where = setting.targets_of(low, high)
            with scored.without(masked, batch[low - start : high - start], low) as own:
                greater[where], equal[where], lists[low:high] = rank_batch(setting, own, low, high)
        if progress is not None:
            progress.advance(stop - start)
    return setting.table(name, lists, greater, equal, seed=seed, warnings=scored.warnings(equal), input_form="dense")


def scores_of(model: Ranker, setting: Setting, start: int, stop: int) -> Any:
    """What the model gives for cases start..stop-1, unchecked."""
    part = slice(start, stop)
    histories = setting.cases.histories(part)
    if getattr(model, "reads_times", False):
        timed: Any = model
        return timed.score(histories, times=setting.cases.times(part))
    return model.score(histories)


def rank_batch(
    setting: Setting, scores: np.ndarray, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts (T_b,) above and equal to each target, and lists (B, L), of cases start..stop-1.

    Args:
        scores: (B, n_items) float32 or float64 without NaN; -inf where an item is masked or no candidate.
    """
    where = setting.targets_of(start, stop)
    target, row = setting.target[where], setting.target_case[where] - start
    lists = top_items(scores, setting.list_length)
    if setting.is_next_item:
        return *counts_around(scores, target, setting.tie), lists
    greater, equal = (np.empty(len(target), dtype=np.int64) for _ in range(2))
    step = max(1, _MULTI_TARGET_CELLS // setting.n_items)
    for low in range(0, len(target), step):
        part = slice(low, low + step)
        greater[part], equal[part] = counts_around(scores[row[part]], target[part], setting.tie)
    return greater, equal, lists


class _Scored:
    """Checks a model's scores, and takes masked items out of a few rows at a time."""

    def __init__(self, name: str, setting: Setting) -> None:
        self._name = name
        self._setting = setting
        self.rows = max(_FEWEST_ROWS, _CACHED_CELLS // setting.n_items)
        self._low_precision = ""

    def checked(self, scores: Any, start: int, stop: int) -> np.ndarray:
        """The scores (B, n_items) of cases start..stop-1 as float32 or float64."""
        scores, precision = as_scores(scores)
        self._low_precision = self._low_precision or precision
        expected = (stop - start, self._setting.n_items)
        if scores.shape != expected:
            raise InputError(
                f"{self._name!r} gave scores of shape {scores.shape} where {expected} (cases, items) were asked for; "
                "column j must be item j of the data set, without a padding column"
            )
        return scores

    @contextmanager
    def without(self, masked: tuple[np.ndarray, np.ndarray], scores: np.ndarray, start: int) -> Iterator[np.ndarray]:
        """The scores (B, n_items) of the cases from `start` on with -inf for masked (row, item) pairs and items that
        are no candidates; the model's own array, which is put back as it was, or a copy where it cannot be written.

        Raises:
            InputError: a score is NaN.
        """
        self._refuse_nan(scores, start)
        if scores.dtype.itemsize > np.dtype(np.float64).itemsize:
            scores = scores.astype(np.float64)
        if not (scores.flags.writeable and scores.flags.c_contiguous):
            scores = scores.copy()
        absent = self._setting.absent
        of_absent, of_masked = scores[:, absent], scores[masked]
        try:
            scores[:, absent] = -np.inf
            scores[masked] = -np.inf
            yield scores
        finally:
            scores[masked] = of_masked
            scores[:, absent] = of_absent

    def _refuse_nan(self, scores: np.ndarray, start: int) -> None:
        with np.errstate(all="ignore"):
            sums = scores @ np.ones(scores.shape[1], dtype=scores.dtype)
        if not np.isnan(sums).any():  # a NaN reaches its row's sum, and so does the difference of two infinities
            return
        bad = np.isnan(scores).any(axis=1)
        if bad.any():
            raise InputError(
                f"{self._name!r} gave NaN scores, first for {self._setting.who(start + int(bad.argmax()))}; "
                "NaN has no rank"
            )

    def warnings(self, equal: np.ndarray) -> tuple[str, ...]:
        """A sentence on ties if any batch came in low precision, also logged."""
        if not self._low_precision:
            return ()
        sentence = low_precision_warning(self._name, self._low_precision, equal)
        logger.warning(sentence)
        return (sentence,)


def as_scores(scores: Any) -> tuple[np.ndarray, str]:
    """Floats of at least 32 bits from an array or tensor, and the narrower type they came in ("" if none)."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(scores, torch.Tensor):
        narrow = str(scores.dtype).removeprefix("torch.") if scores.dtype.itemsize < 4 else ""
        scores = scores.detach().to("cpu")
        return (scores.float() if narrow else scores).numpy(), narrow
    scores = np.asarray(scores)
    if scores.dtype.kind == "f" and scores.dtype.itemsize < 4:
        return scores.astype(np.float32), scores.dtype.name
    if scores.dtype.kind != "f":
        if scores.dtype.kind not in "iub":
            raise InputError(f"scores must be numbers, got an array of {scores.dtype}")
        return scores.astype(np.float64), ""
    return scores, ""


def low_precision_warning(name: str, precision: str, equal: np.ndarray) -> str:
    """What a report says about scores narrower than float32.

    Source: recsys_evaluation 9.14; bf16 logits of a 12,000-item head tie often.
    """
    share = float((equal > 0).mean()) if len(equal) else 0.0
    return (
        f"{name!r} scores in {precision}, compared as float32: {share:.1%} of targets are tied with another item, "
        "which low precision may have caused; score in float32 to be sure"
    )
