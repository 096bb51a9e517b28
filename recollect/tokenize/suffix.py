"""Digits that tell items apart without the codebooks: the rank inside a group, or a hash of attributes.

`suffix` (TIGER, GRID): one more digit, the rank inside the group that shares a tuple, 0 when unique.
`variable_suffix` (MiniOneRec): the extra digit only for items that share a tuple [paper: code].
`hash_last` (GR4AD): the last level is a hash of business attributes instead of a residual code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from recollect.errors import InputError
from recollect.tokenize.groups import rank_in_group, sizes_of, tuple_ids

NO_DIGIT = -1
"""Stands where a tuple of variable length has ended."""

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # SplitMix64's finaliser


def suffix_digits(
    codes: np.ndarray, rank: np.ndarray, existing: np.ndarray, existing_digits: np.ndarray, *, is_variable: bool
) -> np.ndarray:
    """(N,) int32 extra digits of codes (N, L): the place in the group, `NO_DIGIT` for nothing to tell apart.

    Where `existing` (M, L) items hold the tuple with digits (M,), new ones count on from the largest of theirs; an
    existing one without a digit keeps none, as its tuple must not change.
    """
    n = len(codes)
    ids = tuple_ids(np.concatenate([codes, existing]))
    next_digit = np.zeros(ids.max(initial=-1) + 1, dtype=np.int64)
    np.maximum.at(next_digit, ids[n:], existing_digits.astype(np.int64) + 1)
    digits = next_digit[ids[:n]] + rank_in_group(ids[:n], rank)
    if is_variable:
        digits[sizes_of(ids)[:n] == 1] = NO_DIGIT
    return digits.astype(np.int32)


def attribute_digits(attributes: Sequence[Sequence[object]], buckets: int) -> np.ndarray:
    """(N,) int32 in 0..buckets-1: one hash of all attributes of an item, the same on every machine.

    Args:
        attributes: columns of N values each (brand, price band, …); values are hashed as text.
        buckets: codes of the level.

    Raises:
        InputError: no column, or columns of different lengths.
    """
    lengths = sorted({len(column) for column in attributes})
    if len(lengths) != 1:
        raise InputError(f"hash_last needs columns of one length, got {lengths or 'no column'}")
    state = np.zeros(lengths[0], dtype=np.uint64)
    for column in attributes:
        values, inverse = np.unique(np.asarray([str(value) for value in column], dtype=object), return_inverse=True)
        hashes = [hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest() for value in values]
        state = mixed(state ^ np.frombuffer(b"".join(hashes), dtype="<u8")[inverse])
    return (state % np.uint64(buckets)).astype(np.int32)


def mixed(state: np.ndarray) -> np.ndarray:
    """(N,) uint64 in which every bit depends on all bits of `state` (N,) uint64, one to one."""
    state = (state ^ (state >> np.uint64(30))) * _MIX[0]
    state = (state ^ (state >> np.uint64(27))) * _MIX[1]
    return state ^ (state >> np.uint64(31))
