"""MovieLens 100K and 1M, as GroupLens publishes them and as RecBole or sequence files repackage them.

Not covered: the 10M, 20M, 25M and latest releases (import them as `csv`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from recollect.data.assemble import RawTables
from recollect.data.formats import read_recbole, sequence_log
from recollect.data.tables import ID, lines, need_file, pick_file, read_delimited
from recollect.errors import DataError

LICENCE = "GroupLens research licence: cite Harper & Konstan 2015, no redistribution without permission"
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
OCCUPATIONS_1M = (
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service",
    "doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman",
    "unemployed", "writer",
)  # fmt: skip
_ENCODINGS = ("utf-8", "latin-1")  # GroupLens files are latin-1; repackaged ones are often UTF-8
_YEAR = re.compile(r"\((\d{4})\)\s*$")


def read_ml_100k(folder: Path) -> RawTables:
    """Read `u.data`, `u.item`, `u.user`, or the RecBole form `*.inter`, `*.item`, `*.user`.

    Raises:
        DataError: a file is missing or malformed.
    """
    data = pick_file(folder, "u.data")
    if data is None:
        return read_recbole(folder, name="ml-100k", domain="movies", licence=LICENCE)
    log = read_delimited(
        data,
        {"user_id": ID, "item_id": ID, "rating": pa.float32(), "timestamp": pa.float64()},
        delimiter="\t",
        header=("user_id", "item_id", "rating", "timestamp"),
    )
    items_file, users_file = need_file(folder, "u.item"), need_file(folder, "u.user")
    items = []
    for row, cells in _cells(items_file, "|", 5 + len(GENRES_100K)):
        flags = cells[5:]
        if set(flags) - {"0", "1"}:
            raise DataError(f"{items_file}, row {row}: genre flags must be 0 or 1, got {flags!r}")
        genres = [genre for genre, flag in zip(GENRES_100K, flags, strict=True) if flag == "1"]
        items.append((cells[0], cells[1], genres, _year(cells[1])))
    return RawTables(
        name="ml-100k",
        log=log,
        log_file=str(data),
        items=_movies(items),
        items_file=str(items_file),
        users=_people(users_file, "|", ("user_id", "age", "gender", "occupation", "zip_code")),
        users_file=str(users_file),
        domains=("movies",),
        meta={"source": str(folder), "licence": LICENCE},
    )


def read_ml_1m(folder: Path) -> RawTables:
    """Read `ratings.dat`, or `sequences.tsv` where only the order is known; with `movies.dat` and `users.dat`.

    Raises:
        DataError: a file is missing or malformed.
    """
    ratings = pick_file(folder, "ratings.dat")
    movies_file = need_file(folder, "movies.dat")
    users_file = pick_file(folder, "users.dat")
    users = None
    if users_file is not None:
        users = _people(users_file, "::", ("user_id", "gender", "age", "occupation", "zip_code"))
        users = users.set_column(3, "occupation", pa.array([_occupation(cell) for cell in users["occupation"]]))
    items = []
    for _, cells in _cells(movies_file, "::", 3):
        items.append((cells[0], cells[1], cells[2].split("|") if cells[2] else [], _year(cells[1])))
    if ratings is not None:
        # Arrow splits on one character: "::" is two colons with an empty column between
        log = read_delimited(
            ratings,
            {"user_id": ID, "item_id": ID, "rating": pa.float32(), "timestamp": pa.float64()},
            delimiter=":",
            header=("user_id", "_1", "item_id", "_2", "rating", "_3", "timestamp"),
        )
        log_file = ratings
    else:
        log_file = need_file(folder, "ratings.dat", "sequences.tsv")
        log = sequence_log(log_file)
    return RawTables(
        name="ml-1m",
        log=log,
        log_file=str(log_file),
        items=_movies(items),
        items_file=str(movies_file),
        users=users,
        users_file=str(users_file or ""),
        clock="unix" if ratings is not None else "position",
        domains=("movies",),
        meta={"source": str(folder), "licence": LICENCE},
    )


def _cells(path: Path, separator: str, n: int) -> list[tuple[int, list[str]]]:
    result = []
    for row, line in lines(path, _ENCODINGS):
        if not line:
            continue
        cells = line.split(separator)
        if len(cells) != n:
            raise DataError(f"{path}, row {row} has {len(cells)} columns where {n} are expected")
        result.append((row, cells))
    if not result:
        raise DataError(f"{path} is empty")
    return result


def _year(title: str) -> int | None:
    match = _YEAR.search(title)
    return int(match.group(1)) if match else None


def _occupation(cell: pa.Scalar) -> str:
    code = cell.as_py()
    return OCCUPATIONS_1M[int(code)] if code.isdecimal() and int(code) < len(OCCUPATIONS_1M) else code


def _movies(items: Sequence[tuple[str, str, list[str], int | None]]) -> pa.Table:
    return pa.table(
        {
            "item_id": pa.array([item[0] for item in items], pa.string()),
            "title": pa.array([item[1] for item in items], pa.string()),
            "categories": pa.array([item[2] for item in items], pa.list_(pa.string())),
            "year": pa.array([item[3] for item in items], pa.int64()),
        }
    )


def _people(path: Path, separator: str, names: Sequence[str]) -> pa.Table:
    rows = _cells(path, separator, len(names))
    columns = {name: pa.array([cells[at] for _, cells in rows], pa.string()) for at, name in enumerate(names)}
    return pa.table(columns)
