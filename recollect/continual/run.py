"""`recollect.continual(...)`: methods of continual tuning on a stream of tasks, from the files to the report.

Everything is kept as soon as it is finished: rounds, evaluations, and checkpoints inside a round.  A killed run
continues with `resume`, and the matrix is that of an uninterrupted one, bit for bit on a CPU.
Source: trace_benchmark 9.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recollect.backbones.resolve import decoder_folder
from recollect.config import build, check_same_run, run_manifest, to_dict
from recollect.continual.entries import Entry, make_entries, with_matched_budgets
from recollect.continual.examples import Lengths, TaskTokenizer
from recollect.continual.learner import (
    Generation,
    Learner,
    open_learner,
    open_tokens,
    usual_batch,
)
from recollect.continual.report import make_report
from recollect.continual.run_config import LOOSE, ContinualConfig
from recollect.continual.sequence import SequenceOptions, SequenceResult, run_sequence, sequence_cells
from recollect.continual.task_stream import Batching, TaskRows, encode_rows, make_tasks, task_rows
from recollect.continual.trace_data import TraceData, TraceRecord, load_replay_buffer, load_trace
from recollect.continual.trace_floors import Floor, trace_floors
from recollect.continual.trace_tasks import LIMA
from recollect.io import canonical_json, prepare_out, read_json, sha256_text, write_json
from recollect.journal.lock import WriterLock
from recollect.loop import LoopConfig
from recollect.progress import Progress, SilentProgress
from recollect.rng import stream
from recollect.types import Report

GENERAL_PER_TRAINING = 1030 / 5000  # rows of Lima beside the rows of a task in the benchmark's largest variant


@dataclass(frozen=True)
class Materials:
    """What every method and seed of a run shares."""

    data: dict[str, TraceData]
    general: tuple[TraceRecord, ...]
    floors: dict[str, Floor]
    folder: Path
    tokens: TaskTokenizer
    lengths: Lengths


def continual(
    data: str | Path = "trace",
    *,
    method_options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Tune a language model on tasks one after another and measure what it forgets.

    Args:
        data: folder of the task folders.
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
    entries = make_entries(config.method, method_options or {}, config.set)
    progress = progress or SilentProgress()
    progress.stage("reading the tasks")
    shared = _materials(config, entries)
    if config.dry_run:
        return _plan(config, entries, shared)
    out = prepare_out(config.out or free_folder(config.data), resume=config.resume, overwrite=config.overwrite)
    lock = WriterLock(out / "run.json")
    try:
        manifest = _open_run(config, entries, shared, out)
        rows = _rows(config, shared, progress)
        entries = _fitted(config, entries, shared, progress)
        results = _results(config, entries, shared, rows, out, progress)
        progress.stage("comparing")
        report = make_report(config, entries, shared.data, shared.floors, rows, results, manifest)
        report.save(out)
    finally:
        lock.release()
    return report


def free_folder(data: str) -> Path:
    """The first of runs/continual-DATA-1, -2, … that does not exist."""
    name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(data).name) or "data"
    number = 1
    while (folder := Path("runs") / f"continual-{name}-{number}").exists():
        number += 1
    return folder


def _materials(config: ContinualConfig, entries: list[Entry]) -> Materials:
    """Data and tokenizer, checked before anything is written or trained."""
    data = load_trace(
        config.data,
        config.tasks,
        clean=config.mode == "clean",
        train_examples=config.train_examples,
        test_examples=config.test_examples,
        seed=config.seed,
    )
    lengths = Lengths(config.max_prompt, config.max_answer, config.truncation)
    folder = decoder_folder(config.backbone)
    tokens = open_tokens(folder, config.template, lengths)
    return Materials(data, _general(config, entries), trace_floors(data), folder, tokens, lengths)


def _general(config: ContinualConfig, entries: list[Entry]) -> tuple[TraceRecord, ...]:
    """Instructions of no task, where a method keeps data and the folder has them."""
    wanted = config.general_examples
    is_used = any(entry.name == "replay" for entry in entries) and wanted != 0
    if not is_used or not (Path(config.data) / "Lima" / "train.json").is_file():
        return ()
    records = load_replay_buffer(config.data)
    if wanted is None:
        wanted = round(GENERAL_PER_TRAINING * config.train_examples) or len(records)
    chosen = stream(config.seed, "general subset").permutation(len(records))[:wanted]
    return tuple(records[at] for at in sorted(chosen.tolist()))


def _fingerprint(shared: Materials) -> str:
    """SHA-256 over every record that is read, in order."""
    parts = [
        [name, split, [record[:2] for record in getattr(one, split)]]
        for name, one in shared.data.items()
        for split in ("train", "test")
    ]
    return sha256_text(canonical_json([*parts, [record[:2] for record in shared.general]]))


def _open_run(config: ContinualConfig, entries: list[Entry], shared: Materials, out: Path) -> dict[str, Any]:
    """Write `run.json`, or check that the run found there is this one; its content."""
    fingerprint = _fingerprint(shared)
    identity = {name: value for name, value in to_dict(config).items() if name not in LOOSE}
    identity |= {"data": Path(config.data).name, "data_fingerprint": fingerprint, "model": _model_hash(shared.folder)}
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
    """What tells one decoder's files from another's without reading the weights: names, sizes, the config's text."""
    files = [[file.name, file.stat().st_size] for file in sorted(folder.iterdir()) if file.is_file()]
    described = (folder / "config.json").read_text(encoding="utf-8")
    return sha256_text(canonical_json([files, described]))


