"""Interest groups and their shared memory, which is a view over the log (AgentCF++ §3.6-3.7).

Tags of users are embedded and clustered; a cluster is one interest, its group everybody who owns a tag in it. The
shared memory of a group is the last K interactions of its members in a domain before now: no model call, nothing to
write, no way for a member to see the own or a future event.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from recollect.rng import stream_key
from recollect.types import Interactions

POPULARITY_HALF_LIFE = 50.0
POPULARITY_WINDOW = 400


@dataclass(frozen=True)
class Group:
    """One interest: name, its tags, its members (dense user indices, sorted)."""

    name: str
    tags: tuple[str, ...]
    members: tuple[int, ...]


def cluster_count(n_distinct: int, most: int) -> int:
    """min(most, ceil(distinct tags / 4)), at least 1."""
    return max(1, min(most, -(-n_distinct // 4)))


def cluster_vectors(vectors: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    """(T,) labels of scikit-learn's K-means on L2-normalised vectors (T, D); seeded, single-threaded result."""
    from sklearn.cluster import KMeans

    return KMeans(n_clusters=n_clusters, n_init=4, random_state=seed).fit_predict(vectors)


def rank_clusters(
    members: Mapping[int, set[int]],
    occurrences: Mapping[int, int],
    kept: int,
    by: Literal["coverage", "occurrences"],
) -> list[int]:
    """Up to `kept` cluster labels.

    "occurrences": most tag occurrences first (official code). "coverage": greedily the cluster that covers most users
    not covered yet, then most occurrences; those of more than half of the users come last, since what nearly everybody
    shares tells no community apart (our design). Clusters of one user are never an interest *group*.
    """
    shared = {label: who for label, who in members.items() if len(who) >= 2}
    if by == "occurrences":
        return sorted(shared, key=lambda label: (-occurrences[label], label))[:kept]
    half = len(set().union(*shared.values())) / 2
    chosen: list[int] = []
    covered: set[int] = set()
    while shared and len(chosen) < kept:
        best = max(
            sorted(shared),
            key=lambda label: (
                len(members[label]) <= half,
                len(shared[label] - covered),
                occurrences[label],
                -label,
            ),
        )
        chosen.append(best)
        covered |= shared.pop(best)
    return chosen


def build_groups(
    tags: Mapping[int, Sequence[str]],
    vectors: Mapping[str, np.ndarray],
    *,
    kept: int,
    most_clusters: int,
    by: Literal["coverage", "occurrences"],
    seed: int,
) -> list[Group]:
    """Cluster users' tags into groups; unnamed groups carry their most frequent tag as name.

    Args:
        tags: dense user index -> tags, in order of strength; equal tags fall into one group by construction.
        vectors: tag -> (D,) unit vector.
    """
    distinct = sorted({tag for owned in tags.values() for tag in owned})
    if len(distinct) < 2:
        return []
    matrix = np.stack([vectors[tag] for tag in distinct])
    labels = cluster_vectors(
        matrix, cluster_count(len(distinct), most_clusters), stream_key(seed, "groups") & 0x7FFFFFFF
    )
    label_of = dict(zip(distinct, labels.tolist(), strict=True))
    members: dict[int, set[int]] = {}
    occurrences: dict[int, int] = {}
    counts: dict[int, dict[str, int]] = {}
    for user, owned in tags.items():
        for tag in owned:
            label = label_of[tag]
            members.setdefault(label, set()).add(user)
            occurrences[label] = occurrences.get(label, 0) + 1
            counts.setdefault(label, {})[tag] = counts.setdefault(label, {}).get(tag, 0) + 1
    groups = []
    for label in rank_clusters(members, occurrences, kept, by):
        ranked = sorted(counts[label], key=lambda tag: (-counts[label][tag], tag))
        groups.append(Group(ranked[0], tuple(ranked), tuple(sorted(members[label]))))
    return groups


def groups_of_histories(vectors: Mapping[int, np.ndarray], *, kept: int, seed: int) -> list[Group]:
    """The paper's "w/o group" ablation: users clustered by the mean embedding of their whole history."""
    users = sorted(vectors)
    if len(users) < 2:
        return []
    matrix = np.stack([vectors[user] for user in users])
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    labels = cluster_vectors(
        matrix / np.where(norms > 0, norms, 1),
        min(kept, -(-len(users) // 2)),
        stream_key(seed, "histories") & 0x7FFFFFFF,
    )
    return [
        Group(f"readers {label + 1}", (), tuple(user for user, at in zip(users, labels, strict=True) if at == label))
        for label in range(int(labels.max()) + 1)
    ]


def dump_groups(groups: Sequence[Group]) -> str:
    """Canonical JSON text of a set of groups."""
    return json.dumps([[g.name, list(g.tags), list(g.members)] for g in groups], ensure_ascii=False)


def load_groups(text: str) -> list[Group]:
    """Inverse of `dump_groups`."""
    return [Group(name, tuple(tags), tuple(members)) for name, tags, members in json.loads(text)]


class GroupViews:
    """Shared memories as queries on the log.

    Args:
        log: the interaction log.
        rows: the rows a view may show, in global time order. With a real clock these are all rows (a view only looks
            before `now`); where time is a position, rows held out for testing must not be among them.
    """

    def __init__(self, log: Interactions, rows: np.ndarray, n_domains: int) -> None:
        self._user, self._item, self._time = log.user, log.item, log.time
        domain = log.domain if log.domain is not None else np.zeros(len(log), dtype=np.int16)
        self._rows_of_domain = [rows[domain[rows] == d] for d in range(n_domains)]
        self._cache: dict[tuple[tuple[int, ...], int], np.ndarray] = {}

    def _rows(self, members: tuple[int, ...], domain: int) -> np.ndarray:
        key = (members, domain)
        if key not in self._cache:
            rows = self._rows_of_domain[domain]
            self._cache[key] = rows[np.isin(self._user[rows], members)]
        return self._cache[key]

    def _before(self, members: tuple[int, ...], domain: int, now: int, user: int, count: int) -> np.ndarray:
        rows = self._rows(members, domain)
        stop = int(np.searchsorted(self._time[rows], now, side="left"))
        span = count
        while True:
            block = rows[max(0, stop - span) : stop]
            others = block[self._user[block] != user]
            if len(others) >= count or len(block) == stop:
                return others[-count:]
            span *= 2

    def recent(self, group: Group, domain: int, now: int, user: int, count: int) -> np.ndarray:
        """(≤ count,) items: what other members last took in the domain strictly before `now`, oldest first."""
        return self._item[self._before(group.members, domain, now, user, count)]

    def popularity(self, groups: Sequence[Group], domain: int, now: int, user: int) -> dict[int, float]:
        """Recency-weighted counts of items that members of `groups` took before `now`, averaged over the groups.

        In each group's memory the k-th last event weighs 2^(-k/50); a group of n members enters the average with weight
        1/n, for what is taken in a large group says less of its interest. This is popularity inside the community
        without a social graph (our reading of the shared memory as evidence; the paper gives the model the titles).
        """
        held = [group for group in groups if group.members]
        total = sum(1 / len(group.members) for group in held)
        weights: dict[int, float] = {}
        for group in held:
            share = 1 / len(group.members) / total
            rows = self._before(group.members, domain, now, user, POPULARITY_WINDOW)
            for age, item in enumerate(self._item[rows][::-1].tolist()):
                weights[item] = weights.get(item, 0.0) + share * 2.0 ** (-age / POPULARITY_HALF_LIFE)
        return weights
