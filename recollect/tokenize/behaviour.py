"""Semantic IDs against what people did: do neighbours in a history share prefixes, and what a ranked ID is worth.

`prefix_alignment`: P(two items that follow each other in a user's sequence share their first l codes), beside the same
probability for two items drawn independently.
`item_level_gains`: hit and NDCG of the *item* where IDs are ranked and items collide. The target's group is in random
order, so its credit is shared (the collision-corrected formulas); equal to plain hit and NDCG without collisions.
Source: semantic_ids 7 [digest for the corrected formulas].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from recollect.errors import InputError
from recollect.tokenize.groups import tuple_ids

if TYPE_CHECKING:
    from recollect.types import Interactions


class Alignment(NamedTuple):
    """How often two items share a prefix.

    adjacent: of the pairs that follow each other in a user's sequence.  random: of two items drawn independently, each
    as likely as any other.  random_events: of the items of two events drawn independently, so popular items count more.
    """

    adjacent: float
    random: float
    random_events: float


def prefix_alignment(codes: np.ndarray, interactions: Interactions) -> list[Alignment]:
    """Agreement of prefixes of length 1..L with the order of consumption.

    Adjacent pairs are consecutive events of one user, repeats of an item included: they agree whatever the codes are,
    so compare tokenizers on one log only. The random levels are exact probabilities of draws with replacement.

    Args:
        codes: (n_items, L) int; row i is item number i.
        interactions: sorted by user and time.

    Raises:
        InputError: an item without codes, or no two events of one user.
    """
    item = interactions.item
    if len(item) and int(item.max()) >= len(codes):
        raise InputError(f"the log has item {int(item.max())}, but there are codes for {len(codes)} items only")
    pairs = np.flatnonzero(interactions.user[1:] == interactions.user[:-1])
    if not len(pairs):
        raise InputError("the log has no user with two events; alignment needs histories of two items or more")
    before, after = item[pairs], item[pairs + 1]
    popularity = np.bincount(item, minlength=len(codes)) / len(item)
    found = []
    for depth in range(1, codes.shape[1] + 1):
        prefix = tuple_ids(codes[:, :depth])
        found.append(
            Alignment(
                float((prefix[before] == prefix[after]).mean()),
                float(((np.bincount(prefix) / len(codes)) ** 2).sum()),
                float((np.bincount(prefix, weights=popularity) ** 2).sum()),
            )
        )
    return found


def item_level_gains(position: np.ndarray, group_size: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Expected Hit@k and NDCG@k (B,) float64 of a target that shares its ID with group_size - 1 other items.

    With p the rank (from 1, counted in items) at which the group begins, g its size and m = min(g, max(0, k - p + 1)):
    hit = m / g, NDCG = (1 / g) sum_{j < m} 1 / log2(p + j + 1).

    Args:
        position: (B,) p >= 1; 0 where the target's ID is not in the list.
        group_size: (B,) g >= 1.
        k: length of the list, in items.

    Raises:
        InputError: k < 1, a negative position or an empty group.
    """
    position, group_size = np.asarray(position, dtype=np.int64), np.asarray(group_size, dtype=np.int64)
    if k < 1 or (position < 0).any() or (group_size < 1).any():
        raise InputError("item-level gains need k >= 1, positions >= 0 and group sizes >= 1")
    counted = np.where(position > 0, np.minimum(group_size, np.maximum(0, k - position + 1)), 0)
    gains = np.r_[0.0, np.cumsum(1 / np.log2(np.arange(1, k + 1) + 1.0))]  # gains[r]: of ranks 1..r together
    first = np.minimum(np.maximum(position - 1, 0), k)
    return counted / group_size, (gains[np.minimum(first + counted, k)] - gains[first]) / group_size


def target_positions(ranked: np.ndarray, target: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
    """(B,) int64 ranks, counted in items from 1, at which each target's ID begins; 0 where it is not listed.

    Args:
        ranked: (B, R) int numbers of IDs, best first; -1 for an output that is no item's ID (it takes no place), an ID
            that stands twice counts where it stands first.
        target: (B,) number of the target's ID.
        group_sizes: (S,) items per ID.

    Raises:
        InputError: an ID outside 0..S-1.
    """
    ranked, target = np.asarray(ranked, dtype=np.int64), np.asarray(target, dtype=np.int64)
    if (ranked >= len(group_sizes)).any() or (target < 0).any() or (target >= len(group_sizes)).any():
        raise InputError(f"IDs are numbered 0..{len(group_sizes) - 1}; another number was ranked or is a target")
    order = np.argsort(ranked, axis=1, kind="stable")
    ascending = np.take_along_axis(ranked, order, axis=1)
    is_first = np.ones(ranked.shape, dtype=bool)
    np.put_along_axis(is_first[:, :], order[:, 1:], ascending[:, 1:] != ascending[:, :-1], axis=1)
    taken = np.where((ranked >= 0) & is_first, np.asarray(group_sizes)[np.maximum(ranked, 0)], 0)
    before = np.cumsum(taken, axis=1) - taken
    is_target = ranked == target[:, None]
    column = is_target.argmax(axis=1)
    found = before[np.arange(len(ranked)), column] + 1
    return np.where(is_target.any(axis=1), found, 0)
