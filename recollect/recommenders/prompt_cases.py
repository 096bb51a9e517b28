"""What a prompted ranker is asked: test users, their training histories, profiles and candidates.

Popularity, groups and what prompts show come from training rows alone (with history "train"), so no prompt byte depends
on a held-out event of anybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from recollect.data.examples import Cases, held_out_cases, training_sequences
from recollect.data.filters import k_core
from recollect.data.splits import global_temporal, leave_one_out
from recollect.errors import ConfigError, InputError
from recollect.eval.popularity_profiles import PopularityProfile, UserProfile, UserProfiles
from recollect.prompts.fairlrm import PRESETS, RankingRequest
from recollect.recommenders.candidate_sets import (
    full_candidates,
    mixed_candidates,
    with_target,
)
from recollect.recommenders.prompt_rank_config import DRAWN_SHARE, PromptRankConfig
from recollect.rng import stream
from recollect.types import Dataset, Ranker, Split

SHUFFLED, SWAPPED = "shuffled-U", "swapped-labels"
CURVE_PRESETS = ("base", "fairlrm")
"""Prompts that are drawn as curves: re-rankers are stacked on them, and other candidate mixes asked."""


@dataclass(frozen=True)
class PromptCases:
    """The sampled test cases of a run; rows of every array are users.

    keys: (U,) names of the users in random streams.  histories: training items (T,) of each.  targets: (U,) int64.
    candidates: (C,) items of each, in the generator's order.  scores: (C,) of the generator, likewise.  profiles: of
    each.  everyone: the profile of every user of the log that has training events.  n_dropped: test users without
    any history, which no prompt can describe.  mixes: {share of drawn niche items: the cases with such candidates}.
    """

    dataset: Dataset
    split: Split
    cases: Cases
    keys: tuple[str, ...]
    histories: tuple[np.ndarray, ...]
    targets: np.ndarray
    popularity: PopularityProfile
    profiles: tuple[UserProfile, ...]
    everyone: Mapping[int, UserProfile]
    candidates: tuple[np.ndarray, ...]
    scores: tuple[np.ndarray, ...]
    n_dropped: int = 0
    mixes: Mapping[float, PromptCases] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def retrieved(self) -> np.ndarray:
        """(U,) bool: the target is among the candidates."""
        return np.array([target in row for target, row in zip(self.targets, self.candidates, strict=True)])

    @property
    def groups(self) -> np.ndarray:
        """(U,) names of the users' groups."""
        return np.array([profile.group for profile in self.profiles])

    def class_shares(self, classes: np.ndarray, n_classes: int) -> np.ndarray:
        """(U, n_classes) share of each history in each class of items; `classes` is (n_items,) int."""
        counts = np.stack([np.bincount(classes[history], minlength=n_classes) for history in self.histories])
        return counts / counts.sum(axis=1, keepdims=True)


def filtered(dataset: Dataset, core: int) -> Dataset:
    """The k-core of a log; `core` 1 keeps all."""
    return k_core(dataset, core) if core > 1 else dataset


def make_split(dataset: Dataset, config: PromptRankConfig) -> Split:
    """Leave-one-out, or the global temporal split with each user's last event as target."""
    return leave_one_out(dataset) if config.protocol == "loo" else global_temporal(dataset, target="last")


