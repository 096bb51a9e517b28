"""What is tokenized: item vectors from a catalogue's texts or from an .npy file, with the ids and titles of the items.

Texts are embedded in parts that are stored as they finish, so an interrupted run never pays twice; equal texts are
embedded once and get equal vectors to the last bit. Arrays are memory-mapped and never unpickled.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from recollect.data.item_text import item_texts
from recollect.errors import InputError
from recollect.io import atomic_open, canonical_json, read_json, sha256_file, sha256_text, write_json
from recollect.progress import Progress, SilentProgress
from recollect.tokenize.tables import written_table
from recollect.types import Dataset, Split

if TYPE_CHECKING:
    from recollect.backbones.embedding import Embedder

PART = 1024
"""Distinct texts embedded between two writes."""

VECTORS_FILE = "embeddings.npy"
ABOUT_FILE = "embeddings.json"


@dataclass(frozen=True)
class Items:
    """N items to tokenize.

    embeddings: (N, D) float array, possibly memory-mapped.  item_ids, titles: N strings, a title may be "".
    dataset, split: where the vectors are of a catalogue, with its leave-one-out split; else None.
    source: what the vectors are made of, for run.json.  fingerprint: SHA-256 that changes when a vector may.
    """

    embeddings: np.ndarray
    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    source: dict[str, Any]
    fingerprint: str
    dataset: Dataset | None = None
    split: Split | None = None

    def __len__(self) -> int:
        return len(self.embeddings)


def read_vectors(path: str | Path) -> np.ndarray:
    """A memory-mapped (N, D) array of an .npy file.

    Raises:
        InputError: no such file, not an .npy file, pickled objects, or not a table.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give an .npy array of shape (items, dimensions)")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(
            f"{path} is not an .npy array of numbers (a whole file, without pickled objects); use numpy.save"
        ) from error
    if not isinstance(array, np.ndarray) or array.ndim != 2:
        shape = getattr(array, "shape", None)
        raise InputError(f"{path} must hold one array (items, dimensions), found shape {shape}")
    return array


