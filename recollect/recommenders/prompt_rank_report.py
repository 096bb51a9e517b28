"""From answers to the report of `prompt-rank`: tables, groups, controls, curves, and the verdicts in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recollect.eval.protocol import protocol_block
from recollect.eval.statistics import holm
from recollect.recommenders import prompt_rank_panels as panels
from recollect.recommenders.evaluate_report import STRONG_BASELINES
from recollect.recommenders.prompt_cases import CURVE_PRESETS, SHUFFLED, SWAPPED, PromptCases, Variant
from recollect.recommenders.prompt_controls import (
    NOT_USED,
    attribute_stability,
    label_sensitivity,
    position_bias,
    user_side_verdict,
    verdict_text,
    written_lists,
)
from recollect.recommenders.prompt_curves import Sweep, blend_sweep, draw_curves, mix_sweep, rerank_sweeps
from recollect.recommenders.prompt_gap import niche_gap
from recollect.recommenders.prompt_metrics import Judge, Lists, primary, stacked
from recollect.recommenders.prompt_rank_config import DRAWN_SHARE, PromptRankConfig
from recollect.recommenders.prompted import RankingResponse
from recollect.types import Report

RAW = " (raw likelihood)"


def make_report(
    config: PromptRankConfig,
    cases: PromptCases,
    variants: Sequence[Variant],
    responses: Mapping[str, Sequence[RankingResponse | None]],
    others: Mapping[str, np.ndarray],
    costs: Mapping[str, Mapping[str, float]],
) -> Report:
    """Judge everything that was answered.

    Args:
        responses: {variant: per user}, None where a variant had nothing to ask.
        others: {conventional model: (U, C) items}.
        costs: of the journal, by call site.
    """
    options = {"resamples": config.resamples, "seed": config.seed}
    judge = Judge(cases, config.k, inserted=config.insert_target)
    told = {f"base+{name}" for name in config.attributes}
    complete = {
        variant.name: [response for response in responses[variant.name] if response is not None]
        for variant in variants
        if variant.name != SWAPPED
    }
    prompted = {name: _lists(name, found, config.candidates) for name, found in complete.items()}
    mixes = [variant for variant in variants if variant.share is not None]
    others_than_presets = told | {SHUFFLED} | {variant.name for variant in mixes}
    presets = {name: lists for name, lists in prompted.items() if name not in others_than_presets}
    generator = _generator_lists(config, cases)
    rows: dict[str, Lists] = {config.generator: generator, **prompted}
    rows |= {
        name + RAW: _raw_lists(name + RAW, found, config.candidates)
        for name, found in complete.items()
        if found[0].raw_scores is not None
    }
    models = {name: judge.table(lists.items, **options) for name, lists in rows.items()}
    models |= {variant.name: _full_only(models[variant.name]) for variant in mixes}
    models |= {name: _full_only(judge.table(items, **options)) for name, items in others.items()}
    for variant in variants:
        if variant.name in complete:
            models[variant.name] |= _costs_of(costs.get(variant.site), len(cases))
    first = primary(presets)
    sweeps = _sweeps(judge, config, generator, presets)
    mixed: dict[str, dict[float, Lists]] = {}
    for variant in mixes:
        assert variant.share is not None  # what makes it one of them
        mixed.setdefault(variant.preset, {})[variant.share] = prompted[variant.name]
    sweeps += _mix_sweeps(config, cases, generator, presets, mixed)
    curves = draw_curves(judge, sweeps, **options) if sweeps else {}
    for sweep in sweeps:
        if sweep.method.endswith(" + quota"):
            models[sweep.method] = judge.table(sweep.lists[0].items, **options)
    report = Report(
        kind="prompt-rank",
        protocol=_protocol(config, cases),
        metrics=models[first],
        baselines={name: table for name, table in models.items() if name != first},
        warnings=_warnings(config, cases, judge, models, presets),
    )
    sections = report.sections
    sections["subject"] = first
    sections["primary_metric"] = judge.name("ndcg")
    sections["models"] = models
    sections["comparisons_with"] = _comparisons(judge, config.generator, generator, presets, options)
    sections["groups"] = {
        name: judge.groups(lists.items, **options) for name, lists in {config.generator: generator, **presets}.items()
    }
    sections["orders"] = {name: _per_order(judge, found, options) for name, found in complete.items()}
    blind = [name for name in presets if _ranks_places(sections["orders"][name])]
    if blind:
        report.warnings.append(
            f"rankings under two orders of the candidates do not agree beyond chance ({', '.join(blind)}): nothing "
            "here shows that this model ranks items rather than places and labels"
        )
    sections["written"] = {name: rates for name, found in complete.items() if (rates := written_lists(found))}
    report.warnings += [
        f"{name}: {rates['filled']} of {len(cases)} users' lists were completed in backbone order "
        f"({rates['missing_rate']:.0%} of the candidates were not named): that part of its row is {config.generator}'s"
        for name, rates in sections["written"].items()
        if rates["filled"]
    ]
    if SHUFFLED in prompted:
        found = user_side_verdict(judge, prompted["fairlrm"], prompted[SHUFFLED], **options)
        sections["user_side"] = found | {"text": verdict_text(found, (judge.name("ndcg"), judge.name("mrmc")))}
        if found["verdict"] == NOT_USED:
            report.warnings.insert(0, NOT_USED)
    if SWAPPED in responses:
        labels = next(variant.requests[0].labels for variant in variants if variant.requests[0] is not None)
        sections["label_sensitivity"] = label_sensitivity(
            cases, labels, config.k, responses["fairlrm"], responses[SWAPPED], **options
        )
    if told:
        with_attribute = {name.removeprefix("base+"): prompted[name] for name in prompted if name in told}
        sections["stability"] = attribute_stability(judge, prompted["base"], with_attribute, **options)
    sections["curves"] = curves
    sections["niche_gap"] = niche_gap(judge, generator, sweeps, **options)
    sections["panels"] = panels.make_panels(report, judge, config.generator, tuple(presets))
    return report


def _full_only(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Without the columns about retrieved targets: what another model retrieved is not this one's."""
    return {name: value for name, value in table.items() if not name.endswith("|retrieved")}


