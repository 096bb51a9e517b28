"""Who writes memories after a decision: weighted features (any model) or the language model (3B and more).

Both writers have one face, so the method reads the same: each function is a generator that may yield calls and
returns what was written and what it cost. AgentCF++ §3.3-3.5 of the paper for the order and content of the calls;
word limits are the official code's.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from recollect.agents.item_features import ItemFeatures
from recollect.agents.memory import (
    WORD_LIMITS,
    Memory,
    Weights,
    audience_after,
    audience_text,
    fused_after,
    relevant_elsewhere,
    strongest,
    taste_after,
    taste_text,
)
from recollect.agents.questions import Questions, ShownItem
from recollect.backbones.protocol import Answer, Call, Chat, Completion, Request, call_key
from recollect.prompts.parsing import MalformedAnswer, ask_json, word_limit
from recollect.rng import call_seed

Asking = Generator[Sequence[Call], list[Answer], "Written"]
Names = tuple[str | int, ...]
Pair = tuple[Memory, Memory]
"""Memories of the real item and of the rejected one."""
AskingTags = Generator[Sequence[Call], list[Answer], tuple[tuple[str, ...], "Cost"]]
TAGS_SHOWN = 6
NEGATIVE_AUDIENCE_RATE = -0.3


@dataclass(frozen=True)
class Cost:
    """What one memory update asked of the model: hash of the first prompt ("" = nothing asked), tokens, success."""

    prompt_hash: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    ok: bool = True
    fault: str = ""


@dataclass(frozen=True)
class Written:
    """New memories, in the order asked for, and the cost."""

    memories: tuple[Memory, ...]
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class Outcome:
    """A training decision against the truth: the real item, the rejected one, which was picked and why."""

    domain: int
    real: ShownItem
    other: ShownItem
    right: bool
    explanation: str


class Writer(Protocol):
    """Changes memories after an outcome. Names of streams identify the agent and the step."""

    def private(self, memory: Memory, outcome: Outcome, names: Names) -> Asking: ...

    def extract(self, domain: int, others: Mapping[int, Memory], own: Memory, names: Names) -> Asking: ...

    def fuse(self, domain: int, fused: Memory, extract: Memory, private: Memory, names: Names) -> Asking: ...

    def fuse_at_once(self, domain: int, fused: Memory, privates: Mapping[int, Memory], names: Names) -> Asking: ...

    def items(self, user: Memory, pair: Pair, outcome: Outcome, names: Names, *, update_negative: bool) -> Asking: ...

    def tags(self, memories: Mapping[int, Memory], names: Names) -> AskingTags: ...


class StructuredWriter:
    """Likes and dislikes as feature weights; asks no model. A baseline to beat and the deterministic test double."""

    def __init__(self, features: ItemFeatures) -> None:
        self._features = features

    def _taste(self, weights: Weights, updates: int) -> Memory:
        return Memory(taste_text(weights), weights, updates)

    def absorb(self, memory: Memory, item: int) -> Memory:
        """Take in an earlier interaction that nobody predicted: its features gain weight, nothing is rejected."""
        return self._taste(taste_after(memory, self._features.of_item(item), {}, right=True), memory.updates + 1)

    def private(self, memory: Memory, outcome: Outcome, names: Names) -> Asking:
        yield from ()
        weights = taste_after(
            memory,
            self._features.of_item(outcome.real.item),
            self._features.of_item(outcome.other.item),
            right=outcome.right,
        )
        return Written((self._taste(weights, memory.updates + 1),))

    def extract(self, domain: int, others: Mapping[int, Memory], own: Memory, names: Names) -> Asking:
        yield from ()
        return Written((self._taste(self._relevant(domain, others, own.weights), 1),))

    def _relevant(self, domain: int, memories: Mapping[int, Memory], own: Weights) -> Weights:
        """What `memories` of any domains say in terms that items of `domain` know."""
        terms = {term for memory in memories.values() for term in memory.weights}
        return relevant_elsewhere(
            [memories[d].weights for d in sorted(memories)], self._features.known_in(domain, terms), own
        )

    def fuse(self, domain: int, fused: Memory, extract: Memory, private: Memory, names: Names) -> Asking:
        yield from ()
        return Written((self._taste(fused_after(fused.weights, extract.weights, private.weights), fused.updates + 1),))

    def fuse_at_once(self, domain: int, fused: Memory, privates: Mapping[int, Memory], names: Names) -> Asking:
        yield from ()
        own = privates[domain].weights if domain in privates else {}
        extract = self._relevant(domain, privates, own)
        return Written((self._taste(fused_after(fused.weights, extract, own), fused.updates + 1),))

    def items(self, user: Memory, pair: Pair, outcome: Outcome, names: Names, *, update_negative: bool) -> Asking:
        yield from ()
        written = []
        real, other = pair
        for memory, shown, rate in ((real, outcome.real, 1.0), (other, outcome.other, NEGATIVE_AUDIENCE_RATE)):
            if rate < 0 and not update_negative:
                written.append(memory)
                continue
            weights = audience_after(memory, user.weights, rate)
            text = word_limit(audience_text(shown.description, weights), WORD_LIMITS["item"])
            written.append(Memory(text, weights, memory.updates + 1))
        return Written(tuple(written))

    def tags(self, memories: Mapping[int, Memory], names: Names) -> AskingTags:
        yield from ()
        total: Weights = {}
        for domain in sorted(memories):
            for term, weight in memories[domain].weights.items():
                total[term] = total.get(term, 0.0) + weight
        liked = strongest({term: weight for term, weight in total.items() if weight > 0}, TAGS_SHOWN)
        return tuple(sorted(liked, key=lambda term: (-liked[term], term))), Cost()


class LlmWriter:
    """Every memory is written by the language model, one call each, as in the paper.

    An answer that stays unusable after the repair ladder leaves the memory as it was; the event says so.
    """

    def __init__(self, questions: Questions, fingerprint: str, *, seed: int, temperature: float) -> None:
        self._questions = questions
        self._fingerprint = fingerprint
        self._seed = seed
        self._temperature = temperature

    def _request(self, site: str, chat: Chat, words: int, names: Names, schema: str = "") -> Request:
        return Request(
            messages=chat,
            max_tokens=min(800, 2 * words + 16),
            temperature=self._temperature,
            schema=schema,
            seed=call_seed(self._seed, site, *names),
            site=site,
        )

    def _write(self, site: str, chat: Chat, old: Memory, words: int, names: Names) -> Asking:
        request = self._request(site, chat, words, names)
        key = call_key(self._fingerprint, request)[:16]
        tokens_in = tokens_out = 0
        # A text is unusable only when it is empty; one more try at temperature 0, then the old memory stays.
        for attempt in (request, Request(chat, request.max_tokens, 0.0, site=site)):
            (answer,) = yield [attempt]
            assert isinstance(answer, Completion)
            tokens_in, tokens_out = tokens_in + answer.prompt_tokens, tokens_out + answer.completion_tokens
            text = word_limit(" ".join(answer.text.split()), words)
            if text:
                return Written((Memory(text, {}, old.updates + 1),), Cost(key, tokens_in, tokens_out))
        return Written((old,), Cost(key, tokens_in, tokens_out, ok=False, fault="empty text"))

    def _ask(
        self, site: str, chat: Chat, words: int, names: Names, schema: str
    ) -> Generator[Sequence[Call], list[Answer], tuple[Any, Cost]]:
        """A JSON value that obeys `schema`, None where the repair ladder did not help, and what it cost."""
        request = self._request(site, chat, words, names, schema)
        key = call_key(self._fingerprint, request)[:16]
        value, tokens_in, tokens_out = yield from ask_json(request)
        if isinstance(value, MalformedAnswer):
            return None, Cost(key, tokens_in, tokens_out, ok=False, fault=value.reason)
        return value, Cost(key, tokens_in, tokens_out)

    def private(self, memory: Memory, outcome: Outcome, names: Names) -> Asking:
        chat = self._questions.reflect_user(memory.text, outcome)
        return (yield from self._write("reflect_user", chat, memory, WORD_LIMITS["private"], names))

    def extract(self, domain: int, others: Mapping[int, Memory], own: Memory, names: Names) -> Asking:
        if self._questions.is_single_domain:
            return Written((Memory(),))  # step one reads private_{d'}, d' != d: there never is one
        chat = self._questions.fuse_extract(domain, {d: memory.text for d, memory in others.items()})
        return (yield from self._write("fuse_extract", chat, Memory(), WORD_LIMITS["private"], names))

    def fuse(self, domain: int, fused: Memory, extract: Memory, private: Memory, names: Names) -> Asking:
        chat = self._questions.fuse(domain, fused.text, extract.text, private.text)
        return (yield from self._write("fuse", chat, fused, WORD_LIMITS["fused"], names))

    def fuse_at_once(self, domain: int, fused: Memory, privates: Mapping[int, Memory], names: Names) -> Asking:
        chat = self._questions.fuse_one_call(domain, fused.text, {d: memory.text for d, memory in privates.items()})
        return (yield from self._write("fuse_one_call", chat, fused, WORD_LIMITS["fused"], names))

    def items(self, user: Memory, pair: Pair, outcome: Outcome, names: Names, *, update_negative: bool) -> Asking:
        chat, schema = self._questions.reflect_items(user.text, outcome)
        value, cost = yield from self._ask("reflect_items", chat, 2 * WORD_LIMITS["item"], names, schema)
        if value is None:
            return Written(pair, cost)
        written = [
            Memory(text, {}, memory.updates + 1) if (text := word_limit(said, WORD_LIMITS["item"])) else memory
            for memory, said in zip(pair, (value["positive"], value["negative"]), strict=True)
        ]
        if not update_negative:
            written[1] = pair[1]
        return Written(tuple(written), cost)

    def tags(self, memories: Mapping[int, Memory], names: Names) -> AskingTags:
        chat, schema = self._questions.tags({d: memory.text for d, memory in memories.items()})
        value, cost = yield from self._ask("tags", chat, 60, names, schema)
        return tuple(dict.fromkeys(tag.strip().lower() for tag in value or () if tag.strip())), cost
