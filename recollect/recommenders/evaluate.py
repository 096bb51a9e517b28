"""`recollect.evaluate`: fit models on a log, rank the whole catalogue for held-out events, compare, report.

Everything a number depends on is in the report's protocol block; whatever was fitted and tested is on disk
(`recollect.recommenders.evaluate_runs`) and is never computed twice. The test set is opened once per (model, seed);
what is chosen (epochs, a point of a grid, the baseline to compare with) is chosen on validation.

Source: recsys_evaluation 3 and 6.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recollect.config import build, check_replaceable, check_same_run, load_yaml, run_manifest, to_dict
from recollect.data import (
    fingerprint,
    global_temporal,
    k_core,
    leave_one_out,
    load_dataset,
    tie_shuffle,
)
from recollect.data.splits import refit_mask
from recollect.errors import ConfigError, InputError
from recollect.eval.protocol import item_text_fingerprint
from recollect.eval.report import table_csv
from recollect.io import prepare_out, read_json, write_json, write_text
from recollect.journal.lock import WriterLock
from recollect.progress import Progress, SilentProgress
from recollect.recommenders.evaluate_config import EvaluateConfig
from recollect.recommenders.evaluate_grid import choose, make_grid
from recollect.recommenders.evaluate_groups import groups_by_attribute
from recollect.recommenders.evaluate_report import make_report, plan_report
from recollect.recommenders.evaluate_runs import (
    Unit,
    fit,
    is_finished,
    make_entries,
    make_units,
    refit,
    require_same_texts,
    run_unit,
)
from recollect.types import Dataset, Report, Split


def evaluate(
    data: str | Path | Dataset = "harbor",
    *,
    model_options: Mapping[str, Mapping[str, Any]] | None = None,
    grid: str | Path | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Fit and compare recommenders on held-out events of a log.

    Args:
        data: bundled world, registered name, path, or a `Dataset` (which `core` still filters).
        model_options: {row: {option: value}}; a row of another name than a model says which one by "model".
        grid: {row: {option: [value, …]}} to tune with, or the YAML file of it; see `evaluate_grid`.
        progress: where to say how far the run is; silent by default.
        options: fields of `EvaluateConfig`.

    Returns:
        The report that was also written to the run folder (`out`, by default the first free runs/evaluate-DATA-N).
        Under torchrun the first process gives it; the others train along and give the plan.

    Raises:
        InputError: bad data or options, NaN scores, a saved model of other data.
        ResumeRefused: the run in `out` was made with other options or data.
        JournalLocked: another process writes to `out`.
    """
    given = {"data": data.name if isinstance(data, Dataset) else str(data)}
    if grid is not None and not isinstance(grid, Mapping):
        options["grid"] = grid
    named = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    config = build(EvaluateConfig, {**given, **named}, "the options of evaluate")
    entries = make_entries(config.models, model_options or {})
    tuning = make_grid(
        grid if isinstance(grid, Mapping) else load_yaml(config.grid, "--grid") if config.grid else {},
        entries,
        model_options or {},
        config.grid or "the grid",
        allow_unequal=config.unequal_budgets,
    )
    if _n_processes() > 1 and not config.dry_run and config.out is None:
        raise ConfigError("several processes (torchrun) share one run folder; name it by --out DIR")
    if _n_processes() > 1 and tuning.points:
        raise ConfigError("a grid is run by one process; run it without torchrun, then the options it chose with")
    progress = progress or SilentProgress()
    progress.stage("reading the data")
    dataset = prepare(data if isinstance(data, Dataset) else load_dataset(data, seed=config.seed), config)
    split = make_split(dataset, config)
    if tuning.points and not len(split.valid_row):
        raise InputError("a grid is chosen from on validation, and this split has no validation case; leave it out")
    fixed = [entry for entry in entries if entry.label not in tuning.points]
    units = [*make_units(fixed, config), *tuning.units(config)]
    if config.tie_shuffles:
        tie_shuffle(dataset, 1)  # data without a clock are refused before anything is fitted
    groups_by_attribute(dataset, config.attributes)  # so are attributes that make no groups
    if config.dry_run:
        return plan_report(config, dataset, split, units, n_later=tuning.n_later(config))
    if is_helper():
        help_training(config, dataset, split, units, Path(str(config.out)))
        return plan_report(config, dataset, split, units)
    out = prepare_out(config.out or free_folder(dataset.name), resume=config.resume, overwrite=config.overwrite)
    lock = WriterLock(out / "run.json")
    try:
        models = {entry.label: tuning.describe(entry) for entry in entries}
        manifest = open_run(config, dataset, split, models, units, out)
        run_units(config, dataset, split, tuning.units(config), out, progress)
        chosen = {label: choose(points, config, out) for label, points in tuning.points.items()}
        units = make_units([chosen.get(entry.label, entry) for entry in entries], config)
        run_units(config, dataset, split, units, out, progress)
        progress.stage("comparing")
        report = make_report(config, dataset, split, units, out, manifest, tuning, chosen)
        report.save(out)
        write_text(out / "tables.csv", table_csv(report))
    finally:
        lock.release()
    return report


