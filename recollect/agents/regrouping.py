"""What happens at a barrier: the retrieval index catches up and the interest groups are built anew (AgentCF++ §3.6).

Nothing else runs meanwhile, so texts may be embedded and every user's memories read as they stand.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.agents.groups import Group, build_groups, groups_of_histories
from recollect.agents.memory import Memory
from recollect.agents.recorder import Recorder, Steps
from recollect.agents.writers import Cost, StructuredWriter
from recollect.backbones.protocol import Answer, Call, Request
from recollect.io import sha256_text

if TYPE_CHECKING:
    from recollect.agents.agentcf import AgentCF


def rebuild(agents: AgentCF, number: int, users: Sequence[int], now: int | None) -> Steps:
    """One barrier: index what was written before it, then rebuild the groups the method has."""
    if agents.config.recall:
        agents.recall.index_pending(number)
    record = Recorder(agents, number, None, None, "groups")
    if agents.variant.groups == "none":
        return record.result()
    if agents.variant.groups == "history":
        items = agents.dataset.interactions.item
        rows = {user: agents.before(agents.history_rows[user], now) for user in users}
        vectors = {user: agents.recall.vectors(items[held]).mean(axis=0) for user, held in rows.items() if len(held)}
        groups = groups_of_histories(vectors, kept=agents.config.groups, seed=agents.config.seed)
        cost = Cost()
    else:
        groups, cost = yield from _tag_groups(agents, number, users, now)
    record.groups(groups, cost)
    return record.result()


def _tag_groups(
    agents: AgentCF, number: int, users: Sequence[int], now: int | None
) -> Generator[Sequence[Call], list[Answer], tuple[list[Group], Cost]]:
    """All users' tags are asked for at once: their generators advance in lockstep."""
    asking = {}
    for user in users:
        held = _tagged_memories(agents, user, now)
        memories = {position: memory for position, memory in enumerate(held.values()) if memory.text}
        if memories:
            asking[user] = agents.writer.tags(memories, (agents.user_id(user), number))
    found = yield from in_lockstep(asking)
    tags = {user: owned for user, (owned, _) in found.items() if owned}
    distinct = sorted({tag for owned in tags.values() for tag in owned})
    # Journaled vectors, not the index's: a store renormalises them, and K-means would see other last bits.
    vectors = dict(zip(distinct, agents.embed(distinct), strict=True)) if distinct else {}
    costs = [cost for _, cost in found.values()]
    groups = build_groups(
        tags,
        vectors,
        kept=agents.config.groups,
        most_clusters=agents.config.clusters,
        by=agents.config.group_by,
        seed=agents.config.seed,
    )
    if agents.config.writer == "llm" and groups:
        groups, named = yield from _name_groups(agents, groups, number)
        costs.append(named)
    hashes = "".join(cost.prompt_hash for cost in costs)
    return groups, Cost(
        sha256_text(hashes)[:16] if hashes else "",
        sum(cost.tokens_in for cost in costs),
        sum(cost.tokens_out for cost in costs),
        ok=all(cost.ok for cost in costs),
        fault="; ".join(sorted({cost.fault for cost in costs if cost.fault})),
    )


def _tagged_memories(agents: AgentCF, user: int, now: int | None) -> Mapping[str, Memory]:
    """The memories tags are read from. A user whose plain history reaches past `now` is known up to it only."""
    plain = agents.plain_rows.get(user, np.zeros(0, dtype=np.int64))
    known = agents.before(plain, now)
    if len(known) < len(plain) and isinstance(agents.writer, StructuredWriter):
        return agents.absorbed(agents.writer, known)
    if not agents.variant.dual:
        return agents.memories.of(agents.user_key(user), "single")
    if agents.config.tag_source == "fused" and agents.variant.fusion != "none":
        fused = agents.memories.of(agents.user_key(user), "fused:")
        if any(memory.text for memory in fused.values()):
            return fused
    return agents.memories.of(agents.user_key(user), "private:")


def _name_groups(
    agents: AgentCF, groups: list[Group], number: int
) -> Generator[Sequence[Call], list[Answer], tuple[list[Group], Cost]]:
    calls = [Request(agents.questions.group_name(group.tags), max_tokens=16, site="group_name") for group in groups]
    answers = yield calls
    named = []
    for group, answer in zip(groups, answers, strict=True):
        phrase = agents.questions.phrase(getattr(answer, "text", ""))
        named.append(Group(phrase or group.name, group.tags, group.members))
    return named, agents.cost(calls[0], answers)


def in_lockstep(
    asking: dict[int, Generator[Sequence[Call], list[Answer], Any]],
) -> Generator[Sequence[Call], list[Answer], dict[int, Any]]:
    """Run several questioners as one: every round yields all their pending calls together, in key order."""
    results: dict[int, Any] = {}
    pending: dict[int, Sequence[Call]] = {}

    def advance(key: int, answers: list[Answer] | None) -> None:
        try:
            pending[key] = next(asking[key]) if answers is None else asking[key].send(answers)
        except StopIteration as stop:
            results[key] = stop.value
            pending.pop(key, None)

    for key in asking:
        advance(key, None)
    while pending:
        order = list(pending)
        sizes = [len(pending[key]) for key in order]
        answers = yield [call for key in order for call in pending[key]]
        start = 0
        for key, size in zip(order, sizes, strict=True):
            advance(key, answers[start : start + size])
            start += size
    return {key: results[key] for key in asking}
