"""Any LangChain chat model (and embedder) as a backbone.

`generate` always works. Probabilities need the model's own log-probabilities (`logprobs=True`, for models that return
OpenAI-style `logprobs` in their response metadata) or, for `choose`, sampling (`votes=n`). A constrained answer is not
a probability, so without either `choose` is refused; `score` is always refused, because no LangChain model can score a
given text. LangChain's tracing is switched off for our calls: prompts go to the model and nowhere else.
Needs the extra `langchain`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.backbones.protocol import Choice, Chosen, Completion, Message, Request, Scored, Scoring
from recollect.backbones.served import CONTROL_TOKENS
from recollect.backbones.wire import normalised
from recollect.errors import BackboneError, ConfigError, MalformedOutput
from recollect.io import canonical_json
from recollect.rng import call_seed

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage

_TOP_TOKENS = 20


def standard_arguments(request: Request) -> dict[str, Any]:
    """LangChain's standard call arguments of a request; models that spell them otherwise take another function."""
    arguments: dict[str, Any] = {"max_tokens": request.max_tokens, "temperature": request.temperature}
    if request.top_p < 1:
        arguments["top_p"] = request.top_p
    if request.temperature > 0:
        arguments["seed"] = request.seed
    return arguments


class LangChainBackbone:
    """A `Backbone` over a `BaseChatModel`.

    Args:
        chat_model: the model.
        embeddings: what answers `embed`; None refuses it.
        name: identity of the model for the journal; None takes provider and name from the model itself.
        logprobs: the model accepts `logprobs=True, top_logprobs=20` and returns them in OpenAI's form.
        votes: sampled answers per choice, where there are no log-probabilities; 0 refuses `choose`. The estimate is
            (votes + 1/2) / (n + options/2), so its error is about 1/(2 sqrt(n)).
        concurrency: calls in flight at the model.
        arguments: call arguments of a request.
    """

    def __init__(
        self,
        chat_model: BaseChatModel,
        embeddings: Embeddings | None = None,
        *,
        name: str | None = None,
        logprobs: bool = False,
        votes: int = 0,
        concurrency: int = 16,
        arguments: Callable[[Request], dict[str, Any]] = standard_arguments,
    ) -> None:
        if votes < 0 or (votes and logprobs):
            raise ConfigError(
                f"votes must be 0 or more and excludes logprobs, got votes={votes!r}, logprobs={logprobs!r}"
            )
        if concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {concurrency!r}")
        self._model = chat_model
        self._embeddings = embeddings
        self._name = name
        self._logprobs = logprobs
        self._votes = votes
        self._concurrency = concurrency
        self._arguments = arguments

    @property
    def fingerprint(self) -> str:
        """Class, provider and name of the model, and how it chooses; weights and versions behind it are not known."""
        way = "logprobs" if self._logprobs else f"votes={self._votes}"
        if self._name is not None:
            return f"langchain:{self._name}:{way}"
        known = self._model._get_ls_params()
        named = f"{known.get('ls_provider', '')}/{known.get('ls_model_name', '')}"
        return f"langchain:{type(self._model).__module__}.{type(self._model).__qualname__}:{named}:{way}"

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Of the known template families; what the model really uses is not known."""
        return CONTROL_TOKENS

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order; token counts are 0 where the model does not report them.

        Raises:
            BackboneError: the model failed; its own error is the cause.
            MalformedOutput: an answer does not fit its schema.
        """
        answers: list[Completion | None] = [None] * len(requests)
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            key = canonical_json([self._arguments(request), list(request.stop), request.schema])
            alike.setdefault(key, []).append(index)
        for indices in alike.values():
            for index, answer in zip(indices, self._ask_alike([requests[i] for i in indices]), strict=True):
                answers[index] = answer
        return answers  # type: ignore[return-value]

    def _ask_alike(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer requests that differ in their messages only."""
        first = requests[0]
        arguments = self._arguments(first)
        if first.stop:
            arguments["stop"] = list(first.stop)
        chats = [request.messages for request in requests]
        if first.schema:
            schema = {"title": "answer", "description": "The answer.", **json.loads(first.schema)}
            runnable = self._model.with_structured_output(schema)
            return [
                _completion(message, canonical_json(parsed))
                for parsed, message in self._batch(runnable, chats, arguments)
            ]
        return [_completion(message, str(message.text)) for message, _ in self._batch(self._model, chats, arguments)]

    def choose(self, choices: Sequence[Choice]) -> list[Chosen]:
        """Log-probabilities over each choice's options, in order; see `logprobs` and `votes`.

        Raises:
            BackboneError: neither is on, or an option is not among the model's likeliest first tokens.
        """
        if self._logprobs:
            return self._choose_by_logprobs(choices)
        if self._votes:
            return [self._choose_by_votes(choice) for choice in choices]
        raise BackboneError(
            f"{type(self._model).__name__} gives no probabilities, and a constrained answer is not one; pass "
            "logprobs=True if the model returns log-probabilities, votes=30 to sample them, or use an in-process or "
            "server backbone"
        )

    def _choose_by_logprobs(self, choices: Sequence[Choice]) -> list[Chosen]:
        arguments = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": _TOP_TOKENS}
        chosen = []
        messages = self._batch(self._model, [choice.messages for choice in choices], arguments)
        for choice, (message, _) in zip(choices, messages, strict=True):
            try:
                entries = message.response_metadata["logprobs"]["content"][0]["top_logprobs"]
                top = {entry["token"]: float(entry["logprob"]) for entry in entries}
            except (KeyError, IndexError, TypeError) as error:
                raise BackboneError(
                    f"{type(self._model).__name__} returned no logprobs ({error!r}); use votes=n instead"
                ) from error
            if missing := [option for option in choice.options if option not in top]:
                raise BackboneError(
                    f"option {missing[0]!r} is not among the {_TOP_TOKENS} likeliest tokens of "
                    f"{type(self._model).__name__}; use one-letter options or votes=n"
                )
            prompt_tokens = _completion(message, "").prompt_tokens
            chosen.append(Chosen(normalised([top[option] for option in choice.options]), prompt_tokens))
        return chosen

    def _choose_by_votes(self, choice: Choice) -> Chosen:
        requests = [
            Request(choice.messages, max_tokens=64, temperature=1.0, seed=call_seed(0, "vote", number))
            for number in range(self._votes)
        ]
        answers = self.generate(requests)
        counts = Counter(answer.text.strip() for answer in answers)
        votes = [counts[option.strip()] for option in choice.options]
        if not any(votes):
            seen = [text for text, _ in counts.most_common(3)]
            raise MalformedOutput(f"none of {self._votes} answers is one of {choice.options!r}; seen: {seen!r}")
        weights = [math.log(count + 0.5) for count in votes]
        return Chosen(normalised(weights), sum(answer.prompt_tokens for answer in answers))

    def score(self, scorings: Sequence[Scoring]) -> list[Scored]:
        """Refused: LangChain has no call that scores a given text."""
        if not scorings:
            return []
        raise BackboneError("LangChain models cannot score a given text; use an in-process or server backbone")

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(B, D) float32 unit rows from the embeddings given.

        Raises:
            BackboneError: none were given, or they gave a zero or non-finite vector.
        """
        if self._embeddings is None:
            raise BackboneError("this LangChain backbone has no embedder; pass embeddings=, or use --embedder minilm")
        if not texts:
            return np.zeros((0, 0), np.float32)
        rows = np.asarray(self._embeddings.embed_documents(list(texts)), dtype=np.float32)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if not (np.isfinite(lengths).all() and (lengths > 0).all()):
            raise BackboneError(f"{type(self._embeddings).__name__} gave a zero or non-finite vector")
        return rows / lengths

    def close(self) -> None:
        """Nothing is held."""

    def _batch(
        self, runnable: Any, chats: Sequence[Sequence[Message]], arguments: dict[str, Any]
    ) -> list[tuple[Any, AIMessage]]:
        """What `runnable` gives per chat, and the model's message behind it."""
        from langchain_core.callbacks import BaseCallbackHandler
        from langchain_core.exceptions import OutputParserException
        from langchain_core.runnables import RunnableConfig
        from langsmith import tracing_context

        class Listener(BaseCallbackHandler):
            message: Any = None

            def on_llm_end(self, response: Any, **_: Any) -> None:
                self.message = response.generations[0][0].message

        listeners = [Listener() for _ in chats]
        configs = [RunnableConfig(max_concurrency=self._concurrency, callbacks=[one]) for one in listeners]
        inputs = [[_message(message) for message in chat] for chat in chats]
        try:
            with tracing_context(enabled=False):
                outcomes = runnable.batch(inputs, configs, return_exceptions=True, **arguments) if inputs else []
        except Exception as error:  # a provider's own `batch` may raise instead, and anything
            outcomes = [error]
        for outcome in outcomes:
            if isinstance(outcome, OutputParserException) or outcome is None:
                raise MalformedOutput(f"an answer of {type(self._model).__name__} does not fit the schema: {outcome}")
            if isinstance(outcome, Exception):
                reason = f"{type(outcome).__name__}: {outcome}"
                raise BackboneError(f"{type(self._model).__name__} failed: {reason}") from outcome
        return [(outcome, listener.message) for outcome, listener in zip(outcomes, listeners, strict=True)]


def _message(message: Message) -> Any:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    kinds = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}
    return kinds[message.role](message.content)


def _completion(message: AIMessage, text: str) -> Completion:
    usage = message.usage_metadata
    prompt, completion = (usage["input_tokens"], usage["output_tokens"]) if usage else (0, 0)
    reason = message.response_metadata.get("finish_reason") or message.response_metadata.get("stop_reason")
    return Completion(text, prompt, completion, "length" if reason in ("length", "max_tokens") else "stop")
