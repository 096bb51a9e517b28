"""Requests to one model behind one or several server addresses: dispatch, failover, retries, recovery.

Everything runs on one event loop, so the bookkeeping needs no locks. A request waits in one queue, goes to the
server its prompt prefix is cached on while that server has room, else to the least busy one, and is tried again by
`retry.RetryPolicy`. While a server's breaker is open no request is sent to it but a generation probe every 30 s; when
all are open longer than the patience, the waiting requests end in `ServerAway`.
Not covered: what the bodies mean; see `wire` and `server`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import httpx

from recollect.backbones import wire
from recollect.backbones.breaker import Breaker
from recollect.backbones.limiter import AdaptiveLimiter
from recollect.backbones.retry import FaultKind, RequestFault, RetryPolicy, fault_of_status, run_with_retries
from recollect.errors import ServerAway
from recollect.rng import stream

Parsed = TypeVar("Parsed")

_LOOKAHEAD = 64


@dataclass(frozen=True)
class Timeouts:
    """Seconds. `stall`: silence of a whole server after which a one-token probe asks whether it is hung."""

    connect: float = 10.0
    request: float = 300.0
    stall: float = 60.0
    probe: float = 30.0


@dataclass(eq=False)
class Server:
    """One address: its connection pool, slots and health. `api` ends in the version path, `root` is above it."""

    api: str
    client: httpx.AsyncClient
    limiter: AdaptiveLimiter
    breaker: Breaker = field(default_factory=Breaker)
    last_answer_at: float = 0.0
    running: set[asyncio.Task[httpx.Response]] = field(default_factory=set)
    hang_check: asyncio.Task[None] | None = None

    @property
    def root(self) -> str:
        return self.api.removesuffix("/v1")

    @property
    def is_available(self) -> bool:
        return self.breaker.state == "closed" and self.limiter.has_room


class _Waiter(NamedTuple):
    """A request in the queue; a pinned one may go to its preferred server only."""

    granted: asyncio.Future[Server]
    preferred: Server
    is_pinned: bool


def affinity_of(text: str, n_servers: int) -> int:
    """Index of the server that keeps prompts beginning with `text` in its prefix cache."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") % n_servers


