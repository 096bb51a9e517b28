"""Prompts from versioned templates, one file per call site; values are data and stay data.

Every string value is neutralised before it is passed to Jinja's immutable sandbox, so template syntax in a title is
printed as it is. Data stands in one block fenced with a delimiter of the run, the instruction follows it, and the
system turn is rendered from the fence alone, so no untrusted text can reach it. Parts come in the order static text,
user memory, candidates, instruction: a server's prefix cache serves the start of the prompt, and the order is part of
the contract. An optional value that is empty leaves no trace in the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from recollect.backbones.protocol import Chat, Message
from recollect.errors import ConfigError, UnknownName
from recollect.io import sha256_text
from recollect.prompts.untrusted import Neutralizer
from recollect.rng import stream

if TYPE_CHECKING:
    from jinja2 import Template

SHARED = "shared"

# Caps in characters on every string of a field; memories of 180 words fit.
FIELD_CHARACTERS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("domain", "tags"), 60),
        **dict.fromkeys(("title", "title_a", "title_b", "title_liked", "title_disliked", "groups"), 160),
        **dict.fromkeys(("memory_a", "memory_b", "memory_liked", "memory_disliked", "candidates"), 500),
        **dict.fromkeys(("private", "fused", "memory", "extract", "taste", "others", "privates", "memories"), 1600),
        "explanation": 600,
        "complaint": 200,
    }
)


@dataclass(frozen=True)
class Site:
    """What a call site takes. `numbers` are trusted (int or bool); `optional` strings and lists may be empty."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()


_SHOPPER = ("private", "fused", "groups")
_PAIR = ("title_a", "title_b")
_TRUTH = Site(
    ("domain", "title_liked", "title_disliked"),
    ("memory_liked", "memory_disliked", "explanation"),
    ("right", "words"),
)
_LISTS = frozenset({"groups", "others", "privates", "memories", "tags", "candidates"})

SITES: Mapping[str, Site] = MappingProxyType(
    {
        "choice": Site(("domain", *_PAIR), (*_SHOPPER, "memory_a", "memory_b")),
        "choice_explain": Site(("domain", *_PAIR), (*_SHOPPER, "memory_a", "memory_b")),
        "reflect_user": Site(_TRUTH.required, (*_TRUTH.optional, "memory"), _TRUTH.numbers),
        "reflect_items": Site(_TRUTH.required, (*_TRUTH.optional, "taste"), _TRUTH.numbers),
        "fuse_extract": Site(("domain",), ("others",), ("words",)),
        "fuse": Site(("domain",), ("fused", "private", "extract"), ("words",)),
        "fuse_one_call": Site(("domain",), ("fused", "privates"), ("words",)),
        "tags": Site(("memories",), (), ("most",)),
        "group_name": Site(("tags",)),
        "rank_context": Site(("domain",), _SHOPPER),
        "rank_context_neutral": Site(("domain",)),
        "rank_list": Site(("domain", "candidates"), _SHOPPER),
        "taste": Site(("domain", "title"), (*_SHOPPER, "memory")),
        "rating": Site(("domain", "title"), (*_SHOPPER, "memory")),
        "reask": Site(("complaint",)),
    }
)


@lru_cache(maxsize=1)
def _sources() -> dict[str, str]:
    folder = resources.files("recollect.prompts") / "templates"
    return {name: (folder / f"{name}.jinja").read_text(encoding="utf-8") for name in (*SITES, SHARED)}


@lru_cache(maxsize=len(SITES))
def _template(name: str) -> Template:
    from jinja2 import DictLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        loader=DictLoader({f"{key}.jinja": source for key, source in _sources().items()}),
        undefined=StrictUndefined,
        autoescape=False,  # prompts are not HTML
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(f"{name}.jinja")


def template_version(name: str) -> str:
    """Twelve hex digits that change with the wording of a call site (or of what all sites share)."""
    if name not in SITES:
        raise UnknownName("prompt", name, tuple(SITES))
    return sha256_text(_sources()[name] + "\x1f" + _sources()[SHARED])[:12]


def template_versions() -> dict[str, str]:
    """{call site: version}, for `run.json`."""
    return {name: template_version(name) for name in SITES}


