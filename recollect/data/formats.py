"""General formats: `csv`, `recbole` atomic files, `sequences`, `goodbooks`.

The exact columns of `csv` are those of the interface; the other three follow the files that people publish.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recollect.data.assemble import RawTables
from recollect.data.tables import (
    ID,
    header_of,
    lines,
    need_file,
    parse_json_object,
    pick_file,
    read_delimited,
    read_token_lines,
)
from recollect.errors import DataError

TITLE_NAMES = ("title", "movie_title", "item_title", "name", "title_keywords")
CATEGORY_NAMES = ("categories", "category", "class", "genre", "genres")
TEXT_NAMES = ("text", "description")


def read_csv_folder(folder: Path) -> RawTables:
    """Read `interactions.csv`, `items.csv` and, when present, `users.csv`.

    Raises:
        DataError: a file is missing or malformed.
    """
    log_file, items_file = need_file(folder, "interactions.csv"), need_file(folder, "items.csv")
    users_file = pick_file(folder, "users.csv")
    optional = {"rating": pa.float32(), "domain": ID}
    names = header_of(log_file, ",")
    wanted = {"user_id": ID, "item_id": ID, "timestamp": pa.float64()}
    wanted |= {name: kind for name, kind in optional.items() if name in names}
    log = read_delimited(log_file, wanted, delimiter=",", quoted=True)
    ignored = sorted(set(names) - set(wanted))
    item_names = header_of(items_file, ",")
    for name in ("item_id", "title"):
        if name not in item_names:
            raise DataError(f"{items_file} has no column {name!r}; it has {', '.join(item_names)}")
    items = read_delimited(
        items_file, {name: pa.string() for name in item_names}, delimiter=",", quoted=True, multiline=True
    )
    items = with_categories(items, "|")
    if "text" in items.column_names:  # in CSV, no text and empty text look alike
        text = items["text"]
        items = items.set_column(
            items.column_names.index("text"), "text", pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
        )
    users = None
    if users_file is not None:
        user_names = header_of(users_file, ",")
        users = read_delimited(
            users_file,
            {name: pa.string() for name in dict.fromkeys(["user_id", *user_names])},
            delimiter=",",
            quoted=True,
            multiline=True,
        )
    return RawTables(
        name=folder.resolve().name,
        log=log,
        log_file=str(log_file),
        items=items,
        items_file=str(items_file),
        users=users,
        users_file=str(users_file or ""),
        meta={"source": str(folder), "licence": "unknown"},
        warnings=_ignored(log_file, ignored),
    )


def _ignored(path: Path, names: list[str]) -> tuple[str, ...]:
    return (f"columns of {path.name} that were not read: {', '.join(names)}",) if names else ()


def with_categories(items: pa.Table, separator: str) -> pa.Table:
    """Split the text column `categories`, if there is one, into a list column."""
    if "categories" not in items.column_names:
        return items
    cells = items["categories"].to_pylist()
    split = [[part.strip() for part in (cell or "").split(separator) if part.strip()] for cell in cells]
    at = items.column_names.index("categories")
    return items.set_column(at, "categories", pa.array(split, pa.list_(pa.string())))


def read_recbole(folder: Path, *, name: str = "", domain: str = "", licence: str = "unknown") -> RawTables:
    """Read RecBole's atomic files: one `.inter`, and `.item` and `.user` when present (plain or gzip).

    Headers are `name:type` with types token, token_seq, float, float_seq.  Sequences are separated by `;` or `|`
    where the column holds one, else by spaces.  Float columns of `.inter` become context, its other columns are
    not read (a warning lists them).

    Raises:
        DataError: a file is missing or malformed.
    """
    log_file = _atomic(folder, "inter")
    if log_file is None:
        raise DataError(f"{folder} holds no .inter file (plain or .gz)")
    kinds = _atomic_header(log_file)
    for needed in ("user_id", "item_id", "timestamp"):
        if needed not in kinds:
            raise DataError(f"{log_file} has no column {needed!r}; it has {', '.join(kinds)}")
    wanted = {f"user_id:{kinds['user_id']}": ID, f"item_id:{kinds['item_id']}": ID}
    wanted |= {f"timestamp:{kinds['timestamp']}": pa.float64()}
    for column, kind in kinds.items():
        if kind == "float" and column != "timestamp":
            wanted[f"{column}:{kind}"] = pa.float32()
    log = read_delimited(log_file, wanted, delimiter="\t")
    log = log.rename_columns([column.rsplit(":", 1)[0] for column in log.column_names])
    items_file, users_file = _atomic(folder, "item"), _atomic(folder, "user")
    return RawTables(
        name=name or log_file.name.split(".")[0],
        log=log,
        log_file=str(log_file),
        items=None if items_file is None else atomic_items(items_file),
        items_file=str(items_file or ""),
        users=None if users_file is None else _atomic_table(users_file),
        users_file=str(users_file or ""),
        domains=(domain,) if domain else (),
        fractional_time=True,
        meta={"source": str(folder), "licence": licence},
        warnings=_ignored(log_file, sorted(set(kinds) - set(log.column_names))),
    )


def _atomic(folder: Path, suffix: str) -> Path | None:
    found = sorted([*folder.glob(f"*.{suffix}"), *folder.glob(f"*.{suffix}.gz")])
    if len(found) > 1:
        raise DataError(f"{folder} holds several .{suffix} files: {', '.join(path.name for path in found)}; keep one")
    return found[0] if found else None


def _atomic_header(path: Path) -> dict[str, str]:
    kinds = {}
    for cell in header_of(path, "\t"):
        name, colon, kind = cell.rpartition(":")
        if not colon or kind not in ("token", "token_seq", "float", "float_seq"):
            raise DataError(f"{path}: header {cell!r} is not name:type with type token, token_seq, float or float_seq")
        kinds[name] = kind
    return kinds


def _atomic_table(path: Path) -> pa.Table:
    kinds = _atomic_header(path)
    wanted = {f"{name}:{kind}": pa.float64() if kind == "float" else pa.string() for name, kind in kinds.items()}
    table = read_delimited(path, wanted, delimiter="\t")
    return table.rename_columns(list(kinds))


def atomic_items(path: Path) -> pa.Table:
    """An `.item` file with its title, categories and text columns under our names."""
    table = _atomic_table(path)
    if "item_id" not in table.column_names:
        raise DataError(f"{path} has no column 'item_id'; it has {', '.join(table.column_names)}")
    table = table.rename_columns(canonical_item_names(table.column_names))
    if "categories" not in table.column_names:
        return table
    cells = pc.fill_null(table["categories"], "")
    separator = next((mark for mark in ";|" if pc.any(pc.match_substring(cells, mark)).as_py()), " ")
    return with_categories(table, separator)


def canonical_item_names(names: list[str]) -> list[str]:
    """`names` with the first known synonym of title, categories and text renamed."""
    result = list(names)
    for target, synonyms in (("title", TITLE_NAMES), ("categories", CATEGORY_NAMES), ("text", TEXT_NAMES)):
        found = next((name for name in synonyms if name in result), None)
        if found is not None:
            result[result.index(found)] = target
    return result


def sequence_log(path: Path) -> pa.Table:
    """One user a line, `user item item …` oldest first (tab or spaces), as a log without a clock.

    Raises:
        DataError: a line without an item, a user on two lines, wrong encoding, damaged gzip, an empty file.
    """
    numbers, tokens = read_token_lines(path)
    offsets = np.asarray(tokens.offsets)
    lengths = np.diff(offsets)
    if (lengths < 2).any():
        at = int(np.argmax(lengths < 2))
        raise DataError(f"{path}, row {numbers[at].as_py()} names a user but no item")
    flat = tokens.values.cast(pa.string())
    starts = np.asarray(offsets[:-1], dtype=np.int64)
    users = flat.take(pa.array(starts))
    encoded = users.dictionary_encode()
    if len(encoded.dictionary) < len(users):
        again = np.ones(len(users), dtype=bool)
        again[np.unique(np.asarray(encoded.indices), return_index=True)[1]] = False
        at = int(np.argmax(again))
        raise DataError(f"{path}, row {numbers[at].as_py()}: user {users[at].as_py()!r} has a line already")
    is_item = np.ones(len(flat), dtype=bool)
    is_item[starts] = False
    owner = np.repeat(np.asarray(encoded.indices), lengths - 1)
    return pa.table(
        {
            "user_id": pa.DictionaryArray.from_arrays(pa.array(owner, pa.int32()), encoded.dictionary),
            "item_id": flat.filter(pa.array(is_item)).dictionary_encode(),
        }
    )


def read_sequences(folder: Path, *, name: str = "", domain: str = "", licence: str = "unknown") -> RawTables:
    """Read `sequences.txt|tsv` (or a single such file) and the texts of `items.jsonl|tsv` beside it.

    There is no clock: the timestamp is the position in the line.

    Raises:
        DataError: a file is missing or malformed.
    """
    if folder.is_file():
        log_file, folder = folder, folder.parent
    else:
        log_file = need_file(folder, "sequences.tsv", "sequences.txt")
    items_file = pick_file(folder, "items.jsonl", "items.tsv")
    items = None
    if items_file is not None:
        items = jsonl_items(items_file) if ".jsonl" in items_file.name else tsv_items(items_file)
    return RawTables(
        name=name or folder.resolve().name,
        log=sequence_log(log_file),
        log_file=str(log_file),
        items=items,
        items_file=str(items_file or ""),
        clock="position",
        domains=(domain,) if domain else (),
        meta={"source": str(folder), "licence": licence},
    )


def tsv_items(path: Path) -> pa.Table:
    """Items of a tab-separated file with a header; categories are separated by `|`."""
    names = header_of(path, "\t")
    if "item_id" not in names:
        raise DataError(f"{path} has no column 'item_id'; it has {', '.join(names)}")
    table = read_delimited(path, {name: pa.string() for name in names}, delimiter="\t")
    return with_categories(table.rename_columns(canonical_item_names(table.column_names)), "|")


def jsonl_items(path: Path) -> pa.Table:
    """Items of a file of one JSON object a line; text fields may be strings, numbers or lists of strings."""
    rows: list[dict[str, Any]] = []
    for row, line in lines(path):
        if not line.strip():
            continue
        value = parse_json_object(path, row, line)
        if value.get("item_id") in (None, ""):
            raise DataError(f"{path}, row {row} has no item_id")
        rows.append(value)
    if not rows:
        raise DataError(f"{path} is empty")
    names = list(dict.fromkeys(name for value in rows for name in value))
    renamed = canonical_item_names(names)
    columns: dict[str, pa.Array] = {}
    for source, target in zip(names, renamed, strict=True):
        cells = [value.get(source) for value in rows]
        if target == "categories":
            columns[target] = pa.array([category_list(_path(cell)) for cell in cells], pa.list_(pa.string()))
        else:
            columns[target] = pa.array([plain_text(cell) for cell in cells], pa.string())
    return pa.table(columns)


def _path(cell: Any) -> Any:
    """A path written as one string, `A,B & C,D, E`, as its parts; a comma before a space belongs to the name."""
    return re.split(r",(?! )", cell) if isinstance(cell, str) else cell


def plain_text(cell: Any) -> str | None:
    """A JSON value as one line of text; None stays None."""
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, list):
        return " ".join(text for part in cell if (text := plain_text(part))) or None
    return str(cell)


def category_list(cell: Any) -> list[str]:
    """Categories as a flat list without repeats, whatever the nesting."""
    if cell is None or cell == "":
        return []
    if isinstance(cell, list):
        flat = [name for part in cell for name in category_list(part)]
        return list(dict.fromkeys(flat))
    return [str(cell)]


def read_goodbooks(folder: Path) -> RawTables:
    """Read `books.csv` and `ratings.csv`; the ratings file is in time order but has no clock.

    Raises:
        DataError: a file is missing (the catalogue alone is not a data set) or malformed.
    """
    items_file = need_file(folder, "books.csv")
    log_file = pick_file(folder, "ratings.csv")
    if log_file is None:
        raise DataError(
            f"{folder} holds the catalogue books.csv but no ratings.csv; get goodbooks-10k's ratings.csv "
            f"(github.com/zygmuntz/goodbooks-10k, release) and put it there"
        )
    log = read_delimited(log_file, {"user_id": ID, "book_id": ID, "rating": pa.float32()}, delimiter=",")
    wanted = ("book_id", "title", "authors", "original_publication_year", "language_code", "average_rating")
    items = read_delimited(
        items_file, {name: pa.string() for name in wanted}, delimiter=",", quoted=True, multiline=True
    ).rename_columns(["item_id", "title", "authors", "year", "language", "average_rating"])
    return RawTables(
        name="goodbooks-10k",
        log=log.rename_columns(["user_id", "item_id", "rating"]),
        log_file=str(log_file),
        items=items,
        items_file=str(items_file),
        clock="position",
        domains=("books",),
        meta={"source": str(folder), "licence": "CC BY-SA 4.0"},
        warnings=("no clock: the order within a user is that of ratings.csv",),
    )
