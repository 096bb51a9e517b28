"""From string tables to a `Dataset`: dense ids, one sorted log, a catalogue and users that agree with it.

Every reader ends here, so the checks (unknown items, duplicate ids, impossible timestamps) exist once.
Users keep the order of the users file, then of first appearance; items are numbered by first appearance in the
log sorted by (time, row), then in catalogue order, because ranking ties are cut by item index (evaluation spec, 5
and 7; that it is this order and not the one by user is what reproduces the list metrics of its section 7).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recollect.data.ordering import first_appearance, item_numbers, positions, sort_order
from recollect.errors import DataError
from recollect.types import Catalog, Clock, Dataset, Interactions, Users

MAX_TIMESTAMP = 32_503_680_000  # the year 3000; a later "second" is a millisecond
LOG_COLUMNS = ("user_id", "item_id", "timestamp", "rating", "domain", "row")
ITEM_COLUMNS = ("item_id", "title", "domain", "categories", "text")


@dataclass(frozen=True)
class RawTables:
    """What a reader found, still in strings.

    log: columns user_id, item_id, [timestamp], [rating], [domain], [row], further numeric columns.  Without
    `timestamp` the clock is the position in the user's history, in file order.  items: item_id, [title], [domain],
    [categories list], [text], further columns.  users: user_id, further columns.  The `_file` names appear in errors;
    log_parts: (file, rows) of each file where the log was put together from several.
    """

    name: str
    log: pa.Table
    log_file: str
    log_parts: tuple[tuple[str, int], ...] = ()
    items: pa.Table | None = None
    items_file: str = ""
    users: pa.Table | None = None
    users_file: str = ""
    clock: Clock = "unix"
    domains: tuple[str, ...] = ()
    unknown_items: Literal["refuse", "keep"] = "refuse"
    fractional_time: bool = False
    keep_item_order: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def where(self, at: int) -> str:
        """File and 1-based row of row `at` of the log, for an error message."""
        for file, n in self.log_parts:
            if at < n:
                return f"{file}, row {at + 1}"
            at -= n
        return f"{self.log_file}, row {at + 1}"


def assemble(raw: RawTables) -> Dataset:
    """Turn string tables into a data set.

    Raises:
        DataError: no interaction, an empty or duplicate id, a bad timestamp or rating, an item that the items file
            does not list (unless `unknown_items="keep"`).
    """
    n = raw.log.num_rows
    if n == 0:
        raise DataError(f"{raw.log_file} is empty: it holds no interaction")
    user_codes, user_values = _encode(raw.log["user_id"], "user_id", raw.log_file, raw.where)
    item_codes, item_values = _encode(raw.log["item_id"], "item_id", raw.log_file, raw.where)
    user_ids, user_map = _merge_ids(user_values, user_codes, raw.users, "user_id", raw.users_file)
    item_ids, item_map = _merge_ids(item_values, item_codes, raw.items, "item_id", raw.items_file)
    n_known = raw.items.num_rows if raw.items is not None else 0
    if raw.items is not None and raw.unknown_items == "refuse" and len(item_ids) > n_known:
        at = int(np.argmax(item_map[item_codes] >= n_known))
        value = item_values[int(item_codes[at])].as_py()
        raise DataError(f"{raw.where(at)}: item {value!r} is not in {raw.items_file}")
    user, item = user_map[user_codes], item_map[item_codes]
    del user_codes, item_codes

    time = _times(raw, user)
    row = np.arange(n, dtype=np.int64) if "row" not in raw.log.column_names else _integers(raw, "row")
    order = sort_order(user, time, None if "row" not in raw.log.column_names else row)
    user, item, time, row = user[order], item[order], time[order], row[order]
    rating = _ratings(raw)
    item_domain, event_domain, domains = _domains(raw, len(item_ids), order, item)
    new_of_old = np.arange(len(item_ids)) if raw.keep_item_order else item_numbers(item, time, row, len(item_ids))
    old_of_new = np.argsort(new_of_old)
    log = Interactions(
        user=user,
        item=new_of_old[item],
        time=time,
        rating=None if rating is None else rating[order],
        domain=event_domain,
        row=row,
        context={name: to_numpy(raw.log[name])[order] for name in raw.log.column_names if name not in LOG_COLUMNS},
    )
    catalog, warnings = _catalog(raw, item_ids, old_of_new, item_domain[old_of_new])
    users = Users(user_ids=user_ids, attributes=_attributes(raw.users, "user_id", len(user_ids)))
    meta = {"name": raw.name, "clock": raw.clock, **raw.meta, "warnings": [*raw.warnings, *warnings]}
    return Dataset(raw.name, log, catalog, users, domains, meta)


def to_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column as numpy: numbers as they are (null -> NaN), everything else as objects (null -> None)."""
    if pa.types.is_integer(column.type) and column.null_count:
        column = column.cast(pa.float64())
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type):
        return np.asarray(column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy())
    result = np.empty(len(column), dtype=object)
    result[:] = column.to_pylist()
    return result


