"""What the package itself costs: agent-steps a second with a scripted model and everything journaled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Sequence
from typing import Any

from rows import Rows
from sizes import Size
from workload import Batches, open_world, scratch_journal

from recollect.agents.questions import LABELS
from recollect.agents.scheduler import Step, StepResult, run_steps
from recollect.backbones.journaled import Journaled
from recollect.backbones.protocol import Answer, Call, Choice, Chosen, Message
from recollect.backbones.scripted import ScriptedBackbone
from recollect.journal import MemoryWrite


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
