"""`recollect evaluate`: the flags, the YAML file and the Python call are one dataclass, `EvaluateConfig`.

A mapping in the YAML file is a section of options for the row of that name:

    models: [pop, markov, sasrec, wide]
    wide: {model: sasrec, hidden: 128}
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recollect.cli.runs import carry_out, configure_run, only_prints, resolve_with_sections

if TYPE_CHECKING:
    from recollect.types import Report


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from recollect.recommenders.evaluate_config import EvaluateConfig
    from recollect.recommenders.models import MODELS

    configure_run(
        parser,
        "evaluate",
        EvaluateConfig,
        "Fit recommenders on a log and rank the whole catalogue for held-out events: exact ties, intervals over\n"
        "users, paired differences from the best baseline, leak check, the protocol beside every number.\n\nmodels:\n"
        + "".join(f"  {spec.name:<12} {spec.summary}\n" for spec in MODELS.values())
        + "  path:DIR     a saved model of the same data",
        "recollect evaluate ml-100k --models pop,markov,ease,itemknn",
        "recollect evaluate ml-1m --models pop,markov,ease,sasrec --seeds 3 --out runs/ml-1m",
        "recollect evaluate ml-100k --protocol gts --tie-shuffles 3",
        "recollect evaluate ml-1m --models pop,markov,ease,sasrec,hstu --seeds 3 --resume --out runs/ml-1m",
        "recollect evaluate amazon-beauty --config rows.yaml      # a section 'sasrec: {hidden: 128}' sets options",
        config_help="read options, and sections of model options, from a file; flags win",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Report | None:
    """Resolve the options, choose the folder, evaluate."""
    from recollect.recommenders.evaluate_config import EvaluateConfig

    values, sections = resolve_with_sections(arguments, EvaluateConfig)
    if only_prints(arguments, {**values, **sections}):
        return None

    from recollect.recommenders.evaluate import evaluate, free_folder, is_helper

    if is_helper():
        evaluate(values.pop("data"), model_options=sections, **values)
        return None
    writes = not values["dry_run"]
    return carry_out(arguments, values, evaluate, free_folder, writes=writes, model_options=sections)
