"""Exams of recommendation tasks: the whole catalogue is ranked for every test case, by a model or without one.

NDCG@10 with the items of the history taken off the ranking (never the target) is the primary metric; HR@10 and MRR, and
the first two without that mask, stand beside it, since a model that reads text likes to repeat what it read.  Ties
count in expectation.
The floors rank by counts over the very training rows a model gets, popularity and what followed the last item (a
first-order Markov chain), and by the cosine of item texts, which needs no training and which the model starts from;
the best of the three is a task's floor.  Beside it: the counts over all training rows where fewer are learnt.
Source: recsys_evaluation 3.4, 3.5, 4.1, 7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from recollect.continual.trace_floors import Floor
from recollect.eval.metrics import hit_rate, mrr, ndcg, rank_counts
from recollect.eval.topk import NO_ITEM, top_items
from recollect.recommenders.markov import transition_counts

if TYPE_CHECKING:
    from recollect.continual.domain_tasks import Case, DomainTask, TrainingRow

CUT = 10
SCALE = 20.0  # of the cosine between what a model asks for and an item
AROUND = 0.5  # weight of the history's vector beside the hidden state's
PRIMARY = f"ndcg@{CUT}"
LAST_ITEMS = 5  # history items that stand for the user in the comparison of texts
CASES_AT_A_TIME = 64
FLOORS = ("popularity", "Markov chain", "text similarity")

Scorer = Callable[[Sequence["Case"]], np.ndarray]
"""Scores (B, K) of a task's catalogue, higher is better, nothing masked."""


class Ranked(NamedTuple):
    """items: {metric: (C,) 0..1}.  lists: (C, CUT) int64 item numbers, best first, -1 where there are fewer."""

    items: dict[str, np.ndarray]
    lists: np.ndarray


def rank_cases(
    score: Scorer,
    cases: Sequence[Case],
    catalogue: np.ndarray,
    *,
    batch_size: int = CASES_AT_A_TIME,
    after_batch: Callable[[int], None] | None = None,
) -> Ranked:
    """Rank the catalogue for every case, in order.

    Args:
        score: of some cases; asked for cases of like length together, in an order that depends on the cases alone.
        catalogue: (K,) int64 ascending; holds every target and every item of a history.

    Raises:
        InputError: a score is NaN.
    """
    counts = {mask: np.zeros((2, len(cases)), dtype=np.int64) for mask in ("history", "none")}
    lists = np.full((len(cases), CUT), NO_ITEM, dtype=np.int64)
    order = sorted(range(len(cases)), key=lambda at: (-len(cases[at].history), cases[at].prompt_hash))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [cases[at] for at in chosen]
        scores = np.array(score(batch))
        target = np.searchsorted(catalogue, [case.target for case in batch])
        counts["none"][:, chosen] = rank_counts(scores, target)
        for row, case in enumerate(batch):
            seen = np.searchsorted(catalogue, case.history)
            scores[row, seen[seen != target[row]]] = -np.inf
        counts["history"][:, chosen] = rank_counts(scores, target)
        best = top_items(scores, CUT)
        lists[chosen] = np.where(best == NO_ITEM, NO_ITEM, catalogue[best])
        if after_batch is not None:
            after_batch(len(chosen))
    (greater, equal), (greater_all, equal_all) = counts["history"], counts["none"]
    items = {
        PRIMARY: ndcg(greater, equal, CUT),
        f"hr@{CUT}": hit_rate(greater, equal, CUT),
        "mrr": mrr(greater, equal),
        f"{PRIMARY}_unmasked": ndcg(greater_all, equal_all, CUT),
        f"hr@{CUT}_unmasked": hit_rate(greater_all, equal_all, CUT),
    }
    return Ranked(items, lists)


def popularity(rows: Sequence[TrainingRow], n_items: int, catalogue: np.ndarray) -> Scorer:
    """Scores an item by its training events."""
    events = np.concatenate([row.items[row.n_context :] for row in rows])
    counts = np.bincount(events, minlength=n_items)[catalogue].astype(np.float64)
    return lambda cases: np.tile(counts, (len(cases), 1))


def markov(rows: Sequence[TrainingRow], n_items: int, catalogue: np.ndarray) -> Scorer:
    """Scores an item by how often it was predicted right after the history's last item."""
    pairs = [row.items[row.first_target - 1 :] for row in rows]
    starts = np.cumsum([0, *map(len, pairs)])
    counts = transition_counts(np.concatenate(pairs), starts, n_items)
    return lambda cases: counts[[int(case.history[-1]) for case in cases]].toarray()[:, catalogue]


def text_similarity(vectors: np.ndarray, catalogue: np.ndarray) -> Scorer:
    """Scores an item by its cosine to the mean of the history's last items.

    Args:
        vectors: (N, D) unit vectors of all items.
    """
    offered = vectors[catalogue]

    def score(cases: Sequence[Case]) -> np.ndarray:
        users = np.stack([vectors[case.history[-LAST_ITEMS:]].mean(axis=0) for case in cases])
        return users @ offered.T

    return score


def task_floor(task: DomainTask, vectors: np.ndarray) -> Floor:
    """What NDCG@10 a task's test cases give without a model.

    Args:
        vectors: (N, D) unit vectors of all items.
    """
    n_items = len(vectors)
    scorers = {
        "popularity": popularity(task.rows, n_items, task.catalogue),
        "Markov chain": markov(task.rows, n_items, task.catalogue),
        "text similarity": text_similarity(vectors, task.catalogue),
    }
    if len(task.rows) < len(task.all_rows):
        scorers["popularity, all training rows"] = popularity(task.all_rows, n_items, task.catalogue)
        scorers["Markov chain, all training rows"] = markov(task.all_rows, n_items, task.catalogue)
    values = {
        name: float(rank_cases(score, task.cases, task.catalogue).items[PRIMARY].mean())
        for name, score in scorers.items()
    }
    best = max(FLOORS, key=lambda name: values[name])
    return Floor(task.name, best, values.pop(best), values)
