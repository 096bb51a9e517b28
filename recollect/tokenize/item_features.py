"""Semantic IDs as categorical fields of a click model: a code per level, and prefixes of codes.

An index is a function of the item's codes and of the sizes of the codebooks above them. It does not depend on which
other items there are, so a trained embedding table keeps its meaning for a part of the catalogue and after `extend`.

The index of a level is the code. The index of a prefix (c_0, …, c_l) is its mixed-radix number
c_0 + c_1 K_0 + c_2 K_0 K_1 + …; with the first digit as the least significant one, a last level that grows (a collision
digit) renumbers nothing. Numbers of `MOST_ROWS` and more are hashed into the `MOST_ROWS` rows: of P prefixes in use one
then shares its row with another with a probability of about P / 2^20, and the two learn one vector, as in every hashed
feature. Fields of levels and shorter prefixes still tell such items apart.

Source: semantic_ids 2.4; the numbering is ours.
Not covered: pooling over a user's history; soft features (`posterior.soft_features`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from recollect.errors import InputError
from recollect.tokenize.suffix import mixed
from recollect.types import SemanticIDs

MOST_ROWS = 1 << 20
"""Embedding rows of one prefix field at most."""

Fields = Literal["levels", "prefixes", "both"]


@dataclass(frozen=True)
class CategoricalFields:
    """F fields of N items.

    names: `level_0` … and `prefix_1` (one code) …  indices: (N, F) int64, field f in 0..sizes[f]-1.
    sizes: rows the embedding table of each field needs; that of a last level which grows is longer by new rows then.
    """

    names: tuple[str, ...]
    indices: np.ndarray
    sizes: tuple[int, ...]


def ctr_fields(ids: SemanticIDs, fields: Fields = "both", *, levels: int | None = None) -> CategoricalFields:
    """The items' semantic IDs as fields of a click model; see the module's text.

    Args:
        ids: of a catalogue, of a part of it, or of new items.
        fields: "levels" = one per level; "prefixes" = (c_0), (c_0, c_1), …; "both" = the levels, then the prefixes of
            two codes and more.
        levels: how many leading levels are read; default all. Leave out a collision digit: the rank of an item among
            those with equal codes says nothing of the item, and keeps click models from sharing what they learn.

    Raises:
        InputError: levels outside 1..L; an item without a digit in one of them; other fields than these.
    """
    if fields not in get_args(Fields):
        raise InputError(f"fields must be one of {', '.join(get_args(Fields))}, got {fields!r}")
    depth = ids.n_levels if levels is None else levels
    if not 1 <= depth <= ids.n_levels:
        raise InputError(f"levels must be between 1 and {ids.n_levels}, got {levels!r}")
    codes, sizes = ids.codes[:, :depth], ids.codebook_sizes[:depth]
    if (codes < 0).any():
        row, level = (int(place[0]) for place in np.nonzero(codes < 0))
        raise InputError(
            f"item {ids.item_ids[row]!r} has no digit at level {level}: IDs of different lengths make no field of it; "
            "read fewer levels or resolve collisions with another strategy"
        )
    by_level = [(f"level_{level}", codes[:, level].astype(np.int64), size) for level, size in enumerate(sizes)]
    by_prefix = [
        (f"prefix_{length}", prefix_rows(codes[:, :length], sizes[:length]), min(math.prod(sizes[:length]), MOST_ROWS))
        for length in range(1, depth + 1)
    ]
    chosen = {"levels": by_level, "prefixes": by_prefix, "both": by_level + by_prefix[1:]}[fields]
    names, columns, tables = zip(*chosen, strict=True)
    return CategoricalFields(names, np.stack(columns, axis=1), tables)


def prefix_rows(codes: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """(N,) int64 rows, below `MOST_ROWS`, of prefixes (N, l) int of codebooks (K_0, …, K_{l-1})."""
    number = np.zeros(len(codes), dtype=np.int64)
    state = np.zeros(len(codes), dtype=np.uint64)
    place = 1
    for level, size in enumerate(sizes):
        number += place * codes[:, level].astype(np.int64)
        state = mixed(state ^ (codes[:, level].astype(np.uint64) + np.uint64(1)))
        place = min(place * size, MOST_ROWS)  # higher places hash every digit but 0, however high they are
    return np.where(number < MOST_ROWS, number, (state % np.uint64(MOST_ROWS)).astype(np.int64))
