"""One row of a comparison, fitted and measured once: a (method, seed), in a folder of its own.

    rows/LABEL/seed-N/
        codes.npy                 int32 (N, L)
        downstream.safetensors    logits of the click model on the test cases: clicked (C,), skipped (C, M)
        result.json               options, metrics, times; written last: the row is finished
        fit/                      levels of a fit in progress

LABEL is the row's, made fit for a file system (`variants.folder_name`). A finished row is never computed again.
`FLOORS` are rows of the click model alone: no tokenizer stands behind them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recollect.errors import InputError, ResumeRefused
from recollect.io import atomic_open, disk_errors, read_json, write_arrays, write_json
from recollect.progress import Progress
from recollect.tokenize.bench_checks import check_unit
from recollect.tokenize.downstream_cases import CaseSets
from recollect.tokenize.embeddings import Items
from recollect.tokenize.fit_inputs import fit_inputs
from recollect.tokenize.measure import measured, semantic_ids
from recollect.tokenize.methods import Entry
from recollect.tokenize.run_config import BenchConfig
from recollect.tokenize.variants import folder_name

RESULT_FILE = "result.json"
CODES_FILE = "codes.npy"
SCORES_FILE = "downstream.safetensors"

FLOORS = {
    "item-id": "an embedding per item, no content",
    "no-item": "nothing is known of an item",
}


@dataclass(frozen=True)
class Unit:
    """One fit: an entry and its seed; a floor has no entry."""

    label: str
    entry: Entry | None
    seed: int

    @property
    def folder(self) -> str:
        """Below the run folder."""
        return f"{'rows' if self.entry else 'floors'}/{folder_name(self.label)}/seed-{self.seed}"

    def describe(self) -> dict[str, Any]:
        """What must be equal for a finished row to be kept."""
        return {"floor": self.label} if self.entry is None else self.entry.describe()


def make_units(entries: Sequence[Entry], config: BenchConfig, has_log: bool) -> list[Unit]:
    """Every unit of a run; floors only where there is a click model, `item-id` with a generator too."""
    seeds = range(config.seed, config.seed + config.seeds)
    units = [Unit(entry.label, entry, seed) for entry in entries for seed in seeds]
    floors = [label for label in FLOORS if config.downstream or (config.generative and label == "item-id")]
    if has_log:
        units += [Unit(label, None, seed) for label in floors for seed in seeds]
    return units


def is_finished(unit: Unit, out: Path) -> bool:
    """Whether the run folder holds the unit's result.

    Raises:
        ResumeRefused: it was made with other options of the method.
    """
    path = out / unit.folder / RESULT_FILE
    if not path.is_file():
        return False
    held = read_json(path).get("entry")
    if held != unit.describe():
        raise ResumeRefused(
            f"{path} was made with {held!r}, not {unit.describe()!r}; use the same options or another --out"
        )
    return True


def run_unit(
    unit: Unit, title: str, items: Items, cases: CaseSets | None, config: BenchConfig, out: Path, progress: Progress
) -> None:
    """Fit, encode, check, measure and store one unit.

    Raises:
        BaselineFailed: a check of `bench_checks` does not hold.
        InputError: the method cannot be fitted on these items.
    """
    folder = out / unit.folder
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"row": unit.label, "entry": unit.describe(), "seed": unit.seed}
    if unit.entry is None:
        codes = np.arange(len(items))[:, None] if unit.label == "item-id" else np.zeros((len(items), 1), np.int64)
    else:
        codes, found = _fit_and_measure(unit, unit.entry, title, items, config, folder, progress)
        result |= found
        with atomic_open(folder / CODES_FILE, "wb") as handle:
            np.save(handle, codes, allow_pickle=False)
    if cases is not None:
        progress.stage(f"click model on {title}")
        result["downstream"] = _probe(codes, cases, config, unit.seed, folder)
    write_json(folder / RESULT_FILE, result)
    shutil.rmtree(folder / "fit", ignore_errors=True)


def _fit_and_measure(
    unit: Unit, entry: Entry, title: str, items: Items, config: BenchConfig, folder: Path, progress: Progress
) -> tuple[np.ndarray, dict[str, Any]]:
    """Codes (N, L) int32 of every item, and {"metrics", "sizes", "seconds", "levels", "warnings"}."""
    progress.stage(f"fitting {title}")
    tokenizer = entry.spec.open(entry.options, seed=unit.seed)
    inputs = fit_inputs(tokenizer, items, config)
    was_interrupted = (folder / "fit").is_dir()
    started = time.perf_counter()
    tokenizer.fit(items.embeddings, **inputs, checkpoint=folder / "fit", progress=progress)
    fit_seconds = time.perf_counter() - started
    progress.stage(f"measuring {title}")
    started = time.perf_counter()
    encoding = tokenizer.encode(items.embeddings, return_posterior=True)
    encode_seconds = time.perf_counter() - started
    again = tokenizer.encode(items.embeddings).codes
    ids = semantic_ids(items, encoding.codes, tokenizer.codebook_sizes)
    metrics = measured(tokenizer, items, ids, encoding, seed=config.seed)
    alike = inputs["mask"] is None and inputs["weight"] is None
    check_unit(entry, tokenizer, items.embeddings, encoding, again, metrics, is_fitted_on_all=alike)
    metrics["encode_items_per_s"] = len(items) / max(encode_seconds, 1e-9)
    if not was_interrupted:  # a continued fit was timed in part only
        metrics["fit_seconds"] = fit_seconds
    return encoding.codes, {
        "metrics": metrics,
        "sizes": list(tokenizer.codebook_sizes),
        "seconds": {"fit": fit_seconds, "encode": encode_seconds},
        "levels": tokenizer.report.levels,
        "warnings": list(tokenizer.report.warnings),
    }


def _probe(codes: np.ndarray, cases: CaseSets, config: BenchConfig, seed: int, folder: Path) -> dict[str, Any]:
    from recollect.tokenize.downstream import ProbeBudget, numbered_fields, run_probe

    fields = numbered_fields(codes, config.fields)
    found = run_probe(fields, cases, ProbeBudget(epochs=config.probe_epochs), seed=seed)
    write_arrays(folder / SCORES_FILE, {"clicked": found.clicked, "skipped": found.skipped})
    return {
        "valid_auc": list(found.valid_auc),
        "best_epoch": found.best_epoch,
        "seconds": found.seconds,
        "parameters": found.parameters,
        "fields": int(fields.shape[1]),
    }


def read_scores(unit: Unit, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Stored logits of the click model: clicked (C,), skipped (C, M).

    Raises:
        InputError: the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = out / unit.folder / SCORES_FILE
    try:
        arrays = load_file(path)
        return arrays["clicked"], arrays["skipped"]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove its folder and resume the run") from error
