"""What the commands with a run folder share: arguments, resolved options, the folder and what is said of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from recollect.cli.options import add_common, add_options, describe
from recollect.config import dump_yaml, load_yaml, options_of, read_options
from recollect.errors import ConfigError
from recollect.progress import progress_on

if TYPE_CHECKING:
    from recollect.types import Report

_COMMON = ("data", "out", "seed", "resume", "overwrite", "dry_run")
_CONFIG_HELP = "read options from a file; flags win over it"


def configure_run(
    parser: argparse.ArgumentParser,
    command: str,
    config: type[Any],
    purpose: str,
    *examples: str,
    config_help: str = _CONFIG_HELP,
) -> None:
    """Add DATA, a flag for every option of the dataclass `config`, --config and the common flags."""
    describe(parser, purpose, *examples)
    parser.usage = f"recollect {command} [DATA] [options]"
    options = options_of(config)
    data = next(option for option in options if option.name == "data")
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="?",
        default=argparse.SUPPRESS,
        help=f"{data.help} (default: {data.default})".replace("%", "%%"),
    )
    add_options(parser, options, skip=_COMMON)
    parser.add_argument("--config", metavar="FILE.yaml", help=config_help)
    parser.add_argument("--print-config", action="store_true", help="print the resolved options as YAML and stop")
    add_common(parser, is_run=True)


def resolve(arguments: argparse.Namespace, config: type[Any]) -> dict[str, Any]:
    """Every option's value: the flag, else the file's, else the default; checked together by the dataclass."""
    values, _ = resolve_with_sections(arguments, config, allow_sections=False)
    return values


def resolve_with_sections(
    arguments: argparse.Namespace, config: type[Any], *, allow_sections: bool = True
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """`resolve`, and the file's mappings whose name is no option (where they are allowed)."""
    options = options_of(config)
    names = {option.name for option in options}
    from_file = load_yaml(arguments.config) if arguments.config else {}
    sections = {key: value for key, value in from_file.items() if isinstance(value, dict) and key not in names}
    plain = {key: value for key, value in from_file.items() if not (allow_sections and key in sections)}
    read = read_options(options, plain, str(arguments.config))
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    return vars(config(**{**read, **flags})).copy(), sections


def only_prints(arguments: argparse.Namespace, values: dict[str, Any]) -> bool:
    """Print the resolved options where that is all that was asked for.

    Raises:
        ConfigError: a run is to be continued and its folder is not named.
    """
    if arguments.print_config:
        sys.stdout.write(dump_yaml(values))
        return True
    if values["resume"] and values["out"] is None:
        raise ConfigError("--resume needs --out DIR, the folder of the run to continue")
    return False


def carry_out(
    arguments: argparse.Namespace,
    values: dict[str, Any],
    recipe: Callable[..., Report],
    free_folder: Callable[[str], Any],
    *,
    writes: bool,
    **more: Any,
) -> Report:
    """Choose the folder, run `recipe(data, progress=…, **more, **values)`, and say on stderr where the report is.

    Args:
        free_folder: data -> the folder of a run without --out.
        writes: whether this call makes or continues a run folder; a plan or a replay does not.
    """
    if writes:
        values["out"] = arguments.out = values["out"] or str(free_folder(values["data"]))
        sys.stderr.write(f"recollect: writing to {values['out']}\n")
    with progress_on(sys.stderr) as progress:
        report = recipe(values.pop("data"), progress=progress, **more, **values)
    if writes:
        sys.stderr.write(f"recollect: the report is {arguments.out}/report.html\n")
    return report