def _rows(config: ContinualConfig, shared: Materials, progress: Progress) -> list[TaskRows]:
    progress.stage("turning examples into tokens", len(shared.data))
    return task_rows(
        shared.data,
        shared.tokens,
        shared.lengths,
        epochs=config.epochs,
        loss_on=config.loss_on,
        after_task=lambda: progress.advance(1),
    )


def _open_learner(config: ContinualConfig, shared: Materials) -> Learner:
    return open_learner(shared.folder, shared.tokens, shared.lengths, config.precision)


def _fitted(config: ContinualConfig, entries: list[Entry], shared: Materials, progress: Progress) -> list[Entry]:
    """The entries with their final ranks; adapters that do not fit the model are refused before anything is trained."""
    from recollect.continual.adapters.attach import attached, detach

    progress.stage("fitting the adapters to the model")
    model = _open_learner(config, shared).model
    if config.match_budget:
        entries = with_matched_budgets(entries, _shapes(model))
    for entry in entries:
        entry.spec.open(entry.options, entry.adapter).prepare(model)
        if attached(model) is not None:
            detach(model)
    return entries


def _shapes(model: Any) -> list[tuple[int, int]]:
    """(d_in, d_out) of the FFN linears of the first layer."""
    from torch import nn

    from recollect.continual.adapters.config import FFN_LINEARS

    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and last in FFN_LINEARS:
            found.setdefault(last, (module.in_features, module.out_features))
    return list(found.values())


def _results(
    config: ContinualConfig,
    entries: list[Entry],
    shared: Materials,
    rows: list[TaskRows],
    out: Path,
    progress: Progress,
) -> dict[str, list[SequenceResult]]:
    """Every method and seed, or what of it is not yet there; seeds outermost, so that methods can be compared early."""
    general = encode_rows(LIMA, shared.general, shared.tokens, shared.lengths, "answer")
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
        similarity_backend=config.similarity_backend,
        sari_source=config.sari_source,
    )
    results: dict[str, list[SequenceResult]] = {entry.name: [] for entry in entries}
    for seed in config.all_seeds:
        how = Batching(config.batch_size, config.accumulation, shared.tokens.pad_id, seed)
        for entry in entries:
            found = run_sequence(
                entry,
                seed,
                open_model=lambda: _open_learner(config, shared),
                tasks=make_tasks(rows, general, how, is_joint=entry.spec.is_joint),
                data=shared.data,
                options=options,
                folder=out / "methods" / entry.name / f"seed-{seed}",
                progress=progress,
            )
            results[entry.name].append(found)
    return results


def _plan(config: ContinualConfig, entries: list[Entry], shared: Materials) -> Report:
    """What a run would do: rows, optimiser steps, evaluations and answers."""
    rows = [len(one.train) * (config.epochs or one.task.epochs_lora) for one in shared.data.values()]
    tests = [len(one.test) for one in shared.data.values()]
    per_step = config.batch_size * config.accumulation
    steps = sum(
        -(-len(one.train) // per_step) * (config.epochs or one.task.epochs_lora) for one in shared.data.values()
    )
    options = SequenceOptions(LoopConfig(), Generation(), config.evaluation, config.untouched)
    cells = {entry.name: sequence_cells(len(shared.data), options, is_joint=entry.spec.is_joint) for entry in entries}
    numbers = {
        "methods": len(entries),
        "seeds": config.seeds,
        "tasks": len(shared.data),
        "rows_per_sequence": sum(rows),
        "optimiser_steps_per_sequence": steps,
        "evaluations": config.seeds * sum(map(len, cells.values())),
        "answers": config.seeds * sum(tests[cell.task] for plan in cells.values() for cell in plan),
    }
    protocol = {
        "data": Path(config.data).name,
        "benchmark": config.benchmark,
        "backbone": config.backbone,
        "methods": list(config.method),
        "tasks": list(config.tasks),
        "dry_run": True,
    }
    return Report("continual-plan", protocol, {}, ledger=numbers)


__all__ = ["ContinualConfig", "continual", "free_folder"]
