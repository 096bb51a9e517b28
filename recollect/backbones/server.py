"""Language models behind an OpenAI-compatible HTTP server (vLLM first) as a concurrent backbone.

`generate` is a chat completion. `choose` and `score` are exact: token ids come from the server's `/tokenize`,
log-probabilities from `scoring`; where a server cannot give them the call fails and says what to use. The one
exception is documented at `_choose_among_top`. What a server can do is asked once. Retries, breaker, concurrency and
failover live in `fleet`. Untrusted text must have been neutralised by `recollect.prompts`: the server renders the
chat template itself and would obey control tokens.
Not covered: streaming to the caller, tools, images.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx
import numpy as np

from recollect.backbones import scoring, wire
from recollect.backbones.background import BackgroundLoop
from recollect.backbones.fleet import Fleet, Timeouts
from recollect.backbones.protocol import (
    Answer,
    Call,
    Chat,
    Choice,
    Chosen,
    Completion,
    Request,
    Scored,
    Scoring,
    answer_tokens,
)
from recollect.backbones.retry import RetryPolicy
from recollect.backbones.served import Identity, ServedModel, beginning_of
from recollect.errors import BackboneError, ConfigError

Result = TypeVar("Result")
Value = TypeVar("Value")

_TEXTS_PER_REQUEST = 64
_TOP_TOKENS = 20


class ServerBackbone:
    """A `ConcurrentBackbone` over one or several servers of the same model.

    Args:
        url: base URL(s), comma-separated, with or without "/v1": "http://127.0.0.1:8000". Requests that begin alike go
            to the same server (prefix cache) while it has room.
        model: served name; None takes the only one served.
        api_key: sent as a bearer token; None takes the environment variable RECOLLECT_API_KEY.
        concurrency: most requests in flight per server; adapts downwards when the server is overloaded.
        patience_s: seconds a request may keep failing, or all servers stay away, before `ServerAway` (exit 75).
        transport, make_loop: seams for tests (an in-memory server, a loop whose time jumps).

    Nothing is sent before the first use. Every method raises `BackboneError`: `ServerAway` with the address,
    `BackboneConfigError` where asking again cannot help, `ContextTooLong`, `MalformedOutput`.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        concurrency: int = 64,
        patience_s: float = 600.0,
        timeouts: Timeouts | None = None,
        policy: RetryPolicy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        make_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    ) -> None:
        if concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {concurrency!r}")
        self._addresses = [_api_address(part.strip()) for part in url.split(",")]
        self._asked_model = model
        self._concurrency = concurrency
        self._patience_s = patience_s
        self._timeouts = timeouts or Timeouts()
        self._policy = policy or RetryPolicy(deadline_s=patience_s)
        self._api_key = api_key if api_key is not None else os.environ.get("RECOLLECT_API_KEY")
        self._transport = transport
        self._make_loop = make_loop
        self._background: BackgroundLoop | None = None
        self._is_closed = False
        self._fleet: Fleet | None = None
        self._served: ServedModel | None = None
        self._tokens = {"prompt_tokens": 0, "completion_tokens": 0}

    # ---- the protocol --------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Model id, root, adapter, context length and engine version; not the address. Asks the server once."""
        return self._wait([self._run(self._ask_identity())])[0].fingerprint

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """`served.CONTROL_TOKENS` and the bracketed tokens of the served template. Asks the server once."""
        return self._wait([self._run(self._ask_control_tokens())])[0]

    def submit(self, call: Call) -> Future[Answer]:
        """Start one call; its future gives the answer or raises `BackboneError`. Cancelling it frees its slot."""
        return self._run(self._answer(call))

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order. Seeds are honoured as far as the server does."""
        return self._wait([self._run(self._generate(request)) for request in requests])

    def choose(self, choices: Sequence[Choice]) -> list[Chosen]:
        """Log-probabilities over each choice's options, in order."""
        return self._wait([self._run(self._choose(choice)) for choice in choices])

    def score(self, scorings: Sequence[Scoring]) -> list[Scored]:
        """Log-probabilities of each scoring's continuations, in order."""
        return self._wait([self._run(self._score(one)) for one in scorings])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(B, D) float32 unit rows from `/v1/embeddings`; needs a server of an embedding model."""
        parts = [texts[at : at + _TEXTS_PER_REQUEST] for at in range(0, len(texts), _TEXTS_PER_REQUEST)]
        rows = self._wait([self._run(self._embed(part)) for part in parts])
        return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)

    def stats(self) -> dict[str, float]:
        """Counters since the start: requests (HTTP), retries, failures (abandoned), malformed, breaker_opened, probes,
        prompt_tokens, completion_tokens, seconds_busy (with at least one request in flight), faults_<class>."""
        named = ("requests", "retries", "failures", "malformed", "breaker_opened", "probes")
        counts = self._fleet.counts if self._fleet is not None else {}
        busy = self._fleet.seconds_busy if self._fleet is not None else 0.0
        return {name: counts.get(name, 0) for name in named} | dict(counts) | self._tokens | {"seconds_busy": busy}

    def close(self) -> None:
        """Drop what is in flight and the connections; idempotent, safe in a KeyboardInterrupt."""
        self._is_closed = True
        if self._background is not None:
            self._background.close(self._close_fleet)

    def __enter__(self) -> ServerBackbone:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- threads -------------------------------------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        if self._background is None and not self._is_closed:
            self._background = BackgroundLoop("recollect-server", self._make_loop)
        if self._background is None:
            work.close()
            raise BackboneError("the server backbone is closed")
        return self._background.submit(work)

    def _wait(self, futures: Sequence[Future[Result]]) -> list[Result]:
        """Results in order; the first failure, or the user's interrupt, cancels the rest."""
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    async def _close_fleet(self) -> None:
        if self._fleet is not None:
            await self._fleet.close()

    @property
    def _model(self) -> ServedModel:
        """The served model, met on the event loop at first use."""
        if self._served is None:
            self._fleet = Fleet(
                self._addresses,
                headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
                concurrency=self._concurrency,
                patience_s=self._patience_s,
                timeouts=self._timeouts,
                policy=self._policy,
                transport=self._transport,
            )
            self._served = ServedModel(self._fleet, self._asked_model)
        return self._served

    @property
    def _requests(self) -> Fleet:
        assert self._model is not None
        assert self._fleet is not None
        return self._fleet

    async def _ask_identity(self) -> Identity:
        return await self._model.identity()

    async def _ask_control_tokens(self) -> tuple[str, ...]:
        return await self._model.control_tokens()

    # ---- the primitives ------------------------------------------------------------------------------------------

    async def _answer(self, call: Call) -> Answer:
        match call:
            case Request():
                return await self._generate(call)
            case Choice():
                return await self._choose(call)
            case Scoring():
                return await self._score(call)

    def _count(self, answer: Answer) -> None:
        prompt, completion = answer_tokens(answer)
        self._tokens["prompt_tokens"] += prompt
        self._tokens["completion_tokens"] += completion

    async def _generate(self, request: Request) -> Completion:
        identity = await self._model.identity()
        if request.schema:
            await self._model.require_schema()
        check, parse = wire.model_checker(identity.model, identity.root), wire.completion_parser(request)
        answer = await self._requests.call(
            "/v1/chat/completions",
            wire.chat_body(identity.model, request, is_vllm=identity.is_vllm),
            lambda value: parse(check(value)),
            affinity=beginning_of(request.messages),
        )
        self._count(answer)
        return answer

    async def _choose(self, choice: Choice) -> Chosen:
        ways = await self._model.scoring_ways()
        if ways is None:
            answer = await self._choose_among_top(choice)
        else:
            context, options, sums = await self._log_probs(ways, choice.messages, choice.options)
            answer = Chosen(wire.normalised(sums), len(context) + sum(map(len, options)))
        self._count(answer)
        return answer

    async def _score(self, one: Scoring) -> Scored:
        ways = await self._model.scoring_ways()
        if ways is None:
            raise BackboneError(
                f"{self._requests.where} has no /tokenize, so continuations cannot be scored exactly; "
                "use vLLM >= 0.30 or an in-process model"
            )
        context, continuations, sums = await self._log_probs(ways, one.messages, one.continuations)
        lengths = tuple(map(len, continuations))
        answer = Scored(tuple(sums), lengths, len(context) + sum(lengths))
        self._count(answer)
        return answer

    async def _log_probs(
        self, ways: scoring.ScoringWays, messages: Chat, texts: Sequence[str]
    ) -> tuple[list[int], list[list[int]], list[float]]:
        """Token ids of the context, of each text, and each text's summed log-probability."""
        identity = await self._model.identity()
        affinity = beginning_of(messages)
        context, *continuations = await asyncio.gather(
            self._model.tokenize_chat(messages), *(self._model.tokenize_text(text, affinity) for text in texts)
        )
        check = wire.model_checker(identity.model, identity.root)

        async def ask(body: dict[str, Any], parse: Callable[[dict[str, Any]], Value]) -> Value:
            return await self._requests.call(
                "/v1/completions", body, lambda value: parse(check(value)), affinity=affinity
            )

        way = ways.way_for(max(map(len, continuations)))
        return context, continuations, await scoring.log_probs_of(ask, identity.model, way, context, continuations)

    async def _choose_among_top(self, choice: Choice) -> Chosen:
        """Options of one token each on a server without `/tokenize`: read off the likeliest first tokens.

        Exact where every option is, as text, one of the `_TOP_TOKENS` likeliest tokens; any other case is refused,
        for a missing option has no probability and a longer one would be scored by its first token only.
        """
        identity = await self._model.identity()
        check = wire.model_checker(identity.model, identity.root)
        top, n_tokens = await self._requests.call(
            "/v1/chat/completions",
            wire.top_tokens_body(identity.model, choice.messages, _TOP_TOKENS),
            lambda value: wire.parse_top_tokens(check(value)),
            affinity=beginning_of(choice.messages),
        )
        if missing := [option for option in choice.options if option not in top]:
            raise BackboneError(
                f"{self._requests.where} has no /tokenize and option {missing[0]!r} is not among its {_TOP_TOKENS} "
                "likeliest tokens; use vLLM >= 0.30, an in-process model, or one-letter options"
            )
        return Chosen(wire.normalised([top[option] for option in choice.options]), n_tokens)

    async def _embed(self, texts: Sequence[str]) -> np.ndarray:
        identity = await self._model.identity()
        check = wire.model_checker(identity.model, identity.root)
        return await self._requests.call(
            "/v1/embeddings",
            {"model": identity.model, "input": [wire.sendable(text) for text in texts], "encoding_format": "float"},
            lambda value: wire.parse_embeddings(check(value), len(texts)),
        )


def _api_address(url: str) -> str:
    """Base address that ends in its version path.

    Raises:
        ConfigError: not an http(s) URL, or one with a password in it.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"server address {url!r} is not a URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"server address {url!r} must begin with http:// or https://, like http://127.0.0.1:8000")
    if parsed.userinfo:
        raise ConfigError(f"server address of {parsed.host!r} holds a password; give it as api_key instead")
    address = url.rstrip("/")
    return address if parsed.path.strip("/") else address + "/v1"
