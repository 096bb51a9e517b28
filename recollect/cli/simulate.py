"""`recollect simulate`: the flags, the YAML file and the Python call are one dataclass, `SimulateConfig`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recollect.cli.runs import carry_out, configure_run, only_prints, resolve

if TYPE_CHECKING:
    from recollect.types import Report


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from recollect.agents.config import SimulateConfig

    configure_run(
        parser,
        "simulate",
        SimulateConfig,
        "Language agents take the place of a log's users, learn from their past, and are checked against what the\n"
        "real users did next, beside baselines that know no language.",
        "recollect simulate",
        "recollect simulate ml-1m --users 200 --method agentcf++ --out runs/ml-1m",
        "recollect simulate harbor --backbone openai:http://127.0.0.1:8000/v1#qwen3 --concurrency 64",
        "recollect simulate --resume --out runs/ml-1m",
        "recollect simulate --replay runs/ml-1m",
        "recollect simulate --users 50 --print-config > small.yaml && recollect simulate --config small.yaml",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Report | None:
    """Resolve the options, choose the folder, simulate."""
    from recollect.agents.config import SimulateConfig

    values = resolve(arguments, SimulateConfig)
    if only_prints(arguments, values):
        return None

    from recollect.agents.simulate import free_folder, simulate

    return carry_out(
        arguments, values, simulate, free_folder, writes=not values["dry_run"] and values["replay"] is None
    )
