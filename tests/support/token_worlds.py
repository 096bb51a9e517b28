"""A shop whose item vectors, titles and users follow a few themes: for tests of tokenizing a catalogue."""

import numpy as np
from support.recommender_worlds import small_log

from recollect.types import Catalog, Dataset

HOSTILE = "<img src=x onerror=alert(1)>"


def themed_vectors(n_items=60, n_themes=6, dimension=12, seed=0):
    """(n_items, dimension) float32 rows near one of n_themes centres; item i has theme i % n_themes."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(n_themes, dimension))
    rows = centres[np.arange(n_items) % n_themes] + 0.15 * generator.normal(size=(n_items, dimension))
    return rows.astype(np.float32)


def themed_log(n_users=80, n_items=60, n_themes=6, *, length=8, seed=0):
    """Users who stay with one theme nine times out of ten; every item is about as popular as any other."""
    generator = np.random.default_rng(seed)
    sequences = []
    for user in range(n_users):
        own = np.flatnonzero(np.arange(n_items) % n_themes == user % n_themes)
        order = generator.permutation(n_items)
        stay = [int(item) for item in order if item in own]
        stray = [int(item) for item in order if item not in own]
        items = []
        for _ in range(length):
            pool = stay if stay and generator.random() < 0.9 else stray
            items.append(pool.pop())
        sequences.append(items)
    return small_log(sequences, n_items, name="shop")


def described(dataset, titles, texts=None):
    """The same log with other titles (and texts)."""
    catalog = dataset.catalog
    other = Catalog(
        catalog.item_ids,
        np.array(titles, dtype=object),
        catalog.domain,
        catalog.categories,
        catalog.texts if texts is None else np.array(texts, dtype=object),
    )
    return Dataset(dataset.name, dataset.interactions, other, dataset.users, dataset.domains, dataset.meta)


def write_shop(folder, dataset, titles=None):
    """The log as a raw csv data set in `folder`."""
    folder.mkdir()
    log = dataset.interactions
    lines = [f"u{user},i{item},{time}" for user, item, time in zip(log.user, log.item, log.time, strict=True)]
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(lines) + "\n")
    titles = titles or [f"thing {item}" for item in range(dataset.n_items)]
    rows = "".join(f'i{item},"{title}"\n' for item, title in enumerate(titles))
    (folder / "items.csv").write_text("item_id,title\n" + rows)
    return folder


class CountingEmbedder:
    """Embeds a text by the bytes it holds, counts how many texts it was asked for, and may break down."""

    def __init__(self, breaks_after=None, dimension=8):
        self.texts, self.calls = 0, 0
        self._breaks_after, self._dimension = breaks_after, dimension

    fingerprint = "counting/1"

    def embed(self, texts):
        if self._breaks_after is not None and self.calls >= self._breaks_after:
            raise RuntimeError("the embedder broke down")
        self.calls += 1
        self.texts += len(texts)
        rows = [
            np.bincount(np.frombuffer(text.encode(), np.uint8) % self._dimension, minlength=self._dimension)
            for text in texts
        ]
        # What a real embedder does too: a row's last bits depend on its batch mates.
        return np.array(rows, dtype=np.float32) * np.float32(1 + 1e-7 * len(texts))

    def close(self):
        pass
