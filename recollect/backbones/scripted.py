"""A backbone made of plain functions: tests, synthetic worlds, dry runs.

Deterministic by construction: every answer is a pure function of its request. Counts calls, and can answer late and out
of order to show that callers do not depend on timing.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from recollect.backbones.protocol import (
    Answer,
    Call,
    Choice,
    Chosen,
    Completion,
    Request,
    Scored,
    Scoring,
    call_key,
    primitive_of,
)
from recollect.errors import BackboneError, ConfigError
from recollect.rng import stream

DIMENSION = 64


class ScriptedBackbone:
    """Answers from functions of the request.

    Args:
        generate: text for a request; default: a fixed sentence that names the hash of the prompt.
        choose: (n_options,) unnormalised log-weights for a choice; default: by hash, so arbitrary but fixed.
        score: log-probabilities (nats) for a scoring; default: -1 nat a word, hash-dependent fraction.
        embed: (D,) vector for a text, normalised here; default: a hashed bag of words of 64 dimensions.
        name: part of the fingerprint; name it after what the functions do.
        latency: mean seconds a submitted call takes; each call's own delay is drawn by its hash from 0 to twice this.
        concurrency: calls answered at the same time through `submit`.

    Token counts are numbers of blank-separated words. `calls` counts answered calls by primitive.
    """

    def __init__(
        self,
        generate: Callable[[Request], str] | None = None,
        choose: Callable[[Choice], Sequence[float]] | None = None,
        score: Callable[[Scoring], Sequence[float]] | None = None,
        embed: Callable[[str], np.ndarray] | None = None,
        *,
        name: str = "default",
        latency: float = 0.0,
        concurrency: int = 64,
        control_tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"),
    ) -> None:
        if latency < 0:
            raise ConfigError(f"latency must be 0 or more seconds, got {latency!r}")
        if concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {concurrency!r}")
        self._generate = generate or _default_text
        self._choose = choose or _default_weights
        self._score = score or _default_scores
        self._embed = embed or hashed_words
        self._name = name
        self._latency = latency
        self._concurrency = concurrency
        self._control_tokens = control_tokens
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._in_flight = 0
        self.calls: Counter[str] = Counter()
        self.max_in_flight = 0

    @property
    def fingerprint(self) -> str:
        """The name given at construction."""
        return f"scripted/{self._name}"

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """What was given at construction."""
        return self._control_tokens

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer each request by the function, cut at stop strings and `max_tokens` words."""
        return [self._completion(request) for request in requests]

    def choose(self, choices: Sequence[Choice]) -> list[Chosen]:
        """Normalise the function's log-weights."""
        return [self._chosen(choice) for choice in choices]

    def score(self, scorings: Sequence[Scoring]) -> list[Scored]:
        """The function's log-probabilities, with word counts."""
        return [self._scored(scoring) for scoring in scorings]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(B, D) float32 unit rows."""
        self._count("embed", len(texts))
        if not texts:
            return np.zeros((0, DIMENSION), dtype=np.float32)
        rows = np.array([self._embed(text) for text in texts], dtype=np.float64)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if not np.all(norms > 0):
            raise BackboneError("the scripted embed function returned a zero vector")
        return (rows / norms).astype(np.float32)

    def submit(self, call: Call) -> Future[Answer]:
        """Answer one call on a thread, after its own delay; at most `concurrency` at a time."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="scripted")
            return self._pool.submit(self._answer_late, call)

    def close(self) -> None:
        """End the threads of `submit`; waits for calls in flight."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)

    def _answer_late(self, call: Call) -> Answer:
        with self._lock:
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            if self._latency:
                time.sleep(2 * self._latency * stream(0, "latency", call_key(self.fingerprint, call)).random())
            match call:
                case Request():
                    return self._completion(call)
                case Choice():
                    return self._chosen(call)
                case Scoring():
                    return self._scored(call)
        finally:
            with self._lock:
                self._in_flight -= 1

    def _completion(self, request: Request) -> Completion:
        self._count(primitive_of(request))
        text = self._generate(request)
        cuts = [at for at in (text.find(stop) for stop in request.stop) if at >= 0]
        text = text[: min(cuts)] if cuts else text
        words = text.split()
        if len(words) > request.max_tokens:
            cut = " ".join(words[: request.max_tokens])
            return Completion(cut, _n_words(request), request.max_tokens, "length")
        return Completion(text, _n_words(request), len(words))

    def _chosen(self, choice: Choice) -> Chosen:
        self._count(primitive_of(choice))
        weights = np.asarray(self._choose(choice), dtype=np.float64)
        if weights.shape != (len(choice.options),) or np.isnan(weights).any() or not np.isfinite(weights.max()):
            raise BackboneError(f"the scripted choose function gave {weights!r} for {len(choice.options)} options")
        log_probs = weights - np.logaddexp.reduce(weights)
        n_tokens = _n_words(choice) + sum(len(option.split()) for option in choice.options)
        return Chosen(tuple(log_probs.tolist()), n_tokens)

    def _scored(self, scoring: Scoring) -> Scored:
        self._count(primitive_of(scoring))
        log_probs = tuple(float(value) for value in self._score(scoring))
        if len(log_probs) != len(scoring.continuations):
            raise BackboneError(
                f"the scripted score function gave {len(log_probs)} values for {len(scoring.continuations)} texts"
            )
        n_tokens = tuple(max(1, len(text.split())) for text in scoring.continuations)
        return Scored(log_probs, n_tokens, _n_words(scoring) + sum(n_tokens))

    def _count(self, primitive: str, n: int = 1) -> None:
        with self._lock:
            self.calls[primitive] += n


def hashed_words(text: str) -> np.ndarray:
    """(64,) float64: signed counts of the text's words, each at the place its hash says; never zero."""
    vector = np.zeros(DIMENSION)
    for word in text.lower().split() or [""]:
        digest = hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()
        vector[digest[0] % DIMENSION] += 1.0 if digest[1] & 1 else -1.0
    if not vector.any():
        vector[0] = 1.0
    return vector


def _n_words(call: Call) -> int:
    return sum(len(message.content.split()) for message in call.messages)


def _default_text(request: Request) -> str:
    return f"I have read it and my answer is {call_key('text', request)[:8]}."


def _default_weights(choice: Choice) -> list[float]:
    generator = stream(0, "choose", call_key("choose", choice))
    return generator.normal(size=len(choice.options)).tolist()


def _default_scores(scoring: Scoring) -> list[float]:
    context = [message.content for message in scoring.messages]
    return [-len(text.split()) - float(stream(0, "score", *context, text).random()) for text in scoring.continuations]
