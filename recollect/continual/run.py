"""`recollect.continual(...)`: methods of continual tuning on a stream of tasks, from the files to the report.

Everything is kept as soon as it is finished: rounds, evaluations, and checkpoints inside a round.  A killed run
continues with `resume`, and the matrix is that of an uninterrupted one, bit for bit on a CPU.
Source: trace_benchmark 9.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recollect.config import build, check_same_run, run_manifest, to_dict
from recollect.continual.benchmark import Benchmark, open_benchmark
from recollect.continual.budgets import (
    BudgetTable,
    Linears,
    budget_of,
    decoder_linears,
    match_budgets,
    model_linears,
)
from recollect.continual.diagnostics.factors import OldExamples, choose_old
from recollect.continual.entries import Entry, make_entries
from recollect.continual.learner import Generation, best_precision, usual_batch
from recollect.continual.report import make_report
from recollect.continual.run_config import LOOSE, ContinualConfig
from recollect.continual.sequence import SequenceOptions, SequenceResult, run_sequence, sequence_cells
from recollect.continual.task_stream import Batching, TaskRows, make_tasks
from recollect.io import canonical_json, prepare_out, read_json, sha256_text, write_json
from recollect.journal.lock import WriterLock
from recollect.loop import LoopConfig
from recollect.progress import Progress, SilentProgress
from recollect.types import Report

WEIGHT_SAMPLES = 1024
SAMPLE_BYTES = 4096


def continual(
    data: str | Path = "trace",
    *,
    method_options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Tune a language model on tasks one after another and measure what it forgets.

    Args:
        data: folder of the task folders, or the name or folder of an interaction log.
        method_options: {method: options of the method and of its adapters}.
        progress: where to say how far the run is; silent by default.
        options: fields of `recollect.continual.run_config.ContinualConfig`; `method` and `tasks` take one name or more.

    Returns:
        The report that was also written to the run folder (`out`, by default the first free runs/continual-DATA-N).

    Raises:
        InputError: bad data or options.
        ModelFileError: the decoder cannot be had.
        ResumeRefused: the run in `out` was made with other options or data.
        JournalLocked: another process writes to `out`.
        TrainingDiverged: a loss or a weight became NaN or infinite.
    """
    named = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    config = build(ContinualConfig, {"data": str(data), **named}, "the options of continual")
    config = resolved(config)
    entries = make_entries(config.method, method_options or {}, config.set)
    progress = progress or SilentProgress()
    progress.stage("reading the tasks")
    benchmark = open_benchmark(config, replays=any(entry.reads_general_rows for entry in entries))
    if config.dry_run:
        return _plan(config, entries, benchmark)
    out = prepare_out(config.out or free_folder(config.data), resume=config.resume, overwrite=config.overwrite)
    lock = WriterLock(out / "run.json")
    try:
        manifest = _open_run(config, entries, benchmark, out)
        progress.stage("turning examples into tokens", len(benchmark.names))
        rows = benchmark.training_rows(lambda: progress.advance(1))
        entries, budgets = _fitted(config, entries, benchmark, progress)
        results = _results(config, entries, benchmark, rows, out, progress)
        progress.stage("comparing")
        report = make_report(config, entries, benchmark, rows, results, manifest)
        if budgets is not None:
            budgets.add_to(report)
        report.save(out)
    finally:
        lock.release()
    return report


def resolved(config: ContinualConfig) -> ContinualConfig:
    """The options with the arithmetic and the number of answers at a time that this machine takes by itself.

    Both may change an answer by rounding, so the report names them and a run continues with the same ones only.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = best_precision(config.precision, device)
    return replace(config, precision=precision, eval_batch=config.eval_batch or usual_batch())


def free_folder(data: str) -> Path:
    """The first of runs/continual-DATA-1, -2, … that does not exist."""
    name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(data).name) or "data"
    number = 1
    while (folder := Path("runs") / f"continual-{name}-{number}").exists():
        number += 1
    return folder


def _open_run(config: ContinualConfig, entries: list[Entry], benchmark: Benchmark, out: Path) -> dict[str, Any]:
    """Write `run.json`, or check that the run found there is this one; its content."""
    fingerprint = benchmark.fingerprint()
    loose = LOOSE | config.foreign
    identity = {name: value for name, value in to_dict(config).items() if name not in loose}
    identity |= {
        "data": Path(config.data).name,
        "data_fingerprint": fingerprint,
        "model": _model_hash(benchmark.folder),
    }
    path = out / "run.json"
    if config.overwrite:
        shutil.rmtree(out / "methods", ignore_errors=True)
        for name in ("report.json", "report.html", "tables.csv"):
            (out / name).unlink(missing_ok=True)
    elif path.is_file():
        check_same_run(read_json(path), "continual", identity, out)
    manifest = run_manifest("continual", to_dict(config), fingerprint, {"backbone": config.backbone}, config.seed)
    manifest |= {"identity": identity, "methods": {entry.name: entry.describe() for entry in entries}}
    write_json(path, manifest)
    return manifest


def _model_hash(folder: Path) -> str:
    """What tells one decoder's files from another's: names, sizes, the config's text, samples of the weights."""
    files = [[file.name, file.stat().st_size] for file in sorted(folder.iterdir()) if file.is_file()]
    described = (folder / "config.json").read_text(encoding="utf-8")
    weights = [_sampled_hash(file) for file in sorted(folder.glob("*.safetensors"))]
    return sha256_text(canonical_json([files, described, weights]))


