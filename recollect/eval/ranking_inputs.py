"""Two further ways to bring scores: ranked lists (language models, beam search) and streamed counts (huge catalogues).

Both give the `CaseTable` that dense scores give: a full list in the order of tie-free scores, or the counts of the same
scores, have identical metrics.

Source: recsys_evaluation 2 (b), (c) and 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from recollect.errors import ConfigError, InputError
from recollect.eval.case_table import CaseTable
from recollect.eval.metrics import Tie
from recollect.eval.ranking import as_scores
from recollect.eval.setting import Setting, evaluation_setting
from recollect.eval.topk import NO_ITEM, top_items
from recollect.types import Dataset, Split

Fill = Literal["popularity", "backbone"]


def evaluate_lists(
    lists: np.ndarray | Sequence[Sequence[int]],
    dataset: Dataset,
    split: Split,
    *,
    name: str,
    scores: np.ndarray | Sequence[Sequence[float]] | None = None,
    fill: Fill | None = None,
    fill_lists: np.ndarray | None = None,
    seed: int | None = None,
    **options: Any,
) -> CaseTable:
    """Metrics of one ranked list per case.

    A repeated item keeps its first place and the others move up. An invalid id (negative, or not an item of the log)
    keeps its place, so nothing moves up, and is counted in `invalid_rate`. Masked items are taken out, as they are from
    dense scores. A target that is not listed scores 0 everywhere, and a case with an empty list is a case.

    Args:
        lists: one list of item indices per case, best first, of any lengths; in an array, trailing -1 end a list.
        scores: as `lists`, then ordered by (score descending, item index ascending) and ties count as `tie` says; None
            = the order is the ranking.
        fill: what short lists are filled with up to `list_length`: the most popular training items, or `fill_lists`
            (C, F) of another model; None = they stay short. Named in the protocol.
        name, seed: of the row.
        options: `part`, `history`, `mask`, `ks`, `tie`, `list_length`, `rows` as in `evaluate_ranker`.

    Raises:
        InputError: not one list per case, or a NaN score (the message names case and model).
        ConfigError: an illegal option.
    """
    setting = evaluation_setting(dataset, split, **options)
    if fill not in (None, "popularity", "backbone") or (fill == "backbone") != (fill_lists is not None):
        raise ConfigError(
            f"fill must be None, 'popularity', or 'backbone' with fill_lists; got {fill!r} "
            f"{'with' if fill_lists is not None else 'without'} fill_lists"
        )
    case, item, value = _entries(lists, scores, setting, name)
    key = case * setting.n_items + item
    valid = (item >= 0) & (item < setting.n_items) & ~np.isin(item, setting.absent)
    repeated = np.zeros(len(case), dtype=bool)
    repeated[valid] = True
    repeated[np.flatnonzero(valid)[np.unique(key[valid], return_index=True)[1]]] = False
    n_entries = max(len(case), 1)
    invalid_rate, duplicate_rate = float((~valid).sum() / n_entries), float(repeated.sum() / n_entries)
    masked_row, masked_item = setting.masked(0, len(setting.cases))
    keep = ~repeated & ~(valid & np.isin(key, masked_row * setting.n_items + masked_item))
    case, item, value, valid = case[keep], item[keep], value[keep], valid[keep]

    order = np.lexsort((item, -value, case))
    case, item, value, valid = case[order], item[order], value[order], valid[order]
    length = np.bincount(case, minlength=len(setting.cases))
    place = np.arange(len(case)) - np.repeat(np.cumsum(length) - length, length)
    item = np.where(valid, item, NO_ITEM)
    greater, equal = _tied_places(case, value, place, setting.tie)
    if fill is not None:
        source = np.argsort(-setting.popularity, kind="stable")[None] if fill_lists is None else np.asarray(fill_lists)
        more_case, more_item, more_place = _filling(setting, case, item, length, source, masked_row, masked_item)
        case, item, place = np.r_[case, more_case], np.r_[item, more_item], np.r_[place, more_place]
        greater, equal = np.r_[greater, more_place], np.r_[equal, np.zeros(len(more_place), dtype=np.int64)]
    shown = np.full((len(setting.cases), setting.list_length), NO_ITEM, dtype=np.int64)
    inside = place < setting.list_length
    shown[case[inside], place[inside]] = item[inside]

    named = np.flatnonzero(item != NO_ITEM)
    wanted = setting.target_case * setting.n_items + setting.target
    at = _find((case * setting.n_items + item)[named], wanted)
    listed = at < len(named)
    of_target = np.r_[named, len(item)][at]  # one past the end stands for "not listed"
    return setting.table(
        name,
        shown,
        np.r_[greater, setting.n_items][of_target],
        np.r_[equal, 0][of_target],
        listed=listed,
        input_form="lists",
        fill=fill,
        seed=seed,
        invalid_rate=invalid_rate,
        duplicate_rate=duplicate_rate,
    )


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted key (T,) stands among distinct non-negative keys (E,); E where it does not."""
    order = np.r_[np.argsort(keys), len(keys)]
    at = order[np.searchsorted(keys, wanted, sorter=order[:-1])]
    return np.where(np.r_[keys, -1][at] == wanted, at, len(keys))


