"""A catalogue that changes: new items under frozen codebooks, new codebooks under old names, and how much moved.

`extend` codes new items and never touches an existing tuple. `refit` learns new codebooks and renames their codes, per
level, so that as many shared items as possible keep them (an assignment problem on the contingency table); codebook
arrays are permuted alike, so `encode` speaks the new names from then on. Codes of one level mean the same under every
prefix, which is why one permutation per level is enough. All of it is our design.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recollect.errors import InputError
from recollect.progress import Progress, SilentProgress
from recollect.tokenize.collisions import CollisionConfig, Resolution, resolve_collisions
from recollect.tokenize.groups import sizes_of, tuple_ids
from recollect.tokenize.protocol import Encoding, ItemTokenizer

_CHECKED_ROWS = 512


@dataclass(frozen=True)
class Extension:
    """New items' tuples (M, L or L+1) and how they came about; existing tuples are as they were."""

    codes: np.ndarray
    encoding: Encoding
    resolution: Resolution


@dataclass(frozen=True)
class Refit:
    """Codes under a fitted and relabelled tokenizer.

    codes: (N, L) int32 of all items, before collision handling.  labels: per level (K_l,) int64, the new name of each
    code as it was fitted.  churn: (L,) share of the shared items whose first l + 1 digits changed.  churn_unlabelled:
    the same had the codes kept the names they were fitted with.
    """

    codes: np.ndarray
    labels: tuple[np.ndarray, ...]
    churn: np.ndarray
    churn_unlabelled: np.ndarray


def extend(
    tokenizer: ItemTokenizer,
    embeddings: np.ndarray,
    existing: np.ndarray,
    *,
    strategy: str = "zcr",
    beam: int = 1,
    item_ids: Sequence[str] | None = None,
    attributes: Sequence[Sequence[object]] | None = None,
    config: CollisionConfig = CollisionConfig(),  # noqa: B008 - frozen
) -> Extension:
    """Code new items with frozen codebooks; collisions are resolved by moving new items only.

    Args:
        tokenizer: fitted.
        embeddings: (M, D) of the new items.
        existing: (N, L or L+1) tuples of the items there are, resolved with the same `strategy`.
        strategy, item_ids, attributes, config: see `resolve_collisions`; ids and attributes are the new items'.
        beam: see `ItemTokenizer.encode`.

    Raises:
        InputError: as `encode` and `resolve_collisions`.
    """
    encoding = tokenizer.encode(embeddings, beam=beam)
    resolution = resolve_collisions(
        encoding.codes,
        strategy,
        tokenizer=tokenizer,
        embeddings=embeddings,
        item_ids=item_ids,
        attributes=attributes,
        existing=existing,
        config=config,
    )
    return Extension(resolution.codes, encoding, resolution)


