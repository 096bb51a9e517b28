"""What the scheduler, the prompt economies and the journal bring, side by side on the same model and machine.

    python benchmarks/simulate.py --server http://127.0.0.1:8000/v1 [--quick] [--out benchmarks/results/simulate.jsonl]

Sections (all by default, `--only` picks): `scheduler` and `savings` need a vLLM server, `in-process` the embedded model,
`journal` no model. One JSON line per figure on stdout; `render.py` makes the tables.

* scheduler: the training steps of 64 agents through `run_steps` with the journal on, against the very requests that
  left (recorded bodies, sent without tokenisation, parsing, journal or dependencies): at once for the server's own
  saturated throughput, one after the other for the loop of the published code. Runs alternate ours, server, server,
  ours, under cache salts, so that nobody is served from another's prefix cache.
* savings: prompt order, shared contexts and choices instead of texts; requests, tokens and seconds per user.
* in-process: the same economies, and batches against one by one, in the transformers engine.
* journal: agent-steps a second with a scripted model, and what the package itself costs per call.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import serving
from rows import Rows
from savings import (
    Meter,
    Tally,
    choose_all,
    pair_questions,
    reversed_layout,
    slate_questions,
    write_explained,
    write_letter,
)
from workload import Batches, Brief, World, open_world, scratch_journal, shoppers

from recollect.agents.questions import LABELS
from recollect.agents.scheduler import Step, StepResult, levels, run_steps
from recollect.backbones import wire
from recollect.backbones.journaled import Journaled
from recollect.backbones.protocol import Answer, Call, Choice, Chosen, Message, Request, Scoring
from recollect.backbones.scripted import ScriptedBackbone
from recollect.backbones.server import ServerBackbone
from recollect.journal import MemoryWrite

SECTIONS = ("journal", "scheduler", "savings", "in-process")
CONCURRENCY = 64
ALL_AT_ONCE = 4096


@dataclass(frozen=True)
class Size:
    """How much is measured. Seeds are repetitions: each draws its own users, slates and fence."""

    users: int
    choice_interactions: int
    choice_seeds: int
    text_users: int
    text_seeds: int
    loop_calls: int
    people: int
    pairs: int
    repetitions: int
    journal_agents: int
    journal_steps: int


FULL = Size(64, 2, 3, 64, 2, 32, 8, 8, 3, 10_000, 5)
QUICK = Size(64, 1, 1, 32, 1, 12, 4, 6, 1, 2_000, 3)


def main() -> None:
    """Parse the command line and run the sections."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", help="URL of a vLLM server, like http://127.0.0.1:8000/v1")
    parser.add_argument("--data", default="harbor")
    parser.add_argument("--quick", action="store_true", help="a smaller run, under three minutes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    if options.server is None and {"scheduler", "savings"} & set(options.only):
        parser.error("--server is needed; start one with .ci/vllm_server.sh, or choose --only journal in-process")
    size = QUICK if options.quick else FULL
    with Rows("simulate", options.out, data=options.data) as rows:
        for section in options.only:
            rows.say(section)
            match section:
                case "journal":
                    rows.model = "scripted"
                    journal_section(rows, options.data, size)
                case "scheduler":
                    scheduler_section(rows, options.server, options.data, size)
                case "savings":
                    savings_section(rows, options.server, options.data, size)
                case "in-process":
                    in_process_section(rows, options.data, size)
        rows.say("done")


# ---- scheduler ---------------------------------------------------------------------------------------------------


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
    rows.model = _model_name(url)
    kinds: list[tuple[str, int, int, int, dict[str, Any]]] = [
        ("choices", size.users, size.choice_interactions, size.choice_seeds, {}),
        ("texts", size.text_users, 1, size.text_seeds, {"writer": "llm", "fusion": "none"}),
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
        _meet(server, has_schema=options.get("writer") == "llm")
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
        rows.say(
            f"  {len(steps)} steps in {n_levels} levels, {len(transport.sent)} requests, {seconds:.1f} s, {failed} not ok"
        )
        return len(transport.sent) / seconds, list(transport.sent)


def _meet(server: ServerBackbone, *, has_schema: bool) -> None:
    """Let the client learn what the server can do, outside the measured time."""
    chat = (Message("user", "Hello, which letter, A or B?"),)
    server.choose([Choice(chat, LABELS)])
    if has_schema:
        server.generate([Request(chat, 40, schema='{"type":"object","properties":{},"additionalProperties":false}')])


def _model_name(url: str) -> str:
    with ServerBackbone(url) as server:
        return server.fingerprint.rsplit(":", 1)[0]


# ---- savings -----------------------------------------------------------------------------------------------------


def savings_section(rows: Rows, url: str, data: str, size: Size) -> None:
    """Prompt order, shared contexts and choices on the server."""
    rows.model = _model_name(url)
    tallies: dict[tuple[str, str], list[Tally]] = {}
    for repetition in range(size.repetitions):
        world = _trained_world(url, data, repetition, size.users)
        people = shoppers(world, size.people)
        chats = pair_questions(world, people, size.pairs)
        slates = slate_questions(world, people)
        ones = pair_questions(world, people, 1)
        _in_turn(
            tallies,
            repetition,
            {
                ("prompt order", "static to dynamic"): lambda c=chats: _served(url, lambda b: choose_all(b, c)),
                ("prompt order", "what varies first"): lambda c=chats: _served(
                    url, lambda b: choose_all(b, [reversed_layout(chat) for chat in c])
                ),
                ("10 titles", "behind one context"): lambda s=slates: _served(url, lambda b: len(b.score(s)) * 0),
                ("10 titles", "10 full prompts"): lambda s=slates: _full_prompts(url, s),
                ("decision", "choice between labels"): lambda o=ones: _served(url, lambda b: choose_all(b, o)),
                ("decision", "text, searched for a letter"): lambda o=ones: _served(url, lambda b: write_letter(b, o)),
                ("decision", "JSON with explanation"): lambda w=world, p=people, r=repetition: _served(
                    url, lambda b: write_explained(b, w, p, r), has_schema=True
                ),
            },
        )
        rows.say(f"savings, repetition {repetition}")
    _add_tallies(rows, "savings/server", tallies, size.people, size.repetitions)


def _trained_world(url: str, data: str, seed: int, users: int) -> World:
    with ServerBackbone(url) as server:
        world = open_world(
            data,
            fingerprint=server.fingerprint,
            control_tokens=server.control_tokens,
            seed=seed,
            users=users,
            interactions=2,
        )
    return _trained(world)


def _trained(world: World) -> World:
    """Memories and groups as after training, written with a scripted model's decisions: their length is what counts."""
    steps = world.training_steps()
    steps.append(world.agents.rebuild_step(len(steps), world.plan.population.users.tolist(), None))
    with scratch_journal() as journal:
        run_steps(steps, Journaled(Batches(ScriptedBackbone()), journal), journal)
    return world


def _in_turn(
    tallies: dict[tuple[str, str], list[Tally]], repetition: int, ways: dict[tuple[str, str], Callable[[], Tally]]
) -> None:
    """Measure every way once; every other repetition in the opposite order."""
    names = list(ways) if repetition % 2 == 0 else list(reversed(ways))
    for name in names:
        tallies.setdefault(name, []).append(ways[name]())


def _served(url: str, ask: Callable[[ServerBackbone], int], *, has_schema: bool = False) -> Tally:
    """One way on the server under a salt of its own. Requests: those to the model, tokenisation apart."""
    transport = serving.SaltedTransport(serving.fresh_salt())
    with ServerBackbone(url, concurrency=CONCURRENCY, transport=transport) as server:
        _meet(server, has_schema=has_schema)
        return _server_meter(url, transport).measure(lambda: ask(server))


def _server_meter(url: str, transport: serving.SaltedTransport) -> Meter:
    def start() -> Callable[[], tuple[float, float, float, float]]:
        n_sent, before = len(transport.sent), serving.counters(url)

        def stop() -> tuple[float, float, float, float]:
            spent = serving.counters(url).since(before)
            return (
                len(transport.sent) - n_sent,
                spent.prompt_tokens,
                spent.computed_tokens,
                spent.completion_tokens,
            )

        return stop

    return Meter(start)


def _full_prompts(url: str, slates: Sequence[Scoring]) -> Tally:
    """Every title behind its own copy of the context, one request each, scored by prompt log-probabilities."""
    transport = serving.SaltedTransport(serving.fresh_salt())
    with ServerBackbone(url, concurrency=CONCURRENCY, transport=transport) as server:
        name = server.fingerprint.split(":")[1]
        server.choose([Choice(slate.messages, LABELS) for slate in slates])
        # A choice between single tokens sends its context alone: the ids the server's own template gives.
        contexts = [body["prompt"][0] for _, body in transport.sent[-len(slates) :]]
        by_slate = {tuple(context): context for context in contexts}
        assert len(by_slate) == len(slates)
    sent: list[serving.Sent] = []
    for slate, context in zip(slates, contexts, strict=True):
        for title in slate.continuations:
            prompt = [*context, *serving.tokenize(url, name, title)]
            sent.append(("/v1/completions", wire.prompt_log_probs_body(name, [prompt], echo=False)))
    before = serving.counters(url)
    seconds = serving.replay(url, sent, CONCURRENCY)
    spent = serving.counters(url).since(before)
    return Tally(seconds, len(sent), spent.prompt_tokens, spent.computed_tokens, spent.completion_tokens)


def _add_tallies(
    rows: Rows, section: str, tallies: dict[tuple[str, str], list[Tally]], people: int, repetitions: int
) -> None:
    """Costs per user of every way, and seconds of each over the first way of its question."""
    first: dict[str, str] = {}
    for question, way in tallies:
        first.setdefault(question, way)
    order = sorted(tallies, key=lambda key: (list(first).index(key[0]), key[1] != first[key[0]]))
    for question, way in order:
        found = tallies[question, way]
        name, fields = (
            f"{section}/{question}",
            {"seed": f"0..{repetitions - 1}", "seconds": sum(t.seconds for t in found)},
        )
        rows.add_median(name, way, "requests_per_user", [t.requests / people for t in found], **fields)
        rows.add_median(name, way, "sent_tokens_per_user", [t.sent_tokens / people for t in found], **fields)
        rows.add_median(name, way, "computed_tokens_per_user", [t.computed_tokens / people for t in found], **fields)
        rows.add_median(name, way, "written_tokens_per_user", [t.written_tokens / people for t in found], **fields)
        rows.add_median(name, way, "seconds_per_user", [t.seconds / people for t in found], **fields)
        rows.add_median(name, way, "unusable_share", [t.unusable / people for t in found], **fields)
        best = tallies[question, first[question]]
        slower = [t.seconds / b.seconds for t, b in zip(found, best, strict=True)]
        rows.add_median(name, way, "seconds_over_first", slower, **fields)


# ---- in process --------------------------------------------------------------------------------------------------


def in_process_section(rows: Rows, data: str, size: Size) -> None:
    """The transformers engine: batches that share prefixes against one call at a time, and the prompt economies."""
    from recollect.backbones.resolve import open_backbone

    model: Any = open_backbone("smollm2", threads=len(os.sched_getaffinity(0)))
    rows.model = f"smollm2 {model.dtype}, transformers"
    meter = _engine_meter(model)
    tallies: dict[tuple[str, str], list[Tally]] = {}
    for repetition in range(size.repetitions):
        world = _trained(
            open_world(
                data,
                fingerprint=model.fingerprint,
                control_tokens=model.control_tokens,
                seed=repetition,
                users=size.users,
                interactions=2,
            )
        )
        people = shoppers(world, max(2, size.people // 2))
        chats = pair_questions(world, people, size.pairs)
        slates = slate_questions(world, people)
        ones = pair_questions(world, people, 1)
        turned = [reversed_layout(chat) for chat in chats]
        choose_all(model, ones[:1])  # the first pass of a process pays for the library's set-up
        ways: dict[tuple[str, str], Callable[[], int]] = {
            ("choices", "one batch"): lambda c=chats: choose_all(model, c),
            ("choices", "one batch, what varies first"): lambda t=turned: choose_all(model, t),
            ("choices", "one by one"): lambda c=chats: sum(choose_all(model, [chat]) for chat in c),
            ("10 titles", "behind one context"): lambda s=slates: len(model.score(s)) * 0,
            ("10 titles", "10 full prompts"): lambda s=slates: _one_title_at_a_time(model, s),
            ("decision", "choice between labels"): lambda o=ones: choose_all(model, o),
            ("decision", "text, searched for a letter"): lambda o=ones: write_letter(model, o),
            ("decision", "text, one by one"): lambda o=ones: sum(write_letter(model, [chat]) for chat in o),
            ("decision", "JSON with explanation"): lambda w=world, p=people, r=repetition: write_explained(
                model, w, p, r
            ),
        }
        _in_turn(tallies, repetition, {name: lambda ask=ask: meter.measure(ask) for name, ask in ways.items()})
        rows.say(f"in-process, repetition {repetition}")
    _add_tallies(rows, "savings/in-process", tallies, max(2, size.people // 2), size.repetitions)
    model.close()


def _one_title_at_a_time(model: Any, slates: Sequence[Scoring]) -> int:
    for slate in slates:
        for title in slate.continuations:
            model.score([Scoring(slate.messages, (title,))])
    return 0


def _engine_meter(model: Any) -> Meter:
    """Counts of the in-process engine. "Requests" are passes through the model; written tokens are not told."""

    def start() -> Callable[[], tuple[float, float, float, float]]:
        before = model.stats()

        def stop() -> tuple[float, float, float, float]:
            now = model.stats()
            passes, asked, computed = (
                now[name] - before[name] for name in ("passes", "requested_tokens", "computed_tokens")
            )
            return passes, asked, computed, 0.0

        return stop

    return Meter(start)


# ---- journal -----------------------------------------------------------------------------------------------------


def journal_section(rows: Rows, data: str, size: Size) -> None:
    """Agent-steps a second with everything recorded and a model that costs next to nothing."""
    n_steps = size.journal_agents * size.journal_steps
    for dispatch in ("levels", "ready"):
        paces, costs = [], []
        for _ in range(size.repetitions):
            scripted = ScriptedBackbone(
                lambda request: "", lambda choice: (0.0, 1.0), name="two-options", concurrency=2
            )
            backbone: Any = Batches(scripted) if dispatch == "levels" else scripted
            steps = [_plain_step(number, number % size.journal_agents) for number in range(n_steps)]
            with scratch_journal() as journal:
                began = time.perf_counter()
                run_steps(steps, Journaled(backbone, journal, batch_size=256), journal)
                seconds = time.perf_counter() - began
                assert journal.n_committed == n_steps
                assert journal.ledger()["requests"] == n_steps
            bare = _bare_seconds(scripted, steps)
            paces.append(n_steps / seconds)
            costs.append(1e6 * (seconds - bare) / n_steps)
            scripted.close()
        name = f"journal/{size.journal_agents} agents x {size.journal_steps} steps"
        rows.add_median(name, f"dispatch {dispatch}", "agent_steps_per_second", paces, data="one choice a step")
        rows.add_median(name, f"dispatch {dispatch}", "overhead_us_per_call", costs, data="one choice a step")
        rows.say(f"{dispatch}: {statistics.median(paces):.0f} agent-steps/s")
    paces, costs = [], []
    for seed in range(size.repetitions):
        scripted = ScriptedBackbone()
        world = open_world(
            data,
            fingerprint=scripted.fingerprint,
            control_tokens=scripted.control_tokens,
            seed=seed,
            users=size.users,
            interactions=6,
        )
        steps = world.training_steps()
        with scratch_journal() as journal:
            began = time.perf_counter()
            run_steps(steps, Journaled(Batches(scripted), journal), journal)
            seconds = time.perf_counter() - began
            calls = journal.ledger()["requests"]
        paces.append(len(steps) / seconds)
        costs.append(1e6 * seconds / calls)
    name = f"journal/AgentCF++, {size.users} agents x 6 steps"
    fields: dict[str, Any] = {"seed": f"0..{size.repetitions - 1}"}
    rows.add_median(name, "prompts, writers, scheduler, journal", "agent_steps_per_second", paces, **fields)
    rows.add_median(name, "prompts, writers, scheduler, journal", "overhead_us_per_call", costs, **fields)


def _plain_step(number: int, agent: int) -> Step:
    """One choice, one event, one memory write: what a step is without prompts."""
    owner = f"user:{agent}"

    def run() -> Generator[Sequence[Call], list[Answer], StepResult]:
        chat = (Message("user", f"agent {agent}, step {number}"),)
        (answer,) = yield [Choice(chat, LABELS, site="choice")]
        assert isinstance(answer, Chosen)
        event = {"step": number, "kind": "choice", "user": owner, "decision": LABELS[1], "after": f"{number}"}
        return StepResult(
            ({**event, "owner": owner, "key": "private"},), (MemoryWrite(owner, "private", f"{number}"),), _nothing
        )

    return Step(number, (owner,), run)


def _nothing() -> None:
    """A step without state in memory."""


def _bare_seconds(scripted: ScriptedBackbone, steps: Sequence[Step]) -> float:
    """Seconds the scripted model itself takes to answer every step's choice."""
    calls = [Choice((Message("user", f"step {step.number}"),), LABELS) for step in steps]
    began = time.perf_counter()
    scripted.choose(calls)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
