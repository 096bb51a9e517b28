"""Harbor: the bundled synthetic world, whose users' utilities and choice probabilities are known.

It exists to test what real logs cannot: whether a method that separates tastes by domain gains where tastes
conflict, and whether a memory shared by an interest group gains when something becomes popular in that group.
Everything below is our own design; it claims no realism beyond what is written here.

Items.  Item i of domain d has a theme, a mood (both shared by all domains), a kind (of that domain), a make (no
effect) and a quality q_i ~ N(0, 1).  All but the quality are said in title, categories and text.

Tastes.  The interest of group g are the themes 2g and 2g + 1 (modulo their number): its theme taste A_g is equally high
on these, equally low on all others, with mean 0 and variance 1.  A user of group g has
    a_u = sqrt(r) A_g + sqrt(1 - r) e_u,   e_u ~ N(0, 1) for each theme,   r = group_share,
a mood taste b_u ~ N(0, 1) of their own, a kind taste c_ud ~ N(0, 1) in each domain, and a sign z_ud: +1 everywhere for
most users; a share `conflict_share` of users has z_ud = -1 in half of the domains (rounded down), drawn at random: what
they love as a film, they avoid as a mug.

Utility of item i, of domain d, for user u at time t, in units of the noise of the choice:
    v_ui    = shared_weight z_ud (a_u[theme_i] + b_u[mood_i] / 4) + domain_weight c_ud[kind_i]
    U_ui(t) = v_ui + quality_weight q_i + shock_strength s_gi(t),
where s_gi(t) = 1 iff item i belongs to a shock of u's group g that is open at t.  A group has `shocks_per_group`
shocks; shock k of group g is open for `shock_days` and takes `shock_items` random items of domain (g + k) mod D.
Shocks come in rounds of one per domain (D of them, the last round may have fewer).  The last round closes with the
world's end, the others earlier at equal distances, so the last events of a user fall into an open shock.

Choices.  An event has a domain, drawn from the user's own domain shares (Dirichlet(`domain_evenness`)), and
    P(i | u, t, d) = exp(U_ui(t) / temperature) / sum_j exp(U_uj(t) / temperature)
over the items j of d that u has not taken before.

Ratings.  1 + the number of thresholds below (v_ui + rating_noise N(0, 1)) / (sd of v over users and items); the
thresholds (-0.6, 0.0, 0.6, 1.4) leave few ones and twos, since people mostly take what they like.  The shock does
not enter: hype sells, it does not please.

Times.  Sessions of about three events, at random moments of `days` days from 2024-01-01, events minutes apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from recollect.data.harbor_words import DOMAINS, MOODS, NAMES, THEME_NOUNS, THEMES
from recollect.errors import ConfigError, DataError
from recollect.rng import stream
from recollect.types import Catalog, Dataset, Interactions, Users

START = 1_704_067_200  # 2024-01-01 00:00:00 UTC
DAY = 86_400
RATING_THRESHOLDS = (-0.6, 0.0, 0.6, 1.4)
WORLD_VERSION = "2"
THEMES_PER_GROUP = 2
MOOD_WEIGHT = 0.25


@dataclass(frozen=True)
class HarborConfig:
    """Size and strengths of a world; the equations are in the module's docstring."""

    n_users: int = 120
    n_domains: int = 4
    """The first domains of books, films, games, kitchenware."""
    items_per_domain: int = 150
    min_events: int = 24
    """Fewest events of a user."""
    max_events: int = 30
    """Most events of a user, at most the items of one domain."""
    n_groups: int = 4
    group_share: float = 0.85
    """Share of the variance of a user's theme taste that the group explains."""
    conflict_share: float = 0.25
    """Share of users whose shared taste is reversed in half of the domains."""
    shared_weight: float = 1.6
    domain_weight: float = 0.8
    quality_weight: float = 0.5
    shock_strength: float = 4.0
    """Utility added for the group's members while a shock is open; 0 = no shocks."""
    shocks_per_group: int = 12
    shock_items: int = 8
    shock_days: int = 40
    domain_evenness: float = 3.0
    """Concentration of the Dirichlet of a user's domain shares: large = every domain alike, small = cold domains."""
    temperature: float = 1.0
    rating_noise: float = 0.5
    days: int = 180

    def __post_init__(self) -> None:
        for name in ("n_users", "items_per_domain", "min_events", "n_groups", "shocks_per_group", "days", "shock_days"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not 1 <= self.n_domains <= len(DOMAINS):
            raise ConfigError(f"n_domains must lie between 1 and {len(DOMAINS)}, got {self.n_domains!r}")
        if not self.min_events <= self.max_events <= self.items_per_domain:
            raise ConfigError(
                f"min_events <= max_events <= items_per_domain must hold, got {self.min_events!r}, "
                f"{self.max_events!r}, {self.items_per_domain!r}"
            )
        for name in ("group_share", "conflict_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(self, name)!r}")
        for name in ("shared_weight", "domain_weight", "quality_weight", "shock_strength", "rating_noise"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ConfigError(f"{name} must be a finite number >= 0, got {getattr(self, name)!r}")
        for name in ("temperature", "domain_evenness"):
            if not 0 < getattr(self, name) < np.inf:
                raise ConfigError(f"{name} must be a finite number > 0, got {getattr(self, name)!r}")
        if not 0 <= self.shock_items <= self.items_per_domain:
            raise ConfigError(f"shock_items must lie between 0 and items_per_domain, got {self.shock_items!r}")
        if self.shock_days > self.days:
            raise ConfigError(f"shock_days must be at most days ({self.days}), got {self.shock_days!r}")


class Shock(NamedTuple):
    """For the members of `group`, `items` (item numbers) of `domain` are popular while start <= time < end."""

    group: int
    domain: int
    items: np.ndarray
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Truth:
    """What the world knows and a log does not; users and items are numbered as in the world's data set.

    item_domain, theme, mood, kind: (I,) int64.  quality: (I,) float64.  group: (U,) int64.  theme_taste (U, themes),
    mood_taste (U, moods), kind_taste (U, D, kinds), sign (U, D) of +-1, domain_share (U, D) rows summing to 1.
    """

    config: HarborConfig
    item_domain: np.ndarray
    theme: np.ndarray
    mood: np.ndarray
    kind: np.ndarray
    quality: np.ndarray
    group: np.ndarray
    theme_taste: np.ndarray
    mood_taste: np.ndarray
    kind_taste: np.ndarray
    sign: np.ndarray
    domain_share: np.ndarray
    shocks: tuple[Shock, ...]

    @property
    def conflicted(self) -> np.ndarray:
        """Whether a user's taste is reversed in some domain, (U,) bool."""
        return np.asarray((self.sign < 0).any(axis=1))

    def tastes(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """v_ui: what pleases the users, without quality and shock; users (U',), items (I',) -> (U', I')."""
        users, items = np.asarray(users), np.asarray(items)
        row = users[:, None]
        shared = self.theme_taste[row, self.theme[items]] + MOOD_WEIGHT * self.mood_taste[row, self.mood[items]]
        domain = self.item_domain[items]
        own = self.kind_taste[row, domain, self.kind[items]]
        return self.config.shared_weight * self.sign[row, domain] * shared + self.config.domain_weight * own

    def shocked(self, user: int, time: int) -> np.ndarray:
        """Items (I,) bool that are popular in the user's group at `time`."""
        mask = np.zeros(len(self.theme), dtype=bool)
        for shock in self.shocks:
            if shock.group == self.group[user] and shock.start <= time < shock.end:
                mask[shock.items] = True
        return mask

    def utilities(self, user: int, items: np.ndarray, time: int) -> np.ndarray:
        """U_ui(t) of `items` (I',) for one user at a time in Unix seconds; (I',) float64."""
        items = np.asarray(items)
        calm = self.tastes(np.array([user]), items)[0] + self.config.quality_weight * self.quality[items]
        return calm + self.config.shock_strength * self.shocked(user, time)[items]

    def choice_probabilities(self, user: int, candidates: np.ndarray, time: int) -> np.ndarray:
        """Probability that the user takes each of `candidates` (C,) when shown exactly these; sums to 1."""
        logits = self.utilities(user, candidates, time) / self.config.temperature
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()


@dataclass(frozen=True, eq=False)
class World:
    """A synthetic world: how it was made, its log, and the truth behind the log."""

    config: HarborConfig
    seed: int
    dataset: Dataset
    truth: Truth


def build_harbor(config: HarborConfig | None = None, seed: int = 0) -> World:
    """Make the world of `config` and `seed`; equal arguments give equal worlds, bit for bit."""
    config = HarborConfig() if config is None else config
    truth, make, noun = _draw_truth(config, seed)
    user, item, time = _choose(config, truth, seed)
    rating = _rate(config, truth, user, item, seed)
    dataset = Dataset(
        name="harbor",
        interactions=Interactions(
            user=user,
            item=item,
            time=time,
            rating=rating,
            domain=truth.item_domain[item].astype(np.int16),
            row=np.arange(len(user), dtype=np.int64),
        ),
        catalog=_describe_items(config, truth, make, noun),
        users=Users(_objects([f"user-{number:04d}" for number in range(config.n_users)])),
        domains=tuple(domain.name for domain in DOMAINS[: config.n_domains]),
        meta={
            "name": "harbor",
            "version": WORLD_VERSION,
            "source": f"synthetic, seed {seed}",
            "licence": "Apache-2.0",
            "clock": "unix",
            "warnings": [],
            "world": {"name": "harbor", "version": WORLD_VERSION, "seed": seed, "config": asdict(config)},
        },
    )
    return World(config, seed, dataset, truth)


def world_of(dataset: Dataset) -> World | None:
    """The world behind a data set made by `build_harbor`, also after filters or a round trip through a folder.

    The truth is renumbered to the data set's own users and items.  None where the data set is not synthetic.

    Raises:
        DataError: the recorded world is of another version or names ids the world does not have.
    """
    recorded = dataset.meta.get("world")
    if recorded is None:
        return None
    if recorded.get("name") != "harbor" or recorded.get("version") != WORLD_VERSION:
        raise DataError(
            f"the world {recorded!r} of {dataset.name!r} is not harbor version {WORLD_VERSION}; make it again"
        )
    known = {field.name for field in fields(HarborConfig)}
    unknown = sorted(set(recorded["config"]) - known)
    if unknown:
        raise DataError(f"the world of {dataset.name!r} has the unknown option {unknown[0]!r}")
    world = build_harbor(HarborConfig(**recorded["config"]), int(recorded["seed"]))
    users = _places(world.dataset.users.user_ids, dataset.users.user_ids)
    items = _places(world.dataset.catalog.item_ids, dataset.catalog.item_ids)
    return replace(world, dataset=dataset, truth=_renumbered(world.truth, users, items))


def _places(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    place = {name: number for number, name in enumerate(ids)}
    missing = [name for name in wanted if name not in place]
    if missing:
        raise DataError(f"{missing[0]!r} does not exist in the world this data set says it comes from")
    return np.array([place[name] for name in wanted], dtype=np.int64)


def _renumbered(truth: Truth, users: np.ndarray, items: np.ndarray) -> Truth:
    new_item = np.full(len(truth.theme), -1, dtype=np.int64)
    new_item[items] = np.arange(len(items))
    shocks = []
    for shock in truth.shocks:
        numbers = new_item[shock.items]
        shocks.append(shock._replace(items=numbers[numbers >= 0]))
    by_item: dict[str, Any] = {
        name: getattr(truth, name)[items] for name in ("item_domain", "theme", "mood", "kind", "quality")
    }
    by_user: dict[str, Any] = {
        name: getattr(truth, name)[users]
        for name in ("group", "theme_taste", "mood_taste", "kind_taste", "sign", "domain_share")
    }
    return replace(truth, **by_item, **by_user, shocks=tuple(shocks))


def _draw_truth(config: HarborConfig, seed: int) -> tuple[Truth, np.ndarray, np.ndarray]:
    """The truth, and the make and the theme's noun of each item."""
    n_items = config.n_domains * config.items_per_domain
    item_domain = np.repeat(np.arange(config.n_domains), config.items_per_domain)
    draw = stream(seed, "harbor", "items")
    theme, mood = draw.integers(len(THEMES), size=n_items), draw.integers(len(MOODS), size=n_items)
    kind, make = draw.integers(len(DOMAINS[0].kinds), size=n_items), draw.integers(len(DOMAINS[0].makes), size=n_items)
    noun = draw.integers(len(THEME_NOUNS[0]), size=n_items)
    quality = draw.standard_normal(n_items)

    draw = stream(seed, "harbor", "users")
    group = draw.permutation(np.arange(config.n_users) % config.n_groups)
    own, common = np.sqrt(1 - config.group_share), np.sqrt(config.group_share)
    theme_taste = common * _interests(config.n_groups)[group]
    theme_taste += own * draw.standard_normal((config.n_users, len(THEMES)))
    mood_taste = draw.standard_normal((config.n_users, len(MOODS)))
    kind_taste = draw.standard_normal((config.n_users, config.n_domains, len(DOMAINS[0].kinds)))
    domain_share = draw.dirichlet(np.full(config.n_domains, config.domain_evenness), size=config.n_users)
    sign = np.ones((config.n_users, config.n_domains), dtype=np.int64)
    conflicted = draw.permutation(config.n_users)[: round(config.conflict_share * config.n_users)]
    reversed_domains = np.argsort(draw.random((config.n_users, config.n_domains)), axis=1)[:, : config.n_domains // 2]
    sign[conflicted[:, None], reversed_domains[conflicted]] = -1
    truth = Truth(
        config=config,
        item_domain=item_domain,
        theme=theme,
        mood=mood,
        kind=kind,
        quality=quality,
        group=group,
        theme_taste=theme_taste,
        mood_taste=mood_taste,
        kind_taste=kind_taste,
        sign=sign,
        domain_share=domain_share,
        shocks=_draw_shocks(config, seed),
    )
    return truth, make, noun


def _interests(n_groups: int) -> np.ndarray:
    """A_g of every group, (n_groups, themes), rows of mean 0 and variance 1."""
    taste = np.zeros((n_groups, len(THEMES)))
    themes = (THEMES_PER_GROUP * np.arange(n_groups)[:, None] + np.arange(THEMES_PER_GROUP)) % len(THEMES)
    np.put_along_axis(taste, themes, 1.0, axis=1)
    return (taste - taste.mean(axis=1, keepdims=True)) / taste.std(axis=1, keepdims=True)


def _draw_shocks(config: HarborConfig, seed: int) -> tuple[Shock, ...]:
    draw = stream(seed, "harbor", "shocks")
    first_end, last_end = config.shock_days, config.days
    n_rounds = -(-config.shocks_per_group // config.n_domains)
    shocks = []
    for group in range(config.n_groups):
        for number in range(config.shocks_per_group):
            domain = (group + number) % config.n_domains
            items = np.sort(draw.permutation(config.items_per_domain)[: config.shock_items])
            share = (number // config.n_domains + 1) / n_rounds
            end = START + round((first_end + (last_end - first_end) * share) * DAY)
            shocks.append(
                Shock(group, domain, items + domain * config.items_per_domain, end - config.shock_days * DAY, end)
            )
    return tuple(shocks)


def _draw_times(config: HarborConfig, seed: int) -> list[np.ndarray]:
    """Strictly increasing times of each user's events."""
    result = []
    for user in range(config.n_users):
        draw = stream(seed, "harbor", "times", user)
        n_events = int(draw.integers(config.min_events, config.max_events + 1))
        n_sessions = max(1, round(n_events / 3))
        begin = np.sort(draw.random(n_sessions)) * (config.days - 0.25) * DAY
        session = np.sort(draw.integers(n_sessions, size=n_events))
        minutes = np.cumsum(30 + draw.exponential(240.0, size=n_events))
        moment = START + np.floor(begin[session] + minutes - minutes[np.searchsorted(session, session)]).astype(
            np.int64
        )
        steps = np.arange(n_events)  # sessions may overlap: each event is at least a second after the one before
        moment = np.maximum.accumulate(np.sort(moment) - steps) + steps
        result.append(np.minimum(moment, START + config.days * DAY - 1 - (n_events - 1 - steps)))
    return result


def _choose(config: HarborConfig, truth: Truth, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(user, item, time) of every event, sorted by user and time; softmax by the Gumbel maximum."""
    n_items = len(truth.theme)
    calm = truth.tastes(np.arange(config.n_users), np.arange(n_items)) + config.quality_weight * truth.quality
    users, chosen, times = [], [], _draw_times(config, seed)
    for user, moments in enumerate(times):
        draw = stream(seed, "harbor", "choices", user)
        domains = draw.choice(config.n_domains, size=len(moments), p=truth.domain_share[user])
        noise = draw.gumbel(size=(len(moments), config.items_per_domain))
        free = np.ones(n_items, dtype=bool)
        for step, moment in enumerate(moments):
            block = slice(domains[step] * config.items_per_domain, (domains[step] + 1) * config.items_per_domain)
            shock = truth.shocked(user, int(moment))[block]
            logits = (calm[user, block] + config.shock_strength * shock) / config.temperature
            item = int(np.argmax(np.where(free[block], logits + noise[step], -np.inf))) + block.start
            free[item] = False
            chosen.append(item)
        users.append(np.full(len(moments), user, dtype=np.int64))
    return np.concatenate(users), np.array(chosen, dtype=np.int64), np.concatenate(times)


def _rate(config: HarborConfig, truth: Truth, user: np.ndarray, item: np.ndarray, seed: int) -> np.ndarray:
    taste = truth.tastes(np.arange(config.n_users), np.arange(len(truth.theme)))
    spread = float(taste.std()) or 1.0
    noise = config.rating_noise * stream(seed, "harbor", "ratings").standard_normal(len(user))
    return (1 + np.searchsorted(RATING_THRESHOLDS, taste[user, item] / spread + noise)).astype(np.float32)


def _describe_items(config: HarborConfig, truth: Truth, make: np.ndarray, noun: np.ndarray) -> Catalog:
    titles, texts, categories, ids = [], [], [], []
    used: dict[str, int] = {}
    for number, domain_number in enumerate(truth.item_domain):
        domain = DOMAINS[domain_number]
        words = {
            "theme": THEMES[truth.theme[number]],
            "mood": MOODS[truth.mood[number]],
            "kind": domain.kinds[truth.kind[number]],
            "make": domain.makes[make[number]],
        }
        noun_word = THEME_NOUNS[truth.theme[number]][noun[number]]
        within = number % config.items_per_domain
        title = domain.title.format(noun=noun_word, name=NAMES[within % len(NAMES)], **words)
        used[title] = used.get(title, 0) + 1
        titles.append(title if used[title] == 1 else f"{title}, volume {used[title]}")
        texts.append(domain.text.format(noun=noun_word.lower(), **words))
        categories.append((words["kind"], words["theme"], words["mood"], words["make"]))
        ids.append(f"{domain.prefix}-{within:04d}")
    return Catalog(
        item_ids=_objects(ids),
        titles=_objects(titles),
        domain=truth.item_domain.astype(np.int16),
        categories=tuple(categories),
        texts=_objects(texts),
    )


def _objects(values: list[str]) -> np.ndarray:
    result = np.empty(len(values), dtype=object)
    result[:] = values
    return result
