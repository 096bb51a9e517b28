"""FairLRM's structured prompt (arXiv 2601.09478): an item side and a user side of popularity, each part a switch.

The idea is the paper's [abstract]: state how popularity is distributed over the catalogue, state how much this user
likes what is popular, and ask for a ranking that follows the user. Its wording, its tables and its code were not
available; components, presets and texts are our design (fairlrm 4), and no number of the paper is claimed.

| id | component |
|---|---|
| R, H, C, O | role, history, candidates, output form: every preset has them |
| I1, I2, I3 | item side: distribution; class tag on every candidate; why counts are no evidence of liking |
| U1, U2, U3 | user side: measured profile; target number of popular items; what the items taken of each class share |
| D1, D2, X | keyword baselines without facts: "diverse", "avoid popularity bias", and the opposite, "prefer popular" |
| A | the user's attributes, for measuring what they change |

A prompt is a pure function of (profiles, request, components, form, locale): equal input, equal bytes. What is shared
comes first and what varies last, so that orders of one candidate set and presets that differ in their last lines share
their beginnings in a prefix cache. Titles, categories and attributes are untrusted: neutralised, fenced, never in the
system turn. Candidates and output form are never cut; a long history loses its oldest entries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from recollect.backbones.protocol import Chat, Message
from recollect.errors import ConfigError, UnknownName
from recollect.eval.popularity_profiles import PopularityProfile, UserProfile
from recollect.io import sha256_text
from recollect.prompts.render import fence_of
from recollect.prompts.untrusted import Neutralizer

if TYPE_CHECKING:
    from jinja2 import Template

    from recollect.types import Catalog

Form = Literal["label", "list", "title", "yes_no"]
Locale = Literal["en", "de"]
LOCALES: tuple[Locale, ...] = ("en", "de")
YES_NO: Mapping[str, tuple[str, str]] = MappingProxyType({"en": ("yes", "no"), "de": ("ja", "nein")})

COMPONENTS = ("R", "A", "H", "C", "I1", "I2", "I3", "U1", "U2", "U3", "D1", "D2", "X", "O")
_PLAIN = ("R", "H", "C", "O")
ITEM_SIDE, USER_SIDE = ("I1", "I2", "I3"), ("U1", "U2", "U3")

_FULL = (*_PLAIN, *ITEM_SIDE, *USER_SIDE)
PRESETS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "base": frozenset(_PLAIN),
        "diversity": frozenset((*_PLAIN, "D1")),
        "debias": frozenset((*_PLAIN, "D2")),
        "item": frozenset((*_PLAIN, *ITEM_SIDE)),
        "user": frozenset((*_PLAIN, *USER_SIDE)),
        "fairlrm": frozenset(_FULL),
        **{f"fairlrm-without-{part}": frozenset(_FULL) - {part} for part in (*ITEM_SIDE, *USER_SIDE)},
        "anti": frozenset((*_PLAIN, "X")),
    }
)

TITLE_CHARACTERS, DETAIL_CHARACTERS = 160, 60
THEMES_NAMED = 3
_ASCII_PER_TOKEN = 2.5
_ROUND = str.maketrans("[]［］", "()()")


def preset_components(name: str) -> frozenset[str]:
    """The components of a preset; raises `UnknownName` for any other name."""
    if name not in PRESETS:
        raise UnknownName("preset", name, tuple(PRESETS))
    return PRESETS[name]


@dataclass(frozen=True)
class RankingRequest:
    """What is to be ranked for one user.

    key: names the user in random streams.  history: (T,) training items, oldest first.  candidates: (C,) items in the
    order the prompt shows them.  profile: what the user side states.  k: length of the list that U2 speaks of.
    labels: one per candidate, in order.  attributes: text about the user, "" = none.  shown_popular: (C,) bool, the
    tags of I2 where they differ from the truth (swapped-label control).  history_popular: (T,) bool, likewise for U3.
    """

    key: str
    history: np.ndarray
    candidates: np.ndarray
    profile: UserProfile
    k: int
    labels: tuple[str, ...]
    attributes: str = ""
    shown_popular: np.ndarray | None = None
    history_popular: np.ndarray | None = None

    def reordered(self, order: np.ndarray) -> RankingRequest:
        """The same request with its candidates (and their tags) in `order` (C,); labels keep their places."""
        tags = None if self.shown_popular is None else self.shown_popular[order]
        return replace(self, candidates=self.candidates[order], shown_popular=tags)


@dataclass(frozen=True)
class _Shown:
    title: str
    details: str
    is_popular: bool
    decile: int


class FairPrompts:
    """Builds the prompts of one catalogue for one model and one run.

    Args:
        catalog: titles, categories and, where `years`, the column `release_year`.
        popularity: of the training events.
        control_tokens: of the model; broken up wherever they occur in data.
        fence: the run's delimiter, or the seed it is derived from.
        locale: language of the fixed text.
        history_length: most recent training items shown (L_h).
        categories, years: show them behind titles. Years are off by default: they tell the order of release.
        deciles: add the popularity decile to the class tag of I2.
        token_limit: bound on the estimated tokens of a prompt; the oldest history entries are dropped to keep it.

    Raises:
        ConfigError: an illegal option.
    """

    def __init__(
        self,
        catalog: Catalog,
        popularity: PopularityProfile,
        control_tokens: Sequence[str],
        fence: str | int,
        *,
        locale: Locale = "en",
        history_length: int = 20,
        categories: bool = True,
        years: bool = False,
        deciles: bool = False,
        token_limit: int = 4096,
    ) -> None:
        if locale not in LOCALES:
            raise ConfigError(f"locale must be one of {', '.join(LOCALES)}, got {locale!r}")
        if history_length < 1 or token_limit < 1:
            raise ConfigError(
                f"history_length and token_limit must be at least 1, got {history_length!r} and {token_limit!r}"
            )
        if len(catalog) != popularity.n_items:
            raise ConfigError(f"the catalogue has {len(catalog)} items, the popularity profile {popularity.n_items}")
        self.fence = fence_of(fence) if isinstance(fence, int) else fence
        self.locale: Locale = locale
        self._catalog = catalog
        self._popularity = popularity
        self._neutralizer = Neutralizer((*control_tokens, self.fence))
        self._history_length = history_length
        self._with_categories = categories
        self._years = catalog.extra.get("release_year") if years else None
        self._decile = popularity.decile if deciles else np.zeros(popularity.n_items, dtype=np.int64)
        self._token_limit = token_limit
        self._known: dict[int, tuple[str, str]] = {}

    @property
    def version(self) -> str:
        """Twelve hex digits that change with the wording."""
        return sha256_text(_source(self.locale))[:12]

    def title(self, item: int) -> str:
        """The title as prompts print it; an item without one is named by its id."""
        return self._texts(item)[0]

    def chat(self, request: RankingRequest, components: frozenset[str], form: Form) -> Chat:
        """The system and the user turn.

        Raises:
            ConfigError: candidates and labels do not match, or the prompt without any history is over the limit.
        """
        if form != "yes_no" and len(request.labels) < len(request.candidates):
            raise ConfigError(f"{len(request.candidates)} candidates need as many labels, got {len(request.labels)}")
        start = max(0, len(request.history) - self._history_length)
        while True:
            chat = self._render(request, components, form, start)
            excess = estimated_tokens(chat) - self._token_limit
            if excess <= 0:
                return chat
            if start >= len(request.history) or "H" not in components:
                raise ConfigError(
                    f"a prompt of {len(request.candidates)} candidates needs about {estimated_tokens(chat)} "
                    f"tokens, more than the limit of {self._token_limit}; use fewer candidates or a higher limit"
                )
            start += 1

    def neutral(self) -> Chat:
        """The question for a title, asked about nobody: the unconditional side of the title likelihood."""
        values = self._values(frozenset("RO"), "title")
        return _turns(self.locale, values)

    def _render(self, request: RankingRequest, components: frozenset[str], form: Form, start: int) -> Chat:
        history = request.history[start:]
        told = request.history_popular
        history_popular = self._popularity.is_popular[request.history] if told is None else told
        tags = request.shown_popular
        popular = self._popularity.is_popular[request.candidates] if tags is None else tags
        values = self._values(components, form)
        values |= {
            "attributes": self._clean(request.attributes, TITLE_CHARACTERS),
            "history": [self._shown(item, False) for item in history.tolist()],
            "candidates": [
                self._shown(item, bool(flag)) for item, flag in zip(request.candidates.tolist(), popular, strict=True)
            ],
            "labels": request.labels,
            "evidence": self._evidence(history, history_popular[start:]),
            "user_percent": _percent(request.profile.popular_share),
            "group": request.profile.group,
            "quota": request.profile.quota(request.k),
            "k": request.k,
        }
        return _turns(self.locale, values)

    def _values(self, components: frozenset[str], form: Form) -> dict[str, Any]:
        return {
            "fence": self.fence,
            "components": components,
            "form": form,
            "n_items": self._popularity.n_items,
            "n_popular": self._popularity.n_popular,
            "popular_percent": _percent(self._popularity.popular_share),
            "attributes": "",
            "history": (),
            "candidates": (),
            "evidence": (),
        }

    def _texts(self, item: int) -> tuple[str, str]:
        found = self._known.get(item)
        if found is None:
            catalog, clean = self._catalog, self._clean
            title = clean(str(catalog.titles[item]), TITLE_CHARACTERS)
            title = title or clean(f"untitled {catalog.item_ids[item]}", TITLE_CHARACTERS)
            parts = [str(self._years[item])] if self._years is not None and self._years[item] else []
            parts += catalog.categories[item] if self._with_categories else ()
            found = self._known[item] = title, clean(", ".join(parts), DETAIL_CHARACTERS)
        return found

    def _clean(self, text: str, max_characters: int) -> str:
        """Untrusted text for the prompt. Square brackets become round: they mark the class tags of I2, which no title
        may imitate."""
        return self._neutralizer.clean(text.translate(_ROUND), max_characters)

    def _shown(self, item: int, is_popular: bool) -> _Shown:
        title, details = self._texts(item)
        return _Shown(title, details, is_popular, int(self._decile[item]))

    def _evidence(self, history: np.ndarray, is_popular: np.ndarray) -> list[tuple[str, list[int], list[str]]]:
        """Per class: which numbers of the shown history, and the categories most of them share."""
        rows = []
        for name, wanted in (("P", True), ("N", False)):
            places = np.flatnonzero(is_popular == wanted)
            themes = Counter(theme for place in places for theme in self._catalog.categories[history[place]])
            named = sorted(themes, key=lambda theme: (-themes[theme], theme))[:THEMES_NAMED]
            cleaned = [self._clean(theme, DETAIL_CHARACTERS) for theme in named]
            rows.append((name, (places + 1).tolist(), cleaned))
        return rows


def _percent(share: float) -> int:
    return 0 if math.isnan(share) else math.floor(100 * share + 0.5)


def estimated_tokens(chat: Chat) -> int:
    """An upper estimate of a chat's tokens that needs no tokenizer: one per 2.5 ASCII characters and one per byte of
    anything else, plus 8 per turn."""
    total = 0.0
    for message in chat:
        size = len(message.content.encode("utf-8", "surrogatepass"))
        plain = len(message.content.encode("ascii", "ignore"))
        total += plain / _ASCII_PER_TOKEN + (size - plain) + 8
    return math.ceil(total)


@lru_cache(maxsize=len(LOCALES))
def _source(locale: Locale) -> str:
    folder = resources.files("recollect.prompts") / "templates"
    return (folder / f"fairlrm_{locale}.jinja").read_text(encoding="utf-8")


@lru_cache(maxsize=len(LOCALES))
def _template(locale: Locale) -> Template:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        autoescape=False,  # prompts are not HTML
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(_source(locale))


def _turns(locale: Locale, values: dict[str, Any]) -> Chat:
    """The system turn, which sees the fence alone, and the user turn; empty lines are dropped."""
    template = _template(locale)

    def turn(block: str, visible: dict[str, Any]) -> str:
        context = template.new_context(visible)
        return "\n".join(line for line in "".join(template.blocks[block](context)).split("\n") if line.strip())

    system = Message("system", turn("system", {"fence": values["fence"]}))
    return system, Message("user", turn("user", values))


__all__ = [
    "COMPONENTS",
    "LOCALES",
    "PRESETS",
    "YES_NO",
    "FairPrompts",
    "Form",
    "Locale",
    "RankingRequest",
    "estimated_tokens",
    "preset_components",
]