def _encode(column: pa.ChunkedArray, name: str, file: str, where: Callable[[int], str]) -> tuple[np.ndarray, pa.Array]:
    if not pa.types.is_dictionary(column.type):
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise DataError(f"{file}: column {name!r} is {column.type}, not text")
        column = pc.dictionary_encode(column)
    if column.null_count:
        raise DataError(f"{where(_first(pc.is_null(column)))}: {name} is missing")
    column = column.unify_dictionaries() if isinstance(column, pa.ChunkedArray) else column
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    codes = np.concatenate([np.asarray(chunk.indices) for chunk in chunks]).astype(np.int64)
    values = chunks[0].dictionary.cast(pa.string())
    used = np.zeros(len(values), dtype=bool)
    used[codes] = True
    if not used.all():
        codes, values = (np.cumsum(used) - 1)[codes], values.filter(pa.array(used))
    empty = pc.index(values, "").as_py()
    if empty >= 0:
        raise DataError(f"{where(int(np.argmax(codes == empty)))}: {name} is empty")
    return codes, values


def _first(mask: Any) -> int:
    return int(pc.index(mask, True).as_py())


def _merge_ids(
    values: pa.Array, codes: np.ndarray, table: pa.Table | None, name: str, file: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ids in final order (those of `table`, then the others by first appearance) and the place of each value."""
    by_appearance = np.argsort(first_appearance(codes, len(values)))
    if table is None:
        place = np.empty(len(values), dtype=np.int64)
        place[by_appearance] = np.arange(len(values))
        return to_numpy(values)[by_appearance], place
    known = table[name].combine_chunks().cast(pa.string())
    if known.null_count or pc.any(pc.equal(known, "")).as_py():
        at = _first(pc.fill_null(pc.equal(known, ""), True))
        raise DataError(f"{file}, row {at + 1}: {name} is empty")
    encoded = known.dictionary_encode()
    if len(encoded.dictionary) < len(known):
        indices = np.asarray(encoded.indices)
        again = np.ones(len(known), dtype=bool)
        again[np.unique(indices, return_index=True)[1]] = False
        at = int(np.argmax(again))
        raise DataError(f"{file}, row {at + 1}: {name} {known[at].as_py()!r} occurs twice")
    found = pc.index_in(values, value_set=known)
    place = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    extra = by_appearance[place[by_appearance] < 0]
    place[extra] = len(known) + np.arange(len(extra))
    return np.concatenate([to_numpy(known), to_numpy(values)[extra]]), place


def _integers(raw: RawTables, name: str) -> np.ndarray:
    column = raw.log[name]
    if column.null_count:
        raise DataError(f"{raw.where(_first(pc.is_null(column)))}: {name} is missing")
    return column.to_numpy().astype(np.int64)


def _times(raw: RawTables, user: np.ndarray) -> np.ndarray:
    if "timestamp" not in raw.log.column_names:
        return positions(user)
    column = raw.log["timestamp"]
    if column.null_count:
        raise DataError(f"{raw.where(_first(pc.is_null(column)))}: timestamp is missing")
    values = column.to_numpy()
    with np.errstate(invalid="ignore"):
        wrong = ~((values >= 0) & (values <= MAX_TIMESTAMP))  # also true for NaN
        if values.dtype.kind == "f" and not raw.fractional_time:
            wrong |= values != np.floor(values)
    if wrong.any():
        at = int(np.argmax(wrong))
        value = values[at].item()
        hint = "; it looks like milliseconds" if value > MAX_TIMESTAMP else ""
        raise DataError(
            f"{raw.where(at)}: timestamp {value!r} is not a whole number of Unix seconds "
            f"between 0 and {MAX_TIMESTAMP}{hint}"
        )
    return np.floor(values).astype(np.int64) if values.dtype.kind == "f" else values.astype(np.int64)


def _ratings(raw: RawTables) -> np.ndarray | None:
    if "rating" not in raw.log.column_names:
        return None
    column = raw.log["rating"]
    if column.null_count == len(column):
        return None
    rating = column.cast(pa.float32()).to_numpy()
    if np.isinf(rating).any():
        raise DataError(f"{raw.where(int(np.argmax(np.isinf(rating))))}: rating is infinite")
    return rating


def _domains(
    raw: RawTables, n_items: int, order: np.ndarray, item: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """(domain of each item (n_items,), domain of each sorted event (N,), names)."""
    event_names = raw.log["domain"] if "domain" in raw.log.column_names else None
    item_names = raw.items["domain"] if raw.items is not None and "domain" in raw.items.column_names else None
    names: dict[str, int] = {name: index for index, name in enumerate(raw.domains)}

    def code(column: pa.ChunkedArray, file: str, where: Callable[[int], str]) -> np.ndarray:
        codes, values = _encode(column, "domain", file, where)
        used = np.argsort(first_appearance(codes, len(values)))
        for value in to_numpy(values)[used]:
            names.setdefault(value, len(names))
        if len(names) > np.iinfo(np.int16).max:
            raise DataError(f"{file} names {len(names)} domains; at most {np.iinfo(np.int16).max} are allowed")
        return np.asarray([names[value] for value in values.to_pylist()], dtype=np.int16)[codes]

    item_domain = np.full(n_items, -1, dtype=np.int16)
    if item_names is not None:
        item_domain[: len(item_names)] = code(item_names, raw.items_file, lambda at: f"{raw.items_file}, row {at + 1}")
    event_domain = code(event_names, raw.log_file, raw.where)[order] if event_names is not None else None
    if event_domain is not None:
        from_events = np.full(n_items, -1, dtype=np.int16)
        from_events[item[::-1]] = event_domain[::-1]  # the first event wins
        item_domain = np.where(item_domain < 0, from_events, item_domain)
    if not names or (item_domain < 0).any():
        default = names.setdefault(raw.domains[0] if raw.domains else raw.name, len(names))
        item_domain = np.where(item_domain < 0, np.int16(default), item_domain)
    return item_domain, item_domain[item] if event_domain is None else event_domain, tuple(names)


def _catalog(
    raw: RawTables, item_ids: np.ndarray, old_of_new: np.ndarray, domain: np.ndarray
) -> tuple[Catalog, list[str]]:
    n = len(item_ids)
    titles, texts = np.full(n, "", dtype=object), np.full(n, None, dtype=object)
    categories: list[tuple[str, ...]] = [()] * n
    warnings = []
    if raw.items is not None:
        known = raw.items.num_rows
        if "title" in raw.items.column_names:
            titles[:known] = to_numpy(pc.fill_null(raw.items["title"], ""))
        if "text" in raw.items.column_names:
            texts[:known] = to_numpy(raw.items["text"])
        if "categories" in raw.items.column_names:
            categories[:known] = [tuple(value or ()) for value in raw.items["categories"].to_pylist()]
        if n > known:
            warnings.append(f"{n - known} items of {raw.log_file} are not in {raw.items_file}; they have no title")
    empty = int(np.sum(titles == ""))
    if empty:
        warnings.append(f"{empty} of {n} items have an empty title")
    extra = _attributes(raw.items, "item_id", n, skip=ITEM_COLUMNS)
    catalog = Catalog(
        item_ids=item_ids[old_of_new],
        titles=titles[old_of_new],
        domain=domain.astype(np.int16),
        categories=tuple(categories[index] for index in old_of_new),
        texts=texts[old_of_new],
        extra={name: column[old_of_new] for name, column in extra.items()},
    )
    return catalog, warnings


def _attributes(table: pa.Table | None, key: str, n: int, skip: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    if table is None:
        return {}
    result = {}
    for name in table.column_names:
        if name == key or name in skip:
            continue
        column = to_numpy(table[name])
        if len(column) < n:  # ids that the file does not list
            kind = np.float64 if column.dtype.kind in "biuf" else object
            padded = np.full(n, np.nan if kind is np.float64 else None, dtype=kind)
            padded[: len(column)] = column
            column = padded
        result[name] = column
    return result
