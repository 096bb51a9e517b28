"""What the benchmarks need of a model server beyond the backbone: cache salts, recorded bodies, bare replay, counters.

vLLM keeps prefixes between requests, so whatever is measured second would be served from the first one's cache. Each
measurement therefore sends its own `cache_salt`: the prompts stay the same to the letter and share nothing with another
measurement's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

_NUMBER = itertools.count()
_COUNTERS = {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "completion_tokens": "vllm:generation_tokens_total",
    "cached_tokens": "vllm:prefix_cache_hits_total",
}
Sent = tuple[str, dict[str, Any]]


def fresh_salt() -> str:
    """A salt that no earlier measurement on the server has used."""
    return f"{os.getpid()}-{time.time_ns()}-{next(_NUMBER)}"


class SaltedTransport(httpx.AsyncBaseTransport):
    """Sends requests on with a cache salt, and keeps every model request's (path, body) in `sent`.

    `n_requests` counts all HTTP requests, tokenisation included.
    """

    def __init__(self, salt: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._inner = httpx.AsyncHTTPTransport(limits=limits)
        self.salt = salt
        self.sent: list[Sent] = []
        self.n_requests = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.n_requests += 1
        if request.method == "POST" and request.url.path.endswith("/completions"):
            body = json.loads(request.content)
            self.sent.append((request.url.path, body))
            headers = {name: value for name, value in request.headers.items() if name.lower() != "content-length"}
            salted = body | {"cache_salt": self.salt}
            request = httpx.Request(
                "POST", request.url, headers=headers, json=salted, extensions=dict(request.extensions)
            )
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


def root_of(url: str) -> str:
    """Address without its version path."""
    return url.rstrip("/").removesuffix("/v1")


def replay(url: str, sent: Sequence[Sent], concurrency: int) -> float:
    """Seconds the server takes to answer recorded bodies in their order, `concurrency` in flight, under a fresh salt.

    Nothing but the requests themselves is in the time: bodies are serialised before, answers are not read as JSON.
    Depends on nothing of ours, so it is the server's own pace.

    Raises:
        httpx.HTTPStatusError: the server refused one.
    """
    salt = fresh_salt()
    bodies = [(path, json.dumps(body | {"cache_salt": salt}).encode()) for path, body in sent]
    return asyncio.run(_replay(root_of(url), bodies, concurrency))


async def _replay(root: str, bodies: Sequence[tuple[str, bytes]], concurrency: int) -> float:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    headers = {"Content-Type": "application/json"}
    waiting = iter(bodies)

    async with httpx.AsyncClient(base_url=root, limits=limits, timeout=900.0, headers=headers) as client:

        async def worker() -> None:
            for path, body in waiting:
                (await client.post(path, content=body)).raise_for_status()

        await client.get("/v1/models")
        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(min(concurrency, len(bodies)))))
        return time.perf_counter() - began


@dataclass(frozen=True)
class Counters:
    """The server's token counters: prompts as sent, texts written, prompt tokens found in the prefix cache."""

    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    cached_tokens: float = 0.0

    @property
    def computed_tokens(self) -> float:
        """Prompt tokens the model had to read."""
        return self.prompt_tokens - self.cached_tokens

    def since(self, before: Counters) -> Counters:
        """What was added since `before`."""
        return Counters(
            self.prompt_tokens - before.prompt_tokens,
            self.completion_tokens - before.completion_tokens,
            self.cached_tokens - before.cached_tokens,
        )


def counters(url: str) -> Counters:
    """Read `/metrics` of a vLLM server."""
    text = httpx.get(root_of(url) + "/metrics", timeout=60.0).raise_for_status().text
    found = {}
    for name, metric in _COUNTERS.items():
        values = re.findall(rf"^{re.escape(metric)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        found[name] = sum(map(float, values))
    return Counters(**found)


def tokenize(url: str, model: str, text: str) -> list[int]:
    """Token ids of a plain text by the server's tokenizer."""
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    return list(httpx.post(root_of(url) + "/tokenize", json=body, timeout=60.0).raise_for_status().json()["tokens"])