def draw_cases(
    dataset: Dataset, split: Split, generator: Ranker, config: PromptRankConfig, batch_size: int = 256
) -> PromptCases:
    """Draw the test users and lay out everything their prompts say.

    Raises:
        InputError: no test user has a history, or a user has too few unseen items.
    """
    sequences = training_sequences(dataset, split.train)
    popularity = PopularityProfile.of(sequences.items, dataset.n_items, config.convention)
    profiles = UserProfiles.of(popularity, [sequences[index] for index in range(len(sequences))])
    trained = {int(user): sequences[index] for index, user in enumerate(sequences.user)}
    everyone = {user: profiles.describe(history) for user, history in trained.items()}
    cases = held_out_cases(dataset, split, "test", config.history)
    usable = np.array([int(user) in trained for user in cases.user], dtype=bool) & (cases.end > cases.start)
    chosen = np.flatnonzero(usable)
    if not len(chosen):
        raise InputError(f"no test user of {dataset.name!r} has a training history; use a longer log")
    if config.users is not None and config.users < len(chosen):
        # The first of one shuffle, in its order: a larger run begins with the users of a smaller one.
        chosen = stream(config.seed, "prompt-users").permutation(chosen)[: config.users]
    cases = cases.take(chosen)
    histories = cases.histories()
    keys = tuple(str(dataset.users.user_ids[user]) for user in cases.user)
    targets = cases.target

    def candidates(share: float | None) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        return _candidates(generator, histories, keys, targets, popularity, config, share, batch_size)

    items, scores = candidates(DRAWN_SHARE.get(config.candidate_set))
    found = PromptCases(
        dataset=dataset,
        split=split,
        cases=cases,
        keys=keys,
        histories=tuple(histories),
        targets=targets,
        popularity=popularity,
        profiles=tuple(everyone[int(user)] for user in cases.user),
        everyone=everyone,
        candidates=items,
        scores=scores,
        n_dropped=int((~usable).sum()),
    )
    others = {share: candidates(share) for share in config.mix if share != DRAWN_SHARE[config.candidate_set]}
    mixes = {share: replace(found, candidates=own, scores=values) for share, (own, values) in others.items()}
    return replace(found, mixes=mixes)


