"""Published semantic IDs and sequences among the real data, as arrays."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from recollect.types import Interactions, SemanticIDs


def published_ids(shared_data: Path, name: str, codebook_size: int = 256) -> SemanticIDs:
    """The table `sid/<name>.sids.tsv.gz`, rows in the order of their 0-based item numbers."""
    with gzip.open(shared_data / "sid" / f"{name}.sids.tsv.gz", "rt", encoding="utf-8") as handle:
        next(handle)
        rows = np.array([[int(value) for value in line.split("\t")] for line in handle], dtype=np.int64)
    rows = rows[np.argsort(rows[:, 0])]
    assert (rows[:, 0] == np.arange(len(rows))).all()
    names = np.array([str(number) for number in rows[:, 0].tolist()], dtype=object)
    return SemanticIDs(names, rows[:, 1:].astype(np.int32), (codebook_size,) * (rows.shape[1] - 1))


def published_sequences(path: Path, first_item: int) -> Interactions:
    """A file of `user item item …` lines, items numbered from `first_item`; the time is the position."""
    users, items, times = [], [], []
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        for number, line in enumerate(handle):
            found = [int(value) - first_item for value in line.split()[1:]]
            users += [number] * len(found)
            items += found
            times += range(len(found))
    return Interactions(np.array(users), np.array(items), np.array(times))