def _lists(name: str, responses: Sequence[RankingResponse], size: int) -> Lists:
    scores = [np.sort(response.scores)[::-1] for response in responses]
    return Lists(name, stacked([response.order for response in responses], size), stacked(scores, size))


def _raw_lists(name: str, responses: Sequence[RankingResponse], size: int) -> Lists:
    items, scores = [], []
    for response in responses:
        assert response.raw_scores is not None
        order = np.argsort(-response.raw_scores, kind="stable")
        items.append(response.candidates[order])
        scores.append(response.raw_scores[order])
    return Lists(name, stacked(items, size), stacked(scores, size))


def _generator_lists(config: PromptRankConfig, cases: PromptCases) -> Lists:
    return Lists(
        config.generator, stacked(cases.candidates, config.candidates), stacked(cases.scores, config.candidates)
    )


def _sweeps(judge: Judge, config: PromptRankConfig, generator: Lists, presets: Mapping[str, Lists]) -> list[Sweep]:
    if not config.rerankers:
        return []
    sweeps = list(rerank_sweeps(judge, generator, config.rerankers, config.seed))
    for name in CURVE_PRESETS:
        if name in presets:
            sweeps += rerank_sweeps(judge, presets[name], config.rerankers, config.seed)
    if config.candidate_set != "full":  # lists cut from the catalogue hold different items
        sweeps += [blend_sweep(generator, lists) for lists in presets.values()]
    return sweeps


def _mix_sweeps(
    config: PromptRankConfig,
    cases: PromptCases,
    generator: Lists,
    presets: Mapping[str, Lists],
    mixed: Mapping[str, Mapping[float, Lists]],
) -> list[Sweep]:
    """The generator, and every prompt that was asked at other mixes, over the share of drawn candidates.

    Args:
        mixed: {preset: {share: lists}}.
    """
    if not cases.mixes:
        return []
    own = DRAWN_SHARE[config.candidate_set]
    of_generator = {share: _generator_lists(config, other) for share, other in cases.mixes.items()}
    sweeps = [mix_sweep(config.generator, {own: generator, **of_generator})]
    return sweeps + [mix_sweep(name, {own: presets[name], **lists}) for name, lists in mixed.items()]


def _costs_of(cost: Mapping[str, float] | None, n_users: int) -> dict[str, dict[str, Any]]:
    if cost is None:
        return {}
    values = {
        "tokens_per_user": (cost["prompt_tokens"] + cost["completion_tokens"]) / n_users,
        "seconds_per_user": cost["seconds"] / n_users,
    }
    return {name: {"value": value, "ci95": [None, None], "n": n_users} for name, value in values.items()}


