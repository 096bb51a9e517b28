"""SIGINT and SIGTERM wait for the end of a write, and strike at once anywhere else.

Between the commit of a transaction and the update of what the process knows of it, an exception would leave the two
apart; so there a signal is kept and handed to the usual handler when the section ends.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Context manager that takes over the two signals on the main thread; elsewhere it does nothing."""

    def __init__(self) -> None:
        self._depth = 0
        self._waiting: list[tuple[int, FrameType | None]] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if callable(signal.getsignal(number)):  # the default action and "ignored" need no help from us
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            if signal.getsignal(number) == self._receive:  # a handler may have replaced itself while it ran
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._depth:
            self._waiting.append((number, frame))
        else:
            self._hand_on(number, frame)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        handler: Callable[[int, FrameType | None], Any] = self._previous[number]
        handler(number, frame)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals that come inside the block act at its end; blocks nest."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._waiting and not self._depth:
                self._hand_on(*self._waiting.pop(0))
