"""Fingerprint of a log: what must be equal for two result tables to be about the same data.

SHA-256 of the lines `user_id TAB item_id TAB timestamp LF`, sorted by (user_id, item_id) as UTF-8 bytes and by
timestamp as a number; in ids, backslash, tab and line feed are written as \\\\, \\t and \\n.  Where filters were
applied, one more line follows: `rules TAB` and the JSON list of their names.  Row order, titles and dense ids
do not matter.

What is said of the items has a fingerprint of its own, for runs whose models read it.
"""

from __future__ import annotations

import hashlib

import numpy as np

from recollect.io import canonical_json
from recollect.types import Dataset

_BLOCK = 1 << 20


def fingerprint(dataset: Dataset) -> str:
    """Hex SHA-256 of the interaction triples and the filter rules; computed anew, never read from a file."""
    import pyarrow as pa
    import pyarrow.compute as pc

    log = dataset.interactions
    user_rank, user_ids = _ranked(dataset.users.user_ids)
    item_rank, item_ids = _ranked(dataset.catalog.item_ids)
    user, item = user_rank[log.user], item_rank[log.item]
    order = np.lexsort((log.time, user * len(item_ids) + item))
    digest = hashlib.sha256()
    tab, empty, line_end = (pa.scalar(value, pa.large_string()) for value in ("\t", "", "\n"))
    users, items = pa.array(user_ids, pa.large_string()), pa.array(item_ids, pa.large_string())
    for start in range(0, len(order), _BLOCK):
        rows = order[start : start + _BLOCK]
        time = pa.array(log.time[rows]).cast(pa.large_string())
        text = pc.binary_join_element_wise(
            users.take(pa.array(user[rows])), items.take(pa.array(item[rows])), time, tab
        )
        text = pc.binary_join_element_wise(text, empty, line_end)  # joining with "" appends the line end
        offsets = np.frombuffer(text.buffers()[1], dtype=np.int64)
        digest.update(memoryview(text.buffers()[2])[: int(offsets[len(text)])])
    rules = dataset.meta.get("rules") or []
    if rules:
        digest.update(f"rules\t{canonical_json(list(rules))}\n".encode())
    return digest.hexdigest()


def text_fingerprint(dataset: Dataset) -> str:
    """Hex SHA-256 of everything said of the items: titles, domains, categories, texts and further columns.

    Of the lines `[item_id, title, domain, [categories], text, {further columns}]`, canonical JSON, by item id; neither
    users nor events are part of it.
    """
    catalog = dataset.catalog
    columns = sorted(catalog.extra)
    encoded = [value.encode("utf-8", "surrogatepass") for value in catalog.item_ids.tolist()]
    digest = hashlib.sha256()
    for at in sorted(range(len(encoded)), key=encoded.__getitem__):
        line = [
            catalog.item_ids[at],
            catalog.titles[at],
            dataset.domains[int(catalog.domain[at])],
            list(catalog.categories[at]),
            catalog.texts[at],
            {name: str(catalog.extra[name][at]) for name in columns},
        ]
        digest.update(canonical_json(line).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _ranked(ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Place of each id in the sorted list, and that list, escaped."""
    encoded = [value.encode("utf-8", "surrogatepass") for value in ids.tolist()]
    order = sorted(range(len(encoded)), key=encoded.__getitem__)
    rank = np.empty(len(encoded), dtype=np.int64)
    rank[order] = np.arange(len(encoded))
    escaped = [ids[at].replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n") for at in order]
    return rank, escaped
