"""Amazon product reviews of the 2014, 2018 and 2023 releases: reviews or ratings with optional metadata.

A folder may hold several categories; each review file is one domain, named after its category.
Field names: 2014 and 2018 `reviewerID, asin, overall, unixReviewTime`; 2023 `user_id, parent_asin, rating, timestamp`
with milliseconds.  Not covered: images, votes, helpfulness, the review text itself.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recollect.data.assemble import MAX_TIMESTAMP, RawTables
from recollect.data.formats import category_list, plain_text
from recollect.data.tables import ID, header_of, lines, parse_json_object, read_delimited, read_json_lines
from recollect.errors import DataError

LICENCE = "Amazon review data (McAuley et al.), research use"
USER_NAMES = ("user_id", "reviewerID")
ITEM_NAMES = ("parent_asin", "asin", "item_id")
RATING_NAMES = ("rating", "overall")
TIME_NAMES = ("timestamp", "unixReviewTime", "time")
_SUFFIX = re.compile(r"\.(jsonl|json|tsv|csv)(\.gz)?$")
_NAME = re.compile(r"^(reviews_|ratings_)?(.*?)(_5|_5core|\.5core)?$")


def read_amazon(folder: Path) -> RawTables:
    """Read every review file of `folder` (`Books.jsonl.gz`, `reviews_Beauty_5.json.gz`, `ratings_Books.tsv`, …).

    `meta_<category>.json(l)(.gz)` beside it gives title, categories, description, brand and price.  Items without
    metadata are kept with an empty title, because the published metadata is incomplete.

    Raises:
        DataError: no review file, or a malformed one.
    """
    paths = [folder] if folder.is_file() else sorted(path for path in folder.iterdir() if _SUFFIX.search(path.name))
    root = folder.parent if folder.is_file() else folder
    reviews = [path for path in paths if not path.name.startswith("meta_")]
    if not reviews:
        raise DataError(f"{folder} holds no review file (.jsonl, .json, .tsv or .csv, plain or .gz)")
    domains, logs, items, items_files = [], [], [], []
    for path in reviews:
        domain = domain_of(path)
        if domain in domains:
            raise DataError(f"{folder} holds two review files of the domain {domain!r}; keep one")
        domains.append(domain)
        log = _reviews_json(path) if ".json" in path.name else _reviews_table(path)
        label = pa.DictionaryArray.from_arrays(np.zeros(log.num_rows, dtype=np.int32), pa.array([domain]))
        logs.append(log.append_column("domain", label))
        meta = next((other for other in sorted(root.glob("meta_*")) if domain_of(other) == domain), None)
        if meta is not None:
            items.append(_metadata(meta, domain))
            items_files.append(str(meta))
    return RawTables(
        name=root.resolve().name,
        log=pa.concat_tables(logs),  # dictionaries differ by file until `assemble` unifies them, once
        log_file=", ".join(str(path) for path in reviews),
        log_parts=tuple((str(path), log.num_rows) for path, log in zip(reviews, logs, strict=True)),
        items=_first_of_each(pa.concat_tables(items)) if items else None,
        items_file=", ".join(items_files),
        domains=tuple(domains),
        unknown_items="keep",
        meta={"source": str(folder), "licence": LICENCE},
    )


def domain_of(path: Path) -> str:
    """Category of a review or metadata file: its name without prefix, core mark and suffix, in lower case."""
    stem = _SUFFIX.sub("", path.name).removeprefix("meta_")
    match = _NAME.match(stem)
    return (match.group(2) if match else stem).lower() or stem.lower()


def _pick(path: Path, names: list[str], known: tuple[str, ...], what: str) -> str:
    found = next((name for name in known if name in names), None)
    if found is None:
        raise DataError(f"{path} has no {what} column; one of {', '.join(known)} is needed, it has {', '.join(names)}")
    return found


def _reviews_json(path: Path) -> pa.Table:
    first = next(((row, line) for row, line in lines(path) if line.strip()), None)
    if first is None:
        raise DataError(f"{path} is empty")
    fields = list(parse_json_object(path, *first))
    names = _columns(path, fields)
    kinds = {name: pa.float64() if target in ("rating", "timestamp") else pa.string() for target, name in names.items()}
    table = read_json_lines(path, kinds).rename_columns(list(names))
    for target in ("user_id", "item_id"):
        table = table.set_column(table.column_names.index(target), target, _encoded(table[target]))
    return _canonical(table, names)


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """A text column as one chunk of codes. Arrow encodes all chunks with one dictionary but hashes it again for each
    chunk wherever chunks meet, which took longer than reading the file."""
    encoded = column.dictionary_encode()
    codes = pa.chunked_array([chunk.indices for chunk in encoded.chunks]).combine_chunks()
    return pa.DictionaryArray.from_arrays(codes, encoded.chunk(0).dictionary)


def _reviews_table(path: Path) -> pa.Table:
    delimiter = "\t" if ".tsv" in path.name else ","
    names = _columns(path, header_of(path, delimiter))
    kinds = {name: pa.float64() if target in ("rating", "timestamp") else ID for target, name in names.items()}
    table = read_delimited(path, kinds, delimiter=delimiter, quoted=delimiter == ",").rename_columns(list(names))
    return _canonical(table, names)


def _columns(path: Path, fields: list[str]) -> dict[str, str]:
    names = {
        "user_id": _pick(path, fields, USER_NAMES, "user"),
        "item_id": _pick(path, fields, ITEM_NAMES, "item"),
        "timestamp": _pick(path, fields, TIME_NAMES, "time"),
    }
    rating = next((name for name in RATING_NAMES if name in fields), None)
    return names | ({"rating": rating} if rating else {})


def _canonical(table: pa.Table, names: dict[str, str]) -> pa.Table:
    at = table.column_names.index("timestamp")
    time = table["timestamp"]
    largest = pc.max(time).as_py()
    if names["timestamp"] == "timestamp" and largest is not None and MAX_TIMESTAMP < largest < MAX_TIMESTAMP * 1000:
        table = table.set_column(at, "timestamp", pc.floor(pc.divide(time, 1000.0)))  # 2023: milliseconds
    if "rating" in table.column_names:
        at = table.column_names.index("rating")
        return table.set_column(at, "rating", table["rating"].cast(pa.float32()))
    return table.append_column("rating", pa.nulls(table.num_rows, pa.float32()))


def _metadata(path: Path, domain: str) -> pa.Table:
    columns: dict[str, list[Any]] = {
        name: [] for name in ("item_id", "title", "categories", "text", "brand", "price", "domain")
    }
    for row, line in lines(path):
        if not line.strip():
            continue
        value = _record(path, row, line)
        item_id = next((value[name] for name in ("parent_asin", "asin") if value.get(name)), None)
        if not isinstance(item_id, str):
            raise DataError(f"{path}, row {row} has no parent_asin or asin")
        columns["item_id"].append(item_id)
        columns["title"].append(plain_text(value.get("title")) or "")
        columns["categories"].append(category_list(value.get("categories") or value.get("category")))
        columns["text"].append(plain_text(value.get("description")) or plain_text(value.get("features")))
        columns["brand"].append(plain_text(value.get("brand") or value.get("store")))
        columns["price"].append(plain_text(value.get("price")))
        columns["domain"].append(domain)
    if not columns["item_id"]:
        raise DataError(f"{path} is empty")
    kinds = {name: pa.list_(pa.string()) if name == "categories" else pa.string() for name in columns}
    return pa.table({name: pa.array(cells, kinds[name]) for name, cells in columns.items()})


def _record(path: Path, row: int, line: str) -> dict[str, Any]:
    if not line.startswith("{'"):
        return parse_json_object(path, row, line)
    try:  # the 2014 metadata are Python literals; literal_eval builds values and runs nothing
        value = ast.literal_eval(line)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataError(f"{path}, row {row} is neither JSON nor a literal record: {error}") from error
    return value


def _first_of_each(items: pa.Table) -> pa.Table:
    """The published metadata repeat some products; the first record of each stays."""
    codes = items["item_id"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    first = np.sort(np.unique(codes, return_index=True)[1])
    return items.take(pa.array(first))
