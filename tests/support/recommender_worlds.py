"""Small logs for tests of recommenders and their evaluation."""

import numpy as np

from recollect.types import Catalog, Dataset, Interactions, Users


def small_log(sequences, n_items, *, times=None, titles=None, name="small"):
    """A data set with a clock from one item list per user; event t of user u happens at 100 t + u unless given."""
    user = np.concatenate([np.full(len(items), index) for index, items in enumerate(sequences)])
    item = np.concatenate([np.asarray(items, dtype=np.int64) for items in sequences])
    if times is None:
        times = [[100 * position + index for position in range(len(items))] for index, items in enumerate(sequences)]
    log = Interactions(
        user=user.astype(np.int64),
        item=item,
        time=np.concatenate([np.asarray(row, dtype=np.int64) for row in times]),
        row=np.arange(len(item), dtype=np.int64),
    )
    titles = [f"item {index}" for index in range(n_items)] if titles is None else titles
    catalog = Catalog(
        item_ids=np.array([f"i{index}" for index in range(n_items)], dtype=object),
        titles=np.array(titles, dtype=object),
        domain=np.zeros(n_items, dtype=np.int16),
        categories=[()] * n_items,
        texts=np.full(n_items, None, dtype=object),
    )
    users = Users(np.array([f"u{index}" for index in range(len(sequences))], dtype=object))
    return Dataset(name, log, catalog, users, ("things",), {"clock": "unix"})


def random_log(n_users=40, n_items=25, *, length=12, seed=0, n_groups=2):
    """Users of `n_groups` tastes who walk mostly forwards through their group's items: there is something to learn."""
    generator = np.random.default_rng(seed)
    per_group = n_items // n_groups
    sequences = []
    for user in range(n_users):
        first = (user % n_groups) * per_group
        at = int(generator.integers(per_group))
        items = []
        for _ in range(length):
            items.append(first + at if generator.random() < 0.9 else int(generator.integers(n_items)))
            at = (at + int(generator.integers(1, 3))) % per_group
        sequences.append(items)
    return small_log(sequences, n_items)
