"""`recollect.distill(...)`: the alternation of LLMD4Rec and the rows it is compared with, from data to report.

Everything a model is chosen by comes from validation, and no seed reads another's results
(`recollect.distill.seeds`). A killed run continues with `resume`:
finished stages are read back, the current one goes on from its last checkpoint, and the numbers are those of an
uninterrupted run.

Source: llmd4rec 4.3, 4.4 (arXiv 2505.18120).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recollect.backbones.resolve import decoder_folder
from recollect.config import build, check_run_folder, run_manifest, to_dict
from recollect.data.examples import training_sequences
from recollect.data.fingerprints import text_fingerprint
from recollect.distill.config import DistillConfig
from recollect.distill.methods import planned_half_rounds
from recollect.distill.report import make_report
from recollect.distill.results import SeedResults
from recollect.distill.seeds import floor, run_seed
from recollect.distill.stages import Stages
from recollect.distill.workers import train_side_by_side
from recollect.distill.workshop import Workshop
from recollect.errors import InputError
from recollect.io import prepare_out, write_json, write_text
from recollect.journal.lock import WriterLock
from recollect.progress import Progress, SilentProgress
from recollect.recommenders.llm_module import require_layers
from recollect.types import Dataset, Report, Split

METRICS_FILE = "metrics.jsonl"
FLOORS = ("pop", "markov")
"""Rows every table has (recsys_evaluation 8): what has learnt nothing but counts."""


def distill(data: str | Path | Dataset = "harbor", *, progress: Progress | None = None, **options: Any) -> Report:
    """Let a language-model recommender and a conventional one teach each other, and compare with what else could.

    Args:
        data: bundled world, registered name, path, or a `Dataset` (which `core` still filters).
        progress: where to say how far the run is; silent by default.
        options: fields of `recollect.distill.config.DistillConfig`. A script that asks for several workers must call
            this under `if __name__ == "__main__":`, as always where processes are started.

    Returns:
        The report that was also written to the run folder (`out`, by default the first free runs/distill-DATA-N).

    Raises:
        InputError: bad data or options, histories too short to hold anything out, a teacher of other items.
        ModelFileError: the decoder cannot be had.
        ResumeRefused: the run in `out` was made with other options or data.
        TrainingDiverged: a loss became NaN or infinite.
    """
    given = {"data": data.name if isinstance(data, Dataset) else str(data)}
    named = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    config = build(DistillConfig, {**given, **named}, "the options of distill")
    progress = progress or SilentProgress()
    progress.stage("reading the data")
    dataset, split = _read(data, config)
    if config.dry_run:
        return _plan(config, dataset, split)
    # A decoder that cannot be had or cut is refused before anything is trained.
    require_layers(decoder_folder(config.teacher), config.keep_layers)
    out = prepare_out(config.out or free_folder(dataset.name), resume=config.resume, overwrite=config.overwrite)
    lock = WriterLock(out / "run.json")
    try:
        manifest = _open_run(config, dataset, split, out)
        context = {"data": dataset.meta["fingerprint"], "split": split.rule}
        shop = Workshop(config, dataset, split, Stages(out / "stages", context), progress)
        if config.workers > 1:
            train_side_by_side(shop)
        seeds = [run_seed(shop, seed) for seed in config.all_seeds]
        write_text(out / METRICS_FILE, "".join(_metric_lines(seeds)))
        floors = {name: floor(shop, name) for name in FLOORS}
        progress.stage("comparing")
        report = make_report(config, dataset, split, seeds, floors, manifest, shop.stages.seconds)
        report.save(out)
    finally:
        lock.release()
    return report


def _read(data: str | Path | Dataset, config: DistillConfig) -> tuple[Dataset, Split]:
    from recollect.data import load_dataset
    from recollect.recommenders.evaluate import make_split, prepare
    from recollect.recommenders.evaluate_config import EvaluateConfig

    same = EvaluateConfig(data=config.data, protocol=config.protocol, core=config.core, seed=config.seed)
    dataset = prepare(data if isinstance(data, Dataset) else load_dataset(data, seed=config.seed), same)
    split = make_split(dataset, same)
    _require_histories(dataset, split, config)
    return dataset, split


def _require_histories(dataset: Dataset, split: Split, config: DistillConfig) -> None:
    """Refuse a log of which nothing can be learnt or chosen.

    Raises:
        InputError: no training history has two items, or there is no validation case.
    """
    advice = "use a longer log" + (" or a smaller --core" if config.core > 1 else "")
    if not (training_sequences(dataset, split.train).lengths >= 2).any():
        raise InputError(
            f"no training history of {dataset.name!r} has 2 items, so there is no next item to learn from; {advice}"
        )
    if not len(split.valid_row):
        raise InputError(f"{dataset.name!r} has no validation case, and models are chosen on validation; {advice}")


def free_folder(data: str) -> Path:
    """The first of runs/distill-DATA-1, -2, … that does not exist."""
    name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(data).name)
    number = 1
    while (folder := Path("runs") / f"distill-{name}-{number}").exists():
        number += 1
    return folder


def _open_run(config: DistillConfig, dataset: Dataset, split: Split, out: Path) -> dict[str, Any]:
    """Write `run.json`, or check that the run found there is this one; its content."""
    loose = {"method", "compare", "seeds", "workers", "out", "resume", "overwrite", "dry_run"}
    identity = {name: value for name, value in to_dict(config).items() if name not in loose}
    identity |= {"split": split.rule, "data_fingerprint": dataset.meta["fingerprint"]}
    if config.reads_text:
        identity["text_fingerprint"] = text_fingerprint(dataset)
    path = out / "run.json"
    check_run_folder(out, "distill", identity, overwrite=config.overwrite)
    if config.overwrite:
        for name in ("stages", "floors"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("report.json", "report.html", "tables.csv", METRICS_FILE):
            (out / name).unlink(missing_ok=True)
    models = {"student": config.student, "teacher": config.teacher}
    manifest = run_manifest("distill", to_dict(config), dataset.meta["fingerprint"], models, config.seed)
    manifest |= {"identity": identity, "text_fingerprint": text_fingerprint(dataset)}
    write_json(path, manifest)
    return manifest


def _metric_lines(seeds: Sequence[SeedResults]) -> Iterator[str]:
    """One line per half-round of every row: validation of what was trained, of the ensemble, mean weights."""
    step = 0
    for results in seeds:
        for method, row in results.rows.items():
            for half in row.half_rounds:
                step += 1
                weights = half.get("weights") or {}
                line = {
                    "step": step,
                    "seed": results.seed,
                    "method": method,
                    "round": half["round"],
                    "direction": half["direction"],
                    "validation": half["validation"],
                    "epochs": half["epochs"],
                    "stage": half["stage"],
                }
                line |= {"ensemble": half["ensemble"]} if "ensemble" in half else {}
                line |= {
                    f"weight_{part}": weights[part] for part in ("train", "valid") if weights.get(part) is not None
                }
                yield json.dumps(line, allow_nan=False) + "\n"


def _plan(config: DistillConfig, dataset: Dataset, split: Split) -> Report:
    """What a run would do: half-rounds per seed, samples, LLM epochs."""
    down, up = planned_half_rounds(config)
    llm_epochs = config.teacher_epochs * (1 + (config.folds - 1) * ("crossfit" in config.rows))
    numbers = {
        "seeds": config.seeds,
        "users": dataset.n_users,
        "items": dataset.n_items,
        "training_events": int(split.train.sum()),
        "test_cases": len(split.test_row),
        "downward_half_rounds_per_seed": down,
        "upward_half_rounds_per_seed": up,
        "llm_epochs_per_seed": llm_epochs + down * config.teacher_round_epochs,
    }
    protocol = {"data": dataset.name, "method": config.method, "rows": list(config.rows), "dry_run": True}
    return Report("distill-plan", protocol, {}, ledger=numbers)


__all__ = ["DistillConfig", "distill", "free_folder"]
