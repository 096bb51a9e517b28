"""A small scripted world for the journal and the scheduler: who pays for what is written to a file, nothing is random.

Steps have two phases of calls, share users and items, ask one question in common, and meet at barriers that read the
whole state. Imports no torch, so that a process starts fast enough to be killed often.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from recollect.agents.scheduler import Step, StepResult, run_steps
from recollect.backbones.journaled import Journaled
from recollect.backbones.protocol import (
    Answer,
    Call,
    Choice,
    Chosen,
    Completion,
    Message,
    Request,
    Scored,
    Scoring,
    call_key,
)
from recollect.io import sha256_text
from recollect.journal import Journal, MemoryWrite


class Paid:
    """Side file with one line per paid call, appended before the answer is known to anyone."""

    def __init__(self, path: Path | None) -> None:
        self.keys: list[str] = []
        self._descriptor = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, line: str) -> None:
        self.keys.append(line)
        if self._descriptor is not None:
            os.write(self._descriptor, f"{line}\n".encode())


class BatchModel:
    """In-process model whose floats depend on the company in the batch, as real ones' last bits do."""

    fingerprint = "scripted/world"
    control_tokens = ()

    def __init__(self, paid: Paid | None = None, *, noise: bool = True, delay: float = 0.0) -> None:
        self.paid = paid or Paid(None)
        self.batches: list[int] = []
        self._noise = noise
        self._delay = delay

    def _company(self, calls: Sequence[Call]) -> float:
        self.batches.append(len(calls))
        if self._delay:
            time.sleep(self._delay)
        for call in calls:
            self.paid.write(call_key(self.fingerprint, call))
        if not self._noise:
            return 0.0
        return int(sha256_text("".join(call_key(self.fingerprint, call) for call in calls))[:6], 16) * 1e-12

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        noise = self._company(requests)
        return [Completion(f"{sha256_text(repr(r.messages))[:12]} {noise:.15f}", 9, 2) for r in requests]

    def choose(self, choices: Sequence[Choice]) -> list[Chosen]:
        noise = self._company(choices)
        return [
            Chosen((-(int(sha256_text(repr(c.messages))[:4], 16) / 1e4) - noise, -1.0 - noise), 11) for c in choices
        ]

    def score(self, scorings: Sequence[Scoring]) -> list[Scored]:
        noise = self._company(scorings)
        return [Scored((-2.0 - noise,) * len(s.continuations), (1,) * len(s.continuations), 5) for s in scorings]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        for text in texts:
            self.paid.write(f"embed:{sha256_text(text)}")
        rows = [np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint8) for text in texts]
        vectors = np.array(rows, dtype=np.float32) + 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def close(self) -> None:
        pass


class ServedModel(BatchModel):
    """Answers call by call on threads, late and out of order, `concurrency` at a time."""

    def __init__(self, paid: Paid | None = None, *, concurrency: int = 8, delay: float = 0.0) -> None:
        super().__init__(paid, noise=False)
        self._late = delay
        self._pool = ThreadPoolExecutor(concurrency)

    def submit(self, call: Call) -> Future[Answer]:
        return self._pool.submit(self._one, call)

    def _one(self, call: Call) -> Answer:
        if self._late:
            time.sleep(self._late * int(call_key("late", call)[:2], 16) / 128)
        match call:
            case Request():
                return self.generate([call])[0]
            case Choice():
                return self.choose([call])[0]
            case Scoring():
                return self.score([call])[0]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class World:
    """`n_agents` users who meet `n_agents` items; every `barrier_every`-th step is a barrier over everything.

    `edit(number, text)` may change the prompt of a step: what a changed program would ask.
    """

    def __init__(
        self,
        n_agents: int,
        n_steps: int,
        *,
        barrier_every: int = 37,
        edit: Callable[[int, str], str] = lambda number, text: text,
    ) -> None:
        self.n_agents, self.n_steps, self.barrier_every = n_agents, n_steps, barrier_every
        self.memory: dict[tuple[str, str], str] = {}
        self.begun: Counter[int] = Counter()
        self.embed: Callable[[Sequence[str]], np.ndarray] | None = None
        self._edit = edit

    def restore(self, journal: Journal) -> None:
        self.memory = {name: row.text for name, row in journal.memories().items()}

    def steps(self) -> list[Step]:
        return [self._step(number) for number in range(self.n_steps)]

    def _step(self, number: int) -> Step:
        if number % self.barrier_every == self.barrier_every - 1:
            return Step(number, ("all",), lambda: self._barrier(number), barrier=True)
        mixed = int(hashlib.sha256(b"%d" % number).hexdigest()[:8], 16)
        user, item = f"user:{mixed % self.n_agents}", f"item:{mixed // self.n_agents % self.n_agents}"
        return Step(number, (user, item), lambda: self._meet(number, user, item))

    def _result(self, number: int, kind: str, writes: dict[str, str], **fields: object) -> StepResult:
        events = tuple(
            {"step": number, "kind": kind, "owner": owner, "key": "taste", "after": after, **fields}
            for owner, after in writes.items()
        )
        memory = tuple(MemoryWrite(owner, "taste", after) for owner, after in writes.items())

        def apply() -> None:
            self.memory.update({(owner, "taste"): after for owner, after in writes.items()})

        return StepResult(events, memory, apply)

    def _meet(self, number: int, user: str, item: str):
        self.begun[number] += 1
        mine, its = self.memory.get((user, "taste"), ""), self.memory.get((item, "taste"), "")
        group = self.memory.get(("groups", "taste"), "none")
        prompt = self._edit(
            number, f"{user} feels {mine!r} of group {group}; step {number} shows {item} known as {its!r}"
        )
        chat = (Message("system", "You are a buyer."), Message("user", prompt))
        common = (Message("user", "Which is likely?"),)
        chosen, neutral = yield [Choice(chat, ("A", "B"), site="choice"), Scoring(common, ("x",), site="neutral")]
        if number % 3 == 0:
            written = (yield [Request(chat, seed=number, temperature=0.7, site="write")])[0].text
        else:
            written = "quiet"
        after = sha256_text(f"{mine}|{its}|{chosen.log_probs}|{neutral.log_probs}|{written}")[:20]
        return self._result(
            number, "meet", {user: after, item: after[::-1]}, probability=chosen.log_probs[0], ok=number % 10 != 0
        )

    def _barrier(self, number: int):
        self.begun[number] += 1
        state = sha256_text(repr(sorted(self.memory.items())))
        if self.embed is not None:
            state += repr(self.embed([state, "shared", f"group {number}"]).sum(dtype=np.float64))
        (named,) = yield [Request((Message("user", state),), site="name")]
        return self._result(number, "group", {"groups": sha256_text(named.text)[:8]})


def play(
    folder: Path,
    model: BatchModel,
    world: World,
    *,
    resume: bool = False,
    batch_size: int = 4,
    export: bool = True,
    **options,
) -> str:
    """Run (or go on with) the world in `folder`; hex digest of the exported log."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal.open(folder / "journal.sqlite", config={"agents": world.n_agents}, resume=resume)
    try:
        world.restore(journal)
        journaled = Journaled(model, journal, batch_size=batch_size)
        world.embed = journaled.embed
        run_steps(world.steps(), journaled, journal, **options)
        return journal.export_events(folder / "events.jsonl") if export else ""
    finally:
        journal.close()
