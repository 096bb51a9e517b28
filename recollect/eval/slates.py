"""Slates: one held-out positive among negatives the user never touched, in a random place.

Negatives come from the positive's domain. With `matching="matched"` they share its seen-ness in training and its
popularity. Otherwise the candidate list itself gives the answer away: in a published set, "items never seen in training
first" beats every agent. `recollect.eval.null_scorers.audit` checks.

Matching cuts a domain's seen items into bins of near training popularity. Inside a bin the most popular item is still
the likeliest positive, and no other item is as popular; so the slate is drawn as a systematic sample with inclusion
probability proportional to how fast users who lack an item take it up, given that it includes the positive. If
positives follow that rate inside a bin, every member of such a slate is equally likely to be the positive, and
popularity says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from recollect.errors import ConfigError, InputError
from recollect.rng import stream
from recollect.types import Interactions

Matching = Literal["matched", "uniform"]

ITEMS_PER_BIN_AND_CANDIDATE = 5


@dataclass(frozen=True)
class Slates:
    """Cases to rank.

    user, row, time, domain: (C,) of the positive's event; `row` is its position in the log.  candidates: (C, S)
    int64 item indices, distinct in a row.  target: (C,) position of the positive in `candidates`.
    relaxed: (C,) bool, True where the domain held too few items as seen and as popular as the positive.
    """

    user: np.ndarray
    row: np.ndarray
    time: np.ndarray
    domain: np.ndarray
    candidates: np.ndarray
    target: np.ndarray
    relaxed: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    @property
    def size(self) -> int:
        """Candidates per case."""
        return self.candidates.shape[1]

    @property
    def positive(self) -> np.ndarray:
        """(C,) item index of each positive."""
        return self.candidates[np.arange(len(self)), self.target]

    def take(self, index: np.ndarray) -> Slates:
        """The cases `index` (positions or a mask), in that order."""
        return Slates(
            *(
                getattr(self, name)[index]
                for name in ("user", "row", "time", "domain", "candidates", "target", "relaxed")
            )
        )


def training_mask(train_rows: np.ndarray, n_rows: int) -> np.ndarray:
    """(N,) bool mask from a mask or from row numbers."""
    train_rows = np.asarray(train_rows)
    if train_rows.dtype == bool:
        if train_rows.shape != (n_rows,):
            raise InputError(f"the training mask has shape {train_rows.shape} where the log has {n_rows} rows")
        return train_rows
    mask = np.zeros(n_rows, dtype=bool)
    mask[train_rows.astype(np.int64)] = True
    return mask


def uptake(popularity: np.ndarray, n_users: int) -> np.ndarray:
    """Relative rate at which users who lack an item take it up: -log(1 - popularity / n_users).

    Equal to the share of buyers for rare items; larger for items most users already have, who can buy them no more.
    """
    return -np.log1p(-np.minimum(popularity, n_users - 0.5) / n_users)


class _Pools:
    """Items of one domain, least popular first: the never-seen ones, then bins of seen ones.

    A bin holds whole popularity levels, at least 5 items per candidate, and no item so popular that a fair slate would
    need it more than once.
    """

    def __init__(self, items: np.ndarray, popularity: np.ndarray, rate: np.ndarray, size: int) -> None:
        self.items = items
        seen = items[popularity[items] > 0]
        seen = seen[np.argsort(popularity[seen], kind="stable")]
        count = popularity[seen]
        last_of_level = np.flatnonzero(np.diff(count, append=np.inf))
        ends: list[int] = [0]
        for end in (last_of_level + 1).tolist():
            if end - ends[-1] >= ITEMS_PER_BIN_AND_CANDIDATE * size:
                ends.append(end)
        if ends[-1] < len(seen):
            # The remainder is the head; it joins the bin below.
            ends = [*ends[:-1], len(seen)] if len(ends) > 1 else [0, len(seen)]
        speed = rate[seen]
        while len(ends) > 2 and speed[-1] * size > speed[ends[-2] :].sum():
            del ends[-2]
        self.bins = [items[popularity[items] == 0], *(seen[i:j] for i, j in pairwise(ends))]
        self.upper = np.array([popularity[part[-1]] for part in self.bins[1:]])

    def bin_of(self, popularity: int) -> int:
        if popularity == 0 or not len(self.upper):
            return 0
        return 1 + min(int(np.searchsorted(self.upper, popularity)), len(self.upper) - 1)


def _uniform(generator: np.random.Generator, pool: np.ndarray, banned: np.ndarray, count: int) -> np.ndarray:
    """At most `count` distinct items of `pool` that are not `banned`."""
    if len(pool) > 64 * count:
        chosen: dict[int, None] = {}
        for _ in range(8):
            for item in pool[generator.integers(len(pool), size=2 * count)].tolist():
                if not banned[item]:
                    chosen.setdefault(item)
            if len(chosen) >= count:
                return np.array(list(chosen)[:count], dtype=np.int64)
    return generator.permutation(pool[~banned[pool]])[:count]


def _inclusion(weight: np.ndarray, size: int) -> np.ndarray:
    """Inclusion probabilities in proportion to `weight`, at most 1, that sum to `size` (<= number of weights)."""
    certain = np.zeros(len(weight), dtype=bool)
    while True:
        rest = weight[~certain].sum()
        probability = np.where(certain, 1.0, (size - certain.sum()) * weight / max(rest, 1e-300))
        over = (probability > 1.0) & ~certain
        if not over.any():
            return probability
        certain |= over


def _systematic(
    generator: np.random.Generator, eligible: np.ndarray, weight: np.ndarray, own_weight: float, count: int
) -> np.ndarray:
    """`count` of `eligible` (n,): the rest of a systematic sample of count + 1 that includes an item of `own_weight`.

    All items lie in random order on a circle, each as long as its inclusion probability; points one unit apart, the
    first inside the given item, pick the others.
    """
    length = _inclusion(np.append(weight, own_weight), count + 1)
    own = len(eligible)
    while True:
        order = generator.permutation(own + 1)
        edges = np.concatenate([[0.0], np.cumsum(length[order])])
        place = int(np.flatnonzero(order == own)[0])
        start = edges[place] + generator.random() * length[own]
        points = (start + np.arange(1, count + 1)) % edges[-1]
        hit = order[np.minimum(np.searchsorted(edges, points, side="right") - 1, own)]
        # Rounding at an edge could hit one item twice; such a draw is repeated.
        if len(set(hit.tolist()) - {own}) == count:
            return eligible[hit]


def _matched(
    generator: np.random.Generator,
    pools: _Pools,
    rate: np.ndarray,
    own: int,
    own_rate: float,
    banned: np.ndarray,
    count: int,
) -> tuple[np.ndarray, bool]:
    """Negatives like the positive (of popularity `own`), and whether items of the other seen-ness had to help out."""
    home = pools.bin_of(own)
    others = range(1, len(pools.bins))
    if home == 0:
        kin = _uniform(generator, pools.bins[0], banned, count)
    else:
        pool = pools.bins[home]
        eligible = pool[~banned[pool]]
        for bin_ in sorted(others, key=lambda bin_: (abs(bin_ - home), bin_)):
            if len(eligible) >= count:
                break
            if bin_ != home:
                more = pools.bins[bin_]
                eligible = np.concatenate([eligible, more[~banned[more]]])
        kin = eligible if len(eligible) <= count else _systematic(generator, eligible, rate[eligible], own_rate, count)
    if len(kin) == count:
        return kin, False
    strangers = np.concatenate([pools.bins[bin_] for bin_ in others]) if home == 0 and len(others) else pools.bins[0]
    return np.concatenate([kin, _uniform(generator, strangers, banned, count - len(kin))]), True


def sample_slates(
    interactions: Interactions,
    n_items: int,
    item_domain: np.ndarray,
    rows: np.ndarray,
    *,
    size: int = 10,
    matching: Matching = "matched",
    seed: int,
    train_rows: np.ndarray,
    domains: Sequence[str] | None = None,
) -> Slates:
    """Put the event of each of `rows` among `size - 1` items of its domain that its user never touched.

    Args:
        interactions: the whole log; an item the user touches anywhere in it, later too, is no negative.
        n_items: size of the catalogue.
        item_domain: (n_items,) domain index of each item.
        rows: (C,) positions in the log of the positives.
        matching: "matched" = same seen-ness in training and a near popularity; "uniform" = any item of the domain.
        train_rows: mask (N,) or positions of the training rows; popularity is counted there, without the case's own.
        domains: names, for error messages.

    Returns:
        Slates; case c is drawn from the stream (seed, "slate", user, row) and so depends on no other case.

    Raises:
        ConfigError: size or matching is illegal.
        InputError: a domain, less what the user touched, has too few items.

    Source: agentcf_pp 6 ("must sample negatives matched on seen-ness and popularity"); the way is ours.
    """
    if size < 2:
        raise ConfigError(f"a slate needs at least 2 candidates, got {size!r}")
    if matching not in ("matched", "uniform"):
        raise ConfigError(f"matching must be 'matched' or 'uniform', got {matching!r}")
    item_domain = np.asarray(item_domain)
    rows = np.asarray(rows, dtype=np.int64)
    train = training_mask(train_rows, len(interactions))
    popularity = np.bincount(interactions.item[train], minlength=n_items)
    n_buyers = max(len(np.unique(interactions.user[train])), 1)
    rate = uptake(popularity, n_buyers)
    order = np.argsort(interactions.user, kind="stable")
    of_user = interactions.item[order]
    bounds = np.searchsorted(interactions.user[order], [interactions.user[rows], interactions.user[rows] + 1])
    pools: dict[int, _Pools] = {}
    banned = np.zeros(n_items, dtype=bool)
    candidates = np.empty((len(rows), size), dtype=np.int64)
    target = np.empty(len(rows), dtype=np.int64)
    relaxed = np.zeros(len(rows), dtype=bool)
    for case, row in enumerate(rows.tolist()):
        user, positive = int(interactions.user[row]), int(interactions.item[row])
        domain = int(item_domain[positive])
        if domain not in pools:
            pools[domain] = _Pools(np.flatnonzero(item_domain == domain), popularity, rate, size)
        generator = stream(seed, "slate", user, row)
        touched = of_user[bounds[0, case] : bounds[1, case]]
        banned[touched] = True
        if matching == "uniform":
            negatives = _uniform(generator, pools[domain].items, banned, size - 1)
        else:
            own = int(popularity[positive]) - int(train[row])
            own_rate = float(uptake(np.array(own), n_buyers))
            negatives, relaxed[case] = _matched(generator, pools[domain], rate, own, own_rate, banned, size - 1)
        banned[touched] = False
        if len(negatives) < size - 1:
            named = repr(domains[domain]) if domains is not None else str(domain)
            raise InputError(
                f"domain {named} has {len(pools[domain].items)} items, of which user {user} left {len(negatives)} "
                f"untouched; a slate of {size} needs {size - 1}: ask for fewer candidates or drop the domain"
            )
        slate = generator.permutation(np.concatenate([[positive], negatives]))
        candidates[case] = slate
        target[case] = int(np.flatnonzero(slate == positive)[0])
    return Slates(
        user=interactions.user[rows],
        row=rows,
        time=interactions.time[rows],
        domain=item_domain[interactions.item[rows]],
        candidates=candidates,
        target=target,
        relaxed=relaxed,
    )
