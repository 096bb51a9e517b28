"""Ranking metrics that are exact under ties, and two readings of a ranked list written in free text.

A case is a target among candidates. With g candidates scored above the target and e scored equal, the target's rank is
uniform on g+1..g+e+1 and every metric is its expectation, so a constant model gets exactly what chance gives.
Free-text lists: `strict_positions` is the measure; `lenient_positions` reproduces the habit of taking whichever
line resembles the target most, for comparison only.

Several relevant items per case: `multi_relevance`; coverage, popularity and calibration of lists: `list_metrics`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Literal

import numpy as np

from recollect.errors import ConfigError, InputError

if TYPE_CHECKING:
    from recollect.eval.slates import Slates

Tie = Literal["expectation", "optimistic", "pessimistic", "index"]
TIES: tuple[Tie, ...] = ("expectation", "optimistic", "pessimistic", "index")
HIT_RATE_CUTS = (1, 3, 5)
NDCG_CUTS = (5, 10)

_NUMBERING = re.compile(r"^\s*(?:\d+\s*[.):]|[-*•])\s+")


def rank_counts(scores: np.ndarray, target: np.ndarray, *, tie: Tie = "expectation") -> tuple[np.ndarray, np.ndarray]:
    """How many candidates beat the target and how many equal it.

    Args:
        scores: (C, S) higher is better; half-precision is compared as float32.
        target: (C,) position of the target in its row.
        tie: "expectation" keeps the equals apart; the others settle every tie, for parity with other libraries:
            target first, target last, or by position in the row.

    Returns:
        greater, equal: (C,) int64; `equal` excludes the target itself and is 0 unless tie is "expectation".

    Raises:
        InputError: a score is NaN, shapes disagree, or a target is outside its row.

    Source: recsys_evaluation 4.1 (our design; exact).
    """
    if tie not in TIES:
        raise ConfigError(f"tie must be one of {', '.join(TIES)}, got {tie!r}")
    scores = np.asarray(scores)
    target = np.asarray(target)
    if scores.dtype.itemsize < 4 or scores.dtype.kind != "f":
        scores = scores.astype(np.float32 if scores.dtype.kind == "f" else np.float64)
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise InputError(f"scores must be (C, S) and target (C,), got {scores.shape} and {target.shape}")
    if len(target) and (target.min() < 0 or target.max() >= scores.shape[1]):
        raise InputError(f"target must be between 0 and {scores.shape[1] - 1}, got {target.min()}..{target.max()}")
    unusable = np.isnan(scores)
    if unusable.any():
        unusable = unusable.any(axis=1)
        raise InputError(f"{int(unusable.sum())} cases have NaN scores, the first is case {int(unusable.argmax())}")
    return counts_around(scores, target, tie)


def counts_around(scores: np.ndarray, target: np.ndarray, tie: Tie) -> tuple[np.ndarray, np.ndarray]:
    """`rank_counts` of scores (C, S) known to be usable: float32 or float64 without NaN, targets inside."""
    of_target = scores[np.arange(len(target)), target][:, None]  # (C, 1)
    greater = _true_per_row(scores > of_target)
    same = scores == of_target  # (C, S), the target included
    equal = _true_per_row(same) - 1
    if tie == "expectation":
        return greater, equal
    settled = np.zeros_like(equal)
    if tie == "pessimistic":
        settled = equal
    elif tie == "index":
        settled = _true_per_row(same & (np.arange(scores.shape[1]) < target[:, None]))
    return greater + settled, np.zeros_like(equal)


def _true_per_row(mask: np.ndarray) -> np.ndarray:
    """(C,) int64; one call per row is several times faster than `mask.sum(axis=1)`, which widens every element."""
    return np.fromiter(map(np.count_nonzero, mask), dtype=np.int64, count=len(mask))


def _expected(gain: np.ndarray, greater: np.ndarray, equal: np.ndarray, k: int | None) -> np.ndarray:
    """Expectation over the tied ranks of a gain whose prefix sums are `gain` (0 first)."""
    limit = len(gain) - 1 if k is None else min(k, len(gain) - 1)
    low = np.minimum(greater, limit)
    high = np.minimum(greater + equal + 1, limit)
    return (gain[high] - gain[low]) / (equal + 1)


def _prefix_sums(greater: np.ndarray, equal: np.ndarray, k: int | None, kind: Literal["hit", "dcg", "reciprocal"]):
    if k is not None and k < 1:
        raise ConfigError(f"a cut-off must be at least 1, got {k!r}")
    deepest = int(np.max(greater + equal, initial=0)) + 1
    rank = np.arange(1, (deepest if k is None else min(k, deepest)) + 1, dtype=np.float64)
    gain = {"hit": np.ones_like(rank), "dcg": 1.0 / np.log2(rank + 1.0), "reciprocal": 1.0 / rank}[kind]
    return np.concatenate([[0.0], np.cumsum(gain)])


def hit_rate(greater: np.ndarray, equal: np.ndarray, k: int) -> np.ndarray:
    """(C,) probability that the target is among the first k."""
    return _expected(_prefix_sums(greater, equal, k, "hit"), greater, equal, k)


def ndcg(greater: np.ndarray, equal: np.ndarray, k: int) -> np.ndarray:
    """(C,) expected 1/log2(rank+1) within the first k: NDCG@k for one relevant item."""
    return _expected(_prefix_sums(greater, equal, k, "dcg"), greater, equal, k)


def mrr(greater: np.ndarray, equal: np.ndarray, k: int | None = None) -> np.ndarray:
    """(C,) expected 1/rank, 0 beyond k; k None never cuts."""
    return _expected(_prefix_sums(greater, equal, k, "reciprocal"), greater, equal, k)


def ranking_metrics(greater: np.ndarray, equal: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of every ranking table, {metric: (C,)}, from the counts of `rank_counts`."""
    table = {"ranking/mrr": mrr(greater, equal)}
    table |= {f"ranking/ndcg@{k}": ndcg(greater, equal, k) for k in NDCG_CUTS}
    table |= {f"ranking/hr@{k}": hit_rate(greater, equal, k) for k in HIT_RATE_CUTS}
    return table


