"""`recollect prompt-rank`: prompted rankings of candidates, held against the model that proposed them and re-rankers.

The recipe reads top to bottom: data, split, generator, cases, prompts, answers, report. Every answer is journaled
before it is used; killed anywhere, the same call with `resume=True` continues and ends with the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from recollect.backbones.journaled import Journaled
from recollect.backbones.protocol import Backbone, Call
from recollect.backbones.resolve import open_backbone, parse_model_name
from recollect.config import build, check_replaceable, run_manifest, to_dict
from recollect.data import fingerprint, load_dataset, text_fingerprint
from recollect.errors import InputError
from recollect.io import prepare_out, write_json
from recollect.journal import Journal
from recollect.journal import remove as remove_journal
from recollect.progress import Progress, SilentProgress
from recollect.prompts.fairlrm import PRESETS, FairPrompts, RankingRequest, estimated_tokens, preset_components
from recollect.recommenders.models import model_spec
from recollect.recommenders.prompt_cases import (
    PromptCases,
    Variant,
    draw_cases,
    filtered,
    make_split,
    make_variants,
)
from recollect.recommenders.prompt_rank_config import PromptRankConfig
from recollect.recommenders.prompted import LABEL_POOL, PromptedRanker, RankingResponse, single_token_labels
from recollect.types import Dataset, Ranker, Report, Split

JOURNAL_FILE = "journal.sqlite"
USERS_PER_BLOCK = 8


def prompt_rank(
    data: str | Path | Dataset = "ml-100k",
    *,
    backbone: str | Backbone = "smollm2",
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Rank a conventional model's candidates by prompting, and judge lists and prompts.

    Args:
        data: bundled world, registered name, path, or a `Dataset`.
        backbone: name (`recollect.open_backbone`) or an object with the `Backbone` protocol.
        progress: where to say how far the run is; silent by default.
        options: fields of `recollect.recommenders.prompt_rank_config.PromptRankConfig`.

    Returns:
        The report that was also written to the run folder (`out`, by default the first free runs/prompt-rank-DATA-N).

    Raises:
        InputError: bad data or options.  ServerAway: a model server stayed away; resume later.
    """
    given = {
        "data": data.name if isinstance(data, Dataset) else str(data),
        "backbone": backbone if isinstance(backbone, str) else "object",
    }
    named = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    config = build(PromptRankConfig, {**given, **named}, "the options of prompt_rank")
    presets = expanded(config.preset)
    for name in rivals(config):
        model_spec(name)  # misspelt names are refused before anything is fitted
    if isinstance(backbone, str):
        parse_model_name(backbone)  # a misspelt name is refused before data is read and a folder made
    progress = progress or SilentProgress()
    dataset = data if isinstance(data, Dataset) else load_dataset(data, seed=config.seed)
    dataset = filtered(dataset, config.core)
    split = make_split(dataset, config)
    generator = fit_generator(config.generator, dataset, split, config.seed)
    cases = draw_cases(dataset, split, generator, config)
    if config.dry_run:
        return _plan_report(config, presets, cases)
    out = prepare_out(config.out or free_folder(dataset.name), resume=config.resume, overwrite=config.overwrite)
    with ExitStack() as stack:
        model = backbone
        if isinstance(model, str):
            model = open_backbone(model, concurrency=config.concurrency, patience_s=config.server_patience)
            stack.callback(model.close)
        return _run(config, presets, cases, model, out, progress)


def expanded(names: Sequence[str]) -> tuple[str, ...]:
    """The presets named, "all" standing for every one; in the order of `PRESETS`.

    Raises:
        UnknownName: a name is no preset.
    """
    wanted = set(PRESETS) if "all" in names else set()
    for name in names:
        if name != "all":
            preset_components(name)
            wanted.add(name)
    return tuple(name for name in PRESETS if name in wanted)


def free_folder(data: str) -> Path:
    """The first of runs/prompt-rank-DATA-1, -2, … that does not exist."""
    name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(data).name)
    number = 1
    while (folder := Path("runs") / f"prompt-rank-{name}-{number}").exists():
        number += 1
    return folder


def _run(
    config: PromptRankConfig,
    presets: Sequence[str],
    cases: PromptCases,
    backbone: Backbone,
    out: Path,
    progress: Progress,
) -> Report:
    from recollect.recommenders.prompt_rank_report import make_report

    prompts = make_prompts(config, cases, backbone.control_tokens)
    data, texts = fingerprint(cases.dataset), text_fingerprint(cases.dataset)
    identity = {
        "options": config.identity(),
        "data": data,
        "item_texts": texts,
        "backbone": backbone.fingerprint,
        "template": prompts.version,
    }
    if config.overwrite:
        check_replaceable(out, "prompt-rank")
        remove_journal(out / JOURNAL_FILE)
    journal = Journal.open(out / JOURNAL_FILE, config=identity, resume=config.resume)
    try:
        manifest = run_manifest(
            "prompt-rank",
            to_dict(config),
            data,
            {"backbone": backbone.fingerprint, "generator": config.generator},
            config.seed,
        )
        manifest |= {"template": prompts.version, "text_fingerprint": texts}
        write_json(out / "run.json", manifest)
        model = Journaled(backbone, journal, batch_size=config.batch_size)
        ranker = make_ranker(config, prompts)
        labels = labels_for(config, model)
        variants = make_variants(config, presets, cases, labels)
        responses = answer_all(ranker, model, variants, progress)
        progress.stage("judging the lists")
        others = {name: conventional_lists(name, cases, config) for name in rivals(config)}
        report = make_report(config, cases, variants, responses, others, journal.costs())
        report.ledger = journal.ledger()
        report.sections["run"] = manifest
        report.save(out)
    finally:
        journal.close()
    return report


