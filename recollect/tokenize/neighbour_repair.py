"""Neighbour repair (PSID/Latte): colliding items move to the closest tuple nobody has, near their own.

For every item after the first of its group, the Cartesian product of the m nearest codes of each level is searched
for the closest unused tuple. Closeness is the squared error of the decoded tuple; the nearest codes of a level are
those the tokenizer ranks best, given the emitted codes of the levels above.

Source: the official code [paper: code].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recollect.errors import InputError
from recollect.tokenize.digit_costs import ReconstructionCosts
from recollect.tokenize.groups import rank_in_group, tuple_ids

MAX_TUPLES = 1 << 20
"""Tuples that may be tried for one item."""

_DECODED_NUMBERS = 1 << 22


def searched_codes(neighbours: int, sizes: Sequence[int]) -> int:
    """How many codes of each level are combined: `neighbours`, or the smallest of the codebooks K_0..K_{L-1}.

    Raises:
        InputError: their tuples are more than `MAX_TUPLES`.
    """
    nearest = min(neighbours, *sizes)
    n_tuples = nearest ** len(sizes)
    if n_tuples > MAX_TUPLES:
        raise InputError(
            f"{nearest} neighbours on {len(sizes)} levels are {n_tuples} tuples per item, more than {MAX_TUPLES}; "
            "use fewer neighbours or the collision strategy zcr"
        )
    return nearest


def repaired_tuples(
    codes: np.ndarray,
    costs: ReconstructionCosts,
    embeddings: np.ndarray,
    rank: np.ndarray,
    existing: np.ndarray,
    *,
    neighbours: int,
) -> np.ndarray:
    """Codes (N, L) in which items that came second take the closest unused tuple, in canonical order.

    An item whose m^L tuples are all in use keeps its own.

    Raises:
        InputError: see `searched_codes`.
    """
    depth = codes.shape[1]
    nearest = searched_codes(neighbours, costs.sizes)
    n_tuples = nearest**depth
    codes = np.array(codes, dtype=np.int32, order="C")
    held = np.ascontiguousarray(existing, dtype=np.int32)
    ids = tuple_ids(np.concatenate([held, codes]))
    everyone = np.r_[np.full(len(held), -1), rank]  # existing items come first in their groups
    later = np.flatnonzero(rank_in_group(ids, everyone)[len(held) :] > 0)
    later = later[np.argsort(rank[later])]
    used = {row.tobytes() for row in held} | {row.tobytes() for row in codes}
    step = max(1, _DECODED_NUMBERS // (n_tuples * embeddings.shape[1]))
    for start in range(0, len(later), step):
        rows = later[start : start + step]
        tuples = _product(_nearest_codes(costs, embeddings[rows], nearest))  # (B, T, L)
        flat = tuples.reshape(-1, depth)
        error = costs.of_codes(np.repeat(rows, n_tuples), flat).reshape(len(rows), n_tuples)
        order = np.argsort(error, axis=1, kind="stable")
        for item, candidates, nearest_first in zip(rows, tuples, order, strict=True):
            for place in nearest_first.tolist():
                key = candidates[place].tobytes()
                if key not in used:
                    used.add(key)
                    codes[item] = candidates[place]
                    break
    return codes


def _nearest_codes(costs: ReconstructionCosts, embeddings: np.ndarray, m: int) -> np.ndarray:
    """(B, L, m) int32 codes of rows (B, D), best first."""
    encoding = costs.tokenizer.encode(np.asarray(embeddings), top_m=m)
    return encoding.codes[:, :, None] if encoding.alternatives is None else encoding.alternatives


def _product(choices: np.ndarray) -> np.ndarray:
    """(B, m^L, L) int32 all combinations of choices (B, L, m), the last level turning fastest."""
    depth, m = choices.shape[1:]
    grid = np.indices((m,) * depth).reshape(depth, -1)  # (L, T)
    return np.ascontiguousarray(np.stack([choices[:, level, grid[level]] for level in range(depth)], axis=-1))
