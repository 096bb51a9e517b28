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

from recollect.config import build, check_run_folder, run_manifest, to_dict
from recollect.continual.benchmark import Benchmark, open_benchmark
from recollect.continual.budgets import (
    BudgetTable,
    Linears,
    budget_of,
    match_budgets,
    model_linears,
    weightless_decoder,
)
from recollect.continual.diagnostics.factors import OldExamples, choose_old
from recollect.continual.entries import Entry, make_entries
from recollect.continual.learner import Generation, best_precision, usual_batch
from recollect.continual.report import make_report
from recollect.continual.run_config import LOOSE, ContinualConfig
from recollect.continual.sequence import (
    SequenceOptions,
    SequenceResult,
    check_same_method,
    run_sequence,
    sequence_cells,
)
from recollect.continual.task_stream import Batching, TaskRows, make_tasks
from recollect.io import canonical_json, check_out, prepare_out, read_json, sha256_text, write_json
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
    # Whatever can be refused is refused here: until then nothing is written, and nothing replaced.
    out = check_out(config.out or free_folder(config.data), resume=config.resume, overwrite=config.overwrite)
    entries, budgets, _ = _fitted(config, entries, benchmark)
    identity = _identity(config, benchmark)
    _check_folder(config, identity, entries, benchmark, out)
    progress.stage("turning examples into tokens", len(benchmark.names))
    rows = benchmark.training_rows(lambda: progress.advance(1))
    prepare_out(out, resume=config.resume, overwrite=config.overwrite)
    lock = WriterLock(out / "run.json")
    try:
        _check_folder(config, identity, entries, benchmark, out)
        manifest = _open_run(config, identity, entries, out)
        for line in [] if budgets is None else budgets.lines():
            progress.stage(line)
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


def _identity(config: ContinualConfig, benchmark: Benchmark) -> dict[str, Any]:
    """What a run continues with only where it is equal."""
    loose = LOOSE | config.foreign
    identity = {name: value for name, value in to_dict(config).items() if name not in loose}
    return identity | {
        "data": Path(config.data).name,
        "data_fingerprint": benchmark.fingerprint(),
        "model": _model_hash(benchmark.folder),
    }


def _check_folder(
    config: ContinualConfig, identity: Mapping[str, Any], entries: list[Entry], benchmark: Benchmark, out: Path
) -> None:
    """Refuse a folder whose run or sequences are other ones.

    Raises:
        InputError: a run of another command would be replaced.
        ResumeRefused: another run would be continued; the message names the first difference.
    """
    check_run_folder(out, "continual", identity, overwrite=config.overwrite)
    for entry in [] if config.overwrite else entries:
        for seed in config.all_seeds:
            check_same_method(sequence_folder(out, entry, seed), entry, benchmark)


def _open_run(config: ContinualConfig, identity: Mapping[str, Any], entries: list[Entry], out: Path) -> dict[str, Any]:
    """Clear what is to be replaced and write `run.json`; its content."""
    path = out / "run.json"
    methods: dict[str, Any] = {}
    if config.overwrite:
        shutil.rmtree(out / "methods", ignore_errors=True)
        for name in ("report.json", "report.html", "tables.csv"):
            (out / name).unlink(missing_ok=True)
    elif path.is_file():
        methods = read_json(path).get("methods", {})
    fingerprint = identity["data_fingerprint"]
    manifest = run_manifest("continual", to_dict(config), fingerprint, {"backbone": config.backbone}, config.seed)
    manifest |= {"identity": identity, "methods": methods | {entry.name: entry.describe() for entry in entries}}
    write_json(path, manifest)
    return manifest


def sequence_folder(out: Path, entry: Entry, seed: int) -> Path:
    """Where the run in `out` keeps a method with a seed."""
    return out / "methods" / entry.name / f"seed-{seed}"


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
    config: ContinualConfig, entries: list[Entry], benchmark: Benchmark
) -> tuple[list[Entry], BudgetTable | None, Mapping[str, Linears]]:
    """The entries with their final ranks, and the model's linears; what does not fit is refused, without weights."""
    from recollect.continual.adapters.attach import attached, detach

    model = weightless_decoder(benchmark.folder, config.keep_layers if config.benchmark == "domains" else None)
    linears, budgets = model_linears(model), None
    if config.match_budget:
        budgets = match_budgets(entries, linears, len(benchmark.names), config.budget)
        entries = [row.entry for row in budgets.rows]
    for entry in entries:
        entry.spec.open(entry.options, entry.adapter).prepare(model)
        if attached(model) is not None:
            detach(model)
    return entries, budgets, linears


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
                folder=sequence_folder(out, entry, seed),
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
    entries, budgets, linears = _fitted(config, entries, benchmark)
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
