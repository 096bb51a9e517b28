"""Memories of agents: their state, its text, and the rules by which the structured writer changes it.

A memory is either plain text (LLM writer) or signed weights over item features (structured writer, our design for
small models): positive = likes, negative = dislikes, all decayed by `DECAY` per event. The text shown to a model is
rendered from the strongest features. State is JSON text, so the event log can carry it and be folded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np

DECAY = 0.9
KEPT_TERMS = 64
ATTENTION_FLOOR = 0.1
LIKES_SHOWN = 12
DISLIKES_SHOWN = 5
WORD_LIMITS = {"private": 150, "fused": 180, "item": 50}

Weights = dict[str, float]


@dataclass(frozen=True)
class Memory:
    """One memory. `text` is what prompts show; `weights` is empty for texts written by a model."""

    text: str = ""
    weights: Weights = field(default_factory=dict)
    updates: int = 0

    def dump(self) -> str:
        """Canonical JSON text of the whole state."""
        return json.dumps(
            {"text": self.text, "weights": self.weights, "updates": self.updates},
            ensure_ascii=False,
            sort_keys=True,
            separators=(",", ":"),
        )

    @classmethod
    def load(cls, text: str) -> Memory:
        """Inverse of `dump`."""
        value = json.loads(text)
        return cls(value["text"], value["weights"], value["updates"])


def strongest(weights: Weights, count: int) -> Weights:
    """The `count` weights of largest magnitude, ties by name, rounded so that the JSON text is the state."""
    ranked = sorted(weights.items(), key=lambda pair: (-abs(pair[1]), pair[0]))[:count]
    return {term: round(weight, 6) for term, weight in sorted(ranked) if abs(weight) >= 1e-4}


def decayed_sum(old: Weights, new: Weights, decay: float = DECAY, rate: float = 1.0) -> Weights:
    """`decay * old + rate * new`, the exponential forgetting of the structured writer."""
    total = {term: decay * weight for term, weight in old.items()}
    for term, weight in new.items():
        total[term] = total.get(term, 0.0) + rate * weight
    return total


def taste_after(
    memory: Memory, liked: Weights, rejected: Weights, *, right: bool, rejection_rate: tuple[float, float] = (0.5, 0.1)
) -> Weights:
    """Private weights after one interaction.

    The real item's features gain weight. The rejected item's lose more when the agent had wrongly picked it
    (`rejection_rate[0]`) than when the judgement was right (`rejection_rate[1]`): dislikes come from misjudgements.
    """
    weights = decayed_sum(memory.weights, liked)
    rate = rejection_rate[1 if right else 0]
    for term, weight in rejected.items():
        if term not in liked:
            weights[term] = weights.get(term, 0.0) - rate * weight
    return strongest(weights, KEPT_TERMS)


def relevant_elsewhere(private_of_others: list[Weights], relevant: frozenset[str] | set[str], own: Weights) -> Weights:
    """Step one of fusion: what memories of other domains say in terms the target domain knows.

    The paper calls this an analogue of attention. Here a domain's weight is `ATTENTION_FLOOR` plus the cosine of its
    memory with the target domain's own, never below 0: domains that agree count more, one that contradicts the target
    domain not at all, and while little is known of the target all count alike (our design).
    """
    attention = [max(0.0, ATTENTION_FLOOR + cosine(own, weights)) for weights in private_of_others]
    total = sum(attention)
    extract: Weights = {}
    for weights, share in zip(private_of_others, attention, strict=True):
        if share > 0:
            for term in sorted(weights):
                if term in relevant:
                    extract[term] = extract.get(term, 0.0) + weights[term] * share / total
    return strongest(extract, KEPT_TERMS)


def fused_after(fused: Weights, extract: Weights, own: Weights, blend: float = 0.5) -> Weights:
    """Step two of fusion: blend the extract into the fused memory.

    A term on which the domain's own private memory holds the opposite sign is dropped: tastes that conflict between
    domains must not leak.
    """
    blended = {
        term: blend * fused.get(term, 0.0) + (1 - blend) * extract.get(term, 0.0)
        for term in sorted(fused.keys() | extract.keys())
    }
    return strongest(
        {term: weight for term, weight in blended.items() if weight * own.get(term, 0.0) >= 0.0}, KEPT_TERMS
    )


def audience_after(memory: Memory, taste: Weights, rate: float) -> Weights:
    """Item weights after a user with `taste` took (`rate` > 0) or passed over (`rate` < 0) the item."""
    norm = sum(weight * weight for weight in taste.values()) ** 0.5
    if norm == 0.0:
        return strongest(decayed_sum(memory.weights, {}), KEPT_TERMS)
    top = strongest({term: weight / norm for term, weight in taste.items()}, KEPT_TERMS // 2)
    return strongest(decayed_sum(memory.weights, top, rate=rate), KEPT_TERMS)


def taste_text(weights: Weights) -> str:
    """Likes (strongest first), then dislikes; "" when nothing is known."""
    ranked = sorted(weights.items(), key=lambda pair: (-abs(pair[1]), pair[0]))
    likes = [term for term, weight in ranked if weight > 0][:LIKES_SHOWN]
    dislikes = [term for term, weight in ranked if weight < 0][:DISLIKES_SHOWN]
    parts = []
    if likes:
        parts.append(f"Likes {', '.join(likes)}.")
    if dislikes:
        parts.append(f"Dislikes {', '.join(dislikes)}.")
    return " ".join(parts)


def audience_text(described: str, weights: Weights) -> str:
    """An item's inherent description, then who takes it and who passes it over."""
    ranked = sorted(weights.items(), key=lambda pair: (-abs(pair[1]), pair[0]))
    fans = [term for term, weight in ranked if weight > 0][:8]
    others = [term for term, weight in ranked if weight < 0][:4]
    parts = [described] if described else []
    if fans:
        parts.append(f"Taken by users who like {', '.join(fans)}.")
    if others:
        parts.append(f"Passed over by users who like {', '.join(others)}.")
    return " ".join(parts)


def cosine(first: Weights, second: Weights) -> float:
    """Cosine of two sparse weight vectors; 0 when either is empty."""
    if not first or not second:
        return 0.0
    small, large = (first, second) if len(first) <= len(second) else (second, first)
    dot = sum(weight * large[term] for term, weight in small.items() if term in large)
    norm = np.sqrt(sum(w * w for w in first.values()) * sum(w * w for w in second.values()))
    return float(dot / norm) if norm > 0 else 0.0


class MemoryStore:
    """Current memories of everybody. Owners are `user:ID` and `item:ID`; keys name the kind and the domain."""

    def __init__(self) -> None:
        self._memories: dict[str, dict[str, Memory]] = {}

    def get(self, owner: str, key: str) -> Memory | None:
        """The memory, or None where nothing was ever written."""
        return self._memories.get(owner, {}).get(key)

    def put(self, owner: str, key: str, memory: Memory) -> None:
        """Replace a memory."""
        self._memories.setdefault(owner, {})[key] = memory

    def of(self, owner: str, prefix: str) -> dict[str, Memory]:
        """Memories of `owner` whose key starts with `prefix`, in key order."""
        return {key: memory for key, memory in sorted(self._memories.get(owner, {}).items()) if key.startswith(prefix)}

    def owners(self) -> list[str]:
        """Everybody who has a memory, sorted."""
        return sorted(self._memories)
