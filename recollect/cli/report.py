"""`recollect report DIR`: draw the page of a finished run again from its stored results."""

from __future__ import annotations

import argparse

from recollect.cli.options import add_common, describe, pairs_report
from recollect.types import Report


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    describe(
        parser,
        "Draw report.html (and tables.csv) of a run again from its report.json; no model is needed.",
        "recollect report runs/simulate-harbor-1",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a finished run")
    add_common(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Report:
    """Redraw in place, or into --out."""
    import sys

    from recollect.cli.storing import prepare, store
    from recollect.eval.report import load_report, rebuild

    if getattr(arguments, "dry_run", False):
        report = load_report(arguments.folder)
        target = getattr(arguments, "out", None) or arguments.folder
        return pairs_report("plan", "Plan", {"report": report.kind, "would write": f"{target}/report.html"})
    out = prepare(arguments)
    if out is not None:
        return store(load_report(arguments.folder), "report", arguments, out)
    report = rebuild(arguments.folder)
    sys.stderr.write(f"recollect: wrote {arguments.folder}/report.html\n")
    return report
