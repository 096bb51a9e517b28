"""`recollect simulate`: the flags, the YAML file and the Python call are one dataclass, `SimulateConfig`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from recollect.cli.options import add_common, add_options, describe
from recollect.config import dump_yaml, load_yaml, options_of, read_options
from recollect.errors import ConfigError
from recollect.progress import progress_on

if TYPE_CHECKING:
    from recollect.types import Report

_COMMON = ("data", "out", "seed", "resume", "overwrite", "dry_run")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from recollect.agents.config import SimulateConfig

    describe(
        parser,
        "Language agents take the place of a log's users, learn from their past, and are checked against what the\n"
        "real users did next, beside baselines that know no language.",
        "recollect simulate",
        "recollect simulate ml-1m --users 200 --method agentcf++ --out runs/ml-1m",
        "recollect simulate harbor --backbone openai:http://127.0.0.1:8000/v1#qwen3 --concurrency 64",
        "recollect simulate --resume --out runs/ml-1m",
        "recollect simulate --replay runs/ml-1m",
        "recollect simulate --users 50 --print-config > small.yaml && recollect simulate --config small.yaml",
    )
    parser.usage = "recollect simulate [DATA] [options]"
    options = options_of(SimulateConfig)
    data = next(option for option in options if option.name == "data")
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="?",
        default=argparse.SUPPRESS,
        help=f"{data.help} (default: {data.default})".replace("%", "%%"),
    )
    add_options(parser, options, skip=_COMMON)
    parser.add_argument("--config", metavar="FILE.yaml", help="read options from a file; flags win over it")
    parser.add_argument("--print-config", action="store_true", help="print the resolved options as YAML and stop")
    add_common(parser, is_run=True)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Report | None:
    """Resolve the options, choose the folder, simulate."""
    from recollect.agents.config import SimulateConfig

    values = resolve(arguments, SimulateConfig)
    if arguments.print_config:
        sys.stdout.write(dump_yaml(values))
        return None
    if values["resume"] and values["out"] is None:
        raise ConfigError("--resume needs --out DIR, the folder of the run to continue")
    is_new_run = not values["dry_run"] and values["replay"] is None

    from recollect.agents.simulate import free_folder, simulate

    if is_new_run:
        values["out"] = arguments.out = values["out"] or str(free_folder(values["data"]))
        sys.stderr.write(f"recollect: writing to {values['out']}\n")
    with progress_on(sys.stderr) as progress:
        report = simulate(values.pop("data"), progress=progress, **values)
    if is_new_run:
        sys.stderr.write(f"recollect: the report is {arguments.out}/report.html\n")
    return report


def resolve(arguments: argparse.Namespace, config: type[Any]) -> dict[str, Any]:
    """Every option's value: the flag, else the file's, else the default; checked together by the dataclass."""
    options = options_of(config)
    names = {option.name for option in options}
    from_file = load_yaml(arguments.config) if arguments.config else {}
    read = read_options(options, from_file, str(arguments.config))
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    return vars(config(**{**read, **flags})).copy()
