"""What each economy of the prompts saves, on any backbone: the same questions asked the dear way and ours.

Every function asks one way and says what it cost; the caller alternates ways and takes medians.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from workload import Shopper, World

from recollect.agents.questions import LABELS
from recollect.agents.regrouping import in_lockstep
from recollect.backbones.protocol import Chat, Choice, Completion, Message, Request, Scoring
from recollect.prompts.parsing import MalformedAnswer, ask_json

ANSWER_TOKENS = 24
EXPLAIN_TOKENS = 200
_LABEL = re.compile(r"\b([AB])\b")


@dataclass(frozen=True)
class Tally:
    """What a way of asking cost. `sent_tokens`: prompt tokens of all requests, `computed_tokens`: those the model read
    (the rest came from a cache or was shared). `unusable`: answers that gave no decision."""

    seconds: float
    requests: float
    sent_tokens: float
    computed_tokens: float
    written_tokens: float
    unusable: float = 0.0


@dataclass(frozen=True)
class Meter:
    """Counts around a measurement: `start()` gives a function that returns (requests, sent, computed, written)."""

    start: Callable[[], Callable[[], tuple[float, float, float, float]]]

    def measure(self, ask: Callable[[], int]) -> Tally:
        """Run `ask`, which returns the number of unusable answers."""
        stop = self.start()
        began = time.perf_counter()
        unusable = ask()
        seconds = time.perf_counter() - began
        requests, sent, computed, written = stop()
        return Tally(seconds, requests, sent, computed, written, unusable)


def reversed_layout(chat: Chat) -> Chat:
    """The same lines with what varies first: question, candidates, memory. The system turn stays where templates put
    it."""
    *before, user = chat
    opening, *data, closing, question = user.content.split("\n")
    return (*before, Message("user", "\n".join([question, opening, *reversed(data), closing])))


def pair_questions(world: World, people: Sequence[Shopper], pairs: int) -> list[Chat]:
    """`pairs` choices per shopper over disjoint or neighbouring pairs of the slate, one after the other."""
    questions, agents = world.agents.questions, world.agents
    chats = []
    for person in people:
        shown = [questions.shown(item, agents.item_memory(item).text) for item in person.items]
        for at in range(pairs):
            first, second = shown[at % len(shown)], shown[(at + 1) % len(shown)]
            chats.append(questions.choice(person.domain, person.memory, first, second))
    return chats


def slate_questions(world: World, people: Sequence[Shopper]) -> list[Scoring]:
    """One question per shopper with the slate's titles as continuations."""
    questions = world.agents.questions
    return [
        Scoring(
            questions.rank_context(person.domain, person.memory),
            tuple(dict.fromkeys(questions.title(item) for item in person.items)),
        )
        for person in people
    ]


def choose_all(backbone: Any, chats: Sequence[Chat]) -> int:
    """Label probabilities."""
    backbone.choose([Choice(chat, LABELS) for chat in chats])
    return 0


def score_all(backbone: Any, slates: Sequence[Scoring]) -> int:
    """Log-probabilities of every title."""
    backbone.score(slates)
    return 0


def write_letter(backbone: Any, chats: Sequence[Chat]) -> int:
    """Text for the same prompts, searched for a letter."""
    answers = backbone.generate([Request(chat, max_tokens=ANSWER_TOKENS) for chat in chats])
    return sum(_LABEL.search(answer.text) is None for answer in answers)


def write_explained(backbone: Any, world: World, people: Sequence[Shopper], seed: int) -> int:
    """A JSON choice with an explanation, as the papers ask for it, with the ladder that asks again."""
    questions, agents = world.agents.questions, world.agents
    asking = {}
    for number, person in enumerate(people):
        first, second = (questions.shown(item, agents.item_memory(item).text) for item in person.items[:2])
        chat, schema = questions.choice_explain(person.domain, person.memory, first, second)
        request = Request(chat, EXPLAIN_TOKENS, temperature=0.7, schema=schema, seed=1_000 * seed + number)
        asking[number] = ask_json(request)
    rounds = in_lockstep(asking)
    found: dict[int, Any] = {}
    try:
        calls = next(rounds)
        while True:
            answers: list[Completion] = backbone.generate(calls)
            calls = rounds.send(list(answers))
    except StopIteration as stop:
        found = stop.value
    return sum(isinstance(value, MalformedAnswer) for value, _, _ in found.values())
