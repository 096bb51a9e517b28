"""Metrics of a run as JSON lines, one per logged step, so that a reader never needs the process that wrote them.

A resumed run rewinds the file to its checkpoint first: every step stands in it once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from recollect.io import disk_errors, write_text

METRICS_FILE = "metrics.jsonl"


class Tracker:
    """Appends {"step": …, name: value} lines to `metrics.jsonl` in a folder.

    Values must be finite numbers or text, since JSON has no NaN.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / METRICS_FILE

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one line; it is flushed to the operating system before this returns."""
        line = json.dumps({"step": step, **values}, allow_nan=False)
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")

    def rows(self) -> list[dict[str, float | int | str]]:
        """Every complete line so far; a line torn by a kill is left out."""
        if not self.path.is_file():
            return []
        complete = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in complete]

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`; the lines of a run that continues there come anew."""
        kept = [row for row in self.rows() if int(row["step"]) <= step]
        if self.path.is_file():
            write_text(self.path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
