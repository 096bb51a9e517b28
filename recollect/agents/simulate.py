"""`recollect simulate`: agents learn from a log, act on held-out slates, and are compared with what people did.

The recipe reads top to bottom: data, plan, models, journal, agents, steps, validation, report. Killed anywhere, the
same call with `resume=True` continues and ends with the same `events.jsonl`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from recollect.agents.agentcf import AgentCF
from recollect.agents.config import SimulateConfig
from recollect.agents.groups import GroupViews
from recollect.agents.item_features import ItemFeatures
from recollect.agents.memory_index import ExactIndex, MemoryIndex
from recollect.agents.plan import Plan, estimate, make_plan
from recollect.agents.population import in_time_order
from recollect.agents.questions import Questions
from recollect.agents.recall import Recall, Source
from recollect.agents.scheduler import Step, run_steps
from recollect.agents.validation import validate
from recollect.agents.writers import LlmWriter, StructuredWriter, Writer
from recollect.backbones.journaled import Journaled, Replay
from recollect.backbones.protocol import Backbone
from recollect.backbones.resolve import parse_model_name
from recollect.config import build, check_replaceable, run_manifest, to_dict
from recollect.data import fingerprint, load_dataset, text_fingerprint
from recollect.errors import InputError, ReplayMismatch, TooManyFailures
from recollect.eval.report import rebuild
from recollect.io import prepare_out, read_json, sha256_text, write_json
from recollect.journal import Journal
from recollect.journal import remove as remove_journal
from recollect.progress import Progress, SilentProgress
from recollect.prompts import template_versions
from recollect.prompts.render import Renderer
from recollect.types import Dataset, Report

JOURNAL_FILE = "journal.sqlite"
EVENTS_FILE = "events.jsonl"
POSITION_CLOCK = (
    "this log has positions instead of clock times: the global order of interactions across users is arbitrary, and "
    "group memories show training interactions only"
)


def simulate(
    data: str | Path | Dataset = "harbor",
    *,
    backbone: str | Backbone = "smollm2",
    embedder: str | Any = "minilm",
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Simulate users of a log and report how far they agree with the real ones.

    Args:
        data: bundled world, registered name, path, or a `Dataset`.
        backbone: name (`recollect.open_backbone`) or an object with the `Backbone` protocol.
        embedder: name or an object with `embed` and `fingerprint`.
        progress: where to say how far the run is; silent by default.
        options: fields of `recollect.agents.config.SimulateConfig`.

    Returns:
        The report that was also written to the run folder (`out`, by default the first free runs/simulate-DATA-N).

    Raises:
        InputError: bad data or options.  ServerAway: a model server stayed away; resume later.
        TooManyFailures: more than `max_failed` of the steps had unusable model output.
    """
    given = {
        "data": data.name if isinstance(data, Dataset) else str(data),
        "backbone": backbone if isinstance(backbone, str) else "object",
        "embedder": embedder if isinstance(embedder, str) else "object",
    }
    named = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    config = build(SimulateConfig, {**given, **named}, "the options of simulate")
    for name in (backbone, embedder):
        if isinstance(name, str):
            parse_model_name(name)  # a misspelt name is refused before data is read and a folder made
    progress = progress or SilentProgress()
    if config.replay:
        return replay(config.replay, progress=progress, dataset=data if isinstance(data, Dataset) else None)
    dataset = data if isinstance(data, Dataset) else load_dataset(data, seed=config.seed)
    plan = make_plan(dataset, config)
    if config.dry_run:
        return _plan_report(dataset, plan, config)
    out = prepare_out(config.out or free_folder(dataset.name), resume=config.resume, overwrite=config.overwrite)
    with ExitStack() as stack:
        model, text_embedder = _open_models(config, backbone, embedder, stack)
        return _run(config, dataset, plan, model, text_embedder, out, progress)


