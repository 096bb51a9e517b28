"""Rows of a comparison written on one line: METHOD, or METHOD:NAME=VALUE,NAME=VALUE for a variant of it.

    rq-kmeans,rq-gmm:covariance=tied-spherical,rq-gmm:covariance=diag,shrinkage=0.3,rq-gmm:preprocess=centre+pca

A list of rows is separated by commas, and so are the options of a row: what has an "=" and no ":" before it belongs to
the row before it. Lists inside an option are joined by "+". A variant's label is its text with the spaces taken out
and dashes in option names as underscores; everything that is reported of it carries that label.
Free of torch: the command line reads rows before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from recollect.errors import ConfigError
from recollect.io import sha256_text

_FOLDER_LETTERS = 60


def joined_rows(parts: Sequence[str]) -> tuple[str, ...]:
    """Labels of the rows that comma-separated parts (or whole rows) stand for; labels give themselves.

    Raises:
        ConfigError: an option before any row or behind a row without ":", an option without name or value, one that is
            given twice.
    """
    rows: list[str] = []
    for part in (piece.strip() for text in parts for piece in text.split(",")):
        head, sign, _ = part.partition("=")
        if not sign or ":" in head:
            rows.append(part)
        elif not rows or ":" not in rows[-1]:
            row = rows[-1] if rows else "METHOD"
            raise ConfigError(f"methods: {part!r} is an option of no row; write {row}:{part}")
        else:
            rows[-1] += f",{part}"
    return tuple(_label(row) for row in rows if row)


def split_row(label: str) -> tuple[str, tuple[str, ...]]:
    """A label's method (or section) and its NAME=VALUE pairs."""
    name, _, options = label.partition(":")
    return name, tuple(options.split(",")) if options else ()


def folder_name(label: str) -> str:
    """A folder's name for a row: the label where that is a plain word, else its letters and a hash of it."""
    if re.fullmatch(r"[\w.-]+", label, re.ASCII):
        return label
    plain = re.sub(r"[^\w.]+", "-", label, flags=re.ASCII).strip("-")[:_FOLDER_LETTERS]
    return f"{plain}-{sha256_text(label)[:8]}"


def _label(row: str) -> str:
    """The row without spaces around its parts and with option names in one spelling."""
    name, colon, options = row.partition(":")
    if not colon:
        return row
    pairs: dict[str, str] = {}
    for pair in options.split(","):
        key, sign, value = (piece.strip() for piece in pair.partition("="))
        key = key.replace("-", "_")
        if not (name.strip() and key and sign and value):
            raise ConfigError(f"methods: {row!r} is not METHOD:NAME=VALUE,NAME=VALUE")
        if key in pairs:
            raise ConfigError(f"methods: {row!r} gives {key!r} twice")
        pairs[key] = value
    return f"{name.strip()}:" + ",".join(f"{key}={value}" for key, value in pairs.items())
