"""Adaptive concurrency: how many requests one server may have in flight right now.

Multiplicative cut when the server says it is overloaded, slow growth back after rounds that were both clean and
saturated (reliability §5). Pure bookkeeping: the caller brings the clock and does the waiting.
Not covered: slow start; the first requests may use the whole limit, as the servers we talk to queue by themselves.
"""

import math

CUT = 0.8
DEBOUNCE_S = 15.0
GROWTH = 1.05


class AdaptiveLimiter:
    """Slots of one server: at most `ceiling`, fewer while the server is overloaded, never fewer than one."""

    def __init__(self, ceiling: int) -> None:
        self.ceiling = ceiling
        self.in_flight = 0
        self._limit = float(ceiling)
        self._last_cut: float | None = None
        self._clean_answers = 0
        self._saturated = False

    @property
    def limit(self) -> int:
        """Slots allowed now, 1..ceiling."""
        return max(1, math.floor(self._limit))

    @property
    def has_room(self) -> bool:
        """Whether one more request may start."""
        return self.in_flight < self.limit

    def take(self) -> None:
        """Occupy a slot; the caller checked `has_room`."""
        self.in_flight += 1
        if self.in_flight >= self.limit:
            self._saturated = True

    def give_back(self) -> None:
        """Free a slot."""
        self.in_flight -= 1

    def on_overload(self, now: float) -> None:
        """The server answered 429 or 503: cut the limit by a fifth, at most once per `DEBOUNCE_S` seconds."""
        self._clean_answers, self._saturated = 0, False
        if self._last_cut is not None and now - self._last_cut < DEBOUNCE_S:
            return
        self._last_cut = now
        self._limit = max(1.0, self._limit * CUT)

    def on_answer(self) -> None:
        """The server answered well: after a round of `limit` such answers that used every slot, grow by 5 %."""
        self._clean_answers += 1
        if self._clean_answers < self.limit:
            return
        if self._saturated:
            self._limit = min(float(self.ceiling), self._limit * GROWTH)
        self._clean_answers, self._saturated = 0, self.in_flight >= self.limit