def free_folder(data: str) -> Path:
    """The first of runs/simulate-DATA-1, -2, … that does not exist."""
    name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(data).name)
    number = 1
    while (folder := Path("runs") / f"simulate-{name}-{number}").exists():
        number += 1
    return folder


def _open_models(config: SimulateConfig, backbone: Any, embedder: Any, stack: ExitStack) -> tuple[Backbone, Any]:
    from recollect.backbones.resolve import open_backbone, open_embedder

    model = backbone
    if isinstance(backbone, str):
        model = open_backbone(backbone, concurrency=config.concurrency, patience_s=config.server_patience)
        stack.callback(model.close)
    if isinstance(embedder, str):
        embedder = open_embedder(embedder)
        stack.callback(embedder.close)
    return model, embedder


def _run(
    config: SimulateConfig,
    dataset: Dataset,
    plan: Plan,
    backbone: Backbone,
    embedder: Any,
    out: Path,
    progress: Progress,
) -> Report:
    identity = run_identity(config, dataset, backbone, embedder)
    if config.overwrite:
        check_replaceable(out, "simulate")
        remove_journal(out / JOURNAL_FILE)
        (out / EVENTS_FILE).unlink(missing_ok=True)
    journal = Journal.open(out / JOURNAL_FILE, config=identity, resume=config.resume)
    try:
        manifest = run_manifest(
            "simulate",
            to_dict(config),
            identity["data"],
            {"backbone": backbone.fingerprint, "embedder": embedder.fingerprint},
            config.seed,
        )
        manifest |= {"templates": identity["templates"], "text_fingerprint": identity["item_texts"]}
        manifest["control_tokens"] = list(backbone.control_tokens)
        write_json(out / "run.json", manifest)
        model = Journaled(backbone, journal, embedder=embedder, batch_size=config.batch_size)
        agents = _simulate(config, dataset, plan, model, backbone.control_tokens, journal, out, progress)
        journal.export_events(out / EVENTS_FILE)
        progress.stage("comparing with the real log")
        report = _report(config, dataset, plan, agents, journal, model, manifest)
        report.save(out)
    finally:
        journal.close()
    return report


def run_identity(config: SimulateConfig, dataset: Dataset, backbone: Any, embedder: Any) -> dict[str, Any]:
    """What must be equal for a run to be resumed: options that decide events, data, models, prompts."""
    return {
        "options": config.identity(),
        "data": fingerprint(dataset),
        "item_texts": text_fingerprint(dataset),
        "backbone": backbone.fingerprint,
        "embedder": embedder.fingerprint,
        "templates": template_versions(),
    }


def _simulate(
    config: SimulateConfig,
    dataset: Dataset,
    plan: Plan,
    model: Journaled | Replay,
    control_tokens: Sequence[str],
    journal: Journal,
    folder: Path,
    progress: Progress,
) -> AgentCF:
    """Run every step that is not in the journal yet."""
    progress.stage("reading the catalogue")
    features = ItemFeatures.of(dataset.catalog, len(dataset.domains))
    questions = Questions(dataset, Renderer(control_tokens, config.seed))
    recall = _open_recall(config, dataset, plan, questions, model, folder)
    writer: Writer
    if config.writer == "structured":
        writer = StructuredWriter(features)
    else:
        writer = LlmWriter(questions, model.fingerprint, seed=config.seed, temperature=config.temperature)
    view_rows = np.arange(len(dataset.interactions))
    if dataset.clock == "position":
        view_rows = view_rows[plan.training_rows]
    agents = AgentCF(
        dataset,
        config,
        questions=questions,
        writer=writer,
        features=features,
        views=GroupViews(dataset.interactions, in_time_order(dataset, view_rows), len(dataset.domains)),
        embed=model.embed,
        recall=recall,
        fingerprint=model.fingerprint,
        history_rows=_history_rows(dataset, plan),
    )
    try:
        agents.warm_start(plan.population.history)
        agents.catch_up(
            journal, [step.number for step in plan.steps if step.kind == "rebuild" and journal.has_step(step.number)]
        )
        steps = _steps(agents, plan)
        progress.stage("simulating", len(steps))
        progress.advance(journal.n_committed)
        run_steps(steps, model, journal, on_progress=progress.advance)
    finally:
        recall.close()
    failed = 0
    if journal.count_events(ok=False):
        failed = len({event["step"] for event in journal.events() if not event["ok"]})
    if failed > config.max_failed * len(steps):
        journal.export_events(folder / EVENTS_FILE)
        raise TooManyFailures(
            f"{failed} of {len(steps)} steps had unusable model output, more than --max-failed "
            f"{config.max_failed:g}; see the events with ok=false in {folder / EVENTS_FILE}"
        )
    return agents