def _comparisons(
    judge: Judge, generator_name: str, generator: Lists, presets: Mapping[str, Lists], options: Mapping[str, int]
) -> dict[str, dict[str, dict[str, Any]]]:
    """{rival: {preset: {metric: paired difference, p (Holm over the presets)}}} against the generator and base."""
    rivals = {generator_name: generator} | ({"base": presets["base"]} if "base" in presets else {})
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for rival, theirs in rivals.items():
        ours = {name: lists for name, lists in presets.items() if name != rival}
        table: dict[str, dict[str, Any]] = {name: {} for name in ours}
        for metric in (judge.name("ndcg"), judge.name("recall"), judge.name("mrmc")):
            for name, lists in ours.items():
                table[name][metric] = judge.difference(metric, lists.items, theirs.items, **options)
            adjusted = holm(np.array([table[name][metric]["p"] for name in ours])) if ours else ()
            for name, p_value in zip(ours, adjusted, strict=True):
                table[name][metric]["p_holm"] = float(p_value)
        found[rival] = table
    return found


def _per_order(judge: Judge, responses: Sequence[RankingResponse], options: Mapping[str, int]) -> dict[str, Any]:
    """NDCG of every order of the candidates alone, their spread, and how far two orders agree."""
    n_orders = len(responses[0].orders)
    per_seed = []
    for order in range(n_orders):
        items = stacked([response.orders[order] for response in responses], len(responses[0].order))
        per_seed.append(float(judge.accuracy(items)[judge.name("ndcg")].mean()))
    return {
        "per_seed": per_seed,
        "sd": float(np.std(per_seed, ddof=1)) if n_orders > 1 else None,
        "kendall_tau": position_bias(responses, judge.users, **options),
    }


def _ranks_places(orders: Mapping[str, Any]) -> bool:
    """Whether the interval of Kendall's tau between two orders holds zero or less."""
    tau = orders["kendall_tau"]
    return tau is not None and tau["ci95"][0] is not None and tau["ci95"][0] <= 0


def _protocol(config: PromptRankConfig, cases: PromptCases) -> dict[str, Any]:
    block = protocol_block(
        cases.dataset,
        cases.split,
        part="test",
        history=config.history,
        mask="history",
        tie="backbone order",
        ks=(config.k,),
        list_length=config.k,
        n_cases=len(cases),
        n_candidates=cases.dataset.n_items,
        input_form="lists",
        fill="backbone" if config.backend == "generate" else None,
        seeds=(config.seed,),
    )
    return block | {
        "data": cases.dataset.name,
        "users": len(cases),
        "users_drawn_from": len(cases.split.test_row),
        "candidates": (
            f"{block['candidates']}; ranked by prompt: {config.candidate_set}, {config.candidates} of "
            f"{config.generator}; an unretrieved target is a miss"
            + ("; TARGET INSERTED" if config.insert_target else "")
        ),
        "generator": config.generator,
        "backbone": config.backbone,
        "backend": config.backend,
        "permutations": config.permutations,
        "popularity": f"{config.convention}, counted on training rows",
        "shown": {"categories": config.categories, "years": config.years, "history": config.history_length},
        "retrieved_share": float(cases.retrieved.mean()),
    }


def _warnings(
    config: PromptRankConfig,
    cases: PromptCases,
    judge: Judge,
    models: Mapping[str, Mapping[str, Mapping[str, Any]]],
    presets: Mapping[str, Lists],
) -> list[str]:
    ndcg = judge.name("ndcg")
    found = []
    if "pop" in models:
        floor = models["pop"][ndcg]["value"]
        below = [name for name in presets if models[name][ndcg]["value"] < floor]
        if below:
            found.append(f"below MostPop's {ndcg} of {floor:.4f}: {', '.join(below)}")
    missing = [name for name in STRONG_BASELINES if name not in models]
    if missing:
        found.append(f"not every strong baseline is in this table: {', '.join(missing)} missing; add to --compare")
    if cases.n_dropped:
        found.append(f"{cases.n_dropped} test users have no training history and cannot be described; left out")
    if config.insert_target:
        found.append("targets were put among the candidates; these numbers say nothing about recommending")
    found += [str(warning) for warning in cases.dataset.meta.get("warnings", ())]
    return found
