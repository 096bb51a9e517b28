"""Circuit breaker of one server: stop sending to a sick server, look again every half minute.

closed --(5 failures in a row, or > 50 % of the last 20, or found hung)--> open --(30 s)--> half-open: one generation
probe --> closed, or open for another 30 s (reliability §5). Pure bookkeeping: the caller brings the clock and
sends the probe.
"""

from collections import deque
from typing import Literal

CONSECUTIVE = 5
WINDOW = 20
PROBE_EVERY_S = 30.0

State = Literal["closed", "open", "half-open"]


class Breaker:
    """Health of one server, from the outcomes of its requests."""

    def __init__(self) -> None:
        self.state: State = "closed"
        self.opened_at: float | None = None
        self.times_opened = 0
        self._next_probe = 0.0
        self._consecutive = 0
        self._recent: deque[bool] = deque(maxlen=WINDOW)

    def on_success(self) -> None:
        """A request was answered (also by a refusal that shows a live server)."""
        self._consecutive = 0
        self._recent.append(True)

    def on_failure(self, now: float) -> None:
        """A request failed in a way that speaks against the server; outcomes that arrive while open change nothing."""
        if self.state != "closed":
            return
        self._consecutive += 1
        self._recent.append(False)
        full = len(self._recent) == WINDOW
        if self._consecutive >= CONSECUTIVE or (full and self._recent.count(False) > WINDOW / 2):
            self.trip(now)

    def trip(self, now: float) -> None:
        """Open at once: the server was found hung."""
        if self.state != "closed":
            return
        self.state = "open"
        self.opened_at = now
        self.times_opened += 1
        self._next_probe = now + PROBE_EVERY_S

    def seconds_to_probe(self, now: float) -> float:
        """Seconds until an open breaker may be probed; 0 when a probe is due."""
        return max(0.0, self._next_probe - now)

    def start_probe(self) -> None:
        """open -> half-open: one probe is on its way."""
        self.state = "half-open"

    def end_probe(self, answered: bool, now: float) -> None:
        """half-open -> closed (history forgotten) or open again; `opened_at` stays, for patience counts from there."""
        if answered:
            self.state = "closed"
            self.opened_at = None
            self._consecutive = 0
            self._recent.clear()
        else:
            self.state = "open"
            self._next_probe = now + PROBE_EVERY_S