def read_item_ids(path: str | Path, count: int) -> tuple[str, ...]:
    """Item ids, one a line.

    Raises:
        InputError: another number of lines than items, an empty or a doubled id.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as item ids, one a line: {error}") from error
    if len(lines) != count:
        raise InputError(f"{path} holds {len(lines)} ids where there are {count} vectors; give one line per vector")
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"{path} line {number} is empty; every item needs an id")
        if len(line.splitlines()) != 1:
            raise InputError(f"{path} line {number}: {line!r} holds a separator of lines; ids are one-line texts")
        if line in seen:
            raise InputError(f"{path} has {line!r} in lines {seen[line]} and {number}; ids must differ")
        seen[line] = number
    return tuple(lines)


def embed_texts(
    texts: Sequence[str],
    embedder: str | Embedder,
    folder: Path,
    *,
    progress: Progress = SilentProgress(),  # noqa: B008 - stateless
) -> tuple[np.ndarray, str]:
    """Vectors of texts, kept in `folder`, and the fingerprint of texts and embedder.

    Args:
        texts: one per item.
        embedder: a name (`recollect.open_embedder`) or an opened one.
        folder: gets embeddings.npy (N, D) float32 and embeddings.json; finished parts lie in embeddings.parts until
            all are there.

    Returns:
        the memory-mapped vectors, and the fingerprint.

    Raises:
        InputError: every text is empty.  ModelFileError: the embedder cannot be had.  StorageRefused: the disk refused.
    """
    from recollect.backbones.resolve import open_embedder

    if not any(texts):
        raise InputError("no item has a title, a category or a text to embed; give vectors as an .npy file")
    opened = open_embedder(embedder)
    try:
        key = sha256_text(canonical_json([opened.fingerprint, list(texts)]))
        held = folder / ABOUT_FILE
        if held.is_file() and read_json(held).get("fingerprint") == key and (folder / VECTORS_FILE).is_file():
            return read_vectors(folder / VECTORS_FILE), key
        distinct = list(dict.fromkeys(texts))
        parts = folder / f"embeddings.parts-{key[:16]}"
        progress.stage(f"embedding {len(distinct)} item texts", len(distinct))
        for number, start in enumerate(range(0, len(distinct), PART)):
            chunk = distinct[start : start + PART]
            if not (parts / f"{number:06}.npy").is_file():
                vectors = np.ascontiguousarray(opened.embed(chunk), dtype=np.float32)
                with atomic_open(parts / f"{number:06}.npy", "wb") as handle:
                    np.save(handle, vectors, allow_pickle=False)
            progress.advance(len(chunk))
    finally:
        if opened is not embedder:
            opened.close()
    _join(parts, folder, texts, distinct)
    write_json(held, {"fingerprint": key, "items": len(texts), "distinct_texts": len(distinct)})
    shutil.rmtree(parts, ignore_errors=True)
    return read_vectors(folder / VECTORS_FILE), key


def _join(parts: Path, folder: Path, texts: Sequence[str], distinct: Sequence[str]) -> None:
    """Write embeddings.npy from the parts, a part in memory at a time."""
    place = {text: index for index, text in enumerate(distinct)}
    at = np.fromiter((place[text] for text in texts), dtype=np.int64, count=len(texts))
    dimension = read_vectors(parts / "000000.npy").shape[1]
    with _new_vectors(folder, np.float32, (len(texts), dimension)) as whole:
        for number, start in enumerate(range(0, len(distinct), PART)):
            rows = np.flatnonzero((at >= start) & (at < start + PART))
            whole[rows] = read_vectors(parts / f"{number:06}.npy")[at[rows] - start]


def _new_vectors(
    folder: Path, dtype: DTypeLike, shape: tuple[int, int]
) -> contextlib.AbstractContextManager[np.ndarray]:
    """The table that replaces embeddings.npy; embeddings.json goes first, so that it never speaks of other vectors."""
    (folder / ABOUT_FILE).unlink(missing_ok=True)
    return written_table(folder / VECTORS_FILE, dtype, shape)


def items_of_file(path: str | Path, item_ids: str | Path | None) -> Items:
    """The items of an .npy file; without a file of ids they are numbered from 0.

    Raises:
        InputError: see `read_vectors` and `read_item_ids`.
    """
    vectors = read_vectors(path)
    ids = tuple(map(str, range(len(vectors)))) if item_ids is None else read_item_ids(item_ids, len(vectors))
    return Items(
        embeddings=vectors,
        item_ids=ids,
        titles=("",) * len(vectors),
        source={"vectors": Path(path).name},
        fingerprint=sha256_text(canonical_json([sha256_file(path), list(ids)])),
    )


def items_of_dataset(
    dataset: Dataset,
    split: Split,
    folder: Path,
    *,
    embedder: str | Embedder = "minilm",
    vectors: str | Path | None = None,
    vector_ids: str | Path | None = None,
    progress: Progress = SilentProgress(),  # noqa: B008 - stateless
) -> Items:
    """The items of a catalogue with vectors of their texts.

    Args:
        folder: where vectors are kept.
        vectors: an .npy file to take in place of an embedder.
        vector_ids: item ids of its rows, one a line; default: a row per item in the catalogue's order.

    Raises:
        InputError: nothing to embed; another number of vectors than items, or an item without one.
    """
    source: dict[str, Any]
    if vectors is not None:
        array, fingerprint = read_vectors(vectors), sha256_file(vectors)
        names = None if vector_ids is None else read_item_ids(vector_ids, len(array))
        array = _in_catalogue_order(array, catalogue_rows(dataset, len(array), names, vectors), folder)
        if vector_ids is not None:
            fingerprint = sha256_text(canonical_json([fingerprint, sha256_file(vector_ids)]))
        source = {"vectors": Path(vectors).name}
    else:
        texts = item_texts(dataset.catalog)
        array, fingerprint = embed_texts(texts, embedder, folder, progress=progress)
        name = embedder if isinstance(embedder, str) else embedder.fingerprint
        source = {"embedder": name, "text": "title, categories, text", "items_without_text": texts.count("")}
    return Items(
        embeddings=array,
        item_ids=tuple(str(name) for name in dataset.catalog.item_ids),
        titles=tuple(str(title or "") for title in dataset.catalog.titles),
        source=source,
        fingerprint=fingerprint,
        dataset=dataset,
        split=split,
    )


def catalogue_rows(dataset: Dataset, count: int, names: Sequence[str] | None, file: str | Path) -> np.ndarray:
    """(n_items,) int64, the row of each item among `count` vectors of `file`, which `names` may name.

    Raises:
        InputError: an item of the catalogue has no row; without names, another number of rows than items.
    """
    if names is None:
        if count != dataset.n_items:
            raise InputError(
                f"{file} holds {count} vectors where {dataset.name!r} has {dataset.n_items} items; give one row per "
                "item in the catalogue's order, after the same --core, or name the rows by --item-ids"
            )
        return np.arange(count)
    row_of = {name: row for row, name in enumerate(names)}
    wanted = [str(name) for name in dataset.catalog.item_ids]
    missing = [name for name in wanted if name not in row_of]
    if missing:
        raise InputError(f"item {missing[0]!r} has no vector ({len(missing)} of {len(wanted)} items have none)")
    return np.fromiter((row_of[name] for name in wanted), dtype=np.int64, count=len(wanted))


def _in_catalogue_order(array: np.ndarray, rows: np.ndarray, folder: Path) -> np.ndarray:
    """Rows of `array` in the catalogue's order; written to `folder` where that differs from the array's.

    Raises:
        StorageRefused: the disk refused.
    """
    if len(rows) == len(array) and (rows == np.arange(len(rows))).all():
        return array
    with _new_vectors(folder, array.dtype, (len(rows), array.shape[1])) as whole:
        for start in range(0, len(rows), PART):
            whole[start : start + PART] = array[rows[start : start + PART]]
    return read_vectors(folder / VECTORS_FILE)
