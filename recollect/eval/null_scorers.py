"""Scorers that understand nobody, and the audit that says when they nevertheless win.

Two kinds stand beside every agent. Those that should know nothing (random, popularity, anti-popularity, seen-first,
title-length, memory-length, candidate-position): if one of them differs from chance, the candidate lists or the agent's
prompts leak the answer, and `audit` says so. Those that know a little (tfidf-history, bm25-history, mf,
minilm-history): an agent worth its tokens beats them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recollect.errors import InputError
from recollect.eval.factorisation import implicit_factors
from recollect.eval.metrics import ranking_metrics, ranking_table
from recollect.eval.slates import Slates, training_mask
from recollect.eval.statistics import cluster_codes, clustered_standard_error
from recollect.eval.text_scores import (
    bm25_history,
    bm25_words,
    history_counts,
    item_texts,
    tfidf_history,
    tfidf_words,
    word_counts,
)
from recollect.rng import stream
from recollect.types import Dataset, Interactions

KNOW_NOTHING = (
    "random",
    "popularity",
    "anti-popularity",
    "seen-first",
    "title-length",
    "memory-length",
    "candidate-position",
)
AUDIT_THRESHOLD = 3.0


@dataclass(frozen=True)
class Finding:
    """A scorer that should know nothing and yet differs from chance; `z` counts standard errors."""

    scorer: str
    metric: str
    value: float
    chance: float
    standard_error: float
    z: float
    n_users: int

    @property
    def text(self) -> str:
        """The warning for the report."""
        return (
            f"null scorer {self.scorer!r} gets {self.metric} {self.value:.3f} where chance is {self.chance:.3f} "
            f"({self.z:+.1f} standard errors, {self.n_users} users): the candidate lists favour or give away the "
            "answer, so compare agents with this row, not with chance"
        )


def earlier_rows(interactions: Interactions, rows: np.ndarray) -> list[np.ndarray]:
    """Per case the same user's rows before it in log order (user, time, row), oldest first."""
    if len(interactions) and (np.diff(interactions.user) < 0).any():
        raise InputError("the log is not sorted by user; sort it by (user, time, row)")
    first = np.searchsorted(interactions.user, interactions.user[rows])
    return [np.arange(start, row) for start, row in zip(first.tolist(), np.asarray(rows).tolist(), strict=True)]


def _checked_histories(interactions: Interactions, slates: Slates, history_rows: Sequence[np.ndarray]) -> None:
    if len(history_rows) != len(slates):
        raise InputError(f"{len(history_rows)} histories were given for {len(slates)} cases")
    for case, (row, history) in enumerate(zip(slates.row.tolist(), history_rows, strict=True)):
        if len(history) and (max(history) >= row or (interactions.user[history] != slates.user[case]).any()):
            raise InputError(
                f"the history of case {case} (row {row}) holds a row that is not earlier or not its user's"
            )


