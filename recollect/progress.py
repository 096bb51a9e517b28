"""Progress of a long command on stderr: a live bar on a terminal, a line per tenth elsewhere, or nothing.

Library code takes a `Progress` and calls `stage` and `advance`; it never decides where the words go. Nothing here
influences a result.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID


class Progress(Protocol):
    """Where a command says how far it is. `stage` may be entered again, one at a time; `total` None = unknown."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Begin a stage; the one before it is over."""
        ...

    def advance(self, steps: int = 1, note: str = "") -> None:
        """`steps` more are done; `note` is a short remark for people, such as tokens per second."""
        ...

    def close(self) -> None:
        """Leave the stream tidy; safe to call twice."""
        ...


class SilentProgress:
    """Says nothing."""

    def stage(self, name: str, total: int | None = None) -> None:
        pass

    def advance(self, steps: int = 1, note: str = "") -> None:
        pass

    def close(self) -> None:
        pass


class PlainProgress:
    """One line when a stage begins and one for every tenth of it: readable in a log file."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._name = ""
        self._total: int | None = None
        self._done = 0
        self._tenth = 0

    def stage(self, name: str, total: int | None = None) -> None:
        self._name, self._total, self._done, self._tenth = name, total, 0, 0
        self._line(f"{name}" + (f" (0 of {total})" if total else ""))

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        if not self._total:
            return
        tenth = min(10, 10 * self._done // self._total)
        if tenth > self._tenth:
            self._tenth = tenth
            self._line(f"{self._name} ({self._done} of {self._total}){': ' + note if note else ''}")

    def close(self) -> None:
        self._stream.flush()

    def _line(self, text: str) -> None:
        self._stream.write(f"recollect: {text}\n")
        self._stream.flush()


class TerminalProgress:
    """Live bars with elapsed and remaining time."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichBars

        self._bars: RichBars = RichBars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(file=stream),
        )
        self._task: TaskID | None = None
        self._bars.start()

    def stage(self, name: str, total: int | None = None) -> None:
        self._finish()
        self._task = self._bars.add_task(name, total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        if self._task is None:
            return
        if note:
            self._bars.update(self._task, advance=steps, note=note)
        else:
            self._bars.update(self._task, advance=steps)

    def close(self) -> None:
        self._finish()
        self._bars.stop()

    def _finish(self) -> None:
        if self._task is not None:
            self._bars.stop_task(self._task)
            self._task = None


def open_progress(stream: TextIO | None = None) -> Progress:
    """Live bars where `stream` (stderr by default) is a terminal, plain lines elsewhere."""
    stream = sys.stderr if stream is None else stream
    return TerminalProgress(stream) if stream.isatty() else PlainProgress(stream)


@contextmanager
def progress_on(stream: TextIO | None = None) -> Iterator[Progress]:
    """`open_progress`, closed at the end of the block."""
    progress = open_progress(stream)
    try:
        yield progress
    finally:
        progress.close()
