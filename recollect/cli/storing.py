"""Storing what a command that is not a run found: run.json, report.json and report.html in --out."""

from __future__ import annotations

import argparse
from pathlib import Path

from recollect.config import run_manifest
from recollect.io import prepare_out, write_json
from recollect.types import Report


def prepare(arguments: argparse.Namespace) -> Path | None:
    """The folder of --out, made and checked before any work; None where it was not given."""
    out = getattr(arguments, "out", None)
    if out is None or getattr(arguments, "dry_run", False):
        return None
    return prepare_out(out, resume=False, overwrite=getattr(arguments, "overwrite", False))


def store(report: Report, command: str, arguments: argparse.Namespace, out: Path | None) -> Report:
    """Write the report and how it was made into `out` (nothing where it is None); the report again."""
    if out is not None:
        hidden = ("run", "command", "action", "json")
        options = {key: value for key, value in vars(arguments).items() if key not in hidden}
        write_json(out / "run.json", run_manifest(command, options, "", {}, getattr(arguments, "seed", 0)))
        report.save(out)
    return report
