"""Small interaction logs with domains and a clock, for tests of streams of recommendation tasks."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recollect.data.folder import write_folder
from recollect.rng import stream
from recollect.types import Catalog, Dataset, Interactions, Users

START = int(datetime.datetime(2023, 11, 20, tzinfo=datetime.UTC).timestamp())
DAY = 86_400
COLOURS = ("red", "blue", "green", "white", "black", "pink")
THINGS = ("lamp", "chair", "book", "cup", "shoe", "clock", "brush", "plate")


def make_log(
    user: Sequence[int],
    item: Sequence[int],
    time: Sequence[int],
    *,
    titles: Sequence[str],
    domain: Sequence[int] | None = None,
    domains: tuple[str, ...] = ("things",),
    clock: str = "unix",
    name: str = "small",
) -> Dataset:
    """A data set from columns; `domain` is of the items."""
    n_items, n_users = len(titles), max(user) + 1
    order = np.lexsort((np.arange(len(user)), time, user))
    columns = [np.asarray(values, dtype=np.int64)[order] for values in (user, item, time)]
    of_item = np.zeros(n_items, dtype=np.int16) if domain is None else np.asarray(domain, dtype=np.int16)
    return Dataset(
        name,
        Interactions(*columns, domain=of_item[columns[1]], row=np.arange(len(user))),
        Catalog(
            item_ids=np.array([f"i{number}" for number in range(n_items)], dtype=object),
            titles=np.array(titles, dtype=object),
            domain=of_item,
            categories=tuple(() for _ in titles),
            texts=np.full(n_items, None, dtype=object),
        ),
        Users(np.array([f"u{number}" for number in range(n_users)], dtype=object)),
        domains,
        {"name": name, "clock": clock},
    )


def titles_of(n: int) -> list[str]:
    """Distinct titles of two words."""
    return [f"{COLOURS[at % len(COLOURS)]} {THINGS[at // len(COLOURS) % len(THINGS)]}" for at in range(n)]


def random_log(
    seed: int, n_users: int = 12, n_events: int = 120, *, unique_items: bool = False, **more: Any
) -> Dataset:
    """Random events of two domains over half a year.

    unique_items: every event has an item of its own, so that an item tells its event.
    """
    draws = stream(seed, "random log")
    n_items = n_events if unique_items else 24
    item = draws.permutation(n_items) if unique_items else draws.integers(n_items, size=n_events)
    return make_log(
        draws.integers(n_users, size=n_events).tolist(),
        item.tolist(),
        (START + draws.integers(180 * DAY, size=n_events)).tolist(),
        titles=[f"{title} {number}" for number, title in enumerate(titles_of(n_items))],
        domain=[number % 2 for number in range(n_items)],
        domains=("left", "right"),
        **more,
    )


def walks(steps: Sequence[int], n_items: int = 8, n_users: int = 16, length: int = 6) -> Dataset:
    """One domain per entry of `steps`, all over the same titles; in domain d every user walks i, i + steps[d], …"""
    user, item, time = [], [], []
    for number, step in enumerate(steps):
        for who in range(n_users):
            for at in range(length):
                user.append(who)
                item.append(number * n_items + (who + at * step) % n_items)
                time.append(START + (number * length + at) * DAY)
    return make_log(
        user,
        item,
        time,
        titles=titles_of(n_items) * len(steps),
        domain=[number for number in range(len(steps)) for _ in range(n_items)],
        domains=tuple("abcdef"[: len(steps)]),
        name="walks",
    )


def written(dataset: Dataset, folder: Path) -> Path:
    """The data set as a folder."""
    write_folder(dataset, folder)
    return folder


SMALL_DOMAINS = {
    "benchmark": "domains",
    "train_examples": 0,
    "test_examples": 0,
    "epochs": 1,
    "batch_size": 4,
    "eval_batch": 4,
    "max_history": 8,
    "keep_layers": None,
    "checkpoint_every": 1,
    "precision": "fp32",
    "learning_rate": 0.02,
}
"""Options that make a run of a small log take a second."""
