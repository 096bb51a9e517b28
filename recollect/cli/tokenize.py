"""`recollect tokenize`: the flags, the YAML file and the Python call are one dataclass, `TokenizeConfig`.

A mapping in the YAML file named like the method holds its options, one named `collision_options` those of the collision
strategy:

    method: rq-gmm
    rq-gmm: {covariance: diag, shrinkage: 0}
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recollect.cli.runs import carry_out, configure_run, only_prints, resolve_with_sections
from recollect.errors import ConfigError

if TYPE_CHECKING:
    from recollect.types import Report


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from recollect.tokenize.methods import METHODS
    from recollect.tokenize.run_config import TokenizeConfig

    configure_run(
        parser,
        "tokenize",
        TokenizeConfig,
        "Turn the items of a catalogue (or the rows of an .npy file) into semantic IDs: a few small integers each,\n"
        "coarsest first, with codebooks, inverse map, quality and a page to judge them by.\n\nmethods:\n"
        + "".join(f"  {spec.name:<22} {spec.summary}\n" for spec in METHODS.values()),
        "recollect tokenize ml-100k --method rq-gmm --codebook-size 64 --out runs/ids",
        "recollect tokenize vectors.npy --method rq-kmeans --item-ids ids.txt --collisions zcr",
        "recollect tokenize amazon-beauty --method rq-gmm --set annealing=all,restarts=5",
        "recollect tokenize amazon-beauty --method letter --resume --out runs/letter",
        config_help="read options, and a section of method options, from a file; flags win",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Report | None:
    """Resolve the options, choose the folder, tokenize."""
    from recollect.tokenize.run_config import TokenizeConfig

    values, sections = resolve_with_sections(arguments, TokenizeConfig)
    method, collisions = sections.pop(values["method"], {}), sections.pop("collision_options", {})
    if sections:
        raise ConfigError(
            f"the file has sections {', '.join(map(repr, sorted(sections)))}; this run has {values['method']!r} and "
            "'collision_options'"
        )
    if only_prints(arguments, {**values, values["method"]: method} if method else values):
        return None

    from recollect.tokenize.run import free_folder, tokenize

    more = {"method_options": method, "collision_options": collisions}
    return carry_out(arguments, values, tokenize, free_folder, writes=not values["dry_run"], **more)
