"""Raw folders of a known kind to data sets: the kinds of `recollect data import`, and how one is recognised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from recollect.data.amazon import read_amazon
from recollect.data.assemble import RawTables, assemble
from recollect.data.formats import read_csv_folder, read_goodbooks, read_recbole, read_sequences
from recollect.data.movielens import read_ml_1m, read_ml_100k
from recollect.data.tables import pick_file
from recollect.errors import DataError, UnknownName
from recollect.types import Dataset

KINDS: dict[str, Callable[[Path], RawTables]] = {
    "ml-100k": read_ml_100k,
    "ml-1m": read_ml_1m,
    "recbole": read_recbole,
    "amazon": read_amazon,
    "goodbooks": read_goodbooks,
    "csv": read_csv_folder,
    "sequences": read_sequences,
}


def read_kind(kind: str, source: str | Path) -> Dataset:
    """Read the raw files of `kind` under `source`.

    Raises:
        UnknownName: no such kind.
        DataError: `source` does not exist, or a file is missing or malformed.
    """
    if kind not in KINDS:
        raise UnknownName("kind", kind, list(KINDS))
    source = Path(source)
    if not source.exists():
        raise DataError(f"{source} does not exist")
    if source.is_file() and kind not in ("amazon", "sequences"):
        raise DataError(f"{source} is a file; kind {kind!r} reads a folder")
    return assemble(KINDS[kind](source))


def detect_kind(folder: Path) -> str | None:
    """The kind whose characteristic files `folder` holds, or None."""
    if pick_file(folder, "u.data"):
        return "ml-100k"
    if pick_file(folder, "movies.dat") and pick_file(folder, "ratings.dat", "sequences.tsv"):
        return "ml-1m"
    if pick_file(folder, "interactions.csv"):
        return "csv"
    if any(folder.glob("*.inter")) or any(folder.glob("*.inter.gz")):
        return "recbole"
    if pick_file(folder, "books.csv"):
        return "goodbooks"
    if pick_file(folder, "sequences.tsv", "sequences.txt"):
        return "sequences"
    reviews = ("reviews_*.json*", "ratings_*.csv*", "ratings_*.tsv*", "meta_*.json*", "*_5.json*")
    if any(next(folder.glob(pattern), None) for pattern in reviews):
        return "amazon"
    return None
