"""What every form of score input shares: the cases, what is masked, what counts as popular, how a table is finished.

Source: recsys_evaluation 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from recollect.data.examples import Cases, History, Part, held_out_cases
from recollect.data.splits import history_bounds, leak_check, tied_target_share
from recollect.errors import ConfigError, InputError
from recollect.eval.case_table import CaseTable, next_item_metrics
from recollect.eval.metrics import TIES, Tie
from recollect.eval.multi_relevance import several_relevant_metrics
from recollect.eval.protocol import protocol_block
from recollect.types import Dataset, Split

Mask = Literal["history", "none", "train"]
MASKS: tuple[Mask, ...] = ("history", "none", "train")
KS = (1, 5, 10, 20)


@dataclass(frozen=True)
class Setting:
    """The cases of one evaluation.

    target, target_case: (T,) distinct target items and the case each belongs to, cases ascending; next-item cases have
    one each.  mask_start, mask_end: (C,) rows of the log whose items are masked.  absent: items without an event, which
    are no candidates.  rows: (N,) bool, the training rows behind `popularity` (n_items,).
    """

    dataset: Dataset
    split: Split
    cases: Cases
    mask: Mask
    mask_start: np.ndarray
    mask_end: np.ndarray
    ks: tuple[int, ...]
    tie: Tie
    list_length: int
    rows: np.ndarray
    popularity: np.ndarray
    absent: np.ndarray
    target: np.ndarray
    target_case: np.ndarray

    @property
    def n_items(self) -> int:
        return self.dataset.n_items

    @property
    def is_next_item(self) -> bool:
        """Every case has exactly one target."""
        return len(self.target) == len(self.cases) and bool((self.cases.last - self.cases.first == 1).all())

    def masked(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(row, item) pairs (M,) that may not be recommended to cases start..stop-1, rows counted from `start`.

        A case's targets are never among them, though they may recur in its history.
        """
        begin, length = self.mask_start[start:stop], (self.mask_end - self.mask_start)[start:stop]
        row = np.repeat(np.arange(len(length)), length)
        within = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
        item = self.cases.item[np.repeat(begin, length) + within]
        if not len(row):
            return row, item
        low, high = np.searchsorted(self.target_case, [start, stop])
        own = (self.target_case[low:high] - start) * self.n_items + self.target[low:high]
        free = (
            ~np.isin(row * self.n_items + item, own) if not self.is_next_item else item != self.target[start:stop][row]
        )
        return row[free], item[free]

    def targets_of(self, start: int, stop: int) -> slice:
        """Where the targets of cases start..stop-1 stand in `target`."""
        low, high = np.searchsorted(self.target_case, [start, stop])
        return slice(int(low), int(high))

    def who(self, case: int) -> str:
        """A case as an error names it."""
        return f"case {case} (user {self.dataset.users.user_ids[self.cases.user[case]]!r})"

    def table(
        self,
        model: str,
        lists: np.ndarray,
        greater: np.ndarray,
        equal: np.ndarray,
        *,
        listed: np.ndarray | None = None,
        input_form: Literal["dense", "lists", "counts"] = "dense",
        fill: str | None = None,
        seed: int | None = None,
        warnings: tuple[str, ...] = (),
        invalid_rate: float | None = None,
        duplicate_rate: float | None = None,
    ) -> CaseTable:
        """The table of a model from its lists (C, L) and counts (T,), with metrics, protocol and leak check."""
        if self.is_next_item:
            metrics = next_item_metrics(greater, equal, self.ks, listed)
        else:
            metrics = several_relevant_metrics(
                self.target_case, greater, equal, self.ks, n_cases=len(self.cases), listed=listed
            )
        candidate = np.ones(self.n_items, dtype=bool)
        candidate[self.absent] = False
        protocol = protocol_block(
            self.dataset,
            self.split,
            part=self.cases.part,
            history=self.cases.history,
            mask=self.mask,
            tie=self.tie,
            ks=self.ks,
            list_length=self.list_length,
            n_cases=len(self.cases),
            n_candidates=int(candidate.sum()),
            rows=self.rows,
            input_form=input_form,
            fill=fill,
            seeds=() if seed is None else (seed,),
        )
        leak = tied = None
        if self.cases.part == "test":
            if self.dataset.clock == "unix":
                tied = tied_target_share(self.dataset, self.split)
            leak = leak_check(
                self.dataset, self.split, trained=self.rows, recommended=lists if lists.shape[1] else None
            )
        return CaseTable(
            model=model,
            user=self.cases.user,
            metrics=metrics,
            lists=lists,
            greater=greater,
            equal=equal,
            target_case=self.target_case,
            popularity=self.popularity,
            candidate=candidate,
            protocol=protocol,
            leak=leak,
            tied_target_share=tied,
            warnings=warnings,
            invalid_rate=invalid_rate,
            duplicate_rate=duplicate_rate,
        )


