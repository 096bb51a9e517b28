"""Limits on what a run may cost, counted over the whole run: sessions before a kill or a stop count too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recollect.errors import BudgetReached, ConfigError


@dataclass
class Budget:
    """Limits of one run; None = no limit. `seconds` are summed over calls, so concurrent calls count side by side.

    The number of calls is kept exactly: a call that would exceed it is never sent. Tokens and seconds are known only
    when an answer is there, so what was in flight when they were reached is still paid.
    """

    calls: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        self.spent_calls = 0
        self.spent_tokens = 0
        self.spent_seconds = 0.0
        for name in ("calls", "tokens", "seconds"):
            limit = getattr(self, name)
            if limit is not None and limit <= 0:
                raise ConfigError(f"a budget of {name} must be more than 0, got {limit!r}")

    def start_from(self, ledger: Mapping[str, Any]) -> None:
        """Count what the run has cost so far."""
        self.spent_calls = ledger["requests"]
        self.spent_tokens = ledger["prompt_tokens"] + ledger["completion_tokens"]
        self.spent_seconds = ledger["seconds"]

    def spend(self, *, tokens: int, seconds: float) -> None:
        """One call was answered."""
        self.spent_calls += 1
        self.spent_tokens += tokens
        self.spent_seconds += seconds

    def check(self, *, sending: int, in_flight: int = 0) -> None:
        """Allow `sending` more calls beside those in flight.

        Raises:
            BudgetReached: a limit would be exceeded; the message says which and what was spent.
        """
        if self.calls is not None and self.spent_calls + in_flight + sending > self.calls:
            raise _reached("calls", self.spent_calls, self.calls)
        if self.tokens is not None and self.spent_tokens >= self.tokens:
            raise _reached("tokens", self.spent_tokens, self.tokens)
        if self.seconds is not None and self.spent_seconds >= self.seconds:
            raise _reached("seconds", round(self.spent_seconds, 1), self.seconds)


def _reached(name: str, spent: float, limit: float) -> BudgetReached:
    return BudgetReached(
        f"the budget of {limit} {name} is used up ({spent} spent); what was paid for is kept: resume with a larger one"
    )