def fence_of(seed: int) -> str:
    """The run's delimiter: four hex digits, letters and figures mixed so that no year or word equals it."""
    generator = stream(seed, "fence")
    while True:
        fence = f"{int(generator.integers(0x10000)):04x}"
        if re.search("[0-9]", fence) and len(re.findall("[a-f]", fence)) > 1:
            return fence


class Renderer:
    """Renders call sites for one model and one run.

    Args:
        control_tokens: of the model (`Backbone.control_tokens`); broken up wherever they occur in data.
        fence: the run's delimiter, or the seed it is derived from (`fence_of`).
    """

    def __init__(self, control_tokens: Sequence[str], fence: str | int) -> None:
        self.fence = fence_of(fence) if isinstance(fence, int) else fence
        self._neutralizer = Neutralizer((*control_tokens, self.fence))

    def clean(self, field: str, text: str) -> str:
        """A string of `field` as prompts print it; for continuations and names that are printed elsewhere."""
        if field not in FIELD_CHARACTERS:
            raise UnknownName("prompt field", field, tuple(FIELD_CHARACTERS))
        return self._neutralizer.clean(text, FIELD_CHARACTERS[field])

    def render(self, template_name: str, **values: Any) -> Chat:
        """The system and user turn of a call site.

        Args:
            template_name: one of `SITES`.
            values: its fields. Strings are untrusted text; lists hold strings or tuples of strings (`groups`: (name,
                titles); `others`, `privates`: (domain, text); `candidates`: (title, memory)); numbers are trusted.

        Raises:
            ConfigError: a field is missing, unknown or of the wrong type.
        """
        _check(template_name, values)
        return rendered(template_name, self.fence, {name: self._data(name, value) for name, value in values.items()})

    def _data(self, field: str, value: Any) -> Any:
        if isinstance(value, str):
            if field in _LISTS:
                raise ConfigError(f"prompt field {field!r} takes a list, got {value[:60]!r}")
            return self.clean(field, value)
        if isinstance(value, int):
            return value
        if field in _LISTS and isinstance(value, Sequence):
            return self._nested(field, value)
        raise ConfigError(f"prompt field {field!r} takes text, numbers or a list of texts, got {type(value).__name__}")

    def _nested(self, field: str, value: Any) -> Any:
        if isinstance(value, str):
            return self.clean(field, value)
        if not isinstance(value, Sequence):
            raise ConfigError(f"prompt field {field!r} holds a {type(value).__name__}; give text")
        return tuple(self._nested(field, entry) for entry in value)


def _check(name: str, values: Mapping[str, Any]) -> None:
    if name not in SITES:
        raise UnknownName("prompt", name, tuple(SITES))
    site = SITES[name]
    known = (*site.required, *site.optional, *site.numbers)
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"prompt {name!r} has no field {unknown[0]!r}; it takes {', '.join(known)}")
    if missing := [field for field in (*site.required, *site.numbers) if field not in values]:
        raise ConfigError(f"prompt {name!r} needs {missing[0]!r}; it takes {', '.join(known)}")
    for field, value in values.items():
        if (field in site.numbers) != isinstance(value, int):
            expected = "a number" if field in site.numbers else "text"
            raise ConfigError(f"prompt {name!r}: {field!r} takes {expected}, got {value!r}")
        if field in site.required and field in _LISTS and not value:
            raise ConfigError(f"prompt {name!r}: {field!r} is empty")


def rendered(name: str, fence: str, values: Mapping[str, Any]) -> Chat:
    """Fill a template with values that are checked and clean; the system turn sees the fence alone."""
    site = SITES[name]
    absent: dict[str, Any] = {field: () if field in _LISTS else "" for field in site.optional}
    template = _template(name)

    def turn(block: str, visible: dict[str, Any]) -> str:
        text = "".join(template.blocks[block](template.new_context(visible)))
        return "\n".join(line for line in text.split("\n") if line.strip())

    user = Message("user", turn("user", {**absent, **values, "fence": fence}))
    system = turn("system", {"fence": fence})
    return (Message("system", system), user) if system else (user,)
