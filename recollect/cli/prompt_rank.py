"""`recollect prompt-rank`: the flags, the YAML file and the Python call are one dataclass, `PromptRankConfig`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recollect.cli.runs import carry_out, configure_run, only_prints, resolve

if TYPE_CHECKING:
    from recollect.types import Report


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from recollect.recommenders.prompt_rank_config import PromptRankConfig

    configure_run(
        parser,
        "prompt-rank",
        PromptRankConfig,
        "Ask a language model to rank a conventional model's candidates, with prompts that say how popularity is\n"
        "spread and what this user likes of it; beside re-rankers, controls and the curves of accuracy and fairness.",
        "recollect prompt-rank ml-100k --preset base,fairlrm --users 100",
        "recollect prompt-rank ml-100k --preset all --backbone openai:http://127.0.0.1:8000/v1#qwen3",
        "recollect prompt-rank ml-100k --candidate-set mixed --attributes gender,age,occupation",
        "recollect prompt-rank ml-100k --preset all --users 300 --resume --out runs/prompt-rank-ml-100k-1",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Report | None:
    """Resolve the options, choose the folder, rank."""
    from recollect.recommenders.prompt_rank_config import PromptRankConfig

    values = resolve(arguments, PromptRankConfig)
    if only_prints(arguments, values):
        return None

    from recollect.recommenders.prompt_rank import free_folder, prompt_rank

    return carry_out(arguments, values, prompt_rank, free_folder, writes=not values["dry_run"])
