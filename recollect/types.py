"""The shared nouns: interaction log, catalogue, users, data set, split, semantic IDs, ranker, report.

Columnar numpy arrays, read-only; ids are dense integers inside and strings outside. Nothing here knows a
file format or a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from recollect.errors import DataError

if TYPE_CHECKING:
    import pandas

Clock = Literal["unix", "position"]


def _frozen(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


@dataclass(frozen=True)
class Interactions:
    """An interaction log, sorted by (user, time, row); arrays are read-only.

    user: (N,) int64 in 0..n_users-1.  item: (N,) int64 in 0..n_items-1.  time: (N,) int64 Unix seconds (or the
    position in the user's history where the source has no clock).  rating: (N,) float32, NaN = not rated.
    domain: (N,) int16 index into `Dataset.domains`.  row: (N,) int64 position in the source, the last tie-break.
    context: further columns, each (N, …).
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    rating: np.ndarray | None = None
    domain: np.ndarray | None = None
    row: np.ndarray | None = None
    context: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.user)
        for name in ("user", "item", "time", "rating", "domain", "row"):
            column = getattr(self, name)
            if column is None:
                continue
            if len(column) != n:
                raise DataError(f"column {name!r} has {len(column)} rows where 'user' has {n}")
            object.__setattr__(self, name, _frozen(column))
        object.__setattr__(self, "context", {key: _frozen(value) for key, value in self.context.items()})

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: np.ndarray) -> Interactions:
        """The rows `index` (positions or a boolean mask), in that order."""

        def pick(column: np.ndarray | None) -> np.ndarray | None:
            return None if column is None else column[index]

        return Interactions(
            user=self.user[index],
            item=self.item[index],
            time=self.time[index],
            rating=pick(self.rating),
            domain=pick(self.domain),
            row=pick(self.row),
            context={key: value[index] for key, value in self.context.items()},
        )


@dataclass(frozen=True)
class Catalog:
    """What is known of every item; row i describes item i.

    item_ids, titles: (n_items,) object arrays of str.  domain: (n_items,) int16.  categories: one tuple of str per
    item.  texts: (n_items,) object, str or None.  extra: further columns, each (n_items,).
    """

    item_ids: np.ndarray
    titles: np.ndarray
    domain: np.ndarray
    categories: Sequence[tuple[str, ...]]
    texts: np.ndarray
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.item_ids)


@dataclass(frozen=True)
class Users:
    """user_ids: (n_users,) object array of str.  attributes: further columns, each (n_users,)."""

    user_ids: np.ndarray
    attributes: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.user_ids)


@dataclass(frozen=True)
class Dataset:
    """A log with its catalogue and users, and where they come from.

    `meta` holds name, version, source, licence, clock ("unix" or "position") and, once computed, fingerprint.
    """

    name: str
    interactions: Interactions
    catalog: Catalog
    users: Users
    domains: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_users(self) -> int:
        return len(self.users)

    @property
    def n_items(self) -> int:
        return len(self.catalog)

    @property
    def clock(self) -> Clock:
        return self.meta.get("clock", "unix")


@dataclass(frozen=True)
class Split:
    """Training rows and the cases to predict; every number is a row of the sorted log.

    train: (N,) bool, the rows a model may be fitted on before selection.  valid_row, test_row: (C,) int64, the first
    target row of each case; `valid_end`, `test_end`: (C,) int64, one past its last target row (targets are
    contiguous; one per case except under the target rule "all").  A case's history is every earlier row of the same
    user (see `recollect.data.splits.history_bounds`).  t_cut: last time a model behind a test case may know
    (None: the time of the case's own target); t_cut_valid: the same for validation cases.
    """

    train: np.ndarray
    valid_row: np.ndarray
    test_row: np.ndarray
    rule: str
    t_cut: int | None = None
    t_cut_valid: int | None = None
    valid_end: np.ndarray | None = None
    test_end: np.ndarray | None = None

    def __post_init__(self) -> None:
        for row, end in (("valid_row", "valid_end"), ("test_row", "test_end")):
            if getattr(self, end) is None:
                object.__setattr__(self, end, getattr(self, row) + 1)
        for name in ("train", "valid_row", "test_row", "valid_end", "test_end"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))


