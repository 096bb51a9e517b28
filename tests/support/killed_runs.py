"""Run `recollect simulate` in a child that can be killed, and look at what is left of it."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Child:
    """`recollect simulate ARGUMENTS --out folder`, once or many times over; `sent` lists every call ever paid for."""

    folder: Path
    arguments: tuple[str, ...]

    @property
    def sent(self) -> Path:
        return self.folder.with_suffix(".sent")

    def start(self, *flags: str) -> subprocess.Popen:
        """A process group of its own, so that a signal reaches whatever it started."""
        paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        command = [sys.executable, "-m", "support.counted_cli", str(self.sent), "simulate", *self.arguments]
        with self.folder.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                [*command, "--out", str(self.folder), *flags],
                env={**os.environ, "PYTHONPATH": paths},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def next_flags(self) -> tuple[str, ...]:
        """How the run is begun, or continued where it was begun before."""
        return ("--resume",) if (self.folder / "journal.sqlite").is_file() else ()

    def finish(self) -> None:
        """Run to the end."""
        code = self.start(*self.next_flags()).wait(timeout=900)
        assert code == 0, self.folder.with_suffix(".log").read_text(errors="replace")[-2000:]

    def kill_after(self, seconds: float) -> bool:
        """Start or continue, `kill -9` after `seconds`; whether it was still running then."""
        process = self.start(*self.next_flags())
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        assert process.returncode == 0, self.folder.with_suffix(".log").read_text(errors="replace")[-2000:]
        return False

    def wait_for_calls(self, n: int, process: subprocess.Popen, timeout: float = 300) -> None:
        """Return once `n` answers are recorded."""
        deadline = time.monotonic() + timeout
        while len(self.recorded()) < n:
            assert process.poll() is None, "the run ended before it could be disturbed"
            assert time.monotonic() < deadline, "the run made no progress"
            time.sleep(0.1)

    def recorded(self) -> list[str]:
        """Keys of the recorded calls, oldest first."""
        journal = self.folder / "journal.sqlite"
        if not journal.is_file():
            return []
        connection = sqlite3.connect(f"{journal.resolve().as_uri()}?mode=ro", uri=True, timeout=10)
        try:
            return [key for (key,) in connection.execute("SELECT key FROM calls ORDER BY rowid")]
        except sqlite3.OperationalError:  # killed before its tables were made
            return []
        finally:
            connection.close()

    def sent_calls(self) -> list[str]:
        """Keys of the calls the model was asked, in order, over every start of the run."""
        return self.sent.read_text().split() if self.sent.exists() else []

    def events(self) -> bytes:
        return (self.folder / "events.jsonl").read_bytes()

    def sent_twice(self) -> int:
        """Calls paid for again: their answers were lost before they were recorded."""
        return sum(count - 1 for count in Counter(self.sent_calls()).values())
