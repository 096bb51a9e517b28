"""How much `simulate.py` measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """How much is measured. Seeds are repetitions: each draws its own users, slates and fence."""

    users: int
    choice_interactions: int
    choice_seeds: int
    text_users: int
    text_interactions: int
    text_seeds: int
    loop_calls: int
    people: int
    pairs: int
    repetitions: int
    journal_agents: int
    journal_steps: int


FULL = Size(64, 2, 2, 64, 2, 1, 24, 4, 8, 3, 10_000, 5)
QUICK = Size(64, 1, 1, 32, 1, 1, 12, 4, 6, 1, 2_000, 3)
