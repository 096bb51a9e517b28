"""Ranks of the true item under a model that was not fitted on that sample (K folds over users).

Both models of a distillation have been fitted on the very samples whose ranks set the weights, so the one that
memorises more is trusted more. Cross-fitting repairs that (spec 4.2, 7.16; our design, not the paper's).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from recollect.distill.samples import Samples
from recollect.distill.weights import true_item_rank
from recollect.errors import ConfigError, InputError
from recollect.recommenders.protocol import Recommender
from recollect.rng import stream
from recollect.types import Dataset

Model = TypeVar("Model")


def user_folds(user: np.ndarray, n_folds: int = 5, seed: int = 0) -> np.ndarray:
    """Fold of each sample; all samples of a user share one, and folds hold equally many users (within one).

    Args:
        user: (M,) int64.
        n_folds: K >= 2, at most the number of users.

    Returns:
        (M,) int64 in 0..n_folds-1.

    Raises:
        ConfigError: n_folds is out of range.
    """
    users, own = np.unique(user, return_inverse=True)
    if not 2 <= n_folds <= len(users):
        raise ConfigError(f"n_folds must be between 2 and the {len(users)} users, got {n_folds!r}")
    order = stream(seed, "distill", "folds").permutation(len(users))
    fold = np.empty(len(users), dtype=np.int64)
    fold[order] = np.arange(len(users)) % n_folds
    return fold[own]


def crossfit_ranks(
    fold: np.ndarray,
    fit: Callable[[int, np.ndarray], Model],
    rank: Callable[[Model, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Rank of each sample under the model of its fold, which was fitted on all other folds.

    Args:
        fold: (M,) int64, see `user_folds`.
        fit: given a fold's number and the numbers (m,) of the samples outside it, a model fitted on those alone.
        rank: given such a model and sample numbers (b,), returns the 1-based ranks (b,) of their true items.

    Returns:
        (M,) float32 ranks.

    Raises:
        InputError: `rank` gives other than one number, at least 1, per sample.
    """
    ranks = np.zeros(len(fold), dtype=np.float32)
    for number in np.unique(fold).tolist():
        held_out = np.flatnonzero(fold == number)
        found = np.asarray(rank(fit(number, np.flatnonzero(fold != number)), held_out))
        if found.shape != held_out.shape or not (found >= 1).all():
            raise InputError(f"fold {number}: {len(held_out)} ranks >= 1 were expected, got shape {found.shape}")
        ranks[held_out] = found
    return ranks


def rows_without(dataset: Dataset, rows: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """(N,) bool: the training rows of everyone but some users, to fit a fold's recommender on.

    Args:
        dataset: the log.
        rows: (N,) bool, all training rows.
        held_out: user numbers left out.
    """
    keep = np.ones(dataset.n_users, dtype=bool)
    keep[held_out] = False
    return rows & keep[dataset.interactions.user]


def recommender_ranks(model: Recommender, samples: Samples, index: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """1-based ranks (m,) float32 of the true items of some samples under a fitted recommender, nothing masked."""
    target = samples.target
    parts = []
    for begin in range(0, len(index), batch_size):
        batch = index[begin : begin + batch_size]
        logits = torch.from_numpy(np.asarray(model.score(samples.histories(batch)), dtype=np.float32))
        parts.append(true_item_rank(logits, torch.from_numpy(target[batch])).numpy())
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