def prepare(dataset: Dataset, config: EvaluateConfig) -> Dataset:
    """The data set as it is evaluated: filtered, with its fingerprint.

    Raises:
        DataError: nothing is left.
    """
    if config.core > 1:
        dataset = k_core(dataset, config.core)
    return _with_fingerprint(dataset)


def _with_fingerprint(dataset: Dataset) -> Dataset:
    return replace(dataset, meta={**dataset.meta, "fingerprint": fingerprint(dataset)})


def make_split(dataset: Dataset, config: EvaluateConfig) -> Split:
    """The split the options name.

    Raises:
        ConfigError: a global temporal split of data without a clock.
        InputError: there is no test case.
    """
    if config.protocol == "loo":
        split = leave_one_out(dataset)
        if not len(split.test_row):
            raise InputError(
                f"no user of {dataset.name!r} has 3 interactions, so nothing can be held out; use a longer log"
                + (" or a smaller --core" if config.core > 1 else "")
            )
        return split
    split = global_temporal(dataset, q=config.quantile, target=config.target, seed=config.seed)
    if not len(split.test_row):
        raise InputError(
            f"nobody in {dataset.name!r} has interactions both before and after the {config.quantile:g}-quantile of "
            "all times; lower --quantile, or use --protocol loo"
        )
    return split


def free_folder(data: str) -> Path:
    """The first of runs/evaluate-DATA-1, -2, … that does not exist."""
    name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(data).name)
    number = 1
    while (folder := Path("runs") / f"evaluate-{name}-{number}").exists():
        number += 1
    return folder


def open_run(
    config: EvaluateConfig,
    dataset: Dataset,
    split: Split,
    models: Mapping[str, Any],
    units: Sequence[Unit],
    out: Path,
) -> dict[str, Any]:
    """Write `run.json`, or check that the run found there is this one; its content.

    Args:
        models: {label: what its row is}.

    Raises:
        ResumeRefused: the run in `out` is another one; the message names the first difference.
    """
    identity = {**config.identity(), "split": split.rule}
    path = out / "run.json"
    if config.overwrite:
        check_replaceable(out, "evaluate")
        for name in ("rows", "vectors"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("report.json", "report.html", "tables.csv"):
            (out / name).unlink(missing_ok=True)
    elif path.is_file():
        held = read_json(path)
        before = {**(held.get("identity") or {}), "data_fingerprint": held.get("data_fingerprint")}
        now = {**identity, "data_fingerprint": dataset.meta["fingerprint"]}
        check_same_run({**held, "identity": before}, "evaluate", now, out)
    texts = item_text_fingerprint(dataset)
    for unit in units:
        # Refuses a row that was made with other options or texts, before anything is fitted.
        if is_finished(unit, out):
            require_same_texts(unit, out, texts)
    manifest = run_manifest(
        "evaluate",
        to_dict(config),
        dataset.meta["fingerprint"],
        models,
        config.seed,
    )
    manifest |= {"identity": identity, "text_fingerprint": texts}
    write_json(path, manifest)
    return manifest


def is_helper() -> bool:
    """This is one of torchrun's processes, and not the first: it trains along and writes nothing."""
    return int(os.environ.get("RANK", "0")) > 0


def _n_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def help_training(config: EvaluateConfig, dataset: Dataset, split: Split, units: Sequence[Unit], out: Path) -> None:
    """Take this process's share of every training that the first process begins.

    Both see the same units as unfinished: the first one cannot finish a training without the others.
    """
    for unit in units:
        if not unit.entry.is_seeded or (is_finished(unit, out) and not config.overwrite):
            continue
        own, own_split = in_order(unit.shuffle, dataset, split, config)
        _, training = fit(unit, own, own_split, out, SilentProgress())
        if config.refit:
            refit(unit, own, refit_mask(own, own_split), training, out, SilentProgress())


def in_order(shuffle: int | None, dataset: Dataset, split: Split, config: EvaluateConfig) -> tuple[Dataset, Split]:
    """The data set with its tied events in the file's order (None) or in that of the n-th shuffle, and its split."""
    if shuffle is None:
        return dataset, split
    shuffled = _with_fingerprint(tie_shuffle(dataset, shuffle))
    return shuffled, make_split(shuffled, config)


def run_units(
    config: EvaluateConfig, dataset: Dataset, split: Split, units: Sequence[Unit], out: Path, progress: Progress
) -> None:
    """Run every unit that has no result yet, order by order."""
    current, ordered = None, (dataset, split)
    for number, unit in enumerate(units, start=1):
        if is_finished(unit, out):
            continue
        if unit.shuffle != current:
            current, ordered = unit.shuffle, in_order(unit.shuffle, dataset, split, config)
        title = f"{unit.title} (row {number} of {len(units)})"
        run_unit(unit, title, *ordered, config, out, progress)


__all__ = ["EvaluateConfig", "evaluate", "free_folder"]
