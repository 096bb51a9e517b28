"""Rows of a benchmark: one JSON line per figure, with what it needs to be believed.

A row holds benchmark, name, method, data, seed, metric, value, low and high with the kind of `spread` they are ("range"
of repetitions or "ci95"), n, seconds, peak_mb, model, machine, versions and commit.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from recollect.config import versions

Spread = Literal["range", "ci95", ""]
ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The checkout's commit, with "+" when files under recollect/ or benchmarks/*.py differ from it; "" without git."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        if head.returncode != 0:
            return ""
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "recollect", "benchmarks/*.py"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def machine() -> str:
    """Processor family and the number of cores this process may use."""
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line)
        name = next(lines, name)
    return f"{len(os.sched_getaffinity(0))} cores, {name}"


def median_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest."""
    return statistics.median(values), min(values), max(values)


class Rows:
    """Writes rows to stdout and, if asked, to a file, each as soon as it is known.

    Args:
        benchmark: name of the benchmark.
        path: file to begin anew, or None.
        data, model, note: of every row; `data` unless a row says otherwise.
        append: add to the file in place of beginning it anew.
    """

    def __init__(
        self,
        benchmark: str,
        path: Path | None,
        *,
        data: str = "",
        model: str = "",
        note: str = "",
        append: bool = False,
    ) -> None:
        self.data = data
        self.model = model
        self.note = note
        self._benchmark = benchmark
        self._fixed = {"machine": machine(), "versions": versions(), "commit": commit()}
        self._began = time.monotonic()
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a" if append else "w", encoding="utf-8")

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def add(
        self,
        name: str,
        method: str,
        metric: str,
        value: float,
        *,
        low: float | None = None,
        high: float | None = None,
        spread: Spread = "",
        n: int = 1,
        seconds: float = 0.0,
        seed: int | str = 0,
        data: str | None = None,
    ) -> None:
        """One figure. `seconds` is the time measured for it; `n` what it is a median or mean of."""
        row: dict[str, Any] = {
            "benchmark": self._benchmark,
            "name": name,
            "method": method,
            "data": self.data if data is None else data,
            "seed": seed,
            "metric": metric,
            "value": _rounded(value),
            "low": _rounded(low),
            "high": _rounded(high),
            "spread": spread,
            "n": n,
            "seconds": round(seconds, 3),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "model": self.model,
            "note": self.note,
            **self._fixed,
        }
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        for stream in (sys.stdout, self._file):
            if stream is not None:
                stream.write(line + "\n")
                stream.flush()

    def add_median(self, name: str, method: str, metric: str, values: Sequence[float], **fields: Any) -> None:
        """Median of repetitions with their range; an empty sequence gives no row."""
        if values:
            value, low, high = median_and_range(values)
            self.add(name, method, metric, value, low=low, high=high, spread="range", n=len(values), **fields)

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        sys.stderr.write(f"[{time.monotonic() - self._began:6.1f} s] {text}\n")
        sys.stderr.flush()


def _rounded(value: float | None) -> float | None:
    """Six significant digits; not-a-number becomes null."""
    if value is None or value != value:
        return None
    return float(f"{value:.6g}")
