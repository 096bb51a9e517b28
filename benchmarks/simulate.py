"""What the scheduler, the prompt economies and the journal bring, side by side on the same model and machine.

    python benchmarks/simulate.py --server http://127.0.0.1:8000/v1 [--quick] [--out benchmarks/results/simulate.jsonl]

Sections (all by default, `--only` picks): `scheduler` and `savings` need a vLLM server, `in-process` the embedded
model, `journal` no model. One JSON line per figure on stdout; `render.py` makes the tables.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import serving
from pace import journal_section
from races import CONCURRENCY, meet, model_name, scheduler_section
from rows import Rows
from savings import (
    Meter,
    Tally,
    choose_all,
    pair_questions,
    reversed_layout,
    score_all,
    slate_questions,
    write_explained,
    write_letter,
)
from sizes import FULL, QUICK, Size
from workload import Batches, World, open_world, scratch_journal, shoppers

from recollect.agents.questions import LABELS
from recollect.agents.scheduler import run_steps
from recollect.backbones import wire
from recollect.backbones.journaled import Journaled
from recollect.backbones.protocol import Choice, Scoring
from recollect.backbones.scripted import ScriptedBackbone
from recollect.backbones.server import ServerBackbone

SECTIONS = ("journal", "scheduler", "savings", "in-process")
Way = tuple[str, str]
"""A question, and the way it is asked."""


def main() -> None:
    """Parse the command line and run the sections."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", help="URL of a vLLM server, like http://127.0.0.1:8000/v1")
    parser.add_argument("--data", default="harbor")
    parser.add_argument("--quick", action="store_true", help="a smaller run, under three minutes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--note", default="", help="how the server was started: kept in its rows")
    parser.add_argument("--out", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    if options.server is None and {"scheduler", "savings"} & set(options.only):
        parser.error("--server is needed; start one with .ci/vllm_server.sh, or choose --only journal in-process")
    size = QUICK if options.quick else FULL
    with Rows("simulate", options.out, data=options.data) as rows:
        for section in options.only:
            rows.say(section)
            rows.note = options.note if section in ("scheduler", "savings") else ""
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


# ---- savings -----------------------------------------------------------------------------------------------------


def savings_section(rows: Rows, url: str, data: str, size: Size) -> None:
    """Prompt order, shared contexts and choices on the server."""
    rows.model = model_name(url)
    tallies: dict[Way, list[Tally]] = {}
    for repetition in range(size.repetitions):
        world = _trained_world(url, data, repetition, size.users)
        _in_turn(tallies, repetition, _server_ways(url, world, size, repetition))
        rows.say(f"savings, repetition {repetition}")
    _add_tallies(rows, "savings/server", tallies, size.people, size.repetitions)


def _server_ways(url: str, world: World, size: Size, seed: int) -> dict[Way, Callable[[], Tally]]:
    people = shoppers(world, size.people)
    chats, ones = pair_questions(world, people, size.pairs), pair_questions(world, people, 1)
    turned = [reversed_layout(chat) for chat in chats]
    slates = slate_questions(world, people)
    return {
        ("prompt order", "static to dynamic"): lambda: _served(url, lambda b: choose_all(b, chats)),
        ("prompt order", "what varies first"): lambda: _served(url, lambda b: choose_all(b, turned)),
        ("10 titles", "behind one context"): lambda: _served(url, lambda b: score_all(b, slates)),
        ("10 titles", "10 full prompts"): lambda: _full_prompts(url, slates),
        ("decision", "choice between labels"): lambda: _served(url, lambda b: choose_all(b, ones)),
        ("decision", "text, searched for a letter"): lambda: _served(url, lambda b: write_letter(b, ones)),
        ("decision", "JSON with explanation"): lambda: _served(
            url, lambda b: write_explained(b, world, people, seed), has_schema=True
        ),
    }


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


def _in_turn(tallies: dict[Way, list[Tally]], repetition: int, ways: dict[Way, Callable[[], Tally]]) -> None:
    """Measure every way once; every other repetition in the opposite order."""
    names = list(ways) if repetition % 2 == 0 else list(reversed(ways))
    for name in names:
        tallies.setdefault(name, []).append(ways[name]())


def _served(url: str, ask: Callable[[ServerBackbone], int], *, has_schema: bool = False) -> Tally:
    """One way on the server under a salt of its own. Requests: those to the model, tokenisation apart."""
    transport = serving.SaltedTransport(serving.fresh_salt())
    with ServerBackbone(url, concurrency=CONCURRENCY, transport=transport) as server:
        meet(server, has_schema=has_schema)
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
    rows: Rows,
    section: str,
    tallies: dict[Way, list[Tally]],
    people: int,
    repetitions: int,
    *,
    unit: str = "requests",
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
        rows.add_median(name, way, f"{unit}_per_user", [t.requests / people for t in found], **fields)
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
    tallies: dict[Way, list[Tally]] = {}
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
        ways = _engine_ways(model, world, size, repetition)
        next(iter(ways.values()))()  # the first pass of a process pays for the library's set-up
        _in_turn(tallies, repetition, ways)
        rows.say(f"in-process, repetition {repetition}")
    _add_tallies(rows, "savings/in-process", tallies, _people_in_process(size), size.repetitions, unit="passes")
    model.close()


def _people_in_process(size: Size) -> int:
    return max(2, size.people // 2)


def _engine_ways(model: Any, world: World, size: Size, seed: int) -> dict[Way, Callable[[], Tally]]:
    meter, people = _engine_meter(model), shoppers(world, _people_in_process(size))
    chats, ones = pair_questions(world, people, size.pairs), pair_questions(world, people, 1)
    turned = [reversed_layout(chat) for chat in chats]
    slates = slate_questions(world, people)
    return {
        ("choices", "one batch"): lambda: meter.measure(lambda: choose_all(model, chats)),
        ("choices", "one batch, what varies first"): lambda: meter.measure(lambda: choose_all(model, turned)),
        ("choices", "one by one"): lambda: meter.measure(lambda: sum(choose_all(model, [chat]) for chat in chats)),
        ("10 titles", "behind one context"): lambda: meter.measure(lambda: score_all(model, slates)),
        ("10 titles", "10 full prompts"): lambda: meter.measure(lambda: _one_title_at_a_time(model, slates)),
        ("decision", "choice between labels"): lambda: meter.measure(lambda: choose_all(model, ones)),
        ("decision", "text, searched for a letter"): lambda: meter.measure(lambda: write_letter(model, ones)),
        ("decision", "text, one by one"): lambda: meter.measure(
            lambda: sum(write_letter(model, [chat]) for chat in ones)
        ),
        ("decision", "JSON with explanation"): lambda: meter.measure(
            lambda: write_explained(model, world, people, seed)
        ),
    }


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


if __name__ == "__main__":
    main()
