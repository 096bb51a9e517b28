"""Research data sets in the exact files their publishers gave: one reader each.

AgentCF's CDs subsets, URLLM's Arts/Office pair, ReChorus' Grocery, Case Recommender's Book-Crossing and Steam.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recollect.data.assemble import RawTables
from recollect.data.formats import atomic_items
from recollect.data.tables import ID, need_file, read_delimited, read_token_lines
from recollect.errors import DataError

AMAZON_LICENCE = "Amazon review data (McAuley et al.), research use"


def read_agentcf(folder: Path, which: Literal["dense", "sparse"]) -> RawTables:
    """Read AgentCF's CDs subset of 100 users: the history and target of each user's test line.

    The catalogue keeps the items that occur in histories, targets or candidate lists.  No clock.

    Raises:
        DataError: a file is missing or malformed.
    """
    path, users, histories, targets = _agentcf_cases(folder, which)
    lists = _agentcf_lists(folder, which)
    offsets = np.asarray(histories.offsets, dtype=np.int64)
    lengths = np.diff(offsets)
    ends = np.cumsum(lengths + 1) - 1  # where each target goes in the merged log
    merged = np.empty(int(ends[-1]) + 1, dtype=object)
    is_target = np.zeros(len(merged), dtype=bool)
    is_target[ends] = True
    merged[is_target] = targets.to_numpy(zero_copy_only=False)
    merged[~is_target] = histories.values.to_numpy(zero_copy_only=False)
    log = pa.table(
        {
            "user_id": pa.array(np.repeat(users.to_numpy(zero_copy_only=False), lengths + 1), pa.string()),
            "item_id": pa.array(merged, pa.string()),
        }
    )
    items_file = need_file(folder, "CDs.item")
    listed = [item for candidates in lists.values() for item in candidates]
    keep = pa.concat_arrays([log["item_id"].combine_chunks(), pa.array(listed, pa.string())]).unique()
    items = atomic_items(items_file)
    return RawTables(
        name=f"agentcf-cds-{which}",
        log=log,
        log_file=str(path),
        items=items.filter(pc.is_in(items["item_id"], value_set=keep)),
        items_file=str(items_file),
        clock="position",
        domains=("cds",),
        meta={"source": str(folder), "licence": f"Apache-2.0 repository; {AMAZON_LICENCE}"},
    )


def agentcf_candidates(folder: str | Path, which: Literal["dense", "sparse"]) -> dict[str, tuple[str, ...]]:
    """The ten published candidates of each user: item ids, nine negatives in list order, then the target.

    The target is removed from the published list of 100, the first nine are kept and the target is added, as in
    AgentCF's evaluation; the position of the target is the caller's to shuffle.  Negatives the user has met are
    kept (26 of 900 in dense).

    Raises:
        DataError: a file is missing or malformed, or a user has no list.
    """
    folder = Path(folder)
    path, users, _, targets = _agentcf_cases(folder, which)
    lists = _agentcf_lists(folder, which)
    result = {}
    for row, (user, target) in enumerate(zip(users.to_pylist(), targets.to_pylist(), strict=True), start=1):
        if user not in lists:
            raise DataError(f"{path}, row {row}: user {user!r} has no candidate list")
        negatives = [item for item in lists[user] if item != target][:9]
        result[user] = (*negatives, target)
    return result


def _agentcf_cases(folder: Path, which: str) -> tuple[Path, pa.Array, pa.ListArray, pa.Array]:
    path = need_file(folder, f"CDs-100-user-{which}.test.inter")
    names = ("user_id:token", "item_id_list:token_seq", "item_id:token")
    table = read_delimited(path, dict.fromkeys(names, pa.string()), delimiter="\t")
    users, histories, targets = (table[name].combine_chunks() for name in names)
    return path, users, pc.split_pattern(histories, " "), targets


def _agentcf_lists(folder: Path, which: str) -> dict[str, list[str]]:
    path = need_file(folder, f"CDs-100-user-{which}.random")
    _, tokens = read_token_lines(path)
    return {line[0]: line[1:] for line in tokens.to_pylist()}


def read_arts_office(folder: Path) -> RawTables:
    """Read URLLM's Arts/Office pair: train, valid and test lines merged into one log of two domains.

    Each user has two lines with the same history and another target; both targets get the same last position and
    the order of the lines (`row`) breaks the tie.  The users' attribute `split` keeps the source's partition.

    Raises:
        DataError: a file is missing or malformed, or a user's two lines disagree.
    """
    logs, users, parts = [], [], []
    for part in ("train", "valid", "test"):
        path = need_file(folder, f"{part}.txt")
        log, ids = _arts_office_lines(path)
        logs.append(log)
        parts.append((str(path), log.num_rows))
        users.append(pa.table({"user_id": ids, "split": pa.array([part] * len(ids), pa.string())}))
    items, files = [], []
    for domain in ("arts", "office"):
        path = need_file(folder, f"items_{domain}.csv")
        names = ("idAfter", "item_title", "item_attribute")
        table = read_delimited(path, dict.fromkeys(names, pa.string()), delimiter=",", quoted=True)
        table = table.rename_columns(["item_id", "title", "text"])
        items.append(table.append_column("domain", pa.array([domain] * table.num_rows, pa.string())))
        files.append(str(path))
    return RawTables(
        name="amazon-arts-office",
        log=pa.concat_tables(logs),
        log_file=", ".join(path for path, _ in parts),
        log_parts=tuple(parts),
        items=pa.concat_tables(items),
        items_file=", ".join(files),
        users=pa.concat_tables(users),
        users_file=str(folder),
        clock="position",
        domains=("arts", "office"),
        meta={"source": str(folder), "licence": f"no licence file; {AMAZON_LICENCE}"},
        warnings=("the last two events of every user are the two targets of the source, at the same position",),
    )


def _arts_office_lines(path: Path) -> tuple[pa.Table, pa.Array]:
    numbers, tokens = read_token_lines(path)
    offsets = np.asarray(tokens.offsets, dtype=np.int64)
    lengths = np.diff(offsets) - 2  # without the user and the last position
    flat = tokens.values.cast(pa.string())
    ids = flat.take(pa.array(offsets[:-1]))
    if (lengths < 1).any():
        at = int(np.argmax(lengths < 1))
        raise DataError(f"{path}, row {numbers[at].as_py()} names a user but no item")
    if len(ids) % 2 or not ids[0::2].equals(ids[1::2]) or (lengths[0::2] != lengths[1::2]).any():
        raise DataError(f"{path}: every user must have two lines of the same length, one below the other")
    if len(ids[0::2].unique()) < len(ids) // 2:
        raise DataError(f"{path}: a user has more than two lines")
    is_event = np.ones(len(flat), dtype=bool)
    is_event[offsets[:-1]] = is_event[offsets[:-1] + 1] = False
    parts = pc.split_pattern(flat.filter(pa.array(is_event)), "|")
    if not pc.all(pc.equal(pc.list_value_length(parts), 3)).as_py():
        raise DataError(f"{path}: an event is not item|position|position")
    item, position = pc.list_element(parts, 0), pc.list_element(parts, 1)
    line = np.repeat(np.arange(len(ids)), lengths)
    starts = np.cumsum(lengths) - lengths
    within = np.arange(len(line)) - starts[line]
    is_last = within == lengths[line] - 1
    first, second = line % 2 == 0, line % 2 == 1
    shared = item.filter(pa.array(first & ~is_last)), item.filter(pa.array(second & ~is_last))
    if not shared[0].equals(shared[1]):
        raise DataError(f"{path}: the two lines of a user do not share their history")
    keep = np.flatnonzero(first | is_last)  # one history, both targets
    owner = ids.take(pa.array(line[keep]))
    try:
        time = position.take(pa.array(keep)).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: a position is not a number: {error}") from error
    return pa.table({"user_id": owner, "item_id": item.take(pa.array(keep)), "timestamp": time}), ids[0::2]


def read_grocery(folder: Path) -> RawTables:
    """Read ReChorus' Grocery and Gourmet Food: times but no titles; categories are numbers.

    Raises:
        DataError: a file is missing or malformed.
    """
    log_file, items_file = need_file(folder, "train.csv"), need_file(folder, "item_meta.csv")
    log = read_delimited(log_file, {"user_id": ID, "item_id": ID, "time": pa.float64()}, delimiter="\t")
    names = ("item_id", "i_category", "r_complement", "r_substitute")
    meta = read_delimited(items_file, dict.fromkeys(names, pa.string()), delimiter="\t")
    categories = pa.array([[f"category {cell}"] for cell in meta["i_category"].to_pylist()], pa.list_(pa.string()))
    items = pa.table(
        {
            "item_id": meta["item_id"],
            "categories": categories,
            "complements": meta["r_complement"],
            "substitutes": meta["r_substitute"],
        }
    )
    return RawTables(
        name="amazon-grocery",
        log=log.rename_columns(["user_id", "item_id", "timestamp"]),
        log_file=str(log_file),
        items=items,
        items_file=str(items_file),
        domains=("grocery",),
        meta={"source": str(folder), "licence": f"MIT repository; {AMAZON_LICENCE}"},
    )


def read_book_crossing(folder: Path) -> RawTables:
    """Read Case Recommender's cleaned Book-Crossing: implicit history, with the rating (1-10) where one was given.

    Raises:
        DataError: a file is missing or malformed.
    """
    log_file, items_file = need_file(folder, "history.tsv"), need_file(folder, "items.tsv")
    users_file = need_file(folder, "users.tsv")
    history = read_delimited(log_file, {"user": ID, "item": ID}, delimiter="\t")
    ratings = read_delimited(
        need_file(folder, "ratings.tsv"), {"user": ID, "item": ID, "rating": pa.float32()}, delimiter="\t"
    )
    names = ("item", "isbn", "title", "author", "year")
    items = read_delimited(items_file, dict.fromkeys(names, pa.string()), delimiter="\t")
    users = read_delimited(users_file, dict.fromkeys(("user", "country", "age"), pa.string()), delimiter="\t")
    log = history.rename_columns(["user_id", "item_id"])
    log = log.append_column("rating", _joined(history, ratings, ("user", "item"), "rating"))
    return RawTables(
        name="book-crossing",
        log=log,
        log_file=str(log_file),
        items=items.rename_columns(["item_id", *names[1:]]),
        items_file=str(items_file),
        users=users.rename_columns(["user_id", "country", "age"]),
        users_file=str(users_file),
        clock="position",
        domains=("books",),
        meta={"source": str(folder), "licence": "Ziegler et al. 2005, research use when acknowledged"},
        warnings=("no clock: the order within a user is that of history.tsv",),
    )


def read_steam(folder: Path) -> RawTables:
    """Read Case Recommender's Steam purchases, with the hours played (NaN = never) as context `hours`.

    Raises:
        DataError: a file is missing or malformed.
    """
    log_file, items_file = need_file(folder, "game_purchase.tsv"), need_file(folder, "item_info.tsv")
    keys = ("User_ID", "Game_ID")
    purchases = read_delimited(log_file, dict.fromkeys(keys, ID), delimiter="\t")
    played = read_delimited(
        need_file(folder, "game_play.tsv"), {"User_ID": ID, "Game_ID": ID, "Hours": pa.float32()}, delimiter="\t"
    )
    items = read_delimited(items_file, {"Game_ID": pa.string(), "Game Name": pa.string()}, delimiter="\t")
    log = purchases.rename_columns(["user_id", "item_id"])
    return RawTables(
        name="steam",
        log=log.append_column("hours", _joined(purchases, played, keys, "Hours")),
        log_file=str(log_file),
        items=items.rename_columns(["item_id", "title"]),
        items_file=str(items_file),
        clock="position",
        domains=("games",),
        meta={"source": str(folder), "licence": "public data, research use; no explicit licence"},
        warnings=("no clock: the order within a user is that of game_purchase.tsv",),
    )


def _joined(left: pa.Table, right: pa.Table, keys: tuple[str, str], value: str) -> pa.Array:
    """`right[value]` of each row of `left` (the first where a key repeats), null where there is none."""
    codes = []
    for name in keys:
        both = pa.chunked_array(
            [*left[name].cast(pa.string()).chunks, *right[name].cast(pa.string()).chunks]
        ).combine_chunks()
        codes.append(np.asarray(both.dictionary_encode().indices, dtype=np.int64))
    pair = codes[0] * (int(codes[1].max()) + 1) + codes[1]
    wanted, have = pair[: left.num_rows], pair[left.num_rows :]
    unique, first = np.unique(have, return_index=True)
    at = np.minimum(np.searchsorted(unique, wanted), len(unique) - 1)
    found = unique[at] == wanted
    return pa.array(right[value].to_numpy()[first[at]], pa.float32(), mask=~found)
