"""What quantisation keeps of the embeddings: squared error after every level, and who an item's neighbours are.

Errors are in the space `decode` gives back (the input's). Everything is computed block by block, so memory does not
grow with N^2, and sums are float64.
Source: semantic_ids 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from recollect.errors import InputError
from recollect.rng import stream
from recollect.tokenize.groups import tuple_ids

if TYPE_CHECKING:
    from recollect.tokenize.protocol import ItemTokenizer

_BLOCK = 8192  # rows read or decoded at a time
_QUERIES = 2048  # items whose neighbours are sought at a time


class Reconstruction(NamedTuple):
    """What is left after some level.

    relative_mse: squared error / squared distance to the mean row.  rmse: root of the mean squared error per element.
    cosine: mean cosine of a row and its reconstruction (0 where either is zero).
    """

    relative_mse: float
    rmse: float
    cosine: float


def reconstruction(tokenizer: ItemTokenizer, codes: np.ndarray, embeddings: np.ndarray) -> list[Reconstruction]:
    """The error after levels 0..l-1 for l = 1..L.

    Args:
        tokenizer: fitted; its `decode` is asked for every depth.
        codes: (N, L) int, those that address its codebooks.
        embeddings: (N, D).

    Raises:
        InputError: another number of rows, or embeddings that are all equal (the relative error has no meaning).
    """
    _check(codes, embeddings)
    mean = np.zeros(embeddings.shape[1])
    for start in range(0, len(embeddings), _BLOCK):
        mean += np.asarray(embeddings[start : start + _BLOCK], dtype=np.float64).sum(axis=0)
    mean /= len(embeddings)
    total, errors, cosines = 0.0, np.zeros(codes.shape[1]), np.zeros(codes.shape[1])
    for start in range(0, len(embeddings), _BLOCK):
        rows = np.asarray(embeddings[start : start + _BLOCK], dtype=np.float64)
        total += float(((rows - mean) ** 2).sum())
        lengths = np.linalg.norm(rows, axis=1)
        for depth in range(1, codes.shape[1] + 1):
            decoded = np.asarray(tokenizer.decode(codes[start : start + _BLOCK, :depth]), dtype=np.float64)
            errors[depth - 1] += float(((rows - decoded) ** 2).sum())
            scale = lengths * np.linalg.norm(decoded, axis=1)
            cosines[depth - 1] += float(
                np.divide((rows * decoded).sum(axis=1), scale, where=scale > 0, out=0 * scale).sum()
            )
    if not total > 0:
        raise InputError("all embeddings are equal, so there is no variance to explain")
    return [
        Reconstruction(float(error / total), float((error / embeddings.size) ** 0.5), float(cosine / len(embeddings)))
        for error, cosine in zip(errors, cosines, strict=True)
    ]


def neighbour_overlap(
    tokenizer: ItemTokenizer,
    codes: np.ndarray,
    embeddings: np.ndarray,
    *,
    k: int = 10,
    queries: int = 2000,
    seed: int = 0,
) -> float:
    """Mean share of an item's k nearest items (Euclidean, itself apart) that are still among its k nearest decoded.

    Items with equal codes decode to one point, so their order is a tie: the share is its expectation over random orders
    of such items, which makes the figure independent of the order of rows. With fewer than k + 1 items k becomes N - 1.

    Args:
        tokenizer, codes, embeddings: as in `reconstruction`.
        k: neighbours.
        queries: items asked, drawn without replacement by `seed`; all where there are no more.

    Raises:
        InputError: another number of rows, or a single item.
    """
    _check(codes, embeddings)
    n = len(embeddings)
    k = min(k, n - 1)
    if k < 1:
        raise InputError("neighbours need at least two items")
    chosen = np.arange(n) if n <= queries else np.sort(stream(seed, "neighbours").choice(n, queries, replace=False))
    ids = tuple_ids(codes)
    first = np.unique(ids, return_index=True)[1]  # one row of every ID
    group, sizes = torch.from_numpy(ids), torch.from_numpy(np.bincount(ids))
    centre = np.asarray(embeddings[chosen], dtype=np.float64).mean(axis=0)  # keeps float32 distances accurate

    def rows_at(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(embeddings[rows] - centre, dtype=np.float32))

    def points_at(groups: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((tokenizer.decode(codes[first[groups]]) - centre).astype(np.float32))

    total = 0.0
    for part in np.array_split(chosen, -(-len(chosen) // _QUERIES)):
        own = torch.from_numpy(part)
        true = _nearest(rows_at(part), rows_at, n, k, own, torch.inf)  # itself apart
        near = _nearest(points_at(ids[part]), points_at, len(first), min(k + 1, len(first)), group[own], -1.0)
        share = _kept_share(near, group[own], sizes, k)  # (B, m)
        is_in = group[true][:, :, None] == near[:, None, :]  # (B, k, m)
        total += float((is_in * share[:, None, :]).sum(dtype=torch.float64))
    return total / (k * len(chosen))


def _nearest(
    queries: torch.Tensor,
    rows_at: Callable[[np.ndarray], torch.Tensor],
    n: int,
    m: int,
    own: torch.Tensor,
    own_distance: float,
) -> torch.Tensor:
    """(B, m) int64 numbers of the nearest of n rows to `queries` (B, D), nearest first, read block by block.

    The row `own` (B,) of each query counts as at `own_distance`, whatever rounding would make of it.
    """
    best = torch.full((len(queries), 0), torch.inf)
    number = torch.zeros((len(queries), 0), dtype=torch.int64)
    for start in range(0, n, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, n))
        distance = _squared_distances(queries, rows_at(block))
        inside = torch.nonzero((own >= start) & (own < start + len(block)))[:, 0]
        distance[inside, own[inside] - start] = own_distance
        best = torch.cat([best, distance], dim=1)
        number = torch.cat([number, torch.from_numpy(block).expand(len(queries), -1)], dim=1)
        best, place = best.topk(min(m, best.shape[1]), dim=1, largest=False, sorted=True)
        number = number.gather(1, place)
    return number


def _kept_share(near: torch.Tensor, own: torch.Tensor, sizes: torch.Tensor, k: int) -> torch.Tensor:
    """(B, m): expected share of each group's items among the k nearest of a member of group `own` (B,).

    Args:
        near: (B, m) the nearest groups, the own one first; m > k unless there are no more.
        sizes: (S,) items per group.
    """
    others = sizes[near] - (near == own[:, None]).long()
    before = others.cumsum(1) - others
    taken = torch.minimum((k - before).clamp(min=0), others)
    return torch.where(others > 0, taken / others.clamp(min=1), 0.0)


def _squared_distances(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(B, N) float32 squared Euclidean distances, up to float32 rounding."""
    return torch.addmm(right.square().sum(1)[None, :], left, right.T, alpha=-2.0) + left.square().sum(1)[:, None]


def _check(codes: np.ndarray, embeddings: np.ndarray) -> None:
    if len(codes) != len(embeddings) or embeddings.ndim != 2:
        raise InputError(f"{len(codes)} rows of codes for embeddings {embeddings.shape}; give one row per item")
