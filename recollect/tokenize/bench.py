"""`recollect.tokenize_bench`: several tokenizers on one array of item vectors, with the same seeds, in one table.

Everything is measured on the same items and users: errors, usage, collisions, neighbours, behaviour, cost, a small
click model that sees items through their codes only and, where asked for, a small model that writes them. A baseline
that fails its own check ends the run, for nothing could be concluded from the table. Collisions are left in place: what
a method emits is what is compared; only the writing model tells colliding items apart, by one more digit.

Source: semantic_ids 3.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recollect.config import build, check_run_folder, run_manifest
from recollect.eval.report import table_csv
from recollect.io import check_out, prepare_out, read_json, write_json, write_text
from recollect.journal.lock import WriterLock
from recollect.progress import Progress, SilentProgress
from recollect.tokenize.bench_generative import generative_units, is_generated, run_generator
from recollect.tokenize.bench_panels import judging_metric
from recollect.tokenize.bench_report import make_report
from recollect.tokenize.bench_units import CODES_FILE, Unit, is_finished, make_units, run_unit
from recollect.tokenize.downstream_cases import CaseSets, make_cases
from recollect.tokenize.embeddings import ABOUT_FILE, Items, read_vectors
from recollect.tokenize.fit_inputs import check_fit_inputs
from recollect.tokenize.methods import Entry, make_entries
from recollect.tokenize.panels import cluster_panels, collision_panels, usage_curve
from recollect.tokenize.run_config import BenchConfig
from recollect.tokenize.source import check_vectors, keep_vectors, open_items, open_source, preprocessed
from recollect.types import Dataset, Report


def tokenize_bench(
    data: str | Path | Dataset = "harbor",
    *,
    method_options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Compare item tokenizers on one catalogue.

    Args:
        data: bundled world, registered name, path, an .npy file of item vectors, or a `Dataset` (which `core` still
            filters).
        method_options: {row: {option: value}}; a row of another name than a method says which one by "method".
        progress: where to say how far the run is; silent by default.
        options: fields of `BenchConfig`.

    Returns:
        The report that was also written to the run folder (`out`; default: the first free
        runs/tokenize-bench-DATA-N).

    Raises:
        InputError: bad data, vectors or options.
        BaselineFailed: a method does not do what it must do by construction.
        ResumeRefused: the run in `out` was made with other options or data.
        JournalLocked: another process writes to `out`.
    """
    given = {"data": data.name if isinstance(data, Dataset) else str(data)}
    named = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    config = build(BenchConfig, {**given, **named}, "the options of tokenize_bench")
    entries = make_entries(
        config.methods,
        method_options or {},
        levels=config.levels,
        codebook_size=config.codebook_size,
        device=config.device,
    )
    progress = progress or SilentProgress()
    progress.stage("reading the data")
    source = open_source(data, config, core=config.core, seed=config.seed)
    for entry in entries:
        tokenizer = entry.spec.open(entry.options, seed=config.seed)
        check_fit_inputs(tokenizer, config, source.n_items, has_log=source.dataset is not None)
    check_vectors(source, config, max(max(entry.codebook_sizes) for entry in entries))
    units = make_units(entries, config, source.dataset is not None)
    if config.dry_run:
        return _plan(config, source.n_items, source.dataset is not None, entries, units)
    # Whatever can be refused is refused here: until then nothing is written, and nothing replaced.
    out = check_out(config.out or free_folder(source.name), resume=config.resume, overwrite=config.overwrite)
    identity = {**config.identity(), "data_fingerprint": source.fingerprint}
    _check_folder(config, identity, units, out)
    prepare_out(out, resume=config.resume, overwrite=config.overwrite)
    lock = WriterLock(out / "run.json")
    try:
        _check_folder(config, identity, units, out)
        if config.overwrite:
            (out / ABOUT_FILE).unlink(missing_ok=True)  # so that texts are embedded anew
        items = preprocessed(open_items(source, config, out, progress=progress), config, out)
        manifest = _open_run(config, identity, entries, out)
        keep_vectors(manifest, items, out)
        cases = _cases(items, config)
        generators = generative_units(units, config, items.dataset is not None)
        for number, unit in enumerate(units, start=1):
            title = f"{unit.label}, seed {unit.seed} (row {number} of {len(units)})"
            if not is_finished(unit, out):
                run_unit(unit, title, items, cases, config, out, progress)
            if unit in generators and not is_generated(unit, config, out):
                run_generator(unit, title, items, config, out, progress)
        progress.stage("comparing")
        report = make_report(config, items, cases, units, out, manifest)
        report.sections["panels"] += judged(report, items, units, config, out)
        report.save(out)
        write_text(out / "tables.csv", table_csv(report))
    finally:
        lock.release()
    return report