def _entries(
    lists: np.ndarray | Sequence[Sequence[int]],
    scores: np.ndarray | Sequence[Sequence[float]] | None,
    setting: Setting,
    name: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(case, item, value) of every list entry, in order; the value is the score, else minus the place."""
    if len(lists) != len(setting.cases):
        raise InputError(
            f"{name!r} brings {len(lists)} lists for {len(setting.cases)} cases; empty lists are lists too"
        )
    rows = [np.asarray(row, dtype=np.int64).reshape(-1) for row in lists]
    for index, row in enumerate(rows):
        if len(row) and row[-1] == NO_ITEM:
            stated = np.flatnonzero(row != NO_ITEM)
            rows[index] = row[: stated[-1] + 1] if len(stated) else row[:0]
    length = np.array([len(row) for row in rows], dtype=np.int64)
    case = np.repeat(np.arange(len(rows)), length)
    item = np.concatenate([*rows, np.zeros(0, dtype=np.int64)])
    if scores is None:
        return case, item, (np.repeat(np.cumsum(length) - length, length) - np.arange(len(case))).astype(np.float64)
    if len(scores) != len(rows):
        raise InputError(f"{name!r} brings {len(scores)} rows of scores for {len(rows)} lists")
    columns = []
    for index, (row, row_scores) in enumerate(zip(rows, scores, strict=True)):
        value = as_scores(row_scores)[0].reshape(-1)
        if len(value) < len(row):
            raise InputError(f"{name!r} gave {len(value)} scores for {len(row)} listed items in {setting.who(index)}")
        if np.isnan(value[: len(row)]).any():
            raise InputError(f"{name!r} gave a NaN score in {setting.who(index)}; NaN has no rank")
        columns.append(value[: len(row)])
    return case, item, np.concatenate([*columns, np.zeros(0)])


def _tied_places(case: np.ndarray, value: np.ndarray, place: np.ndarray, tie: Tie) -> tuple[np.ndarray, np.ndarray]:
    """Entries above each one and tied with it; entries come by (case, value descending, item)."""
    fresh = np.ones(len(case), dtype=bool)
    fresh[1:] = (case[1:] != case[:-1]) | (value[1:] != value[:-1])
    group = np.cumsum(fresh) - 1
    start = np.flatnonzero(fresh)
    size = np.diff(np.r_[start, len(case)])[group]
    above = place[start][group]
    if tie == "expectation":
        return above, size - 1
    settled = {"optimistic": above, "pessimistic": above + size - 1, "index": place}[tie]
    return settled, np.zeros_like(settled)


def _filling(
    setting: Setting,
    case: np.ndarray,
    item: np.ndarray,
    length: np.ndarray,
    source: np.ndarray,
    masked_row: np.ndarray,
    masked_item: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(case, item, place) of the entries that fill short lists with what is neither listed nor masked.

    source: (1 or C, F) item indices, best first.
    """
    if source.ndim != 2 or len(source) not in (1, len(length)):
        raise InputError(f"fill_lists must be ({len(length)}, F), got shape {source.shape}")
    listed_from = np.r_[0, np.cumsum(length)]
    masked_from = np.searchsorted(masked_row, np.arange(len(length) + 1))
    cases, items, places = [], [], []
    for short in np.flatnonzero(length < setting.list_length):
        taken = np.zeros(setting.n_items, dtype=bool)
        listed = item[listed_from[short] : listed_from[short + 1]]
        taken[listed[listed != NO_ITEM]] = True
        taken[masked_item[masked_from[short] : masked_from[short + 1]]] = True
        taken[setting.absent] = True
        offered = source[short if len(source) > 1 else 0]
        offered = offered[(offered >= 0) & (offered < setting.n_items)]
        offered = offered[~taken[offered]]
        first = np.sort(np.unique(offered, return_index=True)[1])[: setting.list_length - length[short]]
        cases.append(np.full(len(first), short))
        items.append(offered[first])
        places.append(length[short] + np.arange(len(first)))
    nothing = np.zeros(0, dtype=np.int64)
    return tuple(np.concatenate([*parts, nothing]) for parts in (cases, items, places))  # type: ignore[return-value]


def evaluate_counts(
    greater: np.ndarray,
    equal: np.ndarray,
    dataset: Dataset,
    split: Split,
    *,
    name: str,
    lists: np.ndarray | None = None,
    seed: int | None = None,
    **options: Any,
) -> CaseTable:
    """Metrics from how many candidates beat each target and how many equal it (after masking).

    Args:
        greater, equal: (T,) whole numbers, in the order of the cases (of `Setting.target` with several targets each).
        lists: (C, list_length) recommended items, -1 = none; None = the table has no lists.
        name, seed, options: as in `evaluate_lists`; tie "index" needs scores and is refused.

    Raises:
        InputError: another number of counts than targets, or counts that no ranking of the candidates has.
    """
    setting = evaluation_setting(dataset, split, **options)
    if setting.tie == "index":
        raise ConfigError("tie='index' needs scores; counts only know how many candidates are tied")
    greater, equal = np.asarray(greater), np.asarray(equal)
    shape = setting.target.shape
    if greater.shape != shape or equal.shape != shape or greater.dtype.kind not in "iu" or equal.dtype.kind not in "iu":
        raise InputError(
            f"{name!r} brings counts of shape {greater.shape} ({greater.dtype}) and {equal.shape} ({equal.dtype}) "
            f"where whole numbers of shape {shape} are needed"
        )
    greater, equal = greater.astype(np.int64), equal.astype(np.int64)
    wrong = (greater < 0) | (equal < 0) | (greater + equal >= setting.n_items)
    if wrong.any():
        first = int(wrong.argmax())
        raise InputError(
            f"{name!r} counts {greater[first]} candidates above the target and {equal[first]} tied with it in "
            f"{setting.who(int(setting.target_case[first]))}, where {setting.n_items} items are all there is"
        )
    if setting.tie != "expectation":
        greater, equal = greater + (equal if setting.tie == "pessimistic" else 0), np.zeros_like(equal)
    kept = np.zeros((len(setting.cases), 0), dtype=np.int64) if lists is None else np.asarray(lists, dtype=np.int64)
    if len(kept) != len(setting.cases):
        raise InputError(f"{name!r} brings {len(kept)} lists for {len(setting.cases)} cases")
    return setting.table(name, kept, greater, equal, input_form="counts", seed=seed)


class StreamedCounts:
    """Counts and lists of cases start..stop-1 of a setting whose catalogue is scored in blocks of items.

    Memory is (B, block), never (B, n_items). Blocks come in ascending order and cover the catalogue once; each target's
    score must be the very number its block holds, or candidates a rounding apart land on the wrong side of it.
    """

    def __init__(self, setting: Setting, start: int, stop: int, target_scores: np.ndarray) -> None:
        """target_scores: (T_b,) of `setting.target[setting.targets_of(start, stop)]`."""
        where = setting.targets_of(start, stop)
        self._setting, self._start, self._stop = setting, start, stop
        self._target = setting.target[where]
        self._row = setting.target_case[where] - start
        self._score = as_scores(target_scores)[0]
        if self._score.shape != self._target.shape:
            raise InputError(f"{len(self._target)} target scores are needed, got shape {self._score.shape}")
        self._masked = setting.masked(start, stop)
        self._seen = 0
        self._greater, self._equal = (np.zeros(len(self._target), dtype=np.int64) for _ in range(2))
        shape = (stop - start, setting.list_length)
        self._lists = np.full(shape, NO_ITEM, dtype=np.int64)
        self._values = np.full(shape, -np.inf)

    def add(self, scores: np.ndarray) -> None:
        """Take the next block: scores (B, M) of the items that follow those seen so far."""
        block = np.array(as_scores(scores)[0])
        first, last = self._seen, self._seen + block.shape[1]
        if block.shape[0] != self._stop - self._start or last > self._setting.n_items:
            raise InputError(
                f"a block of shape {block.shape} does not continue {self._stop - self._start} cases at item {first} of "
                f"{self._setting.n_items}"
            )
        unusable = np.isnan(block).any(axis=1)
        unusable[self._row[np.isnan(self._score)]] = True
        if unusable.any():
            who = self._setting.who(self._start + int(unusable.argmax()))
            raise InputError(f"NaN among the scores of items {first}..{last - 1} or of the targets, first in {who}")
        absent = self._setting.absent
        block[:, absent[(absent >= first) & (absent < last)] - first] = -np.inf
        row, item = self._masked
        here = (item >= first) & (item < last)
        block[row[here], item[here] - first] = -np.inf
        same = block[self._row] == self._score[:, None]
        inside = np.flatnonzero((self._target >= first) & (self._target < last))
        same[inside, self._target[inside] - first] = False
        self._greater += (block[self._row] > self._score[:, None]).sum(axis=1)
        self._equal += same.sum(axis=1)
        self._merge(block, first)
        self._seen = last

    def _merge(self, block: np.ndarray, first: int) -> None:
        best = top_items(block, self._setting.list_length)
        value = np.where(best >= 0, np.take_along_axis(block, np.maximum(best, 0), axis=1), -np.inf)
        values = np.concatenate([self._values, value], axis=1)
        items = np.concatenate([self._lists, np.where(best >= 0, best + first, NO_ITEM)], axis=1)
        # Stable: among equals the earlier block, hence the lower item, stays first.
        order = np.argsort(-values, axis=1, kind="stable")[:, : self._setting.list_length]
        self._values, self._lists = np.take_along_axis(values, order, 1), np.take_along_axis(items, order, 1)

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """greater (T_b,), equal (T_b,) and lists (B, L), for `evaluate_counts`.

        Raises:
            InputError: the blocks did not cover the catalogue.
        """
        if self._seen != self._setting.n_items:
            raise InputError(f"only {self._seen} of {self._setting.n_items} items were scored")
        return self._greater, self._equal, self._lists
