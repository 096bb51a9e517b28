"""From agents' state to prompts: titles, descriptions and memories into the call sites of `recollect.prompts`.

Everything from the catalogue and from models goes through the renderer, which treats it as data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recollect.agents.memory import WORD_LIMITS
from recollect.backbones.protocol import Chat
from recollect.prompts.parsing import word_limit
from recollect.prompts.render import Renderer
from recollect.prompts.schemas import SCHEMAS, ranking_schema, schema_text
from recollect.types import Dataset

if TYPE_CHECKING:
    from recollect.agents.writers import Outcome

LABELS = ("A", "B")
TAGS_ASKED = 6
DESCRIPTION_WORDS = 24


@dataclass(frozen=True)
class ShownItem:
    """An item as a prompt shows it; `description` is the inherent part of its memory."""

    item: int
    title: str
    memory: str
    description: str


class Questions:
    """Asks everything the agents ask, about one data set, for one model."""

    def __init__(self, dataset: Dataset, renderer: Renderer) -> None:
        self._catalog = dataset.catalog
        self._domains = dataset.domains
        self._renderer = renderer

    @property
    def is_single_domain(self) -> bool:
        """Whether no other domain exists that could say anything."""
        return len(self._domains) == 1

    def title(self, item: int) -> str:
        """The title as prompts print it; an item without one is named after its category and id."""
        title = self._renderer.clean("title", str(self._catalog.titles[item]))
        if title:
            return title
        categories = self._catalog.categories[item]
        kind = categories[-1] if categories else self._domains[int(self._catalog.domain[item])]
        return self._renderer.clean("title", f"untitled {kind} {self._catalog.item_ids[item]}")

    def description(self, item: int) -> str:
        """Side information in one line: the first words of the text, and categories the text does not name."""
        text = word_limit(str(self._catalog.texts[item] or ""), DESCRIPTION_WORDS)
        told = f"{self._catalog.titles[item]} {text}".lower()
        categories = ", ".join(name for name in self._catalog.categories[item] if name.lower() not in told)
        joined = ". ".join(part for part in (categories, text.rstrip(".")) if part)
        return self._renderer.clean("memory_a", joined)

    def item_text(self, item: int) -> str:
        """What an item's embedding is made of."""
        described = self.description(item)
        return f"{self.title(item)}. {described}" if described else self.title(item)

    def shown(self, item: int, memory: str) -> ShownItem:
        """An item with its current memory."""
        return ShownItem(item, self.title(item), memory, self.description(item))

    def phrase(self, text: str) -> str:
        """A model's phrase as a name: one clean line of at most six words."""
        return word_limit(self._renderer.clean("tags", text.strip().strip('"')), 6)

    def choice(self, domain: int, memory: Mapping[str, Any], first: ShownItem, second: ShownItem) -> Chat:
        """Which of two would you take? The answer is a label."""
        return self._renderer.render("choice", **self._pair(domain, memory, first, second))

    def choice_explain(
        self, domain: int, memory: Mapping[str, Any], first: ShownItem, second: ShownItem
    ) -> tuple[Chat, str]:
        """The same with an explanation, as JSON."""
        chat = self._renderer.render("choice_explain", **self._pair(domain, memory, first, second))
        return chat, schema_text(SCHEMAS["choice_explain"])

    def _pair(self, domain: int, memory: Mapping[str, Any], first: ShownItem, second: ShownItem) -> dict[str, Any]:
        return {
            "domain": self._domains[domain],
            **memory,
            "title_a": first.title,
            "memory_a": first.memory,
            "title_b": second.title,
            "memory_b": second.memory,
        }

    def rank_context(self, domain: int, memory: Mapping[str, Any]) -> Chat:
        """A question whose answer is the title of what this user takes next."""
        return self._renderer.render("rank_context", domain=self._domains[domain], **memory)

    def rank_neutral(self, domain: int) -> Chat:
        """The same question to somebody of whom nothing is known."""
        return self._renderer.render("rank_context_neutral", domain=self._domains[domain])

    def rank_list(
        self, domain: int, memory: Mapping[str, Any], items: Sequence[ShownItem]
    ) -> tuple[Chat, str, list[int]]:
        """Rank numbered items; returns the chat, the schema and the number of each item."""
        candidates = tuple((item.title, item.memory) for item in items)
        chat = self._renderer.render("rank_list", domain=self._domains[domain], candidates=candidates, **memory)
        return chat, schema_text(ranking_schema(len(items))), list(range(1, len(items) + 1))

    def rating(self, domain: int, memory: Mapping[str, Any], item: ShownItem) -> Chat:
        """One to five stars for what was taken."""
        return self._renderer.render(
            "rating", domain=self._domains[domain], title=item.title, memory=item.memory, **memory
        )

    def reflect_user(self, memory: str, outcome: Outcome) -> Chat:
        """Rewrite the private memory after the truth is known."""
        return self._renderer.render(
            "reflect_user", memory=memory, words=WORD_LIMITS["private"], **self._truth(outcome)
        )

    def reflect_items(self, taste: str, outcome: Outcome) -> tuple[Chat, str]:
        """Rewrite both items' memories."""
        chat = self._renderer.render("reflect_items", taste=taste, words=WORD_LIMITS["item"], **self._truth(outcome))
        return chat, schema_text(SCHEMAS["reflect_items"])

    def _truth(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "domain": self._domains[outcome.domain],
            "title_liked": outcome.real.title,
            "memory_liked": outcome.real.memory,
            "title_disliked": outcome.other.title,
            "memory_disliked": outcome.other.memory,
            "explanation": outcome.explanation,
            "right": outcome.right,
        }

    def fuse_extract(self, domain: int, others: Mapping[int, str]) -> Chat:
        """What do memories of other domains imply here?"""
        return self._renderer.render(
            "fuse_extract",
            domain=self._domains[domain],
            others=tuple((self._domains[d], text) for d, text in sorted(others.items())),
            words=WORD_LIMITS["private"],
        )

    def fuse(self, domain: int, fused: str, extract: str, private: str) -> Chat:
        """Merge the extract into the fused memory."""
        return self._renderer.render(
            "fuse",
            domain=self._domains[domain],
            fused=fused,
            extract=extract,
            private=private,
            words=WORD_LIMITS["fused"],
        )

    def fuse_one_call(self, domain: int, fused: str, privates: Mapping[int, str]) -> Chat:
        """Both steps in one call over all private memories (official code)."""
        return self._renderer.render(
            "fuse_one_call",
            domain=self._domains[domain],
            fused=fused,
            privates=tuple((self._domains[d], text) for d, text in sorted(privates.items())),
            words=WORD_LIMITS["fused"],
        )

    def tags(self, memories: Mapping[int, str]) -> tuple[Chat, str]:
        """Interests in a few words each, as a JSON list."""
        chat = self._renderer.render("tags", memories=tuple(memories[key] for key in sorted(memories)), most=TAGS_ASKED)
        return chat, schema_text(SCHEMAS["tags"])

    def group_name(self, tags: Sequence[str]) -> Chat:
        """One phrase for an interest."""
        return self._renderer.render("group_name", tags=tuple(tags))
