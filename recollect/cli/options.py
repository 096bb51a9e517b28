"""What the sub-commands share: the parser, the common flags, flags from a dataclass, reports made of one table."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from recollect.config import Option, from_text
from recollect.errors import ConfigError

if TYPE_CHECKING:
    from recollect.types import Report


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and raises `ConfigError` instead of printing its usage."""

    def __init__(self, **options: Any) -> None:
        options |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def describe(parser: argparse.ArgumentParser, purpose: str, *examples: str) -> None:
    """Set the text above the options and the examples below them."""
    parser.description = purpose.replace("%", "%%")
    lines = "".join(f"\n  {example}" for example in examples)
    parser.epilog = f"example{'s' if len(examples) > 1 else ''}:{lines}".replace("%", "%%")


def add_common(parser: argparse.ArgumentParser, *, is_run: bool = False) -> None:
    """The flags every command has; `is_run` adds --resume for a command whose run can be continued."""
    group = parser.add_argument_group("common options")
    group.add_argument(
        "--seed", type=_seed, default=argparse.SUPPRESS, metavar="N", help="seed of every draw (default: 0)"
    )
    default = "default: the first free runs/COMMAND-DATA-N" if is_run else "default: nothing is stored"
    group.add_argument(
        "--out",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help=f"folder for run.json, report.json and report.html ({default})",
    )
    if is_run:
        group.add_argument("--resume", action="store_true", default=argparse.SUPPRESS, help="continue the run in --out")
    group.add_argument(
        "--overwrite", action="store_true", default=argparse.SUPPRESS, help="replace what the folder holds"
    )
    group.add_argument("--json", action="store_true", help="print the report to stdout as JSON")
    group.add_argument(
        "--dry-run", action="store_true", default=argparse.SUPPRESS, help="print the plan and do nothing"
    )


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        raise ConfigError(f"--seed must be a whole number, got {text!r}") from None
    if seed < 0:
        raise ConfigError(f"--seed must be 0 or more, got {text!r}")
    return seed


def add_options(parser: argparse.ArgumentParser, options: Sequence[Option], skip: Collection[str]) -> None:
    """One flag per option; a flag that is not given leaves no attribute, so a file's value can stand."""
    for option in options:
        if option.name in skip:
            continue
        shown = option.help.replace("%", "%%")
        if "default:" not in option.help:
            shown = f"{shown} (default: {_shown(option.default)})".lstrip()
        if option.kind is bool and not option.is_optional:
            parser.add_argument(
                option.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=shown
            )
        else:
            parser.add_argument(
                option.flag,
                action=_ListOnce if option.is_list else "store",
                type=_reader(option),
                default=argparse.SUPPRESS,
                metavar=_metavar(option),
                help=shown,
            )


class _ListOnce(argparse.Action):
    """A list in one flag; a second flag would silently replace the first, so it is refused."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if hasattr(namespace, self.dest):
            raise ConfigError(f"{option_string} is given twice; give all values at once, separated by commas")
        setattr(namespace, self.dest, values)


def _reader(option: Option) -> Any:
    if option.kind is bool:
        return lambda text: _true_or_false(option, text)
    return lambda text: from_text(option, text)


def _true_or_false(option: Option, text: str) -> bool | None:
    words = {"true": True, "yes": True, "false": False, "no": False}
    if text.lower() == "none":
        return None
    if text.lower() not in words:
        raise ConfigError(f"{option.flag} must be true, false or none, got {text!r}")
    return words[text.lower()]


def _metavar(option: Option) -> str:
    if option.choices:
        return "|".join(str(choice) for choice in option.choices)
    word = {bool: "true|false", int: "N", float: "X", str: "TEXT"}[option.kind]
    return f"{word},…" if option.is_list else word


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(str(value) for value in default) or "none"
    return "none" if default is None else str(default)


def table_report(kind: str, title: str, rows: Sequence[Mapping[str, Any]], **sections: Any) -> Report:
    """A report that is one table; `rows` share their keys, which become the columns."""
    from recollect.types import Report

    columns = list(rows[0]) if rows else []
    panel = {
        "kind": "table",
        "title": title,
        "columns": [column.replace("_", " ") for column in columns],
        "rows": [[_cell(row.get(column)) for column in columns] for row in rows],
    }
    return Report(kind=kind, protocol={}, metrics={}, sections={**sections, "panels": [panel]})


def pairs_report(kind: str, title: str, values: Mapping[str, Any], **sections: Any) -> Report:
    """A report that is one list of names and values."""
    from recollect.eval.formats import label, scalar

    rows = [{"what": label(key), "value": scalar(value)} for key, value in values.items()]
    return table_report(kind, title, rows, **sections)


def _cell(value: Any) -> str | int | float:
    from recollect.eval.formats import scalar

    if isinstance(value, bool) or value is None or not isinstance(value, int | float):
        return scalar(value)
    return value