def _history_rows(dataset: Dataset, plan: Plan) -> dict[int, np.ndarray]:
    rows = np.concatenate([plan.population.history, plan.population.training])
    user_of = dataset.interactions.user[rows]
    return {int(user): rows[user_of == user] for user in plan.population.users}


def _open_recall(
    config: SimulateConfig,
    dataset: Dataset,
    plan: Plan,
    questions: Questions,
    model: Journaled | Replay,
    folder: Path,
) -> Recall:
    log = dataset.interactions
    simulated = np.isin(log.user, plan.population.users)
    items = np.unique(
        np.concatenate(
            [
                log.item[simulated],
                *(slates.candidates.ravel() for slates in (plan.rehearsal, plan.calibration, plan.test)),
            ]
        )
    )
    vectors = model.embed([questions.item_text(int(item)) for item in items])
    rows = {int(item): row for row, item in enumerate(items)}

    def describe(item: int) -> tuple[str, str]:
        return questions.item_text(item), dataset.domains[int(dataset.catalog.domain[item])]

    return Recall(rows, vectors, describe, _index_opener(config, model, folder), model.embed)


def _index_opener(config: SimulateConfig, model: Journaled | Replay, folder: Path) -> Callable[[Source], MemoryIndex]:
    """Chroma for runs, with the journal's rows as its source of truth; a replay, which may write nothing, is exact."""

    def open_index(source: Source) -> MemoryIndex:
        index = ExactIndex()
        if not config.recall:
            return index  # nothing will be looked up
        if isinstance(model, Replay):
            for collection, row in source():
                index.upsert(collection, [row])
            return index
        from recollect.agents.chroma_index import ChromaIndex

        # On a shared server the run folder keeps runs apart; a resumed run finds its collections again.
        namespace = sha256_text(str(folder.resolve()))[:16] if config.chroma else ""
        return ChromaIndex(config.chroma or folder / "index", source, namespace=namespace)

    return open_index


def _steps(agents: AgentCF, plan: Plan) -> list[Step]:
    users = plan.population.users.tolist()
    rehearsals = dict(zip(plan.rehearsal.row.tolist(), plan.rehearsal.candidates, strict=True))
    upcoming = plan.moments_of_rebuilds(agents.dataset)
    steps = []
    for planned in plan.steps:
        match planned.kind:
            case "train" | "learn":
                row = planned.index
                slate = rehearsals.get(row) if planned.kind == "train" else None
                steps.append(agents.training_step(planned.number, row, plan.negatives[row], planned.kind, slate))
            case "rebuild":
                steps.append(agents.rebuild_step(planned.number, users, upcoming[planned.number]))
            case "calibrate":
                steps.append(agents.ranking_step(planned.number, plan.calibration, planned.index, "calibrate"))
            case "test":
                steps.append(agents.ranking_step(planned.number, plan.test, planned.index, "test"))
    return steps


