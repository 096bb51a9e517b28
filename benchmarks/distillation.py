"""Keeps what a distillation showed: the figures of finished `recollect distill` runs as rows of a log of tries.

    python benchmarks/distillation.py RUN_FOLDER … --note "what was tried" --out benchmarks/results/distillation.jsonl

Of every run: NDCG@10 and HR@10 of each model on the test cases with their intervals over users, and the paired
differences of NDCG@10 from the student alone and from self-distillation. Rows are added to the file, failures like
successes: a setting that was tried and did not help belongs to what a success must be read against.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rows import Rows

from recollect.distill.config import DistillConfig

METRICS = ("ndcg@10", "hr@10")
AGAINST = ("student_alone", "self_distilled", "labels-only/student")
UNTOLD = frozenset({"data", "out", "resume", "overwrite", "dry_run", "compare", "seeds", "workers", "seed", "k"})


def main() -> None:
    """Read the runs' reports, add their rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--note", default="", help="what was tried; kept with the rows")
    parser.add_argument("--out", type=Path, default=None, help="file the rows are added to")
    options = parser.parse_args()
    for folder in options.runs:
        file = folder / "report.json"
        if not file.is_file():
            sys.exit(f"{file} is missing; finish the run with `recollect distill … --resume --out {folder}`")
        add(json.loads(file.read_text(encoding="utf-8")), options.note, options.out)


def add(report: Mapping[str, Any], note: str, out: Path | None) -> None:
    """The rows of one report."""
    run, protocol = report["run"], report["protocol"]
    seeds = ",".join(map(str, protocol["seeds"]))
    told = "; ".join(part for part in (note, changed_options(run["options"])) if part)
    data = f"{protocol['name']}, {protocol['n_users']} users"
    with Rows("distillation", out, data=data, model=run["models"]["teacher"], note=told, append=True) as rows:
        for model, metrics in report["models"].items():
            for metric in METRICS:
                found = metrics[metric]
                low, high = found["ci95"]
                cost = report["rows"].get(model, {}).get("seconds", [])
                seconds = sum(value for value in cost if value is not None)
                rows.add(
                    "test", model, metric, found["value"], low=low, high=high, spread="ci95",
                    n=found["n"], seconds=seconds, seed=seeds,
                )  # fmt: skip
        for found in report["differences"]:
            if found["metric"] == METRICS[0] and found["against"] in AGAINST:
                low, high = found["ci95"]
                name = f"ndcg@10 minus that of {found['against']}"
                rows.add(
                    name, found["model"], "difference", found["value"], low=low, high=high, spread="ci95",
                    n=found["n"], seed=seeds,
                )  # fmt: skip


def changed_options(options: Mapping[str, Any]) -> str:
    """The options that differ from the defaults, as on the command line."""
    defaults = DistillConfig()
    changed = {
        name: value
        for name, value in options.items()
        if name not in UNTOLD and hasattr(defaults, name) and value != getattr(defaults, name)
    }
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sorted(changed.items()))


if __name__ == "__main__":
    main()