class Fleet:
    """Sends requests for a `Backbone`; all methods run on the event loop it was made on.

    `model` is the served name, set once it is known. `counts` are the ledger's numbers.

    Args:
        addresses: API base URLs, each ending in its version path.
        concurrency: most requests in flight per server.
        patience_s: seconds all servers may stay away before `ServerAway`.
        policy: how often and how long a failing request is tried again.
    """

    def __init__(
        self,
        addresses: list[str],
        *,
        headers: dict[str, str],
        concurrency: int,
        patience_s: float,
        timeouts: Timeouts,
        policy: RetryPolicy,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._patience_s = patience_s
        self._timeouts = timeouts
        self._policy = policy
        self.model = ""
        self._jitter = stream(0, "server", "retry")
        self._queue: deque[_Waiter] = deque()
        self._recovery: asyncio.Task[None] | None = None
        self._in_flight = 0
        self._busy_since = 0.0
        self.counts: Counter[str] = Counter()
        self.seconds_busy = 0.0
        self.servers = [
            Server(
                api,
                httpx.AsyncClient(
                    headers=headers,
                    transport=transport,
                    timeout=httpx.Timeout(timeouts.request, connect=timeouts.connect, pool=None),
                    limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency),
                    follow_redirects=False,
                ),
                AdaptiveLimiter(concurrency),
            )
            for api in addresses
        ]

    @property
    def where(self) -> str:
        """Every address, for messages."""
        return ", ".join(server.api for server in self.servers)

    async def close(self) -> None:
        """Close every connection; the caller cancelled the requests."""
        if self._recovery is not None:
            self._recovery.cancel()
        for server in self.servers:
            await server.client.aclose()

    async def call(
        self,
        path: str,
        body: dict[str, Any] | None,
        parse: Callable[[Any], Parsed],
        *,
        affinity: str = "",
        only: Server | None = None,
        is_optional: bool = False,
    ) -> Parsed:
        """Post `body` (get, where None) and return `parse` of the JSON answer, however many tries it takes.

        `path` beginning with "/v1" is relative to a server's API address, any other to the root above it.
        `parse` raises `RequestFault("semantic")` on a body that is no answer. `only` pins the server. A
        refusal of an optional question does not count as a failure.

        Raises:
            BackboneError: the request was abandoned; see `retry.final_error`.
        """
        first = affinity_of(affinity, len(self.servers))
        last: Server = only or self.servers[first]
        n_tries = 0
        queued_s = 0.0

        async def attempt() -> Parsed:
            nonlocal last, n_tries, queued_s
            # A try that failed is repeated elsewhere where there is an elsewhere.
            preferred = only or self.servers[(first + n_tries) % len(self.servers)]
            n_tries += 1
            since = self._loop.time()
            last = server = await self._take_slot(preferred, only is not None)
            queued_s += self._loop.time() - since
            try:
                value = parse(await self._send(server, path, body))
            finally:
                self._free_slot(server)
            server.limiter.on_answer()
            server.breaker.on_success()
            return value

        def on_fault(fault: RequestFault, tries: Counter[FaultKind], gives_up: bool) -> None:
            if not (is_optional and fault.kind in ("ours", "config", "semantic")):
                self.counts["failures" if gives_up else "retries"] += 1
                self.counts[f"faults_{fault.kind}"] += 1
                self.counts["malformed"] += fault.kind == "semantic"
            self._note_fault(last, fault, tries)

        return await run_with_retries(  # type: ignore[return-value]
            attempt,
            policy=self._policy,
            # Waiting for a slot or for a server to come back is bounded by the patience, not by the request's deadline.
            now=lambda: self._loop.time() - queued_s,
            sleep=asyncio.sleep,
            jitter=self._jitter.random,
            on_fault=on_fault,
            where=lambda: last.api + path.removeprefix("/v1"),
        )

    def _note_fault(self, server: Server, fault: RequestFault, tries: Counter[FaultKind]) -> None:
        now = self._loop.time()
        if fault.overload:
            server.limiter.on_overload(now)
        if self._policy.speaks_against_server(fault, tries):
            server.breaker.on_failure(now)
            self._watch_recovery(server)
        elif fault.kind in ("rate", "ours", "config", "semantic"):
            server.breaker.on_success()

    # ---- one try -------------------------------------------------------------------------------------------------

    async def _send(self, server: Server, path: str, body: dict[str, Any] | None) -> Any:
        """One HTTP exchange; the decoded JSON of a 200, or a `RequestFault`."""
        self.counts["requests"] += 1
        task = asyncio.ensure_future(self._exchange(server, path, body))
        server.running.add(task)
        try:
            response = await self._unless_hung(server, task)
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
            raise RequestFault("transient", f"{type(error).__name__}: {reason}") from error
        finally:
            server.running.discard(task)
            task.cancel()
        server.last_answer_at = self._loop.time()
        if response.status_code != 200:
            raise fault_of_status(response.status_code, response.text, response.headers)
        return decode(response)

    async def _exchange(self, server: Server, path: str, body: dict[str, Any] | None) -> httpx.Response:
        url = server.api + path.removeprefix("/v1") if path.startswith("/v1") else server.root + path
        if body is None:
            return await server.client.get(url)
        return await server.client.post(url, json=body)

    async def _unless_hung(self, server: Server, task: asyncio.Task[httpx.Response]) -> httpx.Response:
        """Wait for `task`; where the whole server is silent for `stall` seconds, probe it and give up if hung."""
        started = self._loop.time()
        while True:
            quiet_since = max(started, server.last_answer_at)
            patience = max(0.0, quiet_since + self._timeouts.stall - self._loop.time())
            done, _ = await asyncio.wait({task}, timeout=patience)
            if done:
                if task.cancelled():
                    raise RequestFault("hung", f"no answer for {self._timeouts.stall:g} s and the probe failed")
                return task.result()
            if self._loop.time() >= max(started, server.last_answer_at) + self._timeouts.stall:
                await self._check_for_hang(server)

    async def _check_for_hang(self, server: Server) -> None:
        """Probe a silent server once for all who wait for it."""
        if server.hang_check is None or server.hang_check.done():
            server.hang_check = asyncio.ensure_future(self._probe_or_trip(server))
        await asyncio.shield(server.hang_check)

    async def _probe_or_trip(self, server: Server) -> None:
        """Open the breaker of a hung server and drop its requests."""
        if not await self._probe(server):
            server.breaker.trip(self._loop.time())
            self._watch_recovery(server)
            for task in list(server.running):
                task.cancel()

    async def _probe(self, server: Server) -> bool:
        """Whether the server generates one token within the probe timeout; `/health` alone proves nothing.

        Until `model` is known there is nothing to generate with, and the list of models has to do.
        """
        self.counts["probes"] += 1
        body = wire.probe_body(self.model) if self.model else None
        path = "/v1/chat/completions" if self.model else "/v1/models"
        try:
            async with asyncio.timeout(self._timeouts.probe):
                response = await self._exchange(server, path, body)
        except (httpx.RequestError, TimeoutError):
            return False
        if response.status_code != 200:
            return False
        server.last_answer_at = self._loop.time()
        return True

    # ---- who goes where ------------------------------------------------------------------------------------------

    async def _take_slot(self, preferred: Server, is_pinned: bool) -> Server:
        waiter = _Waiter(self._loop.create_future(), preferred, is_pinned)
        if is_pinned:
            self._queue.appendleft(waiter)
        else:
            self._queue.append(waiter)
        self._dispatch()
        for server in self.servers:
            self._watch_recovery(server)
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
                self._free_slot(waiter.granted.result())
            raise

    def _free_slot(self, server: Server) -> None:
        server.limiter.give_back()
        self._note_busy(-1)
        self._dispatch()

    def _note_busy(self, change: int) -> None:
        if self._in_flight == 0:
            self._busy_since = self._loop.time()
        self._in_flight += change
        if self._in_flight == 0:
            self.seconds_busy += self._loop.time() - self._busy_since

    def _dispatch(self) -> None:
        """Hand free slots to the queue."""
        while (grant := self._next_grant()) is not None:
            waiter, server = grant
            self._queue.remove(waiter)
            if not waiter.granted.done():
                server.limiter.take()
                self._note_busy(+1)
                waiter.granted.set_result(server)

    def _next_grant(self) -> tuple[_Waiter, Server] | None:
        """The next request whose prefix lives on a free server, else the first in line on the least busy one."""
        free = [server for server in self.servers if server.is_available]
        if not free:
            return None
        least_busy = min(free, key=lambda server: server.limiter.in_flight / server.limiter.limit)
        window = list(itertools.islice(self._queue, _LOOKAHEAD))
        for waiter in window:
            if waiter.preferred.is_available:
                return waiter, waiter.preferred
            if waiter.preferred.breaker.state != "closed" and not waiter.is_pinned:
                return waiter, least_busy
        return next(((waiter, least_busy) for waiter in window if not waiter.is_pinned), None)

    # ---- recovery ------------------------------------------------------------------------------------------------

    def _watch_recovery(self, server: Server) -> None:
        """Start the recovery task when `server` is away and nobody watches."""
        if server.breaker.state == "open":
            self.counts["breaker_opened"] = sum(one.breaker.times_opened for one in self.servers)
            if self._recovery is None or self._recovery.done():
                self._recovery = asyncio.ensure_future(self._recover())

    async def _recover(self) -> None:
        """Probe open servers every half minute while anybody waits; end the waiting when patience runs out."""
        while opened := [server for server in self.servers if server.breaker.state == "open"]:
            if not self._queue and self._in_flight == 0:
                return
            now = self._loop.time()
            due = [server for server in opened if server.breaker.seconds_to_probe(now) == 0.0]
            for server in due:
                server.breaker.start_probe()
                server.breaker.end_probe(await self._probe(server), self._loop.time())
            self._dispatch()
            if due:
                self._give_up_if_away()  # only on fresh evidence, so a server that came back is never missed
            now = self._loop.time()
            await asyncio.sleep(min((server.breaker.seconds_to_probe(now) for server in opened), default=0.0))

    def _give_up_if_away(self) -> None:
        """End every waiting request when the last server to leave has been away longer than the patience.

        Looked at after a failed probe only, so the patience is rounded up to the next half minute.
        """
        opened = [server.breaker.opened_at for server in self.servers if server.breaker.opened_at is not None]
        if len(opened) < len(self.servers) or self._loop.time() - max(opened) < self._patience_s:
            return
        message = (
            f"server {self.where} stayed away longer than {self._patience_s:g} s; "
            "what was answered is kept: start it again and resume"
        )
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.granted.done():
                self.counts["failures"] += 1
                waiter.granted.set_exception(ServerAway(message))


def decode(response: httpx.Response) -> Any:
    """JSON of a 200 answer; a truncated or foreign body is a semantic fault."""
    try:
        return json.loads(response.content)
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise RequestFault("semantic", f"the body is not JSON ({error}): {response.text[:80]!r}") from error
