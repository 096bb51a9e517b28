"""`recollect distill`: the flags, the YAML file and the Python call are one dataclass, `DistillConfig`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recollect.cli.runs import carry_out, configure_run, only_prints, resolve

if TYPE_CHECKING:
    from recollect.types import Report


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from recollect.distill.config import DistillConfig

    configure_run(
        parser,
        "distill",
        DistillConfig,
        "A language-model recommender and a conventional one teach each other in rounds (LLMD4Rec), beside every\n"
        "baseline that tells whether it was worth it: each alone, one direction, self-distillation, their ensemble.",
        "recollect distill ml-100k --student sasrec --teacher smollm2 --out runs/distill",
        "recollect distill ml-100k --method crossfit --compare llmd4rec,static --rounds 5 --seeds 3",
        "recollect distill ml-100k --keep-layers none --supervision last    # the paper's setting; needs a GPU",
        "recollect distill ml-100k --resume --out runs/distill",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Report | None:
    """Resolve the options, choose the folder, distil."""
    from recollect.distill.config import DistillConfig

    values = resolve(arguments, DistillConfig)
    if only_prints(arguments, values):
        return None

    from recollect.distill.loop import distill, free_folder

    return carry_out(arguments, values, distill, free_folder, writes=not values["dry_run"])
