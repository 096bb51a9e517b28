"""Ranking a slate with the agents' state as it stands (AgentCF++ §3.8); changes nothing.

Every candidate gets named evidence: what the memories and the groups say of it, without any call, and what the language
model says in one of three modes. The choice layer weighs the columns afterwards (`recollect.agents.layers`).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.agents.evidence import Evidence, bradley_terry
from recollect.agents.questions import LABELS
from recollect.agents.recorder import Recorder, Steps
from recollect.agents.writers import Cost
from recollect.backbones.protocol import Answer, Call, Choice, Chosen, Request, Scored, Scoring, call_key
from recollect.eval.slates import Slates
from recollect.prompts.parsing import MalformedAnswer, ask_json

if TYPE_CHECKING:
    from recollect.agents.agentcf import AgentCF

RATINGS = ("1", "2", "3", "4", "5")


def rank_slate(agents: AgentCF, number: int, slates: Slates, case: int, part: str) -> Steps:
    """Rank one slate; a test case is also decided as a pair, and a rated row is asked for its stars. Writes nothing."""
    user, domain, now = int(slates.user[case]), int(slates.domain[case]), int(slates.time[case])
    items = [int(item) for item in slates.candidates[case]]
    target = int(slates.target[case])
    memory = agents.read_memory(user, domain, now, training=False)
    record = Recorder(agents, number, user, domain, part)
    evidence = memory_evidence(agents, user, domain, now, slates.candidates[case], read_items=True)
    cost = yield from _language_evidence(agents, domain, memory, items, evidence)
    record.ranking(items, target, evidence, cost)
    if part == "test":
        negative = items[0 if target else 1]
        names = (agents.user_id(user), int(slates.row[case]), "pair")
        decision = yield from agents.choose(domain, memory, agents.shown(items[target]), agents.shown(negative), names)
        picked = items[target] if decision.right else negative
        record.decision("choice", decision, [items[target], negative], picked)
    rating = agents.dataset.interactions.rating
    if rating is not None and not math.isnan(rating[slates.row[case]]):
        call = Choice(agents.questions.rating(domain, memory, agents.shown(items[target])), RATINGS, site="rating")
        (answer,) = yield [call]
        assert isinstance(answer, Chosen)
        record.rating(items[target], np.exp(answer.log_probs), agents.cost(call, [answer]))
    return record.result()


def memory_evidence(
    agents: AgentCF, user: int, domain: int, now: int, candidates: np.ndarray, *, read_items: bool
) -> Evidence:
    """What memories say of each candidate, without any call."""
    evidence = Evidence(len(candidates))
    private, fused = agents.private(user, domain), agents.fused(user, domain)
    if agents.config.writer == "structured":
        evidence.put("private_memory", agents.features.match(private.weights, candidates))
        if read_items:
            evidence.put(
                "item_memory",
                [evidence.audience(private.weights, agents.item_memory(int(item)).weights) for item in candidates],
            )
        if agents.variant.fusion != "none":
            evidence.put("fused_memory", agents.features.match(fused.weights, candidates))
    else:
        texts = [private.text, fused.text]
        evidence.put("private_memory", agents.recall.similarity(texts[0], candidates))
        if agents.variant.fusion != "none":
            evidence.put("fused_memory", agents.recall.similarity(texts[1], candidates))
    if agents.variant.groups != "none":
        groups = agents.groups_of(user)
        recent = {
            int(item)
            for group in groups
            for item in agents.views.recent(group, domain, now, user, agents.config.group_window)
        }
        evidence.put("group_view", agents.recall.closest(candidates, sorted(recent)))
        popularity = agents.views.popularity(groups, domain, now, user)
        evidence.put("group_popularity", [math.log1p(popularity.get(int(item), 0.0)) for item in candidates])
    if agents.config.recall:
        evidence.put("recalled_memory", agents.recall.past_memories(agents.user_key(user), candidates))
    return evidence


def _language_evidence(
    agents: AgentCF, domain: int, memory: dict[str, Any], items: list[int], evidence: Evidence
) -> Generator[Sequence[Call], list[Answer], Cost]:
    if agents.config.ranking == "pairwise":
        return (yield from _rank_pairwise(agents, domain, memory, items, evidence))
    if agents.config.ranking == "listwise":
        return (yield from _rank_listwise(agents, domain, memory, items, evidence))
    titles = tuple(agents.questions.title(item) for item in items)
    calls = [
        Scoring(agents.questions.rank_context(domain, memory), titles, site="rank"),
        Scoring(agents.questions.rank_neutral(domain), titles, site="rank_neutral"),
    ]
    user, neutral = answers = yield calls
    assert isinstance(user, Scored)
    assert isinstance(neutral, Scored)
    length = np.asarray(user.n_tokens, dtype=float)
    evidence.put("lm_likelihood", np.asarray(user.log_probs) / length)
    evidence.put("lm_pmi", (np.asarray(user.log_probs) - np.asarray(neutral.log_probs)) / length)
    return agents.cost(calls[0], answers)


def _rank_pairwise(
    agents: AgentCF, domain: int, memory: dict[str, Any], items: list[int], evidence: Evidence
) -> Generator[Sequence[Call], list[Answer], Cost]:
    shown = [agents.shown(item) for item in items]
    pairs = [pair for a, b in combinations(range(len(items)), 2) for pair in ((a, b), (b, a))]
    calls = [
        Choice(agents.questions.choice(domain, memory, shown[a], shown[b]), LABELS, site="pairwise") for a, b in pairs
    ]
    answers = yield calls
    log_odds = np.zeros((len(items), len(items)))
    for (a, b), answer in zip(pairs, answers, strict=True):
        assert isinstance(answer, Chosen)
        odds = (answer.log_probs[0] - answer.log_probs[1]) / 2
        log_odds[a, b] += odds
        log_odds[b, a] -= odds
    evidence.put("lm_pairwise", bradley_terry(log_odds))
    return agents.cost(calls[0], answers)


def _rank_listwise(
    agents: AgentCF, domain: int, memory: dict[str, Any], items: list[int], evidence: Evidence
) -> Generator[Sequence[Call], list[Answer], Cost]:
    chat, schema, labels = agents.questions.rank_list(domain, memory, [agents.shown(item) for item in items])
    request = Request(chat, max_tokens=8 * len(items) + 16, schema=schema, site="rank_list")
    key = call_key(agents.fingerprint, request)[:16]
    value, tokens_in, tokens_out = yield from ask_json(request)
    if isinstance(value, MalformedAnswer):
        evidence.put("lm_listwise", np.zeros(len(items)))
        return Cost(key, tokens_in, tokens_out, ok=False, fault=value.reason)
    place = {label: position for position, label in reversed(list(enumerate(value)))}
    # Items the model left out share the last place; labels it made up match nothing.
    evidence.put("lm_listwise", [-float(place.get(label, len(items))) for label in labels])
    return Cost(key, tokens_in, tokens_out)
