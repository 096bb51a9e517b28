"""How interactions are spread over a catalogue, and how much each user likes what is popular (fairlrm 2 and 3).

Items are classed by their training counts: popular (P) and niche (N), by one of two conventions that must not be mixed
in one table: `items20`, P = the ceil(.2 n) most counted items (Pareto rule [abstract]), and `mass80`, P = the shortest
run of most counted items that holds 80 % of all counts. Users are classed by the share rho of their training history
that is in P. Everything is counted on training rows; nothing here sees a held-out event.

Not covered: metrics of lists; see `recollect.eval.list_metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from recollect.errors import ConfigError, DataError, InputError
from recollect.eval.class_calibration import popularity_classes
from recollect.eval.list_metrics import gini
from recollect.eval.popularity import HEAD_RULES, HeadRule, head_items

Convention = HeadRule
CONVENTIONS = HEAD_RULES
Group = Literal["niche", "balanced", "mainstream"]
GROUPS: tuple[Group, ...] = ("niche", "balanced", "mainstream")
Grouping = Literal["quantiles", "half"]

BANDS = ("head", "mid", "tail")
OUTER_SHARE = 0.2
PRIOR_EVENTS = 5.0


@dataclass(frozen=True)
class PopularityProfile:
    """The item side. Arrays are (n_items,).

    count: int64 training events.  rank: int64, 0 = most counted, ties by item index.  percentile: float64 in (0, 1],
    the share of items ranked at or below this one.  is_popular: bool, class P.  band: int64 index into `BANDS`: the
    most counted fifth of the items, the least counted fifth, and what is between [our design].
    popular_share: share of the events held by P.  gini: of the counts, 0 = uniform.
    """

    convention: Convention
    count: np.ndarray
    rank: np.ndarray
    percentile: np.ndarray
    is_popular: np.ndarray
    band: np.ndarray
    popular_share: float
    gini: float

    @property
    def n_items(self) -> int:
        """Items of the catalogue, uncounted ones included."""
        return len(self.count)

    @property
    def n_popular(self) -> int:
        """Items of class P."""
        return int(self.is_popular.sum())

    @property
    def decile(self) -> np.ndarray:
        """(n_items,) int64 in 1..10; 10 = among the tenth of items counted most."""
        return np.ceil(self.percentile * 10 - 1e-9).astype(np.int64)

    @classmethod
    def of(cls, items: np.ndarray, n_items: int, convention: Convention = "items20") -> PopularityProfile:
        """Class a catalogue by its training events.

        Args:
            items: (E,) the item of every training event, each in 0..n_items-1.
            n_items: size of the catalogue.
            convention: which items are popular.

        Raises:
            ConfigError: another convention.
            DataError: no event.
            InputError: an item outside the catalogue.
        """
        if convention not in CONVENTIONS:
            raise ConfigError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
        items = np.asarray(items)
        if not len(items):
            raise DataError("popularity needs at least one training event, got none")
        if items.min() < 0 or items.max() >= n_items:
            raise InputError(f"items must be between 0 and {n_items - 1}, got {items.min()}..{items.max()}")
        count = np.bincount(items, minlength=n_items).astype(np.int64)
        rank = np.empty(n_items, dtype=np.int64)
        rank[np.argsort(-count, kind="stable")] = np.arange(n_items)  # ties by item index
        is_popular = head_items(count, convention)
        return cls(
            convention=convention,
            count=count,
            rank=rank,
            percentile=1.0 - rank / n_items,
            is_popular=is_popular,
            band=popularity_classes(count).argmax(axis=1),
            popular_share=float(count[is_popular].sum() / count.sum()),
            gini=gini(count),
        )


@dataclass(frozen=True)
class UserProfile:
    """One user's side.

    n_events: training events.  popular_share: rho, NaN for an empty history.  smoothed_share: rho~, pulled towards the
    share of all events that P holds by 5 events [our design].  group: by rho among all users.
    """

    n_events: int
    popular_share: float
    smoothed_share: float
    group: Group

    def quota(self, k: int) -> int:
        """round(k rho~), halves upwards: the popular items a list of k should hold (component U2)."""
        return math.floor(k * self.smoothed_share + 0.5)


@dataclass(frozen=True)
class UserProfiles:
    """The user side of a whole log: the thresholds that make the groups.

    low, high: rho up to `low` is niche, from `high` on mainstream; equal rho always means the same group, so sizes are
    20/60/20 up to ties, and nobody is in an outer group where low >= high.
    """

    popularity: PopularityProfile
    low: float
    high: float

    @classmethod
    def of(
        cls, popularity: PopularityProfile, histories: Iterable[np.ndarray], grouping: Grouping = "quantiles"
    ) -> UserProfiles:
        """Set the groups' thresholds by the training histories (T,) of all users; empty ones do not count.

        Args:
            grouping: "quantiles", the lowest and the highest fifth of users by rho [our design, the usual one], or
                "half", two groups split at rho = .5.

        Raises:
            ConfigError: another grouping.
            DataError: no history.
        """
        if grouping not in ("quantiles", "half"):
            raise ConfigError(f"grouping must be 'quantiles' or 'half', got {grouping!r}")
        shares = np.sort([popularity.is_popular[history].mean() for history in histories if len(history)])
        if not len(shares):
            raise DataError("user profiles need at least one training history, got none")
        if grouping == "half":
            return cls(popularity, float(np.nextafter(0.5, 0)), 0.5)
        outer = math.ceil(OUTER_SHARE * len(shares) - 1e-9)
        return cls(popularity, float(shares[outer - 1]), float(shares[-outer]))

    def describe(self, history: np.ndarray) -> UserProfile:
        """The profile of one training history (T,), items in time order."""
        n_popular = int(self.popularity.is_popular[history].sum())
        smoothed = (PRIOR_EVENTS * self.popularity.popular_share + n_popular) / (PRIOR_EVENTS + len(history))
        share = n_popular / len(history) if len(history) else math.nan
        return UserProfile(len(history), share, smoothed, self.group_of(share))

    def group_of(self, share: float) -> Group:
        """The group of a user whose history's popular share is `share`; NaN (no history) is balanced."""
        if self.low >= self.high:
            return "balanced"
        if share <= self.low:
            return "niche"
        return "mainstream" if share >= self.high else "balanced"
