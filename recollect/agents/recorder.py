"""What one step leaves behind: events for the log, memory writes, and the change to apply when the step is done."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from recollect.agents.evidence import Evidence
from recollect.agents.groups import Group, dump_groups
from recollect.agents.memory import Memory
from recollect.agents.scheduler import StepResult
from recollect.agents.writers import Cost
from recollect.backbones.protocol import Answer, Call
from recollect.io import sha256_text
from recollect.journal import MemoryWrite
from recollect.types import Dataset

Steps = Generator[Sequence[Call], list[Answer], StepResult]


@dataclass(frozen=True)
class Decision:
    """A decision between two items. `probability` is p(real item), None where a generated choice gives none.

    `log_odds`: of the real item, per order asked (real item second, then real item first).
    """

    right: bool
    probability: float | None
    explanation: str
    cost: Cost
    log_odds: tuple[float, ...] = ()


class Agents(Protocol):
    """What a recorder needs of the agents: names, and the two ways their state changes."""

    dataset: Dataset

    def user_id(self, user: int) -> str: ...

    def item_id(self, item: int) -> str: ...

    def put(self, step: int, owner: str, key: str, memory: Memory) -> None: ...

    def set_groups(self, groups: list[Group]) -> None: ...


class Recorder:
    """Collects the events and memory writes of one step, and applies them to the agents when the step is done."""

    def __init__(self, agents: Agents, number: int, user: int | None, domain: int | None, part: str) -> None:
        self._agents = agents
        self._number = number
        self._user = "" if user is None else agents.user_id(user)
        self._domain = "" if domain is None else agents.dataset.domains[domain]
        self._part = part
        self._events: list[dict[str, Any]] = []
        self._writes: list[tuple[str, str, Memory]] = []
        self._groups: list[Group] | None = None

    def _event(self, kind: str, items: Sequence[int], cost: Cost, **fields: Any) -> None:
        event = {
            "step": self._number,
            "kind": kind,
            "part": self._part,
            "user": self._user,
            "items": [self._agents.item_id(item) for item in items],
            "domain": self._domain,
            "before": "",
            "after": "",
            "decision": None,
            "probability": None,
            "prompt_hash": cost.prompt_hash,
            "tokens_in": cost.tokens_in,
            "tokens_out": cost.tokens_out,
            "ok": cost.ok,
            **({"fault": cost.fault} if cost.fault else {}),
            **fields,
        }
        self._events.append(event)

    def failure(self, kind: str, items: Sequence[int], error: Exception) -> None:
        """The model gave no usable answer; nothing was chosen."""
        self._event(kind, items, Cost(ok=False, fault=f"{type(error).__name__}: {error}"[:300]))

    def decision(self, kind: str, decision: Decision, items: Sequence[int], picked: int) -> None:
        """A choice between the real item (first in `items`) and another."""
        chosen = self._agents.item_id(picked) if decision.cost.ok else None
        self._event(
            kind,
            items,
            decision.cost,
            decision=chosen,
            probability=decision.probability,
            log_odds=list(decision.log_odds),
        )

    def memory(
        self, kind: str, owner: str, key: str, before: Memory, after: Memory, cost: Cost, items: Sequence[int]
    ) -> None:
        """A memory changed; without an owner it is an intermediate text that nobody keeps."""
        self._event(kind, items, cost, owner=owner, key=key, before=sha256_text(before.dump())[:16], after=after.dump())
        if owner:
            self._writes.append((owner, key, after))

    def ranking(self, items: Sequence[int], target: int, evidence: Evidence, cost: Cost) -> None:
        """A slate with what speaks for each candidate; the decision is the one the language model ranks first."""
        scores = evidence.language_scores()
        best = int(np.argmax(scores))
        self._event(
            "rank",
            items,
            cost,
            decision=self._agents.item_id(items[best]),
            target=target,
            evidence=evidence.to_json(),
        )

    def rehearsal(self, items: Sequence[int], evidence: Evidence) -> None:
        """What memories said of a training slate before the truth was learned; nothing was asked or decided."""
        self._event("rank", items, Cost(), evidence=evidence.to_json())

    def rating(self, item: int, probabilities: np.ndarray, cost: Cost) -> None:
        """Probabilities of one to five stars."""
        expected = float(probabilities @ np.arange(1, 6))
        self._event(
            "rate",
            [item],
            cost,
            decision=round(expected, 9),
            stars=[round(float(p), 9) for p in probabilities],
        )

    def groups(self, groups: list[Group], cost: Cost) -> None:
        """The interest groups were rebuilt."""
        self._groups = groups
        self._event("group", [], cost, owner="groups", key="groups", after=dump_groups(groups))

    def result(self) -> StepResult:
        writes = [MemoryWrite(owner, key, memory.dump()) for owner, key, memory in self._writes]
        if self._groups is not None:
            writes.append(MemoryWrite("groups", "groups", dump_groups(self._groups)))
        return StepResult(tuple(self._events), tuple(writes), self._apply)

    def _apply(self) -> None:
        for owner, key, memory in self._writes:
            self._agents.put(self._number, owner, key, memory)
        if self._groups is not None:
            self._agents.set_groups(self._groups)
