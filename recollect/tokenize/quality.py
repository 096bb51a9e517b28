"""How good semantic IDs are, from the codes alone: collisions, use of the codes, balance of the prefixes.

n(s) = items with ID s; S = IDs in use; P_l = prefixes of length l in use; K_l = codes of level l. Every definition is
written out because the literature uses one word ("utilisation") for several. Levels count from 0, the coarsest.
Reconstruction, neighbours and behaviour: `fidelity` and `behaviour`.
Source: semantic_ids 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.errors import InputError
from recollect.tokenize.groups import tuple_ids
from recollect.types import SemanticIDs

if TYPE_CHECKING:
    from recollect.tokenize.protocol import Encoding, ItemTokenizer
    from recollect.types import Interactions


def group_sizes(codes: np.ndarray) -> np.ndarray:
    """(S,) int64: n(s) of every distinct row of `codes` (N, l), in lexicographic order."""
    return np.bincount(tuple_ids(codes))


def gini(frequencies: np.ndarray) -> float:
    """Gini of positive counts (M,): 2 sum_q q f_(q) / (M sum f) - (M + 1) / M with f ascending; 0 = all equal."""
    ascending = np.sort(np.asarray(frequencies, dtype=np.float64))
    m = len(ascending)
    return float(2 * (np.arange(1, m + 1) * ascending).sum() / (m * ascending.sum()) - (m + 1) / m)


def perplexity(codes: np.ndarray) -> float:
    """exp(entropy in nats) of the frequencies of codes (N,): as many equally frequent codes have that entropy."""
    counts = np.unique(codes, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(math.exp(-(shares * np.log(shares)).sum()))


@dataclass(frozen=True)
class CollisionCounts:
    """How many items share an ID.

    n_items N, n_ids |S|, n_unique |{s: n(s) = 1}|, n_shared_items sum of n(s) > 1, largest max n(s).
    """

    n_items: int
    n_ids: int
    n_unique: int
    n_shared_items: int
    largest: int

    @classmethod
    def of(cls, codes: np.ndarray) -> CollisionCounts:
        """Count the rows of `codes` (N, L)."""
        sizes = group_sizes(codes)
        is_shared = sizes > 1
        return cls(
            len(codes), len(sizes), int((~is_shared).sum()), int(sizes[is_shared].sum()), int(sizes.max(initial=0))
        )

    @property
    def unique_rate(self) -> float:
        """|S| / N."""
        return self.n_ids / self.n_items

    @property
    def collision_rate(self) -> float:
        """1 - |S| / N."""
        return 1 - self.unique_rate

    @property
    def items_in_collision(self) -> float:
        """Share of the items that share their ID with another."""
        return self.n_shared_items / self.n_items

    @property
    def independent_coding_ratio(self) -> float:
        """|{s: n(s) = 1}| / |S|."""
        return self.n_unique / self.n_ids


def code_metrics(codes: np.ndarray, codebook_sizes: Sequence[int]) -> dict[str, float]:
    """Everything the codes say about themselves.

    Keys: `unique_rate`, `collision_rate`, `items_in_collision`, `icr`, `max_group`, `tokens_per_item`; per level l
    `utilization/level_l` (used codes / K_l) and `perplexity/level_l` (perplexity / K_l); per prefix ending at level l
    `used_prefixes/level_l` (a count), `prefix_utilization/level_l` (|P_l| / prod K) and `prefix_gini/level_l` (of the
    items per used prefix; `prefix_gini` is that of full IDs).

    Args:
        codes: (N >= 1, L) int, -1 = no digit; a level's own figures are over the items that have one.
        codebook_sizes: K_0..K_{L-1}.

    Raises:
        InputError: no items, or another number of levels than codebooks.
    """
    if codes.ndim != 2 or not codes.size or codes.shape[1] != len(codebook_sizes):
        raise InputError(f"codes are {codes.shape} where there are {len(codebook_sizes)} codebooks")
    counts = CollisionCounts.of(codes)
    found = {
        "unique_rate": counts.unique_rate,
        "collision_rate": counts.collision_rate,
        "items_in_collision": counts.items_in_collision,
        "icr": counts.independent_coding_ratio,
        "max_group": float(counts.largest),
        "tokens_per_item": float((codes >= 0).sum() / len(codes)),
    }
    possible = 1.0
    for level, size in enumerate(codebook_sizes):
        present = codes[:, level][codes[:, level] >= 0]
        possible *= size
        if len(present):
            found[f"utilization/level_{level}"] = len(np.unique(present)) / size
            found[f"perplexity/level_{level}"] = perplexity(present) / size
        prefixes = group_sizes(codes[:, : level + 1])
        found[f"used_prefixes/level_{level}"] = float(len(prefixes))
        if possible:
            found[f"prefix_utilization/level_{level}"] = len(prefixes) / possible
        found[f"prefix_gini/level_{level}"] = gini(prefixes)
    found["prefix_gini"] = found[f"prefix_gini/level_{len(codebook_sizes) - 1}"]
    return found


def quality(
    ids: SemanticIDs,
    *,
    embeddings: np.ndarray | None = None,
    tokenizer: ItemTokenizer | None = None,
    encoding: Encoding | None = None,
    interactions: Interactions | None = None,
    decodable_levels: int | None = None,
    neighbour_queries: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """All metrics that the inputs allow, by the report's names.

    Beside `code_metrics`: with embeddings and a tokenizer that reconstructs, `reconstruction/relative_mse`,
    `reconstruction/rmse` and `reconstruction/cosine` at full depth and with `/level_l` after each level, and
    `knn_overlap@10`; with an encoding, `posterior_entropy/level_l` (nats) and `posterior_confidence/level_l`; with
    interactions, `alignment/same_first_code` of successive events, so popular items count more, beside chance:
    `alignment/random` (of two items, all alike) and `alignment/random_events` (of two events); for prefixes that end at
    a deeper level l, `alignment/same_prefix/level_l`, `alignment/random/level_l`, `alignment/random_events/level_l`.

    Args:
        ids: rows in the order of `embeddings` and of the interactions' item numbers.
        embeddings: (N, D), as encoded.
        tokenizer: the fitted one that made the codes.
        encoding: of the same rows.
        interactions: the training log.
        decodable_levels: leading levels that address the tokenizer's codebooks, where a collision digit does not;
            default all that the tokenizer has.
        neighbour_queries: items whose neighbours are compared; all where there are fewer.
        seed: of the choice of those items.

    Raises:
        InputError: arrays of other lengths.
    """
    found: dict[str, Any] = code_metrics(ids.codes, ids.codebook_sizes)
    if embeddings is not None and tokenizer is not None and tokenizer.reconstructs:
        from recollect.tokenize.fidelity import neighbour_overlap, reconstruction

        depth = len(tokenizer.codebook_sizes) if decodable_levels is None else decodable_levels
        codes = ids.codes[:, :depth]
        steps = reconstruction(tokenizer, codes, embeddings)
        for name, value in steps[-1]._asdict().items():
            found[f"reconstruction/{name}"] = value
        for level, step in enumerate(steps):
            found |= {f"reconstruction/{name}/level_{level}": value for name, value in step._asdict().items()}
        overlap = neighbour_overlap(tokenizer, codes, embeddings, queries=neighbour_queries, seed=seed)
        found["knn_overlap@10"] = overlap
    if encoding is not None:
        for name, array in (("posterior_entropy", encoding.entropy), ("posterior_confidence", encoding.confidence)):
            if array is not None:
                found |= {f"{name}/level_{level}": float(array[:, level].mean()) for level in range(array.shape[1])}
    if interactions is not None:
        from recollect.tokenize.behaviour import prefix_alignment

        first, *deeper = prefix_alignment(ids.codes, interactions)
        found["alignment/same_first_code"] = first.adjacent
        found["alignment/random"] = first.random
        found["alignment/random_events"] = first.random_events
        for level, prefix in enumerate(deeper, start=1):
            found[f"alignment/same_prefix/level_{level}"] = prefix.adjacent
            found[f"alignment/random/level_{level}"] = prefix.random
            found[f"alignment/random_events/level_{level}"] = prefix.random_events
    return found
