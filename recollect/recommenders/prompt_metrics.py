"""What lists of prompted and re-ranked candidates are worth: end to end over the full catalogue.

A target that was not retrieved is a miss. "retrieved" columns look at the cases whose target was among the candidates
only, and say what the ranking step itself did. List metrics are those of `recollect.eval` on the same names.
Source: fairlrm 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recollect.eval.case_table import next_item_metrics
from recollect.eval.class_calibration import calibration_columns
from recollect.eval.list_metrics import exposure_intervals, popularity_lift
from recollect.eval.pareto import PairedDraws
from recollect.eval.popularity import (
    average_popularity,
    log_popularity_difference,
    long_tail_coverage,
    profile_means,
    tail_columns,
)
from recollect.eval.popularity_profiles import BANDS, GROUPS
from recollect.eval.statistics import bootstrap_ratios, centred, entry, paired_difference
from recollect.recommenders.prompt_cases import PromptCases


@dataclass(frozen=True)
class Lists:
    """One method: items (U, C), best first, and their scores (U, C), descending."""

    name: str
    items: np.ndarray
    scores: np.ndarray

    def take(self, name: str, order: np.ndarray) -> Lists:
        """Re-ranked by positions (U, C); scores become minus the place."""
        places = np.broadcast_to(-np.arange(order.shape[1], dtype=np.float64), order.shape)
        return Lists(name, np.take_along_axis(self.items, order, axis=1), places)


@dataclass(frozen=True)
class Names:
    """How metrics are called: the cut-off, the convention of head and tail, and the mark of inserted targets."""

    k: int
    convention: str
    mark: str = ""

    def __call__(self, metric: str) -> str:
        """A metric's full name, e.g. "mrmc@10:head/tail"."""
        suffix = {"ltc": self.convention, "tail_share": self.convention}.get(metric, "")
        if metric == "mrmc":
            suffix = "head/tail" if self.convention == "items20" else f"head/tail({self.convention})"
        if metric == "mrmc_bands":
            metric, suffix = "mrmc", "/".join(BANDS)
        return f"{metric}@{self.k}" + (f":{suffix}" if suffix else "") + self.mark


