"""Small logs and fixed scorers for tests of the full-ranking evaluator."""

from collections.abc import Sequence

import numpy as np

from recollect.data.examples import training_sequences
from recollect.rng import stream
from recollect.types import Catalog, Dataset, Interactions, Users


def log_dataset(
    user: np.ndarray,
    item: np.ndarray,
    time: np.ndarray,
    n_items: int | None = None,
    *,
    categories: Sequence[tuple[str, ...]] | None = None,
    attributes: dict[str, np.ndarray] | None = None,
) -> Dataset:
    """A data set over a log already sorted by (user, time); ids are "u0", "i0" and so on."""
    user, item, time = (np.asarray(column, dtype=np.int64) for column in (user, item, time))
    n_items = int(item.max()) + 1 if n_items is None else n_items
    names = np.array([f"i{index}" for index in range(n_items)], dtype=object)
    n_users = int(user.max()) + 1
    catalog = Catalog(
        item_ids=names,
        titles=names,
        domain=np.zeros(n_items, dtype=np.int16),
        categories=categories or [()] * n_items,
        texts=np.full(n_items, None, dtype=object),
    )
    users = Users(np.array([f"u{index}" for index in range(n_users)], dtype=object), attributes or {})
    log = Interactions(user=user, item=item, time=time, row=np.arange(len(user)))
    return Dataset("toy", log, catalog, users, ("toy",), {"clock": "unix"})


def random_world(seed: int, n_users: int = 40, n_items: int = 60, longest: int = 25) -> Dataset:
    """A log with repeats, many tied times, users of 3 events and more; every item occurs."""
    generator = stream(seed, "random-world")
    lengths = generator.integers(3, longest, size=n_users)
    user = np.repeat(np.arange(n_users), lengths)
    item = np.minimum(generator.integers(n_items, size=len(user)), generator.integers(n_items, size=len(user)))
    item[generator.permutation(len(item))[:n_items]] = np.arange(n_items)
    time = generator.integers(1, 2000, size=len(user))
    order = np.lexsort((time, user))
    return log_dataset(user, item[order], time[order], n_items)


class FixedScores:
    """A model whose row c answers the c-th history it is shown, counted over calls."""

    name = "fixed"

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores
        self.shown: list[np.ndarray] = []

    def score(self, histories, candidates=None):
        first = len(self.shown)
        self.shown += list(histories)
        return self.scores[first : len(self.shown)]


class MostPopular:
    """Training counts, the same for everybody."""

    name = "most-popular"

    def __init__(self, dataset: Dataset, rows: np.ndarray) -> None:
        self.count = np.bincount(dataset.interactions.item[rows], minlength=dataset.n_items).astype(np.float32)

    def score(self, histories, candidates=None):
        return np.broadcast_to(self.count, (len(histories), len(self.count)))


class LastItemMarkov:
    """Training count of the adjacent pair (last item of the history, candidate)."""

    name = "last-item-markov"

    def __init__(self, dataset: Dataset, rows: np.ndarray) -> None:
        sequences = training_sequences(dataset, rows)
        adjacent = np.ones(len(sequences.items) - 1, dtype=bool)
        adjacent[sequences.starts[1:-1] - 1] = False
        self.count = np.zeros((dataset.n_items, dataset.n_items), dtype=np.float32)
        pair = (sequences.items[:-1][adjacent], sequences.items[1:][adjacent])
        np.add.at(self.count, pair, 1)

    def score(self, histories, candidates=None):
        return self.count[[history[-1] for history in histories]]
