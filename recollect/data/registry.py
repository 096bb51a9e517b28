"""Data sets by name: which are known, where they are looked for, how they are fetched, and `load_dataset`.

`RECOLLECT_DATA=DIR[:DIR]` is searched first and takes the raw files as published; then the cache
(`RECOLLECT_CACHE`, default `~/.cache/recollect`); then, where a publisher's address is known, the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from recollect.data.amazon import LICENCE as AMAZON_LICENCE
from recollect.data.assemble import RawTables, assemble
from recollect.data.folder import is_dataset_folder, read_folder, write_folder
from recollect.data.formats import read_goodbooks, read_sequences
from recollect.data.harbor import build_harbor
from recollect.data.movielens import LICENCE as GROUPLENS_LICENCE
from recollect.data.movielens import read_ml_1m, read_ml_100k
from recollect.data.published import (
    read_agentcf,
    read_arts_office,
    read_book_crossing,
    read_grocery,
    read_steam,
)
from recollect.data.readers import detect_kind, read_kind
from recollect.errors import DataError, UnknownName
from recollect.io import confined, disk_errors, fsync_folder
from recollect.types import Dataset

MAX_UNPACKED_BYTES = 4 << 30
_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Registered:
    """A data set known by name.

    folders: names under which its files may lie in a searched directory.  files: one of them (plain or .gz) must be
    there.  url, checksum ("algorithm:hex"): the publisher's archive, None where there is none to fetch; homepage:
    where a person finds it.
    """

    name: str
    kind: str
    licence: str
    read: Callable[[Path], RawTables]
    folders: tuple[str, ...]
    files: tuple[str, ...]
    homepage: str
    url: str | None = None
    checksum: str | None = None


_SETS = (
    Registered(
        "ml-100k",
        "ml-100k",
        GROUPLENS_LICENCE,
        read_ml_100k,
        ("ml-100k",),
        ("u.data", "ml-100k.inter"),
        "https://grouplens.org/datasets/movielens/100k/",
        "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        "sha256:50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    ),
    Registered(
        "ml-1m",
        "ml-1m",
        GROUPLENS_LICENCE,
        read_ml_1m,
        ("ml-1m",),
        ("ratings.dat", "sequences.tsv"),
        "https://grouplens.org/datasets/movielens/1m/",
        "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        "sha256:a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    ),
    Registered(
        "amazon-beauty",
        "sequences",
        AMAZON_LICENCE,
        partial(read_sequences, name="amazon-beauty", domain="beauty", licence=AMAZON_LICENCE),
        ("amazon-beauty", "amazon_beauty"),
        ("sequences.txt",),
        "https://github.com/RUCAIBox/CIKM2020-S3Rec (data/Beauty.txt, saved as sequences.txt)",
    ),
    Registered(
        "amazon-scientific",
        "sequences",
        AMAZON_LICENCE,
        partial(read_sequences, name="amazon-scientific", domain="scientific", licence=AMAZON_LICENCE),
        ("amazon-scientific", "amazon_scientific"),
        ("sequences.tsv",),
        "https://github.com/Nishikata97/CollisionGenRec",
    ),
    Registered(
        "amazon-arts-office",
        "arts-office",
        AMAZON_LICENCE,
        read_arts_office,
        ("amazon-arts-office", "amazon_cross_arts_office", "AO"),
        ("train.txt",),
        "https://github.com/TingJShen/URLLM (DG_Final/AO)",
    ),
    Registered(
        "agentcf-cds-dense",
        "agentcf",
        AMAZON_LICENCE,
        partial(read_agentcf, which="dense"),
        ("agentcf-cds-dense", "agentcf_cds"),
        ("CDs-100-user-dense.test.inter",),
        "https://github.com/RUCAIBox/AgentCF (agentcf/dataset)",
    ),
    Registered(
        "agentcf-cds-sparse",
        "agentcf",
        AMAZON_LICENCE,
        partial(read_agentcf, which="sparse"),
        ("agentcf-cds-sparse", "agentcf_cds"),
        ("CDs-100-user-sparse.test.inter",),
        "https://github.com/RUCAIBox/AgentCF (agentcf/dataset)",
    ),
    Registered(
        "amazon-grocery",
        "grocery",
        AMAZON_LICENCE,
        read_grocery,
        ("amazon-grocery", "amazon_grocery_ts", "Grocery_and_Gourmet_Food"),
        ("train.csv",),
        "https://github.com/THUwangcy/ReChorus (data/Grocery_and_Gourmet_Food)",
    ),
    Registered(
        "book-crossing",
        "book-crossing",
        "Ziegler et al. 2005, research use when acknowledged",
        read_book_crossing,
        ("book-crossing", "book_crossing"),
        ("history.tsv",),
        "https://github.com/caserec/Datasets-for-Recommender-Systems",
    ),
    Registered(
        "steam",
        "steam",
        "public data, research use; no explicit licence",
        read_steam,
        ("steam", "steam_play"),
        ("game_purchase.tsv",),
        "https://github.com/caserec/Datasets-for-Recommender-Systems",
    ),
    Registered(
        "goodbooks-10k",
        "goodbooks",
        "CC BY-SA 4.0",
        read_goodbooks,
        ("goodbooks-10k",),
        ("books.csv",),
        "https://github.com/zygmuntz/goodbooks-10k (release v1.0)",
    ),
)
SETS = {entry.name: entry for entry in _SETS}
WORLDS = ("harbor",)


def registered() -> list[dict[str, Any]]:
    """One row per known data set: name, kind, licence, found (folder or None), url, checksum, homepage."""
    rows: list[dict[str, Any]] = [
        {
            "name": "harbor",
            "kind": "synthetic world",
            "licence": "Apache-2.0 (generated)",
            "found": "bundled",
            "url": None,
            "checksum": None,
            "homepage": None,
        }
    ]
    for entry in _SETS:
        found = _find(entry)[0]
        rows.append(
            {
                "name": entry.name,
                "kind": entry.kind,
                "licence": entry.licence,
                "found": None if found is None else str(found),
                "url": entry.url,
                "checksum": entry.checksum,
                "homepage": entry.homepage,
            }
        )
    return rows


def cache_folder() -> Path:
    """Where fetched data sets are kept: `$RECOLLECT_CACHE/datasets`, by default `~/.cache/recollect/datasets`."""
    root = os.environ.get("RECOLLECT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "recollect") / "datasets"


def _find(entry: Registered) -> tuple[Path | None, list[Path]]:
    """(folder that holds the set or None, the folders tried)."""
    roots = [Path(part) for part in os.environ.get("RECOLLECT_DATA", "").split(":") if part]
    tried = []
    for root in roots:
        places = [root / prefix / name for prefix in ("", "recsys") for name in entry.folders]
        if root.name in entry.folders:
            places.insert(0, root)
        tried += places
    tried.append(cache_folder() / entry.name)
    for place in tried:
        if is_dataset_folder(place) or any(
            (place / f"{name}{suffix}").is_file() for name in entry.files for suffix in ("", ".gz")
        ):
            return place, tried
    return None, tried


def fetch(name: str) -> Path:
    """Folder of a registered data set's raw files; downloaded, checked and unpacked when it is nowhere yet.

    Raises:
        UnknownName: no such data set.
        DataError: it cannot be downloaded, or what arrived has another checksum; the message names the places tried.
        StorageRefused: the disk is full, read-only or over quota.
    """
    if name not in SETS:
        raise UnknownName("data set", name, list(SETS))
    entry = SETS[name]
    found, tried = _find(entry)
    if found is not None:
        return found
    places = ", ".join(str(place) for place in tried)
    if entry.url is None or entry.checksum is None:
        raise DataError(
            f"data set {name!r} is not in {places}, and has no address to download from; get it from "
            f"{entry.homepage} and set RECOLLECT_DATA to the folder above it"
        )
    target = cache_folder() / name
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=target.parent))
    try:
        with disk_errors(target):
            archive = temporary / "archive.zip"
            try:
                _download(entry.url, archive, entry.checksum)
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                raise DataError(
                    f"data set {name!r} is not in {places}, and {entry.url} cannot be reached ({error}); connect, or "
                    f"put its files in a folder {entry.folders[0]!r} and set RECOLLECT_DATA to the folder above it"
                ) from error
            _unpack(archive, temporary / "files")
            fsync_folder(temporary / "files")
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.rename(temporary / "files", target)
            fsync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _download(url: str, path: Path, checksum: str) -> None:
    algorithm, _, expected = checksum.partition(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer, open(path, "wb") as handle:
        while block := answer.read(1 << 20):
            digest.update(block)
            handle.write(block)
    if digest.hexdigest() != expected:
        raise DataError(f"{url} has {algorithm} {digest.hexdigest()} where {expected} is expected; nothing was kept")


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the regular files of a zip, without its top folder; names that climb out are refused."""
    folder.mkdir()
    try:
        with zipfile.ZipFile(archive) as source:
            members = [member for member in source.infolist() if not member.is_dir()]
            if sum(member.file_size for member in members) > MAX_UNPACKED_BYTES:
                raise DataError(f"{archive} would unpack to more than {MAX_UNPACKED_BYTES} bytes")
            tops = {member.filename.split("/")[0] for member in members}
            shared = len(tops) == 1 and all("/" in member.filename for member in members)
            for member in members:
                name = member.filename.split("/", 1)[1] if shared else member.filename
                path = confined(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with source.open(member) as reading, open(path, "wb") as writing:
                    shutil.copyfileobj(reading, writing)
                    writing.flush()
                    os.fsync(writing.fileno())
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive} is not a zip archive: {error}") from error


