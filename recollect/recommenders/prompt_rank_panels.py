"""The panels of a `prompt-rank` page, as JSON for `recollect.eval.panels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recollect.eval.popularity_profiles import GROUPS
from recollect.recommenders.prompt_cases import CURVE_PRESETS
from recollect.recommenders.prompt_curves import OVER_THE_MIX
from recollect.recommenders.prompt_metrics import Judge
from recollect.types import Report

HEADLINE = ("ndcg", "recall", "ltc", "mrmc", "mrmc_bands", "lpd", "dgap", "tail_share", "gini", "coverage")
CURVES_DRAWN = 5
_LEVELS = {"calibration": "MRMC (lower is better)", "coverage": "long-tail coverage (higher is better)"}


def make_panels(report: Report, judge: Judge, generator: str, presets: Sequence[str]) -> list[dict[str, Any]]:
    """Verdict, tables, groups, controls, Pareto plots; what was not measured leaves no panel."""
    sections = report.sections
    panels: list[dict[str, Any]] = []
    if "user_side" in sections:
        text = sections["user_side"]["text"]
        panels.append({"kind": "text", "title": "Are the user's facts used?", "text": text, "terminal": True})
    panels.append(_models(sections["models"], judge))
    panels += _comparisons(sections["comparisons_with"], judge)
    panels.append(_groups(sections["groups"], judge))
    panels.append(_orders(sections["orders"], sections["models"], judge))
    if sections["written"]:
        panels.append(_written(sections["written"]))
    if "label_sensitivity" in sections:
        panels.append(_label_sensitivity(sections["label_sensitivity"]))
    if "stability" in sections:
        panels.append(_stability(sections["stability"], judge))
    if sections["niche_gap"] is not None:
        panels.append(_niche_gap(sections["niche_gap"]))
    for plane, content in sections["curves"].items():
        panels.append(_pareto(plane, content, sections["models"], generator, presets))
        panels += _drawn(plane, content, sections["models"], generator, presets)
        panels.append(_volumes(plane, content))
    return panels


def _models(models: Mapping[str, Mapping[str, Any]], judge: Judge) -> dict[str, Any]:
    names = [judge.name(metric) for metric in HEADLINE]
    retrieved = [f"{judge.name(metric)}|retrieved" for metric in ("ndcg", "recall")]
    rows = [[name, *(_cell(table.get(metric)) for metric in (*names, *retrieved))] for name, table in models.items()]
    return {
        "kind": "table",
        "title": "Every method",
        "terminal": True,
        "note": "End to end over the full catalogue: an unretrieved target is a miss. |retrieved: only users whose "
        "target was among the candidates. LtC grows with any noise in the lists: read it beside NDCG.",
        "columns": ["method", *names, *retrieved],
        "rows": rows,
    }


def _cell(entry: Mapping[str, Any] | None) -> Any:
    return "–" if entry is None else {"value": entry["value"], "ci95": entry.get("ci95")}


def _comparisons(found: Mapping[str, Any], judge: Judge) -> list[dict[str, Any]]:
    panels = []
    for rival, table in found.items():
        if not table:
            continue
        metrics = list(next(iter(table.values())))
        columns = [part for metric in metrics for part in (f"Δ {metric}", "p (Holm)")]
        rows = [
            [
                name,
                *(
                    part
                    for metric in metrics
                    for part in (by_metric[metric]["difference"], by_metric[metric]["p_holm"])
                ),
            ]
            for name, by_metric in table.items()
        ]
        panels.append(
            {
                "kind": "table",
                "title": f"Presets minus {rival}, same users",
                "note": "Paired bootstrap and sign flips over users; p adjusted by Holm over the presets.",
                "columns": ["preset", *columns],
                "rows": rows,
            }
        )
    return panels


def _groups(groups: Mapping[str, Any], judge: Judge) -> dict[str, Any]:
    rows = []
    for method, by_metric in groups.items():
        for metric in HEADLINE:
            found = by_metric[judge.name(metric)]
            cells = [_cell(found.get(group)) for group in GROUPS]
            rows.append([method, judge.name(metric), *cells, _cell(found["gap"]), found["worst"] or "–"])
    sizes = {group: int((judge.cases.groups == group).sum()) for group in GROUPS}
    return {
        "kind": "table",
        "title": "By group of users",
        "note": "Groups by the popular share of the training history (lowest fifth, middle, highest fifth); "
        + ", ".join(f"{group}: {size}" for group, size in sizes.items())
        + " users here. Gap = largest minus smallest; chance alone makes it positive, so its draws are moved onto the "
        "value. What the lists of a group have together (coverage, LtC, Gini) depends on its size, so it has no gap: "
        "compare it between methods, not between groups.",
        "columns": ["method", "metric", *GROUPS, "gap", "worst group"],
        "rows": rows,
    }


def _orders(orders: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]], judge: Judge) -> dict[str, Any]:
    rows = []
    for name, found in orders.items():
        spread = "–" if found["sd"] is None else found["sd"]
        tau = "–" if found["kendall_tau"] is None else found["kendall_tau"]
        costs = [models[name].get(cost, {}).get("value", "–") for cost in ("tokens_per_user", "seconds_per_user")]
        mean = sum(found["per_seed"]) / len(found["per_seed"])
        rows.append([name, models[name][judge.name("ndcg")]["value"], mean, spread, tau, *costs])
    return {
        "kind": "table",
        "title": "Order of the candidates, and cost",
        "note": "Each seeded order judged alone beside their average. Kendall tau compares the rankings under two "
        "orders: 1 = position does not matter. Tokens count every prompt in full; shared prefixes are computed once.",
        "columns": [
            "prompt",
            f"{judge.name('ndcg')} averaged",
            "of single orders, mean",
            "sd over orders",
            "Kendall tau of two orders",
            "tokens per user",
            "seconds per user",
        ],
        "rows": rows,
    }


def _written(written: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    keys = ("entries", "invalid_rate", "duplicate_rate", "missing_rate", "filled", "fill")
    return {
        "kind": "table",
        "title": "Written lists",
        "note": "Rates of the entries; missing: of the candidates. Filled lists are completed in backbone order.",
        "columns": ["prompt", *(key.replace("_", " ") for key in keys)],
        "rows": [[name, *(rates[key] for key in keys)] for name, rates in written.items()],
    }


def _label_sensitivity(found: Mapping[str, Any]) -> dict[str, Any]:
    change = "–" if found["change"] is None else found["change"]
    return {
        "kind": "table",
        "title": "Swapping the tags of one popular and one niche candidate",
        "note": "Change of (score of the popular one minus score of the niche one); below zero, the tag itself raises "
        "a score.",
        "columns": ["mean change", "users up", "users down", "p (sign test)"],
        "rows": [[change, found["positive"], found["negative"], found["p_sign"]]],
    }


def _stability(stability: Mapping[str, Any], judge: Judge) -> dict[str, Any]:
    return {
        "kind": "table",
        "title": "What telling an attribute changes",
        "note": f"Base prompt with and without the attribute: overlap of the first {judge.k} (Jaccard), share of their "
        f"ordered pairs that is kept (PRAG*), change of {judge.name('ndcg')}.",
        "columns": ["attribute", f"Jaccard@{judge.k}", f"PRAG*@{judge.k}", f"Δ {judge.name('ndcg')}"],
        "rows": [
            [name, found["jaccard"], found["prag"], found["ndcg"]["difference"]] for name, found in stability.items()
        ],
    }


def _niche_gap(found: Mapping[str, Any]) -> dict[str, Any]:
    metric, reference = found["metric"], found["reference"]
    low, high = found["gap"]["ci95"]
    bounds = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
    wanted = {f"{reference} + cp", "fairlrm + cp"}  # the report's JSON holds every prompt's
    shown = [row for row in found["rows"] if row["method"] in wanted] or found["rows"]
    rows = [
        [
            row["method"],
            f"{row['value']:g}",
            _cell(row["ndcg"]),
            _percent(row["change"]),
            _cell(row["gap"]),
            _percent(row["closed"]),
            "–" if row["closed"] is None else "yes" if row["supported"] else "not shown" if row["within"] else "no",
        ]
        for row in shown
    ]
    return {
        "kind": "table",
        "title": "The gap between mainstream and niche users",
        "note": f"Gap: {metric} of mainstream users ({found['n']['mainstream']}) minus that of niche users "
        f"({found['n']['niche']}); {reference}: {found['gap']['value']:+.4f}{bounds}"
        + ("" if found["gap"]["value"] > 0 else ", so there is no gap to close")
        + f". Goal: half of it closed at most 2 % below {reference}'s {metric}; met = both, and the interval of the "
        "gap's reduction lies above 0; not shown = both, but it does not. Settings are not chosen on other users, and "
        "of many some succeed by luck.",
        "columns": ["method", "lambda", metric, f"{metric} vs {reference}", "gap", "gap closed", "goal met"],
        "rows": rows,
    }


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.1f} %"


def _pareto(
    plane: str,
    content: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    generator: str,
    presets: Sequence[str],
) -> dict[str, Any]:
    wanted = [f"{generator} + {name}" for name in ("cp", "poppen", "xquad")]
    wanted += ["fairlrm + cp", f"{generator} mixed with fairlrm"]
    known = {curve["method"]: curve for curve in content["curves"] if len(curve["points"]) > 1}
    drawn = [known[name] for name in wanted if name in known]
    left = [curve for name, curve in known.items() if curve not in drawn and not _has_own_plot(name)]
    drawn += left[: max(0, CURVES_DRAWN - len(drawn))]
    return _curves(
        f"NDCG against {_LEVELS[plane]}",
        "Curves run over the knob of a method; grey points are single prompts and the generator.",
        content,
        drawn,
        {name: models[name] for name in (generator, *presets, f"{generator} + quota") if name in models},
    )


_OWN_PLOTS = {
    " + softmax": (
        "over temperature",
        "softmax: one list per user drawn place by place from softmax(score / T), T in standard deviations of the "
        "user's scores, the same noise at every T; T = 0 is the method itself.",
    ),
    OVER_THE_MIX: (
        "over the candidate mix",
        "Share of the candidates that are niche items drawn at random in place of the last retrieved ones; the "
        "generator ranks the same candidates by its own scores.",
    ),
}
"""By the end of a curve's name: its plot's title and note."""


def _has_own_plot(method: str) -> bool:
    return method.endswith(tuple(_OWN_PLOTS))


def _drawn(
    plane: str,
    content: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    generator: str,
    presets: Sequence[str],
) -> list[dict[str, Any]]:
    """The curves over temperature, and those over the candidate mix."""
    marks = {
        name: models[name] for name in (generator, *presets) if name in models and name in (generator, *CURVE_PRESETS)
    }
    panels = []
    for ending, (title, note) in _OWN_PLOTS.items():
        drawn = [curve for curve in content["curves"] if curve["method"].endswith(ending)]
        if drawn:
            panels.append(_curves(f"NDCG against {_LEVELS[plane]}, {title}", note, content, drawn, marks))
    return panels


def _curves(
    title: str,
    note: str,
    content: Mapping[str, Any],
    drawn: Sequence[Mapping[str, Any]],
    marks: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    gain, cost = content["gain"], content["cost"]
    return {
        "kind": "pareto",
        "title": title,
        "note": note,
        "series": {
            curve["method"]: {
                "x": [point[gain]["value"] for point in curve["points"]],
                "y": [point[cost]["value"] for point in curve["points"]],
                "labels": [f"{curve['knob']} = {point['value']:g}" for point in curve["points"]],
            }
            for curve in drawn
        },
        "marks": {
            name: {"x": [table[gain]["value"]], "y": [table[cost]["value"]], "labels": [""]}
            for name, table in marks.items()
        },
        "x_label": gain,
        "y_label": cost,
    }


def _volumes(plane: str, content: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for curve in sorted(content["curves"], key=lambda curve: -curve["hypervolume"]["value"]):
        on_frontier = [point for point in curve["points"] if point["frontier"]]
        shown = ", ".join(f"{point['value']:g}" for point in on_frontier) if curve["knob"] else "the point"
        difference = "–" if curve["difference"] is None else curve["difference"]
        rows.append([curve["method"], curve["hypervolume"], difference, shown if on_frontier else "none"])
    reference = content["reference"] or "–"
    return {
        "kind": "table",
        "title": f"Hyper-volume: NDCG and {_LEVELS[plane].split(' (')[0]}",
        "note": f"Area dominated from the reference point (0, 1){', counting 1 - LtC' if plane == 'coverage' else ''}; "
        f"difference from {reference}, paired over users. More settings can only enlarge an area: "
        "compare methods with equally many. Last column: settings on the frontier of all methods.",
        "columns": ["method", "hyper-volume", f"minus {reference}", "on the joint frontier"],
        "rows": rows,
    }
