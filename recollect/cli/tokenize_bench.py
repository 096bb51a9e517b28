"""`recollect tokenize-bench`: the flags, the YAML file and the Python call are one dataclass, `BenchConfig`.

A mapping in the YAML file is a section of options for the row of that name:

    methods: [rq-kmeans, rq-gmm, narrow]
    narrow: {method: rq-gmm, covariance: tied_spherical, preprocess: [pca], whiten: true}
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recollect.cli.runs import carry_out, configure_run, only_prints, resolve_with_sections

if TYPE_CHECKING:
    from recollect.types import Report


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from recollect.tokenize.methods import METHODS
    from recollect.tokenize.run_config import BenchConfig

    configure_run(
        parser,
        "tokenize-bench",
        BenchConfig,
        "Compare tokenizers on the same item vectors with the same seeds: error, use of the codes, collisions,\n"
        "neighbours, behaviour, cost, and a click model that sees items through their codes only; with --generative\n"
        "also HR and NDCG of a model that writes codes.\n\nmethods:\n"
        + "".join(f"  {spec.name:<22} {spec.summary}\n" for spec in METHODS.values()),
        "recollect tokenize-bench ml-100k --methods random,rq-kmeans,rq-gmm --codebook-size 64",
        "recollect tokenize-bench amazon-beauty --seeds 3 --levels 2 --codebook-size 128 --out runs/beauty",
        "recollect tokenize-bench ml-100k --methods rq-kmeans,rq-gmm:covariance=diag,shrinkage=0,rq-gmm:annealing=all",
        "recollect tokenize-bench amazon-beauty --config rows.yaml --resume --out runs/beauty",
        config_help="read options, and sections of method options, from a file; flags win",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Report | None:
    """Resolve the options, choose the folder, compare."""
    from recollect.tokenize.run_config import BenchConfig

    values, sections = resolve_with_sections(arguments, BenchConfig)
    if only_prints(arguments, {**values, **sections}):
        return None

    from recollect.tokenize.bench import free_folder, tokenize_bench

    return carry_out(
        arguments, values, tokenize_bench, free_folder, writes=not values["dry_run"], method_options=sections
    )
