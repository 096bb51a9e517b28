"""`recollect continual`: the flags, the YAML file and the Python call are one dataclass, `ContinualConfig`.

A mapping in the YAML file named like a method holds its options and those of its adapters:

    method: [loramoe, mh-moe]
    mh-moe: {heads: 8, rank: 2}
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recollect.cli.runs import carry_out, configure_run, only_prints, resolve_with_sections

if TYPE_CHECKING:
    from recollect.types import Report


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from recollect.continual.methods.registry import METHODS
    from recollect.continual.run_config import ContinualConfig

    configure_run(
        parser,
        "continual",
        ContinualConfig,
        "Tune a language model on tasks one after another (TRACE, or recommending in one domain or month after\n"
        "another), by one method or several, and measure what it learns and what it forgets.\n\nmethods:\n"
        + "".join(f"  {spec.name:<16} {spec.summary}\n" for spec in METHODS.values()),
        "recollect continual data/trace --benchmark trace --method mh-moe --tasks FOMC,ScienceQA,NumGLUE-ds",
        "recollect continual data/trace --method seq-lora,loramoe,mh-moe --match-budget --seeds 3 --out runs/trace",
        "recollect continual data/trace --method mh-moe --set mh-moe.heads=8,mh-moe.rank=2",
        "recollect continual data/trace --method mh-moe --seeds 3 --resume --out runs/mh-moe    # go on after a kill",
        "recollect continual harbor --benchmark domains --method seq-lora,replay --tasks books,films,games",
        "recollect continual ml-100k --benchmark domains --period month --holdout time --learning-rate 1e-3",
        config_help="read options, and a section of options per method, from a file; flags win",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Report | None:
    """Resolve the options, choose the folder, tune and measure."""
    from recollect.continual.run_config import ContinualConfig

    values, sections = resolve_with_sections(arguments, ContinualConfig)
    if only_prints(arguments, {**values, **sections}):
        return None

    from recollect.continual.run import continual, free_folder

    writes = not values["dry_run"]
    return carry_out(arguments, values, continual, free_folder, writes=writes, method_options=sections)
