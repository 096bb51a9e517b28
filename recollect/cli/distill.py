"""`recollect distill`: the flags, the YAML file and the Python call are one dataclass, `DistillConfig`."""

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
    from recollect.distill.config import DistillConfig

    describe(
        parser,
        "A language-model recommender and a conventional one teach each other in rounds (LLMD4Rec), beside every\n"
        "baseline that tells whether it was worth it: each alone, one direction, self-distillation, their ensemble.",
        "recollect distill ml-100k --student sasrec --teacher smollm2 --out runs/distill",
        "recollect distill ml-100k --method crossfit --compare llmd4rec,static --rounds 5 --seeds 3",
        "recollect distill ml-100k --keep-layers none --supervision last    # the paper's setting; needs a GPU",
        "recollect distill ml-100k --resume --out runs/distill",
    )
    parser.usage = "recollect distill [DATA] [options]"
    options = options_of(DistillConfig)
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
    """Resolve the options, choose the folder, distil."""
    from recollect.distill.config import DistillConfig

    values = resolve(arguments, DistillConfig)
    if arguments.print_config:
        sys.stdout.write(dump_yaml(values))
        return None
    if values["resume"] and values["out"] is None:
        raise ConfigError("--resume needs --out DIR, the folder of the run to continue")

    from recollect.distill.loop import distill, free_folder

    if not values["dry_run"]:
        values["out"] = arguments.out = values["out"] or str(free_folder(values["data"]))
        sys.stderr.write(f"recollect: writing to {values['out']}\n")
    with progress_on(sys.stderr) as progress:
        report = distill(values.pop("data"), progress=progress, **values)
    if not values["dry_run"]:
        sys.stderr.write(f"recollect: the report is {arguments.out}/report.html\n")
    return report