def _candidates(
    generator: Ranker,
    histories: Sequence[np.ndarray],
    keys: Sequence[str],
    targets: np.ndarray,
    popularity: PopularityProfile,
    config: PromptRankConfig,
    share: float | None,
    batch_size: int,
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Candidates and their scores per user; `share` of drawn niche items, None = the full catalogue."""
    size = config.candidates
    items: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for start in range(0, len(histories), batch_size):
        part = slice(start, start + batch_size)
        scores = np.asarray(generator.score(histories[part]))
        rows: list[np.ndarray]
        if share is None:
            rows = full_candidates(scores, histories[part])
        else:
            is_popular = popularity.is_popular
            rows = list(
                mixed_candidates(
                    scores, histories[part], size, is_popular, keys=keys[part], seed=config.seed, tail_share=share
                )
            )
        if config.insert_target:
            rows = list(with_target(np.stack(rows), targets[part]))
        items += rows
        values += [scores[index, row].astype(np.float64) for index, row in enumerate(rows)]
    return tuple(items), tuple(values)


def requests_of(cases: PromptCases, labels: tuple[str, ...], k: int) -> list[RankingRequest]:
    """One request per user, with nothing but the truth in it."""
    return [
        RankingRequest(key, history, candidates, profile, k, labels)
        for key, history, candidates, profile in zip(
            cases.keys, cases.histories, cases.candidates, cases.profiles, strict=True
        )
    ]


def shuffled_profiles(cases: PromptCases, requests: Sequence[RankingRequest], seed: int) -> list[RankingRequest]:
    """The control of equal information: everybody is described by another user's profile (oracle 15).

    U1 and U2 state the share, group and quota of a user drawn from the whole log. U3's classes of the history are
    redrawn by seed so that their share is the other's too: no user-side fact of the prompt is the user's own.

    Raises:
        ConfigError: the log has one user only.
    """
    if len(cases.everyone) < 2:
        raise ConfigError("the shuffled-U control needs a log of at least two users; leave the controls out")
    users = sorted(cases.everyone)
    result = []
    for user, request in zip(cases.cases.user.tolist(), requests, strict=True):
        others = [other for other in users if other != user]
        generator = stream(seed, "shuffled-U", request.key)
        profile = cases.everyone[others[int(generator.integers(len(others)))]]
        n_popular = int(np.floor(len(request.history) * profile.popular_share + 0.5))
        told = np.zeros(len(request.history), dtype=bool)
        told[generator.permutation(len(request.history))[:n_popular]] = True
        result.append(replace(request, profile=profile, history_popular=told))
    return result


def swapped_labels(
    requests: Sequence[RankingRequest], popularity: PopularityProfile, seed: int
) -> list[tuple[RankingRequest, int, int] | None]:
    """The control of label sensitivity (oracle 9): one popular and one niche candidate exchange their tags.

    Returns:
        Per request (the changed request, place of the popular one, place of the niche one); None where a candidate
        set holds one class only.
    """
    result: list[tuple[RankingRequest, int, int] | None] = []
    for request in requests:
        tags = popularity.is_popular[request.candidates]
        if tags.all() or not tags.any():
            result.append(None)
            continue
        generator = stream(seed, "swapped-labels", request.key)
        popular, niche = (int(generator.choice(np.flatnonzero(tags == wanted))) for wanted in (True, False))
        changed = tags.copy()
        changed[[popular, niche]] = False, True
        result.append((replace(request, shown_popular=changed), popular, niche))
    return result


def with_attributes(
    requests: Sequence[RankingRequest], dataset: Dataset, users: np.ndarray, name: str
) -> list[RankingRequest]:
    """The same requests with one attribute of each user, as `name: value`.

    Raises:
        InputError: the data set has no such column.
    """
    column = dataset.users.attributes.get(name)
    if column is None:
        known = ", ".join(sorted(dataset.users.attributes)) or "none"
        raise InputError(f"{dataset.name!r} has no user attribute {name!r}; it has: {known}")
    return [
        replace(request, attributes=f"{name}: {column[user]}") for request, user in zip(requests, users, strict=True)
    ]


@dataclass(frozen=True)
class Variant:
    """One way of asking: which requests, with which components. None = nothing to ask for that user.

    preset, share: of a preset that is asked with another share of drawn niche items among the candidates.
    """

    name: str
    components: frozenset[str]
    requests: Sequence[RankingRequest | None]
    preset: str = ""
    share: float | None = None

    @property
    def site(self) -> str:
        """Call site of its calls: what it cost can be summed in the journal."""
        return f"prompt-rank.{self.name}"


def make_variants(
    config: PromptRankConfig, presets: Sequence[str], cases: PromptCases, labels: tuple[str, ...]
) -> list[Variant]:
    """Presets, then controls, then the base prompt with one attribute at a time, then other candidate mixes."""
    requests = requests_of(cases, labels, config.k)
    variants = [Variant(name, PRESETS[name], requests) for name in presets]
    if config.controls and "fairlrm" in presets:
        full = PRESETS["fairlrm"]
        variants.append(Variant(SHUFFLED, full, shuffled_profiles(cases, requests, config.seed)))
        if config.candidate_set != "full":
            swapped = swapped_labels(requests, cases.popularity, config.seed)
            variants.append(Variant(SWAPPED, full, [None if one is None else one[0] for one in swapped]))
    for name in config.attributes:
        told = with_attributes(requests, cases.dataset, cases.cases.user, name)
        variants.append(Variant(f"base+{name}", PRESETS["base"] | {"A"}, told))
    if config.attributes and "base" not in presets:
        variants.insert(0, Variant("base", PRESETS["base"], requests))
    for share, mixed in cases.mixes.items():
        other = requests_of(mixed, labels, config.k)
        variants += [
            Variant(f"{name} (mix {share:g})", PRESETS[name], other, name, share)
            for name in CURVE_PRESETS
            if name in presets
        ]
    return variants


__all__ = [
    "CURVE_PRESETS",
    "SHUFFLED",
    "SWAPPED",
    "PromptCases",
    "Variant",
    "draw_cases",
    "filtered",
    "make_split",
    "make_variants",
    "requests_of",
    "shuffled_profiles",
    "swapped_labels",
    "with_attributes",
]
