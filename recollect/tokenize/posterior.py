"""Uses of the posterior over codes: alternative IDs, soft click features, items to look at again.

All functions read an `Encoding`; the posterior of a level is given the emitted codes of the levels above. In hundreds
of dimensions posteriors are nearly one-hot, so alternatives may carry next to no probability [measured]. Source of
every use: our design.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recollect.errors import InputError
from recollect.tokenize.protocol import Encoding

REVIEW_BELOW = 0.5
"""Level-0 confidence under which a person should look at an item."""

_MOST_TUPLES = 1 << 16


@dataclass(frozen=True)
class Alternatives:
    """codes: (N, count, L) int32, the likeliest first.  probability: (N, count) float64, the product of the levels'."""

    codes: np.ndarray
    probability: np.ndarray


def _top_m(encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    if encoding.alternatives is None or encoding.probability is None:
        raise InputError(
            "the encoding has no posterior of alternatives; encode with top_m above 1 and a method that has one "
            "(the rq-gmm family)"
        )
    return encoding.alternatives, encoding.probability.astype(np.float64)


def alternative_ids(encoding: Encoding, count: int) -> Alternatives:
    """The `count` likeliest tuples of each item over its top-m codes, ranked by the product of the levels' posteriors.

    The levels below a changed digit are not coded anew, so this is a way to vary training input, never a target of
    evaluation.

    Raises:
        InputError: no posterior in `encoding`; count outside 1..m^L; more than 65,536 tuples per item.
    """
    codes, probability = _top_m(encoding)
    n, depth, m = codes.shape
    if m**depth > _MOST_TUPLES:
        raise InputError(f"{m} codes on {depth} levels are {m**depth} tuples, more than {_MOST_TUPLES}; lower top_m")
    if not 1 <= count <= m**depth:
        raise InputError(f"count must be between 1 and {m**depth} ({m} codes on {depth} levels), got {count!r}")
    grid = np.indices((m,) * depth).reshape(depth, -1)  # (L, T)
    joint = np.ones((n, grid.shape[1]))
    for level in range(depth):
        joint *= probability[:, level, grid[level]]
    best = np.argsort(-joint, axis=1, kind="stable")[:, :count]  # (N, count)
    chosen = np.stack(
        [np.take_along_axis(codes[:, level], grid[level][best], axis=1) for level in range(depth)], axis=2
    )
    return Alternatives(chosen.astype(np.int32), np.take_along_axis(joint, best, axis=1))


def sample_ids(encoding: Encoding, generator: np.random.Generator) -> np.ndarray:
    """(N, L) int32 tuples with every digit drawn from its level's top-m codes by posterior; for training only.

    Raises:
        InputError: no posterior in `encoding`.
    """
    codes, probability = _top_m(encoding)
    steps = probability.cumsum(axis=2)
    drawn = generator.random(codes.shape[:2])[:, :, None] * steps[:, :, -1:]
    place = np.minimum((steps <= drawn).sum(axis=2), codes.shape[2] - 1)
    return np.take_along_axis(codes, place[:, :, None], axis=2)[:, :, 0].astype(np.int32)


def soft_features(encoding: Encoding, tables: Sequence[np.ndarray]) -> np.ndarray:
    """(N, E_0 + … + E_{L-1}) float32: per level sum_k gamma_k E[k] over the top-m codes, one after the other.

    Args:
        encoding: with alternatives and their probability; gamma is not scaled up to sum to 1.
        tables: one embedding table (K_l, E_l) per level.

    Raises:
        InputError: no posterior in `encoding`; another number of tables than levels; a table with too few rows.
    """
    codes, probability = _top_m(encoding)
    if len(tables) != codes.shape[1]:
        raise InputError(f"{len(tables)} tables for {codes.shape[1]} levels; give one table per level")
    parts = []
    for level, table in enumerate(tables):
        largest = int(codes[:, level].max(initial=0))
        if table.ndim != 2 or len(table) <= largest:
            raise InputError(f"the table of level {level} is {table.shape} where codes reach {largest}")
        parts.append(np.einsum("nm,nme->ne", probability[:, level], table[codes[:, level]]))
    return np.concatenate(parts, axis=1).astype(np.float32)


def review_flags(encoding: Encoding, below: float = REVIEW_BELOW) -> np.ndarray:
    """(N,) bool: items whose level-0 code has a posterior below `below`.

    Raises:
        InputError: no confidence in `encoding`; `below` outside 0..1.
    """
    if not 0 <= below <= 1:
        raise InputError(f"below must be a probability, got {below!r}")
    return _confidence(encoding)[:, 0] < below


def items_to_encode_again(before: Encoding, after: Encoding, drop: float = 0.1) -> np.ndarray:
    """(N,) bool: items whose confidence fell by more than `drop` at some level under a refitted model.

    Args:
        before: of the items when they got their codes.
        after: of the same items under the new model.
        drop: probability in 0..1.

    Raises:
        InputError: an encoding without confidence; different shapes; `drop` outside 0..1.
    """
    if not 0 <= drop <= 1:
        raise InputError(f"drop must be a probability, got {drop!r}")
    old, new = _confidence(before), _confidence(after)
    if old.shape != new.shape:
        raise InputError(f"encodings of the same items are compared, got confidences {old.shape} and {new.shape}")
    return (old - new > drop).any(axis=1)


def _confidence(encoding: Encoding) -> np.ndarray:
    if encoding.confidence is None:
        raise InputError(
            "the encoding has no confidence; encode with return_posterior and a method that has a posterior "
            "(the rq-gmm family)"
        )
    return encoding.confidence