def rivals(config: PromptRankConfig) -> tuple[str, ...]:
    """Conventional models beside the generator; none where targets are inserted, which their lists do not hold."""
    if config.insert_target:
        return ()
    return tuple(dict.fromkeys(name for name in config.compare if name not in ("none", config.generator)))


def fit_generator(name: str, dataset: Dataset, split: Split, seed: int) -> Ranker:
    """The conventional model `name`, fitted on the training rows.

    Raises:
        UnknownName: there is no such model.
    """
    spec = model_spec(name)
    return spec.open(spec.options({}, name), seed=seed).fit(dataset, split)


def conventional_lists(name: str, cases: PromptCases, config: PromptRankConfig) -> np.ndarray:
    """(U, C) items of another conventional model over the full catalogue, for comparison."""
    from recollect.recommenders.candidate_sets import retrieval_candidates

    model = fit_generator(name, cases.dataset, cases.split, config.seed)
    return retrieval_candidates(np.asarray(model.score(cases.histories)), cases.histories, config.candidates)


def make_prompts(config: PromptRankConfig, cases: PromptCases, control_tokens: Sequence[str]) -> FairPrompts:
    """The prompts of a run."""
    return FairPrompts(
        cases.dataset.catalog,
        cases.popularity,
        control_tokens,
        config.seed,
        locale=config.locale,
        history_length=config.history_length,
        categories=config.categories,
        years=config.years,
        deciles=config.deciles,
        token_limit=config.token_limit,
    )


def make_ranker(config: PromptRankConfig, prompts: FairPrompts) -> PromptedRanker:
    """The back-end of a run."""
    return PromptedRanker(
        prompts,
        backend=config.backend,
        permutations=config.permutations,
        orders=config.orders,
        calibrate=config.calibrate,
        max_tokens=config.max_tokens,
        seed=config.seed,
    )


def labels_for(config: PromptRankConfig, model: Journaled) -> tuple[str, ...]:
    """Labels of the candidates; checked to be single tokens where they are scored.

    Raises:
        InputError: more candidates than labels.
    """
    if config.candidate_set == "full" or config.backend == "yes_no":
        return ()
    if config.candidates > len(LABEL_POOL):
        raise InputError(f"a prompt can label {len(LABEL_POOL)} candidates, not {config.candidates}; ask for fewer")
    if config.backend == "label_logits":
        return single_token_labels(model.answer, config.candidates)
    return LABEL_POOL[: config.candidates]


def answer_all(
    ranker: PromptedRanker, model: Journaled, variants: Sequence[Variant], progress: Progress
) -> dict[str, list[RankingResponse | None]]:
    """Every variant's answer for every user. All variants of a few users are asked together: they share prefixes."""
    n_users = len(variants[0].requests)
    everything = [request.candidates for variant in variants for request in variant.requests if request is not None]
    ranker.prepare(model.answer, np.concatenate(everything))
    responses: dict[str, list[RankingResponse | None]] = {variant.name: [] for variant in variants}
    progress.stage("asking the model", n_users)
    for start in range(0, n_users, USERS_PER_BLOCK):
        users = range(start, min(start + USERS_PER_BLOCK, n_users))
        planned: list[tuple[Variant, RankingRequest, list[Call]]] = []
        for user in users:
            for variant in variants:
                request = variant.requests[user]
                if request is None:
                    responses[variant.name].append(None)
                    continue
                planned.append((variant, request, ranker.calls(request, variant.components, variant.site)))
        answers = iter(model.answer([call for *_, calls in planned for call in calls]))
        for variant, request, calls in planned:
            response = ranker.response(request, calls, [next(answers) for _ in calls])
            responses[variant.name].append(response)
        progress.advance(len(users))
    return responses


def _plan_report(config: PromptRankConfig, presets: Sequence[str], cases: PromptCases) -> Report:
    ranker = make_ranker(config, make_prompts(config, cases, ()))
    labels = () if config.candidate_set == "full" or config.backend == "yes_no" else LABEL_POOL[: config.candidates]
    variants = make_variants(config, presets, cases, labels)
    first = [
        call
        for variant in variants
        for request in variant.requests[:1]
        if request is not None
        for call in ranker.calls(request, variant.components, variant.site)
    ]
    numbers: Mapping[str, Any] = {
        "users": len(cases),
        "variants": len(variants),
        "calls": len(first) * len(cases),
        "estimated_prompt_tokens": len(cases) * sum(estimated_tokens(call.messages) for call in first),
    }
    protocol = {"data": cases.dataset.name, "generator": config.generator, "dry_run": True}
    return Report("prompt-rank-plan", protocol, {}, ledger=dict(numbers))


__all__ = ["expanded", "free_folder", "prompt_rank"]
