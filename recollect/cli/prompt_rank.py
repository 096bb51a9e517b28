"""`recollect prompt-rank`: the flags, the YAML file and the Python call are one dataclass, `PromptRankConfig`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from recollect.cli.options import add_common, add_options, describe
from recollect.cli.simulate import resolve
from recollect.config import dump_yaml, options_of
from recollect.errors import ConfigError
from recollect.progress import progress_on

if TYPE_CHECKING:
    from recollect.types import Report

_COMMON = ("data", "out", "seed", "resume", "overwrite", "dry_run")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from recollect.recommenders.prompt_rank_config import PromptRankConfig

    describe(
        parser,
        "Ask a language model to rank a conventional model's candidates, with prompts that say how popularity is\n"
        "spread and what this user likes of it; beside re-rankers, controls and the curves of accuracy and fairness.",
        "recollect prompt-rank ml-100k --preset base,fairlrm --users 100",
        "recollect prompt-rank ml-100k --preset all --backbone openai:http://127.0.0.1:8000/v1#qwen3",
        "recollect prompt-rank ml-100k --candidate-set mixed --attributes gender,age,occupation",
        "recollect prompt-rank ml-100k --preset all --users 300 --resume --out runs/prompt-rank-ml-100k-1",
    )
    parser.usage = "recollect prompt-rank [DATA] [options]"
    options = options_of(PromptRankConfig)
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
    """Resolve the options, choose the folder, rank."""
    from recollect.recommenders.prompt_rank_config import PromptRankConfig

    values = resolve(arguments, PromptRankConfig)
    if arguments.print_config:
        sys.stdout.write(dump_yaml(values))
        return None
    if values["resume"] and values["out"] is None:
        raise ConfigError("--resume needs --out DIR, the folder of the run to continue")

    from recollect.recommenders.prompt_rank import free_folder, prompt_rank

    if not values["dry_run"]:
        values["out"] = arguments.out = values["out"] or str(free_folder(values["data"]))
        sys.stderr.write(f"recollect: writing to {values['out']}\n")
    with progress_on(sys.stderr) as progress:
        report = prompt_rank(values.pop("data"), progress=progress, **values)
    if not values["dry_run"]:
        sys.stderr.write(f"recollect: the report is {arguments.out}/report.html\n")
    return report
