"""What every language model answers, and nothing else: four batch-first primitives.

Calls are frozen records, so they can be hashed into the journal and sent again. A call's answer depends on
(model, prompt, parameters, seed) alone. `Choice` and `Scoring` are deterministic, so equal calls share one answer;
a sampled `Request` carries a seed named after its agent and step (`recollect.rng.call_seed`), which keeps two agents
who ask the same question apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from recollect.errors import ConfigError
from recollect.io import canonical_json, sha256_text

Role = Literal["system", "user", "assistant"]


class Message(NamedTuple):
    """One turn. `content` is final text: untrusted parts were neutralised by `recollect.prompts`."""

    role: Role
    content: str


Chat = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """Ask for text. `schema` is a JSON schema as canonical JSON text ("" = free text). `temperature` 0 is greedy."""

    messages: Chat
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    schema: str = ""
    seed: int = 0
    site: str = ""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens!r}")
        if self.temperature < 0:
            raise ConfigError(f"temperature must be 0 or more, got {self.temperature!r}")


@dataclass(frozen=True, slots=True)
class Choice:
    """Ask which of `options` (at least two, distinct, non-empty) the assistant's answer is."""

    messages: Chat
    options: tuple[str, ...]
    site: str = ""

    def __post_init__(self) -> None:
        if len(self.options) < 2 or len(set(self.options)) != len(self.options) or not all(self.options):
            raise ConfigError(f"a choice needs at least two distinct non-empty options, got {self.options!r}")


@dataclass(frozen=True, slots=True)
class Scoring:
    """Ask how likely each of `continuations` is as the assistant's answer to one shared context."""

    messages: Chat
    continuations: tuple[str, ...]
    site: str = ""

    def __post_init__(self) -> None:
        if not self.continuations or not all(self.continuations):
            raise ConfigError(f"scoring needs non-empty continuations, got {self.continuations!r}")


Call = Request | Choice | Scoring


@dataclass(frozen=True, slots=True)
class Completion:
    """Answer to a `Request`. finish_reason "length" means it was cut at max_tokens."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Literal["stop", "length"] = "stop"


@dataclass(frozen=True, slots=True)
class Chosen:
    """Answer to a `Choice`: log-probabilities (nats) normalised over the options, in their order."""

    log_probs: tuple[float, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Scored:
    """Answer to a `Scoring`: per continuation the summed log-probability (nats) and the token count.

    `prompt_tokens` counts what was computed: the context once plus every continuation.
    """

    log_probs: tuple[float, ...]
    n_tokens: tuple[int, ...]
    prompt_tokens: int


Answer = Completion | Chosen | Scored


@runtime_checkable
class Backbone(Protocol):
    """A language model (or a wrapper of one). Methods keep order and raise `BackboneError` on failure.

    `fingerprint` names weights, tokenizer, template and engine; it is part of every journal key.
    `control_tokens` are the strings the model's template treats as structure; prompts break them up in untrusted text.
    """

    @property
    def fingerprint(self) -> str: ...

    @property
    def control_tokens(self) -> tuple[str, ...]: ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...

    def choose(self, choices: Sequence[Choice]) -> list[Chosen]: ...

    def score(self, scorings: Sequence[Scoring]) -> list[Scored]: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(B, D) float32 unit rows."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class ConcurrentBackbone(Backbone, Protocol):
    """A backbone that takes calls one at a time and answers them as they come (servers).

    Bounded concurrency, retries and the breaker live behind `submit`. Backbones without it answer whole batches,
    whose composition may change the last bits of a float, so callers fix it.
    """

    def submit(self, call: Call) -> Future[Answer]: ...


PRIMITIVES: dict[type, str] = {Request: "generate", Choice: "choose", Scoring: "score"}


def primitive_of(call: Call) -> str:
    """ "generate", "choose" or "score"."""
    return PRIMITIVES[type(call)]


def call_to_json(call: Call) -> dict[str, Any]:
    """Everything that determines the answer (so not `site`, which only labels), as JSON values."""
    messages = [[role, content] for role, content in call.messages]
    match call:
        case Request():
            return {
                "primitive": "generate",
                "messages": messages,
                "max_tokens": call.max_tokens,
                "temperature": call.temperature,
                "top_p": call.top_p,
                "stop": list(call.stop),
                "schema": call.schema,
                "seed": call.seed if call.temperature > 0 else 0,
            }
        case Choice():
            return {"primitive": "choose", "messages": messages, "options": list(call.options)}
        case Scoring():
            return {"primitive": "score", "messages": messages, "continuations": list(call.continuations)}


def call_key(fingerprint: str, call: Call) -> str:
    """SHA-256 key of a call under a model: the journal's primary key. Includes the call site."""
    return sha256_text(canonical_json([fingerprint, call.site, call_to_json(call)]))


def answer_to_json(answer: Answer) -> dict[str, Any]:
    """JSON values of an answer; floats survive exactly (shortest round-trip text)."""
    match answer:
        case Completion():
            return {
                "text": answer.text,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "finish_reason": answer.finish_reason,
            }
        case Chosen():
            return {"log_probs": list(answer.log_probs), "prompt_tokens": answer.prompt_tokens}
        case Scored():
            return {
                "log_probs": list(answer.log_probs),
                "n_tokens": list(answer.n_tokens),
                "prompt_tokens": answer.prompt_tokens,
            }


def answer_from_json(primitive: str, value: dict[str, Any]) -> Answer:
    """Inverse of `answer_to_json`; raises KeyError, TypeError or ValueError on a poisoned value."""
    match primitive:
        case "generate":
            if value["finish_reason"] not in ("stop", "length") or not isinstance(value["text"], str):
                raise ValueError(f"not a completion: {value!r}")
            return Completion(
                value["text"], int(value["prompt_tokens"]), int(value["completion_tokens"]), value["finish_reason"]
            )
        case "choose":
            return Chosen(tuple(float(p) for p in value["log_probs"]), int(value["prompt_tokens"]))
        case "score":
            log_probs = tuple(float(p) for p in value["log_probs"])
            n_tokens = tuple(int(n) for n in value["n_tokens"])
            if len(log_probs) != len(n_tokens):
                raise ValueError(f"not a score: {value!r}")
            return Scored(log_probs, n_tokens, int(value["prompt_tokens"]))
    raise ValueError(f"unknown primitive {primitive!r}")


def answer_tokens(answer: Answer) -> tuple[int, int]:
    """(prompt tokens, completion tokens) an answer cost."""
    return answer.prompt_tokens, answer.completion_tokens if isinstance(answer, Completion) else 0


def answer_batch(backbone: Backbone, calls: Sequence[Call]) -> list[Answer]:
    """Answer mixed calls through the three batch primitives, each in one batch, and keep their order."""
    ask: dict[type, Callable[[Sequence[Any]], Sequence[Answer]]] = {
        Request: backbone.generate,
        Choice: backbone.choose,
        Scoring: backbone.score,
    }
    answers: dict[int, Answer] = {}
    for kind, primitive in ask.items():
        index = [i for i, call in enumerate(calls) if isinstance(call, kind)]
        if index:
            answers.update(zip(index, primitive([calls[i] for i in index]), strict=True))
    return [answers[i] for i in range(len(calls))]