def null_scores(
    slates: Slates,
    dataset: Dataset,
    history_rows: Sequence[np.ndarray] | None = None,
    *,
    train_rows: np.ndarray,
    seed: int,
    with_text: bool = False,
    memory_length: np.ndarray | None = None,
    item_vectors: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Scores of every null scorer, {name: (C, S) float64}, higher is better.

    Args:
        slates: the cases; none of their rows may be a training row.
        history_rows: per case the log rows the agents saw; None = all earlier rows of the user.
        train_rows: mask (N,) or positions; popularity, seen-ness and factors come from these rows alone.
        with_text: descriptions join title and categories in the text scorers.
        memory_length: (C, S) length of each candidate's memory as the agent read it; adds "memory-length".
        item_vectors: (n_items, D) unit rows of an embedder; adds "minilm-history" (cosine with the history's mean).

    Returns:
        random, popularity, anti-popularity, seen-first (never seen in training comes first), title-length (longer
        first), candidate-position (earlier first), tfidf-history, bm25-history, mf and those added. Ties stay ties.

    Raises:
        InputError: a case's own row is a training row, or a history holds a row that is not earlier.

    Source: agentcf_pp 6 (anchors) and 7, oracle 11.
    """
    log = dataset.interactions
    train = training_mask(train_rows, len(log))
    if train[slates.row].any():
        raise InputError(
            f"{int(train[slates.row].sum())} of {len(slates)} case rows are training rows; "
            "null scorers would count the answers: leave them out of train_rows"
        )
    if history_rows is None:
        history_rows = earlier_rows(log, slates.row)
    else:
        _checked_histories(log, slates, history_rows)
    candidates = slates.candidates
    popularity = np.bincount(log.item[train], minlength=dataset.n_items).astype(np.float64)[candidates]
    title_length = np.array([len(title) for title in dataset.catalog.titles], dtype=np.float64)
    histories = history_counts([log.item[rows] for rows in history_rows], dataset.n_items)
    texts = item_texts(dataset.catalog, with_text=with_text)
    of_user, of_item = implicit_factors(log.user[train], log.item[train], dataset.n_users, dataset.n_items, seed=seed)
    scores = {
        "random": np.stack(
            [
                stream(seed, "null-random", user, row).random(slates.size)
                for user, row in zip(slates.user.tolist(), slates.row.tolist(), strict=True)
            ]
        )
        if len(slates)
        else np.zeros(candidates.shape),
        "popularity": popularity,
        "anti-popularity": -popularity,
        "seen-first": (popularity == 0).astype(np.float64),
        "title-length": title_length[candidates],
        "candidate-position": np.broadcast_to(-np.arange(slates.size, dtype=np.float64), candidates.shape),
        "tfidf-history": tfidf_history(word_counts(texts, tfidf_words), histories, candidates),
        "bm25-history": bm25_history(word_counts(texts, bm25_words), histories, candidates),
        "mf": np.einsum("cf,csf->cs", of_user[slates.user], of_item[candidates]),
    }
    if memory_length is not None:
        scores["memory-length"] = np.asarray(memory_length, dtype=np.float64)
    if item_vectors is not None:
        mean = histories @ np.asarray(item_vectors, dtype=np.float64)
        norm = np.linalg.norm(mean, axis=1, keepdims=True)
        mean = mean / np.where(norm > 0, norm, 1.0)
        scores["minilm-history"] = np.einsum("cd,csd->cs", mean, np.asarray(item_vectors, dtype=np.float64)[candidates])
    return scores


def audit(
    scores_by_name: Mapping[str, np.ndarray],
    slates: Slates,
    *,
    metric: str = "ranking/mrr",
    threshold: float = AUDIT_THRESHOLD,
) -> list[Finding]:
    """Which scorers that should know nothing differ from chance by more than `threshold` standard errors.

    Args:
        scores_by_name: {name: (C, S)}; names outside `KNOW_NOTHING` are not judged.

    Returns:
        One finding per offender, largest |z| first. The standard error is clustered by user and no smaller than that
        of a uniform ranker on as many independent cases.
    """
    places = np.arange(slates.size)
    by_rank = ranking_metrics(places, np.zeros_like(places))[metric]  # the metric at each rank
    expected, spread = float(by_rank.mean()), float(by_rank.std())
    n_users = cluster_codes(slates.user)[1]
    findings = []
    for name in KNOW_NOTHING:
        if name not in scores_by_name or n_users < 2:
            continue
        values = ranking_table(scores_by_name[name], slates)[metric]
        gap = float(values.mean()) - expected
        if abs(gap) < 1e-12:
            continue
        # Ties can make a scorer vary less than chance does; a trivial gap is then no finding, hence the floor.
        error = max(clustered_standard_error(values, slates.user), spread / math.sqrt(len(slates)))
        z = gap / error
        if abs(z) > threshold:
            findings.append(Finding(name, metric, float(values.mean()), expected, error, z, n_users))
    return sorted(findings, key=lambda finding: -abs(finding.z))