def ranking_table(scores: np.ndarray, slates: Slates, *, tie: Tie = "expectation") -> dict[str, np.ndarray]:
    """One value per case and metric: {"ranking/mrr": (C,), "ranking/ndcg@10": (C,), …}.

    Args:
        scores: (C, S) of `slates.candidates`.

    Raises:
        InputError: `scores` has another shape than the slates, or holds a NaN.
    """
    if np.shape(scores) != slates.candidates.shape:
        raise InputError(f"scores are {np.shape(scores)} where the slates are {slates.candidates.shape}")
    return ranking_metrics(*rank_counts(scores, slates.target, tie=tie))


def chance(size: int) -> dict[str, float]:
    """What a uniform ranker of `size` candidates gets, in closed form; at 10: MRR .2929, NDCG@10 .4544."""
    none, all_others = np.zeros(1, dtype=np.int64), np.full(1, size - 1)
    return {name: float(value[0]) for name, value in ranking_metrics(none, all_others).items()}


def normalised_title(line: str) -> str:
    """A line or title as compared: leading numbering, outer quotes and case removed, spaces collapsed."""
    text = _NUMBERING.sub("", line).strip().strip("\"'“”").strip()
    return " ".join(text.split()).casefold()


def strict_positions(lines: Sequence[str], titles: Sequence[str], generator: np.random.Generator) -> np.ndarray:
    """Where a free-text ranked list puts each candidate; only the candidate's own title counts.

    A line that names no candidate, or one named before, keeps its place and hits nothing. Candidates that no
    line names follow in an order drawn from `generator`.

    Returns:
        (S,) int64 distinct 1-based positions, so that `greater = position - 1`, `equal = 0`.
    """
    waiting: dict[str, list[int]] = {}
    for index, title in enumerate(titles):
        waiting.setdefault(normalised_title(title), []).append(index)
    position = np.zeros(len(titles), dtype=np.int64)
    for place, line in enumerate(lines, start=1):
        left = waiting.get(normalised_title(line))
        if left:
            position[left.pop(0)] = place
    missing = np.flatnonzero(position == 0)
    position[generator.permutation(missing)] = len(lines) + 1 + np.arange(len(missing))
    return position


def invalid_share(lines: Sequence[str], titles: Sequence[str]) -> float:
    """Share of lines that name no candidate; 0 for an empty list."""
    known = {normalised_title(title) for title in titles}
    return sum(normalised_title(line) not in known for line in lines) / max(len(lines), 1)


def lenient_positions(lines: Sequence[str], target_title: str) -> np.ndarray:
    """1-based positions of all lines most similar to the target, whether or not any of them names it.

    Similarity is the edit ratio of `difflib` on normalised text. Several equally similar lines are several hits, and
    an invented title can hit: this flatters the list and exists only to compare with published numbers.
    No lines give no position; score such an output as the strict reading does.
    """
    wanted = normalised_title(target_title)
    ratios = np.array([SequenceMatcher(None, normalised_title(line), wanted).ratio() for line in lines])
    return np.flatnonzero(ratios == ratios.max()) + 1 if len(ratios) else np.zeros(0, dtype=np.int64)


def list_metrics(
    lines: Sequence[str], titles: Sequence[str], target: int, generator: np.random.Generator
) -> dict[str, float]:
    """Strict and lenient metrics of one free-text list.

    Returns:
        {"ranking/…": strict value, "ranking/…~lenient": lenient value, "ranking/invalid_rate": share}.
        For every metric strict <= lenient; lenient can exceed 1, because ties count as several hits.
    """
    strict = strict_positions(lines, titles, generator)[target]
    lenient = lenient_positions(lines, titles[target])
    if not len(lenient):
        lenient = np.array([strict])
    zero = np.zeros(len(lenient), dtype=np.int64)
    row = {name: float(value[0]) for name, value in ranking_metrics(np.array([strict - 1]), zero[:1]).items()}
    loose = {f"{name}~lenient": float(value.sum()) for name, value in ranking_metrics(lenient - 1, zero).items()}
    return {**row, **loose, "ranking/invalid_rate": invalid_share(lines, titles)}