@dataclass(frozen=True)
class SemanticIDs:
    """The semantic ID of every item: row i is item i's tuple of codes, coarsest level first.

    item_ids: (N,) object array of distinct str.  codes: (N, L) int32, read-only, level l in 0..codebook_sizes[l]-1; -1
    where an item has no digit (at the end of a row only: a collision digit that unique items do without).
    codebook_sizes: K_0..K_{L-1}, a collision digit included. Several items may share one ID.
    """

    item_ids: np.ndarray
    codes: np.ndarray
    codebook_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        codes = np.ascontiguousarray(self.codes)
        if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
            raise DataError(f"codes must be integers of shape (items, levels), got {codes.dtype} {codes.shape}")
        if len(self.item_ids) != len(codes):
            raise DataError(f"{len(self.item_ids)} item ids where there are {len(codes)} rows of codes")
        if codes.shape[1] != len(self.codebook_sizes) or not codes.shape[1]:
            raise DataError(f"codes have {codes.shape[1]} levels where there are {len(self.codebook_sizes)} codebooks")
        for level, size in enumerate(self.codebook_sizes):
            column = codes[:, level]
            wrong = np.flatnonzero((column < -1) | (column >= size))
            if len(wrong):
                row = int(wrong[0])
                raise DataError(
                    f"item {self.item_ids[row]!r} has code {int(column[row])} at level {level}; allowed: 0..{size - 1}"
                )
        gap = (codes[:, :-1] < 0) & (codes[:, 1:] >= 0)
        wrong = np.flatnonzero(gap.any(axis=1) | (codes[:, 0] < 0))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(f"item {self.item_ids[row]!r} has codes {codes[row].tolist()}; -1 may only end a row")
        object.__setattr__(self, "codes", _frozen(codes.astype(np.int32, copy=False)))
        object.__setattr__(self, "codebook_sizes", tuple(int(size) for size in self.codebook_sizes))

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def n_levels(self) -> int:
        """L."""
        return len(self.codebook_sizes)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        rows = {item: row for row, item in enumerate(self.item_ids.tolist())}
        if len(rows) != len(self.item_ids):
            raise DataError("item ids are not distinct; give every item its own id")
        return rows

    def rows_of(self, item_ids: Sequence[str]) -> np.ndarray:
        """Row (n,) int64 of each id.

        Raises:
            DataError: an id that has no row, or ids that are not distinct in the table itself.
        """
        unknown = [item for item in item_ids if item not in self._row_of]
        if unknown:
            raise DataError(
                f"item {unknown[0]!r} has no semantic ID ({len(unknown)} of {len(item_ids)} asked are unknown); "
                "add new items with `extend`"
            )
        return np.fromiter((self._row_of[item] for item in item_ids), dtype=np.int64, count=len(item_ids))


@runtime_checkable
class Ranker(Protocol):
    """Whoever scores items for a user: SASRec, a language model, a simulated user."""

    def score(self, histories: Sequence[np.ndarray], candidates: np.ndarray | None = None) -> np.ndarray:
        """Score candidates (B, C) (or every item, where None) given histories, oldest first; (B, C) float32."""
        ...


@dataclass
class Report:
    """What a run found; `report.json` in memory.

    metrics: {name: {"value", "ci95": [low, high], "n"}}.  baselines: {name: {metric: {…}}}.  sections: everything
    else a command stores for its page (tables, curves, samples), JSON values only.
    """

    kind: str
    protocol: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    baselines: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    sections: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of `report.json`."""
        return {
            "kind": self.kind,
            "protocol": self.protocol,
            "metrics": self.metrics,
            "baselines": self.baselines,
            "ledger": self.ledger,
            "warnings": self.warnings,
            **self.sections,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Report:
        """Inverse of `to_json`."""
        known = ("kind", "protocol", "metrics", "baselines", "ledger", "warnings")
        return cls(
            **{key: value[key] for key in known if key in value},
            sections={key: item for key, item in value.items() if key not in known},
        )

    def to_frame(self) -> pandas.DataFrame:
        """One row per (who, metric) with value, low, high and n, those of `models` included; needs pandas."""
        import pandas

        rows = [("run", metric, entry) for metric, entry in self.metrics.items()]
        rows += [(who, metric, entry) for who, table in self.baselines.items() for metric, entry in table.items()]
        models = self.sections.get("models") or {}
        rows += [(who, metric, entry) for who, table in models.items() for metric, entry in table.items()]
        return pandas.DataFrame(
            [
                {
                    "who": who,
                    "metric": metric,
                    "value": entry["value"],
                    "low": (entry.get("ci95") or [None, None])[0],
                    "high": (entry.get("ci95") or [None, None])[1],
                    "n": entry.get("n"),
                }
                for who, metric, entry in rows
            ]
        )

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` and `report.html` into `folder`, each atomically."""
        from recollect.eval.report import render_html
        from recollect.io import write_json, write_text

        folder = Path(folder)
        write_json(folder / "report.json", self.to_json())
        write_text(folder / "report.html", render_html(self))
        return folder