def free_folder(data: str) -> Path:
    """The first of runs/tokenize-bench-DATA-1, -2, … that does not exist."""
    name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(data).name)
    number = 1
    while (folder := Path("runs") / f"tokenize-bench-{name}-{number}").exists():
        number += 1
    return folder


def _cases(items: Items, config: BenchConfig) -> CaseSets | None:
    if not config.downstream or items.dataset is None or items.split is None:
        return None
    return make_cases(items.dataset, items.split, train_cases=config.probe_cases, seed=config.seed)


def judged(report: Report, items: Items, units: Sequence[Unit], config: BenchConfig, out: Path) -> list[dict[str, Any]]:
    """Usage, map and collisions of the first seed of two rows: the one compared with and the best of the others.

    Best is by `judging_metric`, so on validation where there is one.
    """
    models = report.sections["models"]
    metric, _, sign = judging_metric(models)
    ranked = sorted(
        (label for label in models if metric in models[label] and label != config.against),
        key=lambda label: -sign * models[label][metric]["value"],
    )
    chosen = [label for label in (config.against, *ranked[:1]) if label in models] or list(models)[:1]
    shown: list[dict[str, Any]] = []
    for label in chosen:
        unit = next(unit for unit in units if unit.label == label)
        codes = np.array(read_vectors(out / unit.folder / CODES_FILE))
        curve = usage_curve(codes, report.sections["rows"][label]["sizes"])
        shown += [
            {**curve, "title": f"{curve['title']}, {label}"},
            *cluster_panels(items, codes, label=label, seed=config.seed),
            *collision_panels(items, codes, label=label),
        ]
    return shown


def _check_folder(config: BenchConfig, identity: Mapping[str, Any], units: Sequence[Unit], out: Path) -> None:
    """Refuse a folder whose run or rows are other ones.

    Raises:
        InputError: a run of another command would be replaced.
        ResumeRefused: another run would be continued; the message names the first difference.
    """
    check_run_folder(out, "tokenize-bench", identity, overwrite=config.overwrite)
    for unit in [] if config.overwrite else units:
        is_finished(unit, out)
        if config.generative:
            is_generated(unit, config, out)


def _open_run(config: BenchConfig, identity: Mapping[str, Any], entries: Sequence[Entry], out: Path) -> dict[str, Any]:
    """Clear what is to be replaced and write `run.json`; its content."""
    path = out / "run.json"
    held: dict[str, Any] = {}
    if config.overwrite:
        for name in ("rows", "floors"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("report.json", "report.html", "tables.csv"):
            (out / name).unlink(missing_ok=True)
    elif path.is_file():
        held = read_json(path)
    fingerprint = identity["data_fingerprint"]
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}
    models = {entry.label: entry.describe() for entry in entries}
    manifest = run_manifest("tokenize-bench", options, fingerprint, models, config.seed)
    manifest["identity"] = identity
    manifest["vectors_sha256"] = held.get("vectors_sha256")
    write_json(path, manifest)
    return manifest


def _plan(config: BenchConfig, n_items: int, has_log: bool, entries: Sequence[Entry], units: Sequence[Unit]) -> Report:
    """What a run would do; nothing is embedded, fitted or written."""
    out = None if config.out is None else Path(config.out)
    finished = [unit for unit in units if config.resume and out is not None and is_finished(unit, out)]
    rows = [
        [
            entry.label,
            entry.spec.summary,
            ", ".join(f"{key}={value}" for key, value in entry.describe()["options"].items()),
        ]
        for entry in entries
    ]
    panel = {
        "kind": "table",
        "title": "What would be fitted and measured",
        "columns": ["row", "method", "options"],
        "rows": rows,
    }
    numbers = {
        "items": n_items,
        "rows_to_run": len(units) - len(finished),
        "rows_finished": len(finished),
        "click_models": len(units) if config.downstream and any(unit.entry is None for unit in units) else 0,
        "generators": len(generative_units(units, config, has_log)),
    }
    protocol = {"data": config.data, "seeds": config.seeds, "dry_run": True}
    return Report("tokenize-bench-plan", protocol, {}, ledger=numbers, sections={"panels": [panel]})


__all__ = ["BenchConfig", "free_folder", "tokenize_bench"]
