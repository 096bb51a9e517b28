"""How much memory a stretch of work takes beyond what was in use before it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class PeakMemory:
    """Highest resident memory inside a `with` block, above that at its start.

    `mb` is a number of MiB after the block; None where the system cannot tell (anything but Linux, or a kernel that
    does not let a process reset its mark).
    """

    def __init__(self) -> None:
        self.mb: float | None = None
        self._before: float | None = None

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):
            _RESET.write_text("5")  # sets the high-water mark to what is resident now
            self._before = _status("VmRSS")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        highest = None if self._before is None else _status("VmHWM")
        if highest is not None and self._before is not None:
            self.mb = max(0.0, highest - self._before)


def _status(key: str) -> float | None:
    """A line of the process's status, in MiB."""
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return None
