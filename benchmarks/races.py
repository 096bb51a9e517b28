"""The scheduler on a real server: training steps of many agents against the same requests without the agents.

Nobody is served from another's prefix cache (cache salts), and the order is ours, server, server, ours.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import serving
from rows import Rows
from sizes import Size
from workload import Brief, open_world, scratch_journal

from recollect.agents.questions import LABELS
from recollect.agents.scheduler import levels, run_steps
from recollect.backbones.journaled import Journaled
from recollect.backbones.protocol import Choice, Message, Request
from recollect.backbones.server import ServerBackbone

CONCURRENCY = 64
ALL_AT_ONCE = 4096


@dataclass(frozen=True)
class Race:
    """Calls a second of one seed. `ours`: the two scheduled runs; `server`: by concurrency; `loop`: one by one."""

    ours: tuple[float, float]
    server: dict[int, float]
    loop: float
    prompt_tokens: float
    written_tokens: float
    seconds: float

    @property
    def of_saturated(self) -> float:
        """Our mean pace over the server's best."""
        return statistics.mean(self.ours) / max(self.server.values())

    @property
    def over_loop(self) -> float:
        """Our mean pace over that of one call at a time."""
        return statistics.mean(self.ours) / self.loop


def scheduler_section(rows: Rows, url: str, data: str, size: Size) -> None:
    """Our scheduler against the same requests without it."""
    rows.model = model_name(url)
    kinds: list[tuple[str, int, int, int, dict[str, Any]]] = [
        ("choices", size.users, size.choice_interactions, size.choice_seeds, {}),
        ("texts", size.text_users, size.text_interactions, size.text_seeds, {"writer": "llm", "fusion": "none"}),
    ]
    for kind, users, interactions, n_seeds, options in kinds:
        began = time.perf_counter()
        races = []
        for seed in range(n_seeds):
            races.append(_race(url, data, seed, users, interactions, size.loop_calls, options, rows))
            rows.say(
                f"{kind}, seed {seed}: {races[-1].of_saturated:.3f} of saturated, {races[-1].over_loop:.2f} x loop"
            )
        name, seconds = f"scheduler/{kind}", time.perf_counter() - began
        fields: dict[str, Any] = {"seconds": seconds, "seed": f"0..{n_seeds - 1}"}
        rows.add_median(
            name, "scheduler, 64 in flight", "calls_per_second", [v for r in races for v in r.ours], **fields
        )
        for concurrency in races[0].server:
            method = "server alone, " + ("all at once" if concurrency == ALL_AT_ONCE else f"{concurrency} in flight")
            rows.add_median(name, method, "calls_per_second", [r.server[concurrency] for r in races], **fields)
        rows.add_median(name, "one call at a time", "calls_per_second", [r.loop for r in races], **fields)
        rows.add_median(name, "scheduler / saturated server", "ratio", [r.of_saturated for r in races], **fields)
        rows.add_median(name, "scheduler / one call at a time", "ratio", [r.over_loop for r in races], **fields)
        rows.add_median(name, "prompt", "tokens_per_call", [r.prompt_tokens for r in races], **fields)
        rows.add_median(name, "answer", "tokens_per_call", [r.written_tokens for r in races], **fields)


def _race(
    url: str, data: str, seed: int, users: int, interactions: int, n_loop: int, options: dict[str, Any], rows: Rows
) -> Race:
    began = time.perf_counter()
    before = serving.counters(url)
    first, sent = _scheduled(url, data, seed, users, interactions, options, rows)
    spent = serving.counters(url).since(before)
    # The second run of the server alone takes place right before the second run of ours: ours, server, server, ours.
    server = {}
    order = (CONCURRENCY, ALL_AT_ONCE) if seed % 2 == 0 else (ALL_AT_ONCE, CONCURRENCY)
    for concurrency in order:
        server[concurrency] = len(sent) / serving.replay(url, sent, concurrency)
    second, _ = _scheduled(url, data, seed, users, interactions, options, rows)
    part = sent[:: max(1, len(sent) // n_loop)][:n_loop]  # spread over the run, for prompts grow with it
    loop = len(part) / serving.replay(url, part, 1)
    per_call = (spent.prompt_tokens / len(sent), spent.completion_tokens / len(sent))
    return Race((first, second), dict(sorted(server.items())), loop, *per_call, time.perf_counter() - began)


def _scheduled(
    url: str, data: str, seed: int, users: int, interactions: int, options: dict[str, Any], rows: Rows
) -> tuple[float, list[serving.Sent]]:
    """Model requests a second of the agents' training steps, journal included; and the requests."""
    transport = serving.SaltedTransport(serving.fresh_salt())
    with ServerBackbone(url, concurrency=CONCURRENCY, transport=transport) as server:
        backbone: Any = Brief(server) if options.get("writer") == "llm" else server
        meet(server, has_schema=options.get("writer") == "llm")
        world = open_world(
            data,
            fingerprint=backbone.fingerprint,
            control_tokens=backbone.control_tokens,
            seed=seed,
            users=users,
            interactions=interactions,
            **options,
        )
        steps = world.training_steps()
        transport.sent.clear()
        with scratch_journal() as journal:
            began = time.perf_counter()
            run_steps(steps, Journaled(backbone, journal), journal)
            seconds = time.perf_counter() - began
            assert journal.n_committed == len(steps)
            failed = journal.count_events(ok=False)
        n_levels = len(levels(steps))
        n_sent = len(transport.sent)
        rows.say(f"  {len(steps)} steps, {n_levels} levels, {n_sent} requests, {seconds:.1f} s, {failed} not ok")
        return n_sent / seconds, list(transport.sent)


def meet(server: ServerBackbone, *, has_schema: bool) -> None:
    """Let the client learn what the server can do, outside the measured time."""
    chat = (Message("user", "Hello, which letter, A or B?"),)
    server.choose([Choice(chat, LABELS)])
    if has_schema:
        server.generate([Request(chat, 40, schema='{"type":"object","properties":{},"additionalProperties":false}')])


def model_name(url: str) -> str:
    with ServerBackbone(url) as server:
        return server.fingerprint.rsplit(":", 1)[0]