def load_dataset(data: str | Path, seed: int = 0) -> Dataset:
    """The data set that `data` names.

    Args:
        data: `harbor` (the bundled world, made from `seed`), a registered name, a dataset folder, or a raw folder of
            a known kind.
        seed: of a synthetic world; without effect on others.

    Raises:
        UnknownName: neither a known name nor a folder that can be read.
        DataError: the files are missing or malformed.
    """
    name = str(data)
    if name in WORLDS:
        return build_harbor(seed=seed).dataset
    if name in SETS:
        folder = fetch(name)
        return read_folder(folder) if is_dataset_folder(folder) else assemble(SETS[name].read(folder))
    path = Path(data)
    if is_dataset_folder(path):
        return read_folder(path)
    if path.is_dir():
        kind = detect_kind(path)
        if kind is not None:
            return read_kind(kind, path)
        raise DataError(
            f"{path} is neither a dataset folder (dataset.json, interactions.parquet) nor a raw folder of a known "
            "kind; import it with: recollect data import KIND SRC OUT"
        )
    raise UnknownName("data set", name, [*WORLDS, *SETS], "Or give the path of a dataset folder or raw folder")


def import_dataset(kind: str, source: str | Path, out: str | Path, overwrite: bool = False) -> Dataset:
    """Read raw files of `kind` under `source` and write the dataset folder `out`.

    Raises:
        UnknownName: no such kind.
        DataError: the files are missing or malformed.
        InputError: `out` holds something and `overwrite` is false.
        StorageRefused: the disk is full, read-only or over quota; nothing is half-written.
    """
    dataset = read_kind(kind, source)
    write_folder(dataset, out, overwrite=overwrite)
    return dataset
