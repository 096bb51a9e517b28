"""`recollect evaluate`: the flags, the YAML file and the Python call are one dataclass, `EvaluateConfig`.

A mapping in the YAML file is a section of options for the row of that name:

    models: [pop, markov, sasrec, wide]
    wide: {model: sasrec, hidden: 128}
"""

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
    from recollect.recommenders.evaluate_config import EvaluateConfig
    from recollect.recommenders.models import MODELS

    describe(
        parser,
        "Fit recommenders on a log and rank the whole catalogue for held-out events: exact ties, intervals over\n"
        "users, paired differences from the best baseline, leak check, the protocol beside every number.\n\nmodels:\n"
        + "".join(f"  {spec.name:<12} {spec.summary}\n" for spec in MODELS.values())
        + "  path:DIR     a saved model of the same data",
        "recollect evaluate ml-100k --models pop,markov,ease,itemknn",
        "recollect evaluate ml-1m --models pop,markov,ease,sasrec --seeds 3 --out runs/ml-1m",
        "recollect evaluate ml-100k --protocol gts --tie-shuffles 3",
        "recollect evaluate ml-1m --models pop,markov,ease,sasrec,hstu --seeds 3 --resume --out runs/ml-1m",
        "recollect evaluate amazon-beauty --config rows.yaml      # a section 'sasrec: {hidden: 128}' sets options",
    )
    parser.usage = "recollect evaluate [DATA] [options]"
    options = options_of(EvaluateConfig)
    data = next(option for option in options if option.name == "data")
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="?",
        default=argparse.SUPPRESS,
        help=f"{data.help} (default: {data.default})".replace("%", "%%"),
    )
    add_options(parser, options, skip=_COMMON)
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="read options, and sections of model options, from a file; flags win"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved options as YAML and stop")
    add_common(parser, is_run=True)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Report | None:
    """Resolve the options, choose the folder, evaluate."""
    values, sections = resolve(arguments)
    if arguments.print_config:
        sys.stdout.write(dump_yaml({**values, **sections}))
        return None
    if values["resume"] and values["out"] is None:
        raise ConfigError("--resume needs --out DIR, the folder of the run to continue")

    from recollect.recommenders.evaluate import evaluate, free_folder, is_helper

    if is_helper():
        evaluate(values.pop("data"), model_options=sections, **values)
        return None
    if not values["dry_run"]:
        values["out"] = arguments.out = values["out"] or str(free_folder(values["data"]))
        sys.stderr.write(f"recollect: writing to {values['out']}\n")
    with progress_on(sys.stderr) as progress:
        report = evaluate(values.pop("data"), model_options=sections, progress=progress, **values)
    if not values["dry_run"]:
        sys.stderr.write(f"recollect: the report is {arguments.out}/report.html\n")
    return report


def resolve(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Every option's value (the flag, else the file's, else the default) and the file's sections of model options."""
    from recollect.recommenders.evaluate_config import EvaluateConfig

    options = options_of(EvaluateConfig)
    names = {option.name for option in options}
    from_file = load_yaml(arguments.config) if arguments.config else {}
    sections = {key: value for key, value in from_file.items() if isinstance(value, dict) and key not in names}
    plain = {key: value for key, value in from_file.items() if key not in sections}
    read = read_options(options, plain, str(arguments.config))
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    return vars(EvaluateConfig(**{**read, **flags})).copy(), sections
