"""The dataset folder: `dataset.json`, `interactions.parquet`, `items.parquet`, `users.parquet`.

What `recollect data import` writes and everything reads.  A folder appears whole or not at all: it is written
beside its place, flushed to the disk and renamed.  Not covered: appending, partitioned logs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recollect.data.assemble import RawTables, assemble
from recollect.data.fingerprints import fingerprint
from recollect.errors import DataError, InputError
from recollect.io import disk_errors, fsync_folder, read_json, write_json
from recollect.types import Dataset

FORMAT_VERSION = 1
_ROW_GROUP = 1 << 20
_LOG_TYPES = {"user_id": pa.string(), "item_id": pa.string(), "domain": pa.string()}
_OWN_KEYS = ("name", "domains", "counts", "created_with", "format")


def is_dataset_folder(folder: Path) -> bool:
    """Whether `folder` holds the two files that make it a dataset folder."""
    return (folder / "dataset.json").is_file() and (folder / "interactions.parquet").is_file()


def write_folder(dataset: Dataset, folder: str | Path, overwrite: bool = False) -> Path:
    """Write `dataset`; the folder appears complete or not at all.

    Raises:
        InputError: something is there and `overwrite` is false, or what is there is no dataset folder.
        StorageRefused: the disk is full, read-only or over quota.
    """
    folder = Path(folder)
    if folder.exists():
        replaceable = folder.is_dir() and (is_dataset_folder(folder) or not any(folder.iterdir()))
        if not replaceable:
            raise InputError(f"{folder} exists and is not a dataset folder; give another place")
        if any(folder.iterdir()) and not overwrite:
            raise InputError(f"{folder} holds a data set already; add --overwrite to replace it")
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        with disk_errors(folder):
            _write_files(dataset, temporary)
            os.chmod(temporary, 0o755)
            fsync_folder(temporary)
            _swap(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _swap(temporary: Path, folder: Path) -> None:
    """Put `temporary` in the place of `folder`; a kill between the two renames leaves the old one as `.….old`."""
    old = temporary.with_suffix(".old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_files(dataset: Dataset, folder: Path) -> None:
    log = dataset.interactions
    with _parquet(folder / "interactions.parquet", _log_rows(dataset, 0, 0).schema) as writer:
        for start in range(0, len(log), _ROW_GROUP):
            writer.write_table(_log_rows(dataset, start, start + _ROW_GROUP))
    names = np.asarray(dataset.domains, dtype=object)
    catalog = dataset.catalog
    items = {
        "item_id": pa.array(catalog.item_ids, pa.string()),
        "title": pa.array(catalog.titles, pa.string()),
        "domain": pa.array(names[catalog.domain], pa.string()),
        "categories": pa.array([list(value) for value in catalog.categories], pa.list_(pa.string())),
        "text": pa.array(catalog.texts, pa.string()),
    }
    _write_table(folder / "items.parquet", items | _columns(catalog.extra, items))
    users = {"user_id": pa.array(dataset.users.user_ids, pa.string())}
    _write_table(folder / "users.parquet", users | _columns(dataset.users.attributes, users))
    write_json(
        folder / "dataset.json",
        {
            "format": FORMAT_VERSION,
            "name": dataset.name,
            "version": "1",
            "source": None,
            "licence": "unknown",
            **{key: value for key, value in dataset.meta.items() if key not in _OWN_KEYS},
            "domains": list(dataset.domains),
            "counts": _counts(dataset),
            "fingerprint": fingerprint(dataset),
            "created_with": _created_with(),
        },
    )


def _counts(dataset: Dataset) -> dict[str, int]:
    return {"users": dataset.n_users, "items": dataset.n_items, "interactions": len(dataset.interactions)}


def _created_with() -> str:
    from recollect import __version__

    return f"recollect {__version__}"


def _columns(columns: Mapping[str, np.ndarray], taken: Mapping[str, Any]) -> dict[str, pa.Array]:
    clash = sorted(set(columns) & set(taken))
    if clash:
        raise DataError(f"column {clash[0]!r} exists twice; rename the extra one")
    return {name: pa.array(column) for name, column in columns.items()}


def _log_rows(dataset: Dataset, start: int, stop: int) -> pa.Table:
    log = dataset.interactions
    part = slice(start, stop)
    domain = (dataset.catalog.domain[log.item[part]] if log.domain is None else log.domain[part]).astype(np.int32)
    rating = np.full(len(log.user[part]), np.nan, np.float32) if log.rating is None else log.rating[part]
    row = np.arange(len(log), dtype=np.int64)[part] if log.row is None else log.row[part]
    columns = {
        "user_id": _labels(log.user[part], dataset.users.user_ids),
        "item_id": _labels(log.item[part], dataset.catalog.item_ids),
        "timestamp": pa.array(log.time[part], pa.int64()),
        "rating": pa.array(rating.astype(np.float32), pa.float32(), mask=np.isnan(rating)),
        "domain": _labels(domain, np.asarray(dataset.domains, dtype=object)),
        "row": pa.array(row, pa.int64()),
    }
    context = {name: column[part] for name, column in log.context.items()}
    return pa.table(columns | _columns(context, columns))


def _labels(codes: np.ndarray, names: np.ndarray) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(codes))


@contextlib.contextmanager
def _parquet(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    with open(path, "wb") as handle:  # Python's own file, so that the disk's refusal keeps its errno
        with pq.ParquetWriter(handle, schema, compression="zstd") as writer:
            yield writer
        handle.flush()
        os.fsync(handle.fileno())


def _write_table(path: Path, columns: Mapping[str, pa.Array]) -> None:
    table = pa.table(dict(columns))
    with _parquet(path, table.schema) as writer:
        writer.write_table(table)


def read_folder(folder: str | Path) -> Dataset:
    """Read a dataset folder; items and users keep the order of their files.

    The recorded fingerprint stays in `meta` and is not checked here (`describe` compares it with the data).

    Raises:
        DataError: a file is missing, damaged, lacks a column, disagrees with the others or with the counts.
    """
    folder = Path(folder)
    described = _description(folder / "dataset.json")
    log_file, items_file = folder / "interactions.parquet", folder / "items.parquet"
    users_file = folder / "users.parquet"
    log = _read_parquet(log_file, ("user_id", "item_id", "timestamp"), dictionary=("user_id", "item_id", "domain"))
    items = _read_parquet(items_file, ("item_id", "title"))
    users = _read_parquet(users_file, ("user_id",)) if users_file.exists() else None
    _check_types(log, log_file)
    meta = {key: value for key, value in described.items() if key not in ("domains", "counts", "format")}
    dataset = assemble(
        RawTables(
            name=described["name"],
            log=log,
            log_file=str(log_file),
            items=items,
            items_file=str(items_file),
            users=users,
            users_file=str(users_file),
            clock=described.get("clock", "unix"),
            domains=tuple(described.get("domains", ())),
            keep_item_order=True,
            meta=meta,
        )
    )
    counts = described.get("counts")
    if counts is not None and counts != _counts(dataset):
        raise DataError(f"{folder} holds {_counts(dataset)} where dataset.json says {counts}; import it again")
    return replace(dataset, meta={**dataset.meta, "warnings": described.get("warnings", dataset.meta["warnings"])})


def _description(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except InputError as error:
        raise DataError(str(error)) from error
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise DataError(f"{path} is not the description of a data set: it has no 'name'")
    if value.get("clock", "unix") not in ("unix", "position"):
        raise DataError(f"{path}: clock must be 'unix' or 'position', got {value['clock']!r}")
    if value.get("format", FORMAT_VERSION) != FORMAT_VERSION:
        raise DataError(f"{path}: format {value['format']!r} is not {FORMAT_VERSION}; use a newer recollect")
    return value


def _read_parquet(path: Path, needed: tuple[str, ...], dictionary: tuple[str, ...] = ()) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
        table = pq.read_table(path, read_dictionary=[name for name in dictionary if name in names], partitioning=None)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged or not Parquet: {' '.join(str(error).split())[:200]}") from error
    for name in needed:
        if name not in table.column_names:
            raise DataError(f"{path} has no column {name!r}; it has {', '.join(table.column_names)}")
    if table.num_rows == 0:
        raise DataError(f"{path} is empty: it holds no row")
    return table


def _check_types(log: pa.Table, path: Path) -> None:
    for name in ("timestamp", "row"):
        if name in log.column_names and not pa.types.is_integer(log[name].type):
            raise DataError(f"{path}: column {name!r} is {log[name].type}, not int64")
    if "rating" in log.column_names and not pa.types.is_floating(log["rating"].type):
        raise DataError(f"{path}: column 'rating' is {log['rating'].type}, not float32")