def evaluation_setting(
    dataset: Dataset,
    split: Split,
    *,
    part: Part = "test",
    history: History = "train+val",
    mask: Mask = "history",
    ks: Sequence[int] = KS,
    tie: Tie = "expectation",
    list_length: int | None = None,
    rows: np.ndarray | None = None,
) -> Setting:
    """Check the options and lay out the cases.

    Args:
        mask: "history" masks the items the model is shown, "train" the user's training items only, "none" nothing.
        ks: cut-offs, each at least 1.
        list_length: of the recommended lists; default the largest cut-off.
        rows: (N,) bool, the rows the model was fitted on (popularity, leak check); default `split.train`.

    Raises:
        ConfigError: an option is illegal.
        InputError: there is no case, or `rows` has another length than the log.
    """
    if mask not in MASKS:
        raise ConfigError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
    if tie not in TIES:
        raise ConfigError(f"tie must be one of {', '.join(TIES)}, got {tie!r}")
    ks = tuple(sorted({int(k) for k in ks}))
    if not ks or ks[0] < 1:
        raise ConfigError(f"cut-offs must be whole numbers of at least 1, got {ks!r}")
    if list_length is not None and list_length < 1:
        raise ConfigError(f"list_length must be at least 1, got {list_length!r}")
    cases = held_out_cases(dataset, split, part, history)
    if not len(cases):
        raise InputError(
            f"{dataset.name!r} has no {part} case under {split.rule}: every user's history is too short, or nothing "
            "happened after the cut; use a longer log or another split"
        )
    log = dataset.interactions
    rows = split.train if rows is None else np.asarray(rows)
    if rows.shape != (len(log),) or rows.dtype != bool:
        raise InputError(f"rows must be a boolean mask over {len(log)} interactions, got {rows.dtype} {rows.shape}")
    if mask == "none":
        mask_start = mask_end = np.zeros(len(cases), dtype=np.int64)
    elif mask == "train":
        mask_start, mask_end = history_bounds(dataset, split, part, "train")
    else:
        mask_start, mask_end = cases.start, cases.end
    count = cases.last - cases.first
    case = np.repeat(np.arange(len(cases)), count)
    within = np.arange(len(case)) - np.repeat(np.cumsum(count) - count, count)
    # An item that comes twice among a case's targets is relevant once.
    pair = np.unique(case * dataset.n_items + cases.item[np.repeat(cases.first, count) + within])
    target_case, target = np.divmod(pair, dataset.n_items)
    return Setting(
        dataset=dataset,
        split=split,
        cases=cases,
        mask=mask,
        mask_start=mask_start,
        mask_end=mask_end,
        ks=ks,
        tie=tie,
        list_length=max(ks) if list_length is None else int(list_length),
        rows=rows,
        popularity=np.bincount(log.item[rows], minlength=dataset.n_items),
        absent=np.flatnonzero(np.bincount(log.item, minlength=dataset.n_items) == 0),
        target=target,
        target_case=target_case,
    )