def _sampled_hash(file: Path) -> str:
    """SHA-256 of up to WEIGHT_SAMPLES evenly spaced blocks of a file: a tuned variant changes every block."""
    size, digest = file.stat().st_size, hashlib.sha256()
    step = max(SAMPLE_BYTES, size // WEIGHT_SAMPLES)
    with file.open("rb") as handle:
        for start in range(0, size, step):
            handle.seek(start)
            digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _fitted(
    config: ContinualConfig, entries: list[Entry], benchmark: Benchmark, progress: Progress
) -> tuple[list[Entry], BudgetTable | None]:
    """The entries with their final ranks; adapters that do not fit the model are refused before anything is trained."""
    from recollect.continual.adapters.attach import attached, detach

    progress.stage("fitting the adapters to the model")
    model = benchmark.open_learner().model
    budgets = None
    if config.match_budget:
        budgets = match_budgets(entries, model_linears(model), len(benchmark.names), config.budget)
        entries = [row.entry for row in budgets.rows]
        for line in budgets.lines():
            progress.stage(line)
    for entry in entries:
        entry.spec.open(entry.options, entry.adapter).prepare(model)
        if attached(model) is not None:
            detach(model)
    return entries, budgets


def _results(
    config: ContinualConfig,
    entries: list[Entry],
    benchmark: Benchmark,
    rows: list[TaskRows],
    out: Path,
    progress: Progress,
) -> dict[str, list[SequenceResult]]:
    """Every method and seed, or what of it is not yet there; seeds outermost, so that methods can be compared early."""
    general = benchmark.general_rows()
    options = SequenceOptions(
        loop=LoopConfig(
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            schedule=config.schedule,
            betas=(0.9, 0.95),
            clip_norm=config.clip_norm,
            accumulation=config.accumulation,
        ),
        answers=Generation(config.eval_batch or usual_batch(), config.temperature, 0, config.max_new_tokens),
        evaluation=config.evaluation,
        untouched=config.untouched,
        ability=config.ability,
        checkpoint_every=config.checkpoint_every,
        diagnostics=_old_examples(config, benchmark, rows),
    )
    results: dict[str, list[SequenceResult]] = {entry.name: [] for entry in entries}
    for seed in config.all_seeds:
        how = Batching(config.batch_size, config.accumulation, benchmark.pad_id, seed)
        for entry in entries:
            found = run_sequence(
                entry,
                seed,
                tasks=make_tasks(rows, general, how, is_joint=entry.spec.is_joint),
                benchmark=benchmark,
                options=options,
                folder=out / "methods" / entry.name / f"seed-{seed}",
                progress=progress,
            )
            results[entry.name].append(found)
    return results


def _old_examples(config: ContinualConfig, benchmark: Benchmark, rows: list[TaskRows]) -> OldExamples | None:
    """What the diagnostics look at, the same for every method and seed."""
    if not config.diagnostics:
        return None
    from recollect.continual.trace_benchmark import TraceBenchmark

    assert isinstance(benchmark, TraceBenchmark)  # the factors of a token are those of text
    return choose_old(rows, benchmark.token_text, per_task=config.diagnostic_examples, seed=config.seed)


def _plan(config: ContinualConfig, entries: list[Entry], benchmark: Benchmark) -> Report:
    """What a run would do: rows, tokens, optimiser steps, evaluations, answers, and the disk it would take."""
    rows = benchmark.training_rows(lambda: None)
    linears = decoder_linears(benchmark.folder, config.keep_layers if config.benchmark == "domains" else None)
    budgets = None
    if config.match_budget:
        budgets = match_budgets(entries, linears, len(benchmark.names), config.budget)
        entries = [row.entry for row in budgets.rows]
    sizes = benchmark.sizes().values()
    tests = [n_tests for _, _, n_tests in sizes]
    per_step = config.batch_size * config.accumulation
    options = SequenceOptions(LoopConfig(), Generation(), config.evaluation, config.untouched)
    cells = {entry.name: sequence_cells(len(tests), options, is_joint=entry.spec.is_joint) for entry in entries}
    numbers = {
        "methods": len(entries),
        "seeds": config.seeds,
        "tasks": len(tests),
        "rows_per_sequence": sum(n_rows * epochs for n_rows, epochs, _ in sizes),
        "training_tokens_per_sequence": sum(len(row) * one.epochs for one in rows for row in one.rows),
        "optimiser_steps_per_sequence": sum(-(-n_rows // per_step) * epochs for n_rows, epochs, _ in sizes),
        "evaluations": config.seeds * sum(map(len, cells.values())),
        "answers": config.seeds * sum(tests[cell.task] for plan in cells.values() for cell in plan),
        "disk_mb": round(config.seeds * sum(_disk_bytes(entry, len(tests), linears) for entry in entries) / 1e6, 2),
    }
    protocol = {
        "data": Path(config.data).name,
        "benchmark": config.benchmark,
        "backbone": config.backbone,
        "methods": list(config.method),
        "tasks": list(benchmark.names),
        "dry_run": True,
    }
    plan = Report("continual-plan", protocol, {}, ledger=numbers)
    if budgets is not None:
        budgets.add_to(plan)
    return plan


def _disk_bytes(entry: Entry, n_tasks: int, linears: Mapping[str, Linears]) -> int:
    """What one sequence keeps of its rounds: the method's state and the adapters, or the tuned weights, in float32."""
    if not entry.spec.has_adapters:
        return 4 * n_tasks * sum(one.d_in * one.d_out * one.number for one in linears.values())
    rounds = [budget_of(entry.spec, entry.adapter, number, linears) for number in range(1, n_tasks + 1)]
    kept = rounds[-1:] if entry.spec.is_joint else rounds
    return 2 * 4 * sum(one.trained + one.router for one in kept)


__all__ = ["ContinualConfig", "continual", "free_folder"]