def _report(
    config: SimulateConfig,
    dataset: Dataset,
    plan: Plan,
    agents: AgentCF,
    journal: Journal,
    model: Journaled | Replay,
    manifest: dict[str, Any],
) -> Report:
    report = validate(config, dataset, plan, agents, list(journal.events()), model.embed)
    report.ledger = journal.ledger()
    report.sections["run"] = manifest
    if dataset.clock == "position":
        report.warnings.append(POSITION_CLOCK)
    report.warnings += [str(warning) for warning in dataset.meta.get("warnings", ())]
    if plan.population.skipped:
        report.warnings.append(
            f"{plan.population.skipped} users have fewer than 3 interactions and cannot be held out; left out"
        )
    return report


def _plan_report(dataset: Dataset, plan: Plan, config: SimulateConfig) -> Report:
    rated = dataset.interactions.rating is not None
    numbers = {
        "users": len(plan.population.users),
        "training_steps": plan.count("train") + plan.count("learn"),
        "calibration_cases": plan.count("calibrate"),
        "test_cases": plan.count("test"),
        **estimate(plan, config, rated=rated),
    }
    return Report("simulate-plan", {"data": dataset.name, "method": config.method, "dry_run": True}, {}, ledger=numbers)


def replay(folder: str | Path, *, progress: Progress | None = None, dataset: Dataset | None = None) -> Report:
    """Re-execute a finished run from its journal, without any model.

    Raises:
        ReplayMismatch: the code asks something else than it did (the first differing call, with a diff), or ends with
            another event log.
        InputError: the folder holds no run.
    """
    folder = Path(folder)
    manifest = read_json(folder / "run.json")
    if manifest.get("command") != "simulate" or not (folder / JOURNAL_FILE).is_file():
        raise InputError(f"{folder} holds no simulation; give the folder of a `recollect simulate` run")
    loose = {"resume", "overwrite", "replay", "dry_run", "out"}
    config = SimulateConfig(**{key: value for key, value in manifest["options"].items() if key not in loose})
    dataset = dataset or load_dataset(config.data, seed=config.seed)
    if fingerprint(dataset) != manifest["data_fingerprint"]:
        raise ReplayMismatch(f"the data {config.data!r} is not what {folder} was made with (fingerprints differ)")
    plan = make_plan(dataset, config)
    recorded = Journal.open(folder / JOURNAL_FILE, config={}, resume=True, read_only=True)
    try:
        model = Replay(recorded, manifest["models"]["backbone"], manifest["models"]["embedder"])
        with tempfile.TemporaryDirectory() as scratch:
            journal = Journal.open(Path(scratch) / JOURNAL_FILE, config={}, resume=False)
            try:
                agents = _simulate(
                    config,
                    dataset,
                    plan,
                    model,
                    manifest["control_tokens"],
                    journal,
                    Path(scratch),
                    progress or SilentProgress(),
                )
                journal.export_events(Path(scratch) / EVENTS_FILE)
                _compare_logs(folder / EVENTS_FILE, Path(scratch) / EVENTS_FILE)
                report = _report(config, dataset, plan, agents, journal, model, manifest)
            finally:
                journal.close()
        if manifest.get("text_fingerprint") not in (None, text_fingerprint(dataset)):
            report.warnings.append(
                "the catalogue says other things of its items than it did (titles, categories or texts), though "
                "nothing that this run asked or decided depends on the difference"
            )
        report.ledger = recorded.ledger()
        return report
    finally:
        recorded.close()


def _compare_logs(recorded: Path, replayed: Path) -> None:
    with recorded.open(encoding="utf-8") as before, replayed.open(encoding="utf-8") as after:
        for number, (old, new) in enumerate(zip(before, after, strict=False), start=1):
            if old != new:
                keys = [key for key in json.loads(old) if json.loads(old)[key] != json.loads(new).get(key)]
                raise ReplayMismatch(f"event {number} of {recorded} differs on replay in {', '.join(keys)}")
    if recorded.stat().st_size != replayed.stat().st_size:
        raise ReplayMismatch(f"the replay of {recorded} has another number of events")


__all__ = ["free_folder", "rebuild", "replay", "simulate"]
