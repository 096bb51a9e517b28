"""One writer per run: an operating-system lock beside the journal, which dies with its process."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from recollect.errors import JournalLocked
from recollect.io import disk_errors

_PATIENCE_SECONDS = 1.0


class WriterLock:
    """Holds the lock of a journal until `release`. The lock file stays: removing it would let two processes in."""

    def __init__(self, journal: Path) -> None:
        """Take the lock.

        Raises:
            JournalLocked: another process (or another `Journal` of this one) writes; the message names its pid.
        """
        path = journal.with_name(f"{journal.name}-lock")
        with disk_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._take(journal)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _take(self, journal: Path) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip()
                # Nothing or a dead process there: the holder has the lock but has not signed yet, or is just ending.
                if _is_alive(holder) or time.monotonic() > deadline:
                    raise JournalLocked(
                        f"{journal} is being written by process {holder or '(unknown)'}; wait for it or stop it"
                    ) from None
                time.sleep(0.002)
            else:
                with disk_errors(journal):
                    os.ftruncate(self._descriptor, 0)
                    os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
                return

    def release(self) -> None:
        """Let others write; safe to call twice."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
