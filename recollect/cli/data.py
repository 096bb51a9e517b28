"""`recollect data list | describe | import | fetch`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recollect.cli.options import Parser, add_common, describe, pairs_report, table_report
from recollect.types import Report


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's actions and their arguments."""
    describe(parser, "Data sets: bundled worlds, registered public logs, and your own.", "recollect data list")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)

    listing = actions.add_parser("list", help="what can be named as DATA")
    describe(listing, "Every data set that can be named as DATA, and whether it is here.", "recollect data list --json")

    describing = actions.add_parser("describe", help="counts, domains and fingerprint of a data set")
    describe(describing, "Counts, domains, time span and fingerprint of a data set.", "recollect data describe harbor")
    describing.add_argument("data", metavar="DATA", help="name, dataset folder or raw folder")

    importing = actions.add_parser("import", help="turn raw files into a dataset folder")
    describe(
        importing,
        "Turn raw files into a dataset folder: dataset.json, interactions.parquet, items.parquet, users.parquet.",
        "recollect data import csv my-log/ my-data/",
        "recollect data import ml-1m downloads/ml-1m data/ml-1m",
    )
    importing.add_argument("kind", metavar="KIND", help="ml-100k, ml-1m, recbole, amazon, goodbooks, csv or sequences")
    importing.add_argument("source", metavar="SRC", help="the raw file or folder")
    importing.add_argument("target", metavar="OUT", help="the dataset folder to make")

    fetching = actions.add_parser("fetch", help="download a registered data set")
    describe(fetching, "Download a registered data set and check it by SHA-256.", "recollect data fetch ml-100k")
    fetching.add_argument("name", metavar="NAME", help="a name from `recollect data list`")

    for action, function in (
        (listing, run_list),
        (describing, run_describe),
        (importing, run_import),
        (fetching, run_fetch),
    ):
        add_common(action)
        action.set_defaults(run=_stored(function))


def _stored(function: Callable[[argparse.Namespace], Report]) -> Callable[[argparse.Namespace], Report]:
    """`function(arguments) -> Report` with its report stored in --out."""

    def run(arguments: argparse.Namespace) -> Report:
        from recollect.cli.storing import prepare, store

        out = prepare(arguments)
        return store(function(arguments), f"data {arguments.action}", arguments, out)

    return run


def run_list(arguments: argparse.Namespace) -> Report:
    """One row per name that DATA can be."""
    from recollect.data import registered

    rows = registered()
    shown = [
        {
            "name": row["name"],
            "here": row["found"] or "no",
            "fetch": "yes" if row["url"] else "by hand" if not row["found"] else "",
            "licence": row["licence"],
            "homepage": row["homepage"] or "",
        }
        for row in rows
    ]
    return table_report("data-list", "Data sets", shown, datasets=rows)


def run_describe(arguments: argparse.Namespace) -> Report:
    """What a data set holds."""
    from recollect.data import describe as describe_dataset
    from recollect.data import load_dataset

    if getattr(arguments, "dry_run", False):
        return pairs_report("plan", "Plan", {"would read": arguments.data})
    return _described(describe_dataset(load_dataset(arguments.data, seed=getattr(arguments, "seed", 0))))


def run_import(arguments: argparse.Namespace) -> Report:
    """Write a dataset folder and describe it."""
    from recollect.data import describe as describe_dataset
    from recollect.data import import_dataset, load_dataset

    if getattr(arguments, "dry_run", False):
        plan = {"would read": arguments.source, "as": arguments.kind, "would write": arguments.target}
        return pairs_report("plan", "Plan", {**plan, "source bytes": _size(Path(arguments.source))})
    import_dataset(arguments.kind, arguments.source, arguments.target, overwrite=getattr(arguments, "overwrite", False))
    return _described(describe_dataset(load_dataset(arguments.target)))


def run_fetch(arguments: argparse.Namespace) -> Report:
    """Download one data set."""
    from recollect.data import fetch

    if getattr(arguments, "dry_run", False):
        return pairs_report("plan", "Plan", {"would fetch": arguments.name})
    folder = fetch(arguments.name)
    return pairs_report("data-fetch", "Fetched", {"name": arguments.name, "folder": str(folder)}, folder=str(folder))


def _described(facts: dict[str, Any]) -> Report:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, dict):
            flat |= {f"{key}: {part}": inner for part, inner in value.items()}
        else:
            flat[key] = "none" if value in ([], "") else value
    return pairs_report("data-describe", str(facts.get("name", "data set")), flat, dataset=facts)


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
