"""Which items a prompted model is asked to rank: the first stage of a two-stage recommender (fairlrm 5).

`retrieval`: the top C of a conventional model, the realistic setting.  `mixed`: half of them, and as many niche items
drawn by seed, without which no debiasing could show.  `full`: every unseen item, for scorers that take them in chunks.
A target is never put in, except by `with_target`, whose metrics must be named `~inserted`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recollect.errors import ConfigError, InputError
from recollect.eval.topk import NO_ITEM, top_items
from recollect.rng import stream


def retrieval_candidates(scores: np.ndarray, histories: Sequence[np.ndarray], size: int) -> np.ndarray:
    """The top `size` unseen items of each user.

    Args:
        scores: (B, n_items) of a conventional model.
        histories: items (T,) of each user, which are left out.
        size: C.

    Returns:
        (B, C) int64 by score descending, equal scores by item index.

    Raises:
        InputError: a score is NaN, or a user has fewer than C unseen items.
    """
    if np.isnan(scores).any():
        raise InputError("the candidate generator gave NaN scores; fit it again")
    masked = scores.astype(np.float32, copy=True)
    for row, history in enumerate(histories):
        masked[row, history] = -np.inf
    candidates = top_items(masked, size)
    if (candidates == NO_ITEM).any():
        raise InputError(f"a user has fewer than {size} unseen items among {scores.shape[1]}; ask for fewer candidates")
    return candidates


def mixed_candidates(
    scores: np.ndarray,
    histories: Sequence[np.ndarray],
    size: int,
    is_popular: np.ndarray,
    *,
    keys: Sequence[str],
    seed: int,
    tail_share: float = 0.5,
) -> np.ndarray:
    """(B, C): the top of the generator, then round(C `tail_share`) unseen niche items drawn uniformly per user.

    The drawn items follow the retrieved ones, by the generator's score among themselves, so the row stays an order of
    preference with the generator's favourites first. `keys` (B,) name the users in the random streams.

    Raises:
        ConfigError: `tail_share` is not in 0..1.
        InputError: as `retrieval_candidates`, or too few niche items are unseen.
    """
    if not 0 <= tail_share <= 1:
        raise ConfigError(f"tail_share must be between 0 and 1, got {tail_share!r}")
    n_drawn = int(np.floor(size * tail_share + 0.5))
    if n_drawn == 0:
        return retrieval_candidates(scores, histories, size)
    kept = retrieval_candidates(scores, histories, size - n_drawn) if n_drawn < size else None
    result = np.empty((len(histories), size), dtype=np.int64)
    for row, history in enumerate(histories):
        free = ~is_popular
        free[history] = False
        if kept is not None:
            free[kept[row]] = False
        pool = np.flatnonzero(free)
        if len(pool) < n_drawn:
            raise InputError(
                f"user {keys[row]!r} has {len(pool)} unseen niche items, not {n_drawn}; lower --candidates"
            )
        drawn = stream(seed, "tail-candidates", keys[row]).choice(pool, size=n_drawn, replace=False)
        drawn = drawn[np.lexsort((drawn, -scores[row, drawn]))]
        result[row] = drawn if kept is None else np.r_[kept[row], drawn]
    return result


def full_candidates(scores: np.ndarray, histories: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Every unseen item of each user, by score descending, equal scores by item index."""
    rows = []
    for row, history in enumerate(histories):
        unseen = np.ones(scores.shape[1], dtype=bool)
        unseen[history] = False
        items = np.flatnonzero(unseen)
        rows.append(items[np.argsort(-scores[row, items], kind="stable")])
    return rows


def with_target(candidates: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The candidates (B, C) with the target (B,) in the last place where it was not retrieved."""
    inserted = candidates.copy()
    missing = ~(candidates == targets[:, None]).any(axis=1)
    inserted[missing, -1] = targets[missing]
    return inserted
