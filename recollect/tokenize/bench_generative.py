"""The generators of a comparison: one per row and seed, beside what the row's folder holds already.

    rows/LABEL/seed-N/
        generative.safetensors    a column per metric, a value per test user
        generative.json           options, chosen epoch, coverage, times; written last: the generator is finished
        generator/                state of a training in progress

A generator needs the codes of a finished row alone, so it can be added to a comparison that was made without one. The
floor `item-id` is the same model with a code per item: no content, the nearest thing here to a sequence model of items.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recollect.errors import InputError, ResumeRefused
from recollect.io import read_json, write_arrays, write_json
from recollect.progress import Progress
from recollect.tokenize.bench_units import CODES_FILE, RESULT_FILE, Unit
from recollect.tokenize.embeddings import Items, read_vectors
from recollect.tokenize.run_config import BenchConfig

if TYPE_CHECKING:
    from recollect.tokenize.generative import GenerativeBudget

GENERATIVE_FILE = "generative.json"
COLUMNS_FILE = "generative.safetensors"
REFERENCE = "item-id"
"""The floor that has a generator too."""

SHOWN = ("hr@10", "ndcg@10", "hr@10_unmasked", "ndcg@10_unmasked")
NDCG = "generative/ndcg@10"
COVERAGE = "generative/coverage@10"


def generative_units(units: Sequence[Unit], config: BenchConfig, has_log: bool) -> list[Unit]:
    """The units that have a generator; none without a log."""
    if not config.generative or not has_log:
        return []
    return [unit for unit in units if unit.entry is not None or unit.label == REFERENCE]


def budget_of(config: BenchConfig) -> GenerativeBudget:
    """What every generator of a run may spend."""
    from recollect.tokenize.generative import GenerativeBudget
    from recollect.tokenize.generator import GeneratorShape

    shape = GeneratorShape(history=config.generative_history)
    return GenerativeBudget(shape=shape, epochs=config.generative_epochs, beams=config.beams)


def is_generated(unit: Unit, config: BenchConfig, out: Path) -> bool:
    """Whether the run folder holds the unit's generator.

    Raises:
        ResumeRefused: it was made with other options.
    """
    from recollect.config import to_dict

    path = out / unit.folder / GENERATIVE_FILE
    if not path.is_file():
        return False
    held, wanted = read_json(path).get("budget"), to_dict(budget_of(config))
    if held != wanted:
        differing = sorted(
            key
            for key in (wanted.keys() | held.keys() if isinstance(held, dict) else wanted)
            if not isinstance(held, dict) or held.get(key) != wanted.get(key)
        )
        raise ResumeRefused(
            f"the generator in {path} was made with another {', '.join(differing)}; use the same options or another "
            "--out"
        )
    return True


def run_generator(unit: Unit, title: str, items: Items, config: BenchConfig, out: Path, progress: Progress) -> None:
    """Train, search, measure and store the generator of one finished unit.

    Raises:
        InputError: no user is long enough, or the row's codes cannot be read.
    """
    from recollect.config import to_dict
    from recollect.tokenize.generative import run_generative

    assert items.dataset is not None
    assert items.split is not None
    folder, budget = out / unit.folder, budget_of(config)
    if unit.entry is None:
        codes, sizes = np.arange(len(items))[:, None], [len(items)]
    else:
        codes, sizes = np.array(read_vectors(folder / CODES_FILE)), read_json(folder / RESULT_FILE)["sizes"]
    progress.stage(f"generator on {title}")
    was_interrupted = (folder / "generator").is_dir()
    found = run_generative(
        codes,
        sizes,
        items.dataset,
        items.split,
        budget,
        seed=unit.seed,
        folder=folder / "generator",
        progress=progress,
    )
    write_arrays(folder / COLUMNS_FILE, found.columns)
    listed = np.unique(found.lists[found.lists >= 0])
    result = {
        "budget": to_dict(budget),
        "seed": unit.seed,
        "best_epoch": found.best_epoch,
        "epochs": found.epochs,
        "valid_ndcg": found.valid_ndcg,
        "extra_digit": found.extra_digit,
        "parameters": found.parameters,
        "coverage": len(listed) / len(items),
        "seconds": {} if was_interrupted else found.seconds,  # a continued training was timed in part only
    }
    write_json(folder / GENERATIVE_FILE, result)
    shutil.rmtree(folder / "generator", ignore_errors=True)


def read_columns(unit: Unit, out: Path) -> dict[str, np.ndarray]:
    """The stored columns (C,) of a unit's generator.

    Raises:
        InputError: the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = out / unit.folder / COLUMNS_FILE
    try:
        arrays = load_file(path)
        return {name: arrays[name] for name in SHOWN}
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); remove {GENERATIVE_FILE} beside it and resume the run"
        ) from error
