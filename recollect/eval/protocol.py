"""The protocol block: what must be equal for two rows of results to stand in one table.

A block is a JSON-ready dictionary. Its hash covers everything that changes what a number means; seeds, versions, the
data set's name, the texts of its items and the label of the rows a model was fitted on identify a row and are left out
of it. Rows of different hash are refused side by side, since nearly every "library X is worse than paper Y" is a
difference of protocol.

Source: recsys_evaluation 2, 3 and 10.
"""

from __future__ import annotations

import platform
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from recollect.data.fingerprints import fingerprint, text_fingerprint
from recollect.data.splits import refit_mask
from recollect.errors import InputError
from recollect.io import canonical_json, sha256_text
from recollect.types import Dataset, Split

TRAIN = "train"
LIST_CUT = "score descending, item index ascending"
IDENTITY_FIELDS = ("name", "text_fingerprint", "trained_on", "seeds", "versions")
REQUIRED_FIELDS = (
    "fingerprint",
    "filters",
    "split",
    "part",
    "history",
    "mask",
    "tie",
    "candidates",
    "input",
    "list_cut",
    "list_length",
    "ks",
    "n_cases",
    "trained_on",
    "seeds",
    "versions",
)

_fingerprints: dict[tuple[str, int], tuple[weakref.ref[Dataset], str]] = {}


def data_fingerprint(dataset: Dataset) -> str:
    """`recollect.data.fingerprint`, computed once per data set object."""
    return _once(fingerprint, dataset)


def item_text_fingerprint(dataset: Dataset) -> str:
    """`recollect.data.text_fingerprint`, computed once per data set object."""
    return _once(text_fingerprint, dataset)


def _once(compute: Callable[[Dataset], str], dataset: Dataset) -> str:
    key = compute.__name__, id(dataset)
    known = _fingerprints.get(key)
    if known is not None and known[0]() is dataset:
        return known[1]
    value = compute(dataset)
    _fingerprints[key] = (weakref.ref(dataset, lambda _: _fingerprints.pop(key, None)), value)
    return value


def protocol_block(
    dataset: Dataset,
    split: Split,
    *,
    part: str,
    history: str,
    mask: str,
    tie: str,
    ks: Sequence[int],
    list_length: int,
    n_cases: int,
    n_candidates: int,
    rows: np.ndarray | None = None,
    input_form: str = "dense",
    fill: str | None = None,
    seeds: Sequence[int] = (),
) -> dict[str, Any]:
    """How a row was made, JSON-ready.

    Args:
        rows: (N,) bool, what the model was fitted on; None = `split.train`.
        input_form: "dense", "lists" or "counts"; recorded as "scores" where the numbers mean the same (dense and
            counts) and as "lists" where unlisted items have no rank.
        fill: what short lists were filled with; None = not filled.
        seeds: of the fitted models behind the row; empty for models without randomness.
    """
    import recollect

    return {
        "name": dataset.name,
        "fingerprint": data_fingerprint(dataset),
        "text_fingerprint": item_text_fingerprint(dataset),
        "filters": list(dataset.meta.get("rules", [])),
        "split": split.rule,
        "part": part,
        "history": history,
        "history_length": "all earlier rows; a model may read fewer",
        "mask": mask,
        "tie": tie,
        "candidates": f"full ranking of the {n_candidates} items of the filtered log, target never masked",
        "input": "lists" if input_form == "lists" else "scores",
        "fill": fill,
        "list_cut": LIST_CUT,
        "list_length": int(list_length),
        "ks": [int(k) for k in ks],
        "n_cases": int(n_cases),
        "trained_on": TRAIN if rows is None else training_label(dataset, split, rows),
        "seeds": [int(seed) for seed in seeds],
        "versions": {
            "recollect": recollect.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def training_label(dataset: Dataset, split: Split, rows: np.ndarray) -> str:
    """ "train", "refit (train and validation)", or how many events were given."""
    if np.array_equal(rows, split.train):
        return TRAIN
    if np.array_equal(rows, refit_mask(dataset, split)):
        return "refit (train and validation)"
    return f"{int(rows.sum())} given events"


def require_protocol(protocol: Mapping[str, Any] | None, who: str) -> Mapping[str, Any]:
    """The block itself, if it is one.

    Raises:
        InputError: it is missing or lacks a field; no row is printed without it.
    """
    missing = [name for name in REQUIRED_FIELDS if name not in (protocol or {})]
    if protocol is None or missing:
        raise InputError(
            f"the row {who!r} has no complete protocol block (missing: {', '.join(missing)}); "
            "a result without its protocol cannot be printed"
        )
    return protocol


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """16 hex digits over every field but those that only identify a row (`IDENTITY_FIELDS`)."""
    fields = {key: value for key, value in protocol.items() if key not in IDENTITY_FIELDS}
    return sha256_text(canonical_json(fields))[:16]


def compare_protocols(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every field in which two blocks differ, {field: (in a, in b)}, identifying fields included; None = absent."""
    names = sorted({*a, *b})
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def mixed_fields(protocols: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Fields of the hash in which rows differ, {field: {row: value}}; empty when all rows may stand together."""
    names = sorted({name for block in protocols.values() for name in block} - set(IDENTITY_FIELDS))
    found = {}
    for name in names:
        values = {row: block.get(name) for row, block in protocols.items()}
        if len({canonical_json(value) for value in values.values()}) > 1:
            found[name] = values
    return found


def require_same_protocol(
    protocols: Mapping[str, Mapping[str, Any]], *, allow_mixed: bool = False
) -> dict[str, dict[str, Any]]:
    """`mixed_fields`, refused unless allowed.

    Raises:
        InputError: a block is incomplete, or the rows differ and `allow_mixed` is False; the message names each field.
    """
    for row, block in protocols.items():
        require_protocol(block, row)
    found = mixed_fields(protocols)
    if found and not allow_mixed:
        raise InputError(
            "these rows were made under different protocols and cannot stand in one table:\n"
            + "\n".join(mixed_lines(found))
            + "\nevaluate them alike, or pass allow_mixed=True to print them with this list"
        )
    return found


def mixed_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per differing field: `mask: a='history', b='none'`."""
    return [f"{name}: " + ", ".join(f"{row}={value!r}" for row, value in rows.items()) for name, rows in found.items()]