def churn(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(L,) share of items whose first l + 1 digits differ between tuples (N, L) and (N, L); 0 without items.

    Raises:
        InputError: tables of different shapes.
    """
    if before.ndim != 2 or before.shape != after.shape:
        raise InputError(f"churn compares two tables of the same items, got {before.shape} and {after.shape}")
    if not len(before):
        return np.zeros(before.shape[1])
    return np.logical_or.accumulate(before != after, axis=1).mean(axis=0)


def overlap_labels(old: np.ndarray, new: np.ndarray, size: int) -> np.ndarray:
    """(size,) int64 name of each new code so that the most items keep their old one.

    Args:
        old, new: (S,) codes of the same items, in 0..size-1.
        size: K of the level.
    """
    from scipy.optimize import linear_sum_assignment

    table = np.bincount(new.astype(np.int64) * size + old, minlength=size * size).reshape(size, size)
    codes, names = linear_sum_assignment(table, maximize=True)
    labels = np.empty(size, dtype=np.int64)
    labels[codes] = names
    return labels


def permuted_arrays(arrays: Mapping[str, np.ndarray], labels: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a tokenizer in which code k of level l is called labels[l][k].

    Arrays of a level are named `{what}.{level}`; those with a row per code are reordered, others (a variance shared by
    all codes) kept.
    """
    renamed = dict(arrays)
    for level, names in enumerate(labels):
        place = np.argsort(names)  # the code that is now called 0, 1, …
        for name, array in arrays.items():
            if name.endswith(f".{level}") and array.ndim and len(array) == len(names):
                renamed[name] = np.ascontiguousarray(array[place])
    return renamed


def relabel(tokenizer: ItemTokenizer, labels: Sequence[np.ndarray], probe: np.ndarray) -> None:
    """Rename the codes of a fitted tokenizer: code k of level l becomes labels[l][k].

    Args:
        tokenizer: changed in place.
        labels: per level a permutation of 0..K_l-1.
        probe: (n, D) rows by whose codes the renaming is checked.

    Raises:
        InputError: not permutations; a method whose codes cannot be renamed (their numbers mean something, as in FSQ,
            or do not come from a codebook, as in random codes); the tokenizer is then as it was.
    """
    sizes = tokenizer.codebook_sizes
    if len(labels) != len(sizes) or any(
        not np.array_equal(np.sort(names), np.arange(size)) for names, size in zip(labels, sizes, strict=False)
    ):
        raise InputError(f"labels must be a permutation of 0..K-1 for each of {sizes} codes")
    before = tokenizer.arrays()
    kept = {name: np.array(array) for name, array in before.items()}
    old = tokenizer.encode(probe).codes
    expected = np.stack([names[old[:, level]] for level, names in enumerate(labels)], axis=1)
    refusal = f"{tokenizer.name}: the codes of this method cannot be renamed, so IDs cannot be carried over a refit"
    try:
        tokenizer.take_arrays(permuted_arrays(kept, labels))
    except InputError as error:
        tokenizer.take_arrays(kept)
        raise InputError(f"{refusal} ({error})") from error
    found = tokenizer.encode(probe).codes
    books = [tokenizer.arrays()[f"codebook.{level}"] for level in range(len(sizes))]
    # of two codes with equal rows the lower number is emitted, so these may answer for each other
    agrees = [np.array_equal(book[found[:, level]], book[expected[:, level]]) for level, book in enumerate(books)]
    if not all(agrees):
        tokenizer.take_arrays(kept)
        raise InputError(refusal)


def refit(
    tokenizer: ItemTokenizer,
    embeddings: np.ndarray,
    previous: np.ndarray,
    *,
    shared: np.ndarray | None = None,
    beam: int = 1,
    mask: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    collaborative: np.ndarray | None = None,
    checkpoint: Path | None = None,
    progress: Progress = SilentProgress(),  # noqa: B008 - stateless
) -> Refit:
    """Fit `tokenizer` and rename its codes after those items had before.

    Args:
        tokenizer: unfitted; fitted and relabelled afterwards.
        embeddings: (N, D) of the catalogue as it is now.
        previous: (S, L) codes of the shared items as the old tokenizer emitted them (before collision handling).
        shared: (S,) their rows in `embeddings`; default: they are the first S.
        beam: of `encode`.
        mask, weight, collaborative, checkpoint, progress: see `ItemTokenizer.fit`.

    Raises:
        InputError: as `fit` and `relabel`; `previous` has other levels or codes than the new codebooks hold.
    """
    rows = np.arange(len(previous)) if shared is None else np.asarray(shared)
    if rows.shape != previous.shape[:1] or (len(rows) and not 0 <= rows.min() <= rows.max() < len(embeddings)):
        raise InputError(
            f"shared must name the rows of {len(previous)} previous codes among {len(embeddings)} items, "
            f"got {rows.shape}"
        )
    tokenizer.fit(
        embeddings, mask=mask, weight=weight, collaborative=collaborative, checkpoint=checkpoint, progress=progress
    )
    sizes = tokenizer.codebook_sizes
    if previous.ndim != 2 or previous.shape[1] != len(sizes):
        raise InputError(f"previous codes are {previous.shape} where the new tokenizer has {len(sizes)} levels")
    for level, size in enumerate(sizes):
        if len(previous) and not 0 <= previous[:, level].min() <= previous[:, level].max() < size:
            raise InputError(
                f"previous codes of level {level} reach {int(previous[:, level].max())}, the new codebook has {size} "
                "codes; refit with at least as many codes per level"
            )
    fitted = tokenizer.encode(embeddings, beam=beam).codes
    labels = tuple(overlap_labels(previous[:, level], fitted[rows, level], size) for level, size in enumerate(sizes))
    relabel(tokenizer, labels, np.asarray(embeddings[:_CHECKED_ROWS]))
    codes = tokenizer.encode(embeddings, beam=beam).codes
    return Refit(codes, labels, churn(previous, codes[rows]), churn(previous, fitted[rows]))


def resolve_refit(
    codes: np.ndarray,
    previous: np.ndarray,
    resolved: np.ndarray,
    tokenizer: ItemTokenizer,
    embeddings: np.ndarray,
    *,
    shared: np.ndarray | None = None,
    strategy: str = "zcr",
    item_ids: Sequence[str] | None = None,
    config: CollisionConfig = CollisionConfig(),  # noqa: B008 - frozen
) -> Resolution:
    """Resolve collisions after `refit` around the items whose emitted codes did not change: they keep their tuples.

    Args:
        codes: (N, L) of `Refit`.
        previous, resolved: (S, L) and (S, L or L+1), what the shared items were emitted and given before.
        tokenizer, embeddings: the relabelled tokenizer and the (N, D) items.
        shared: (S,) rows of the shared items; default the first S.
        strategy, item_ids, config: see `resolve_collisions`; `hash_last` has nothing to keep and is not meant here.

    Returns:
        As `resolve_collisions`, codes of all N items; the counts are about the items that were resolved anew, but
        `unresolved`, which is about all.

    Raises:
        InputError: as `resolve_collisions`; tables of different lengths.
    """
    rows = np.arange(len(previous)) if shared is None else np.asarray(shared)
    if len(resolved) != len(previous) or len(rows) != len(previous):
        raise InputError(f"{len(previous)} previous codes, {len(resolved)} resolved ones and {len(rows)} rows differ")
    same = (codes[rows] == previous).all(axis=1)
    is_kept = np.zeros(len(codes), dtype=bool)
    is_kept[rows[same]] = True
    fresh = np.flatnonzero(~is_kept)
    found = resolve_collisions(
        codes[fresh],
        strategy,
        tokenizer=tokenizer,
        embeddings=np.asarray(embeddings[fresh]),
        item_ids=None if item_ids is None else [item_ids[row] for row in fresh.tolist()],
        existing=resolved[same],
        config=config,
    )
    whole = np.empty((len(codes), found.codes.shape[1]), dtype=np.int32)
    whole[rows[same]] = resolved[same]
    whole[fresh] = found.codes
    shares = int((sizes_of(tuple_ids(whole)) > 1).sum())
    return dataclasses.replace(found, codes=whole, unresolved=shares)
