"""Logs with a long tail, and scripted models that read what a FairLRM prompt says and follow a rule.

A reader is a pure function of the prompt: it sees labels, titles and class tags of the candidates and the number of
U2, never an item id, so what it does proves what the prompt holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from support.agent_worlds import objects

from recollect.backbones.protocol import Chat, Choice, Request
from recollect.backbones.scripted import ScriptedBackbone
from recollect.types import Catalog, Dataset, Interactions, Users

THEMES = ("Comedy", "Drama", "Horror", "Western", "Sci-Fi")


def make_dataset(events: Sequence[tuple[int, int]], n_users: int, n_items: int, *, categories=None) -> Dataset:
    """A log from (user, item) pairs; a user's events come in the order given, one second apart."""
    user = np.array([event[0] for event in events], dtype=np.int64)
    item = np.array([event[1] for event in events], dtype=np.int64)
    order = np.argsort(user, kind="stable")
    user, item = user[order], item[order]
    starts = np.r_[0, np.cumsum(np.bincount(user, minlength=n_users))]
    time = np.arange(len(user)) - starts[user]
    themes = categories or [(THEMES[number % 5], THEMES[(number // 5) % 5]) for number in range(n_items)]
    return Dataset(
        name="fair",
        interactions=Interactions(user=user, item=item, time=time.astype(np.int64), row=np.arange(len(user))),
        catalog=Catalog(
            item_ids=objects([f"i{number}" for number in range(n_items)]),
            titles=objects([f"Title {number:03d}" for number in range(n_items)]),
            domain=np.zeros(n_items, dtype=np.int16),
            categories=tuple(tuple(dict.fromkeys(names)) for names in themes),
            texts=objects([None] * n_items),
        ),
        users=Users(
            objects([f"u{number}" for number in range(n_users)]),
            {"gender": objects(["F" if number % 2 else "M" for number in range(n_users)])},
        ),
        domains=("films",),
        meta={"name": "fair", "version": "1", "source": "made by a test", "licence": "Apache-2.0", "clock": "unix"},
    )


def long_tail_world(n_users: int = 60, n_items: int = 90, length: int = 14, seed: int = 0) -> Dataset:
    """Users without repeats, items by a Zipf law, each user leaning to the head or the tail by a taste of their own."""
    generator = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, n_items + 1)
    events = []
    for user in range(n_users):
        weight = popularity ** generator.uniform(0.1, 1.4)
        drawn = generator.choice(n_items, size=length, replace=False, p=weight / weight.sum())
        events += [(user, int(item)) for item in drawn]
    return make_dataset(events, n_users, n_items)


def two_tastes_world(n_users: int = 80, n_items: int = 40, seed: int = 0) -> Dataset:
    """Half the users take niche items and will take another; half take popular ones (oracle 14)."""
    generator = np.random.default_rng(seed)
    head = n_items // 5
    tail_weight = 0.93 ** np.arange(n_items - head)
    tail_weight /= tail_weight.sum()
    events = []
    for user in range(n_users):
        if user % 2:
            items = [int(item) + head for item in generator.choice(n_items - head, 10, replace=False, p=tail_weight)]
            items[2] = int(generator.integers(head))
        else:
            items = generator.permutation(head)[: head - 1].tolist()
            items = [*items[:3], int(generator.integers(head, n_items)), *items[3:]]
        events += [(user, int(item)) for item in items]
    # Counts that make the head the most counted items whatever the draw.
    for user in range(n_users, n_users + 12):
        events += [(user, item) for item in range(head)] + [(user, head + (user - n_users))]
    return make_dataset(events, n_users + 12, n_items)


class Shown(NamedTuple):
    label: str
    title: str
    tag: str
    decile: int


_CANDIDATE = re.compile(r"([A-Z]{1,2})\. (.*?)(?: \[(popular|niche)(?:, popularity (\d+) of 10)?\])?")
_QUOTA = re.compile(r"about (\d+) of the first (\d+) should be popular")


def candidates_in(chat: Chat) -> list[Shown]:
    """The candidates a prompt lists, in its order."""
    lines = chat[-1].content.split("\n")
    start = next((at for at, line in enumerate(lines) if line.startswith("Candidate")), len(lines))
    found = []
    for line in lines[start + 1 :]:
        match = _CANDIDATE.fullmatch(line)
        if match is None:
            break
        title = match[2].partition(" (")[0]
        found.append(Shown(match[1], title, match[3] or "", int(match[4] or 0)))
    return found


def history_in(chat: Chat) -> tuple[str, ...]:
    """The titles of the history a prompt shows, oldest first."""
    return tuple(
        match[1].partition(" (")[0]
        for line in chat[-1].content.split("\n")
        if (match := re.fullmatch(r"\d+\. (.*)", line))
    )


Rule = Callable[[Chat, list[Shown]], list[int]]
"""Places of the candidates, best first."""


def reader(rule: Rule, name: str) -> ScriptedBackbone:
    """A model that answers label choices and written lists by a rule."""

    def choose(choice: Choice) -> list[float]:
        order = rule(choice.messages, candidates_in(choice.messages))
        weights = [0.0] * len(choice.options)
        for rank, place in enumerate(order):
            weights[place] = -float(rank)
        return weights

    def generate(request: Request) -> str:
        shown = candidates_in(request.messages)
        return json.dumps([shown[place].label for place in rule(request.messages, shown)])

    return ScriptedBackbone(generate=generate, choose=choose, name=name)


def echo(chat: Chat, shown: list[Shown]) -> list[int]:
    """The order of the prompt."""
    return list(range(len(shown)))


def by_popularity(chat: Chat, shown: list[Shown]) -> list[int]:
    """What the prompt tags as popular first, then the order of the prompt."""
    return sorted(range(len(shown)), key=lambda at: (-shown[at].decile, shown[at].tag != "popular", at))


def follows_quota(chat: Chat, shown: list[Shown]) -> list[int]:
    """The number of U2, filled in the order of the prompt; without U2 or tags the order of the prompt."""
    found = _QUOTA.search(chat[-1].content)
    if found is None or not all(item.tag for item in shown):
        return echo(chat, shown)
    wanted, k = int(found[1]), min(int(found[2]), len(shown))
    popular = [at for at, item in enumerate(shown) if item.tag == "popular"]
    niche = [at for at, item in enumerate(shown) if item.tag == "niche"]
    n_popular = min(max(wanted, k - len(niche)), len(popular))
    chosen = sorted(popular[:n_popular] + niche[: k - n_popular])
    return [*chosen, *(at for at in range(len(shown)) if at not in set(chosen))]


def knows_targets(targets: Mapping[tuple[str, ...], str]) -> Rule:
    """The target first, by the shown history; then the order of the prompt."""

    def rule(chat: Chat, shown: list[Shown]) -> list[int]:
        target = targets[history_in(chat)]
        return sorted(range(len(shown)), key=lambda at: (shown[at].title != target, at))

    return rule