class Judge:
    """Judges lists of one set of cases; everything that does not depend on the list is computed once."""

    def __init__(self, cases: PromptCases, k: int, *, inserted: bool = False) -> None:
        self.cases = cases
        self.k = k
        self.name = Names(k, cases.popularity.convention, "~inserted" if inserted else "")
        self.tail = ~cases.popularity.is_popular
        self._classes = np.stack([cases.popularity.is_popular, self.tail], axis=1).astype(np.float64)
        self._bands = np.eye(len(BANDS))[cases.popularity.band]
        self.users = cases.cases.user
        self.retrieved = cases.retrieved
        self._draws: dict[tuple[int, int], PairedDraws] = {}
        self._profile = profile_means(cases.cases, cases.popularity.count.astype(np.float64))

    def accuracy(self, items: np.ndarray) -> dict[str, np.ndarray]:
        """ndcg, recall (U,) at k of lists (U, C); 0 where the target is not in the first k."""
        hit = items == self.cases.targets[:, None]
        listed = hit.any(axis=1)
        place = np.where(listed, hit.argmax(axis=1), items.shape[1])
        table = next_item_metrics(place, np.zeros_like(place), (self.k,), listed)
        return {self.name("ndcg"): table[f"ndcg@{self.k}"], self.name("recall"): table[f"hr@{self.k}"]}

    def miscalibration(self, items: np.ndarray) -> np.ndarray:
        """(U,) MRMC over popular and niche."""
        return calibration_columns(items[:, : self.k], self.cases.cases, self._classes)["mrmc"]

    def columns(self, items: np.ndarray) -> dict[str, np.ndarray]:
        """Every per-user metric (U,)."""
        top, cases, popularity = items[:, : self.k], self.cases.cases, self.cases.popularity.count
        return self.accuracy(items) | {
            self.name("mrmc"): self.miscalibration(items),
            self.name("mrmc_bands"): calibration_columns(top, cases, self._bands)["mrmc"],
            self.name("tail_share"): tail_columns(top, self.tail)[0],
            self.name("lpd"): log_popularity_difference(top, cases, popularity),
        }

    def coverage(self, items: np.ndarray) -> float:
        """LtC: share of the niche items that somebody is recommended."""
        return long_tail_coverage(items[:, : self.k], self.tail)

    def draws(self, resamples: int, seed: int) -> PairedDraws:
        """Resamples of these cases' users, made once; every curve and gap shares them."""
        if (resamples, seed) not in self._draws:
            self._draws[resamples, seed] = PairedDraws(len(self.cases), resamples, seed)
        return self._draws[resamples, seed]

    def table(self, items: np.ndarray, *, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
        """Report entries of every metric of lists (U, C)."""
        top = items[:, : self.k]
        columns = self.columns(items)
        ones = np.ones(len(self.users))
        intervals = bootstrap_ratios(
            {name: (column, ones) for name, column in columns.items()}
            | {
                f"{name}|retrieved": (column * self.retrieved, self.retrieved.astype(np.float64))
                for name, column in self.accuracy(items).items()
            },
            self.users,
            n=resamples,
            seed=seed,
        )
        every = np.ones_like(self.tail)
        whole = exposure_intervals(top, self.users, every, resamples=resamples, seed=seed)
        popularity = average_popularity(top, self.cases.popularity.count)
        lift = popularity_lift(self.users, popularity, self._profile, resamples, seed)
        draws = self.draws(resamples, seed)
        shares = {
            name: draws.interval(value, draws.coverage(top, counted))
            for name, value, counted in (
                ("ltc", self.coverage(items), self.tail),
                ("coverage", whole["coverage"].value, every),
            )
        }
        return (
            {name: entry(interval) for name, interval in intervals.items()}
            | {self.name(name): entry(interval) for name, interval in shares.items()}
            | {self.name("gini"): entry(whole["gini"]), self.name("dgap"): entry(lift)}
        )

    def groups(self, items: np.ndarray, *, resamples: int, seed: int) -> dict[str, Any]:
        """{metric: {"niche", "balanced", "mainstream", "gap": entry, "worst"}} of every metric of `table`.

        gap: largest minus smallest group value, its draws moved onto the value, since chance alone makes it positive;
        None for what the lists of a group have together, which grows with its size. worst: the group with the lowest
        ndcg or recall, or the highest miscalibration.
        """
        draws = self.draws(resamples, seed)
        inside: dict[str, np.ndarray] = {
            group: chosen for group in GROUPS if (chosen := self.cases.groups == group).any()
        }
        found: dict[str, Any] = {}
        for name, column in self.columns(items).items():
            values = {group: float(column[chosen].mean()) for group, chosen in inside.items()}
            drawn = {group: draws.group_mean(column, chosen) for group, chosen in inside.items()}
            found[name] = self._by_group(values, drawn, draws)
            if name.startswith(("mrmc", "ndcg", "recall")):
                pick = max if name.startswith("mrmc") else min
                found[name]["worst"] = pick(values, key=lambda group: values[group])
        shown = average_popularity(items[:, : self.k], self.cases.popularity.count)
        means = {group: (shown[chosen].mean(), self._profile[chosen].mean()) for group, chosen in inside.items()}
        lifted = {
            group: draws.group_mean(shown, chosen) / draws.group_mean(self._profile, chosen) - 1
            for group, chosen in inside.items()
        }
        lifts = {group: float(of_list / of_profile - 1) for group, (of_list, of_profile) in means.items()}
        found[self.name("dgap")] = self._by_group(lifts, lifted, draws)
        return found | self._exposure_by_group(items, inside, resamples=resamples, seed=seed)

    def _by_group(
        self, values: Mapping[str, float], drawn: Mapping[str, np.ndarray], draws: PairedDraws
    ) -> dict[str, Any]:
        """Entries of each group and of the gap between them, from values and draws {group: (B,)}."""
        size = {group: int((self.cases.groups == group).sum()) for group in values}
        gap = max(values.values()) - min(values.values())
        every = np.stack(list(drawn.values()))
        apart = centred(gap, every.max(axis=0) - every.min(axis=0))
        return {
            **{
                group: entry(draws.interval(value, drawn[group])._replace(n=size[group]))
                for group, value in values.items()
            },
            "gap": entry(draws.interval(gap, apart)),
            "worst": None,
        }

    def _exposure_by_group(
        self, items: np.ndarray, inside: Mapping[str, np.ndarray], *, resamples: int, seed: int
    ) -> dict[str, Any]:
        """ltc, coverage and gini of each group's lists; the three groups are not of one size, so there is no gap."""
        found: dict[str, Any] = {self.name(name): {"gap": None, "worst": None} for name in ("ltc", "coverage", "gini")}
        every = np.ones_like(self.tail)
        for group, chosen in inside.items():
            whole = exposure_intervals(
                items[chosen, : self.k],
                self.users[chosen],
                every,
                tails={"": self.tail},
                resamples=resamples,
                seed=seed,
            )
            for name in ("ltc", "coverage", "gini"):
                found[self.name(name)][group] = entry(whole[name]._replace(n=int(chosen.sum())))
        return found

    def difference(
        self, name: str, ours: np.ndarray, theirs: np.ndarray, *, resamples: int, seed: int
    ) -> dict[str, Any]:
        """Paired difference of one per-user metric between two sets of lists, with its p-value."""
        first, second = (self.columns(items)[name] for items in (ours, theirs))
        found = paired_difference(first, second, self.users, n=resamples, seed=seed)
        return {"difference": entry(found.difference), "p": found.p_value, "users_changed": found.n_changed}


def kendall_tau(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau between two rankings (C,) of the same items, without ties."""
    place = {item: at for at, item in enumerate(second.tolist())}
    at = np.array([place[item] for item in first.tolist()])
    n = len(at)
    if n < 2:
        return 1.0
    agree = np.sign(at[None, :] - at[:, None])[np.triu_indices(n, 1)].sum()
    return float(agree / (n * (n - 1) / 2))


def jaccard(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(U,) overlap of two lists (U, K) of each user: shared items over all items of both."""
    shared = (first[:, :, None] == second[:, None, :]).any(axis=2).sum(axis=1)
    return shared / (first.shape[1] + second.shape[1] - shared)


def sign_test(changes: np.ndarray) -> float:
    """Two-sided exact p-value that positive and negative changes (N,) are equally likely; zeros are left out."""
    from scipy.stats import binomtest

    moved = changes[changes != 0]
    return float(binomtest(int((moved > 0).sum()), len(moved)).pvalue) if len(moved) else 1.0


def stacked(rows: Sequence[np.ndarray], size: int) -> np.ndarray:
    """(U, size) the first `size` entries of every row."""
    return np.stack([row[:size] for row in rows])


def primary(presets: Mapping[str, Any]) -> str:
    """The preset a report speaks of first: fairlrm where it was asked, else the first."""
    return "fairlrm" if "fairlrm" in presets else next(iter(presets))
