"""Tables and plots of the diagnostics for the page of a continual run; plots show the first methods, tables all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recollect.continual.adapters.collision import LEAST_TOKENS
from recollect.continual.diagnostics.factors import FACTORS
from recollect.continual.diagnostics.forgetting import LEAST_COUNTED
from recollect.continual.diagnostics.rounds import ALIGNMENT_EXAMPLES, GRADIENT_EXAMPLES, PROBE_TOKENS
from recollect.eval.plots import SERIES_COLOURS

DIFFERENCES = {
    "overlap_left@rank": "outputs",
    "overlap_right@rank": "inputs",
    "gradient/overlap_left@rank": "outputs, gradient",
    "gradient/overlap_right@rank": "inputs, gradient",
    "outputs/cka": "likeness (CKA)",
    "effective_rank": "effective rank",
}
COMMON = {
    "common_energy": "common energy",
    "gradient/common_energy": "of gradients",
    "gate_alignment@rank": "gate along its expert",
    "gate_specificity@rank": "own over others",
    "routing/information": "routes tell the task",
    "leak_left": "leak, outputs",
    "leak_right": "leak, inputs",
}


def diagnostic_panels(section: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Tables and plots in reading order; none where nothing was measured."""
    if section is None:
        return []
    routed = {name: one for name, one in section["methods"].items() if one["no_routes"] is None}
    found = [scope_panel(section)]
    if not routed:
        return found
    found += [n_eff_panel(routed), *n_eff_lines(routed)]
    found += [*collision_panels(routed)]
    for name, one in routed.items():
        found += probe_panels(name, one)
    found += [alignment_panel(routed), *spectrum_panels(routed)]
    return found


def scope_panel(section: Mapping[str, Any]) -> dict[str, Any]:
    """What was looked at, for which methods it means something, and what may be concluded."""
    lines = [
        f"Diagnostics look at {section['examples']} training examples in all ({section['tokens']} tokens), the same "
        "for every method; after a task, at those of the tasks learnt so far. They are descriptions: a high N_eff "
        "bounds which share of a route a new task can touch, not how much an old task loses.",
    ]
    routed = [one for one in section["methods"].values() if one["no_routes"] is None]
    if routed:
        layers = ", ".join(str(layer) for layer in routed[0]["layers_looked_at"])
        lines.append(
            f"N_eff and losses: every layer and token. Probes, gradients and spectra: layers {layers} alone; probes "
            f"read about {PROBE_TOKENS} tokens, gradients of compositions {ALIGNMENT_EXAMPLES} examples, gradients of "
            f"experts {GRADIENT_EXAMPLES}."
        )
    for name, one in section["methods"].items():
        if one["no_routes"] is not None:
            lines.append(f"{name}: does not apply, {one['no_routes']}.")
        elif one["rounds"][0]["is_dense"]:
            lines.append(f"{name}: every expert takes part for every token; its route is the expert with most weight.")
    return {"kind": "text", "title": "Diagnostics of routes: what was looked at", "text": "\n\n".join(lines)}


def n_eff_panel(routed: Mapping[str, Any]) -> dict[str, Any]:
    """Collisions and use of every method after every task."""
    rows = []
    for name, one in routed.items():
        for entry in one["rounds"]:
            n_eff = entry["neff"]
            rows.append(
                [
                    name,
                    entry["after"],
                    *(_cell(n_eff[key], 1) for key in ("joint", "bank", "one_route")),
                    _cell(n_eff["routes_used"], 1),
                    _cell(n_eff["route_entropy"], 2),
                    _cell(n_eff["load_cv"], 2),
                    _percent(n_eff["joint_share"]),
                    _percent(entry["gated_share"]),
                ]
            )
    return {
        "kind": "table",
        "title": "Compositions that a route collects (N_eff)",
        "columns": [
            "method",
            "after",
            "joint",
            "bank",
            "one route",
            "routes used",
            "entropy",
            "load CV",
            "counted, %",
            "gated, %",
        ],
        "rows": rows,
        "note": "Means over routers. A composition is (task, label, frequency, position, class of the token). Joint: "
        "N_eff of a route, the experts of all slices together; bank: of one expert of one slice; one route: were there "
        "no choice. Entropy of the routes in nats; load CV: how unevenly experts are used, 0 = evenly. Counted: share "
        f"of tokens in joint routes with at least {LEAST_TOKENS} tokens, the others tell too little. Gated: share of "
        "experts whose updates were withheld, at least in part, in usage-gated methods.",
    }


def n_eff_lines(routed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """N_eff of joint routes over the tasks, and over the layers at the end."""
    found = []
    longest = max(len(one["rounds"]) for one in routed.values())
    over_tasks = {
        name: [entry["neff"]["joint"] for entry in one["rounds"]]
        for name, one in routed.items()
        if len(one["rounds"]) == longest
    }
    if longest > 1 and _is_drawn(over_tasks):
        found.append(
            {
                "kind": "lines",
                "title": "N_eff of joint routes, task after task",
                "x": list(range(1, longest + 1)),
                "series": _first(over_tasks),
                "x_label": "tasks learnt",
                "y_label": "compositions per route",
            }
        )
    layers = [[entry["layer"] for entry in one["layers"]] for one in routed.values()]
    over_layers = {name: [entry["joint"] for entry in one["layers"]] for name, one in routed.items()}
    if len(layers[0]) > 1 and all(other == layers[0] for other in layers) and _is_drawn(over_layers):
        found.append(
            {
                "kind": "lines",
                "title": "N_eff of joint routes at the end, layer by layer",
                "x": layers[0],
                "series": _first(over_layers),
                "x_label": "layer",
                "y_label": "compositions per route",
            }
        )
    return found


def collision_panels(routed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """N_eff of a route before a task against what the task cost the route's old tokens."""
    rows, fifths = [], {}
    for name, one in routed.items():
        for entry in one["collision"]:
            learning = entry["learning"] or "all later tasks"
            tokens = "of answers" if entry["tokens"] == "answer" else "all"
            rows.append(
                [
                    name,
                    learning,
                    tokens,
                    {"value": entry["rho"], "ci95": entry["ci95"]},
                    _cell(entry["within"], 3),
                    _cell(entry["p"], 3),
                    entry["routes"],
                    entry["layers"],
                ]
            )
            if "fifths" in entry and entry["tokens"] == "all" and entry["routes"] >= 10:
                fifths[name] = entry["fifths"]
    if not rows:
        return []
    found: list[dict[str, Any]] = [
        {
            "kind": "table",
            "title": "Collision against forgetting",
            "columns": [
                "method",
                "while learning",
                "old tokens",
                "rank correlation",
                "inside routers",
                "p of it",
                "routes",
                "layers",
            ],
            "rows": rows,
            "note": "Spearman's correlation of a route's N_eff before the task with the mean rise of the loss on its "
            "old tokens by it; above 0, routes that collect more lose more. Interval: layers resampled, from three on. "
            "Inside routers: ranks taken among the routes of each router, p by shuffling them there. Routes with at "
            f"least {LEAST_TOKENS} tokens and {LEAST_COUNTED} that count. An association, not a cause.",
        }
    ]
    if fifths:
        fifths = _first(fifths)
        found.append(
            {
                "kind": "lines",
                "title": "Rise of the loss by how much a route collects",
                "x": [1, 2, 3, 4, 5],
                "series": {name: one["increase"] for name, one in fifths.items()},
                "low": {name: one["low"] for name, one in fifths.items()},
                "high": {name: one["high"] for name, one in fifths.items()},
                "x_label": "fifth of the routes, by rising N_eff",
                "y_label": "nats per old token",
                "note": "All later tasks and all old tokens; bands are two standard errors over routes, which share "
                "tokens.",
            }
        )
    return found


def probe_panels(name: str, one: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Which factor a logistic probe reads from the router's input and from each of its slices, at the end."""
    slices = list(dict.fromkeys(entry["slice"] for entry in one["probes"]))
    values = {(entry["factor"], entry["slice"]): entry for entry in one["probes"]}
    heads = ["whole input" if part is None else f"slice {part + 1}" for part in slices]
    whole = {factor: values[factor, None] for factor in FACTORS}
    layers = list(whole[FACTORS[0]]["layers"])
    rows = []
    for factor in FACTORS:
        cells = [_cell(values[factor, part]["value"], 2) for part in slices]
        cells += [_cell(whole[factor]["layers"][layer], 2) for layer in layers]
        rows.append([factor, *cells, whole[factor]["classes"], whole[factor]["test"]])
    table = {
        "kind": "table",
        "title": f"What the router's input tells of a token: {name}",
        "columns": ["factor", *heads, *(f"whole, layer {layer}" for layer in layers), "values", "test tokens"],
        "rows": rows,
        "note": "Logistic probes at the end, mean of the layers looked at: balanced accuracy on prompts the probe did "
        "not see, 0 = chance, 1 = always right. Empty: fewer than two values of the factor occur often enough.",
    }
    if len(slices) == 1:
        return [table]
    heat = {
        "kind": "heat",
        "title": f"The same as a map: {name}",
        "rows": list(FACTORS),
        "columns": heads,
        "values": [[values[factor, part]["value"] for part in slices] for factor in FACTORS],
    }
    return [table, heat]


def alignment_panel(routed: Mapping[str, Any]) -> dict[str, Any]:
    """Cosines of the experts' gradients of two compositions, sharing a route or not."""
    rows = []
    for name, one in routed.items():
        for entry in one["rounds"]:
            found = entry["alignment"]
            rows.append(
                [
                    name,
                    entry["after"],
                    _cell(found["sharing"], 3),
                    found["sharing_pairs"],
                    _cell(found["apart"], 3),
                    found["apart_pairs"],
                ]
            )
    return {
        "kind": "table",
        "title": "Do compositions that share a route pull its experts the same way?",
        "columns": ["method", "after", "cosine, one main route", "pairs", "cosine, different ones", "pairs"],
        "rows": rows,
        "note": "Mean cosine of the gradients of the experts' parameters, of the most frequent compositions in a few "
        "examples, in the layers looked at. 1: the same pull; below 0: what helps one harms the other. The purer "
        "two different routes, the fewer parameters they have in common and the nearer their cosine is to 0 by "
        "construction.",
    }


def spectrum_panels(routed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Overlap of experts in weights and gradients, what they have in common, and the gate, after every task."""
    found = [
        _spectrum_table(
            routed,
            DIFFERENCES,
            "How far the experts differ",
            "Overlap of two experts' strongest directions, as many as their rank, of outputs and inputs, in "
            "weights and in the gradients of answers of old tasks (from 32 examples on): 1 = the same; after vs "
            "what unrelated experts would give, more for sd-moe, whose experts have fewer directions left. Low "
            "overlap is no other meaning: likeness is that of their outputs on the same tokens, where one slice "
            "holds the whole input. Effective rank: directions an expert uses. Means over the linears of the "
            "layers looked at.",
        ),
        _spectrum_table(
            routed,
            COMMON,
            "What the experts share, and where the gates look",
            "Common energy: share of experts' weights, or gradients, that touches the leading directions of their "
            "mean. Gate along its expert: share of a gate's row in the input directions of its own expert; own "
            "over others: that over the mean of the others. Routes tell the task: nats of information. Leak: "
            "largest share of an expert inside the common adapter's directions (sd-moe).",
        ),
    ]
    found = [table for table in found if table["rows"]]
    longest = max(len(one["rounds"]) for one in routed.values())
    series = {
        name: [entry["spectra"].get("overlap_left@rank", {}).get("value") for entry in one["rounds"]]
        for name, one in routed.items()
        if len(one["rounds"]) == longest
    }
    if longest > 1 and _is_drawn(series):
        found.append(
            {
                "kind": "lines",
                "title": "Overlap of what the experts write, task after task",
                "x": list(range(1, longest + 1)),
                "series": _first(series),
                "x_label": "tasks learnt",
                "y_label": "overlap of output directions",
            }
        )
    return found


def _spectrum_table(routed: Mapping[str, Any], names: Mapping[str, str], title: str, note: str) -> dict[str, Any]:
    known = [key for key in names if any(key in entry["spectra"] for entry in _rounds(routed))]
    rows = [
        [name, entry["after"], *(_beside_random(entry["spectra"].get(key)) for key in known)]
        for name, one in routed.items()
        for entry in one["rounds"]
    ]
    columns = ["method", "after", *(names[key] for key in known)]
    return {"kind": "table", "title": title, "columns": columns, "rows": rows if known else [], "note": note}


def _rounds(routed: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for one in routed.values() for entry in one["rounds"]]


def _first(series: Mapping[str, Any]) -> dict[str, Any]:
    """The first methods, as many as there are colours."""
    return dict(list(series.items())[:SERIES_COLOURS])


def _is_drawn(series: Mapping[str, Sequence[float | None]]) -> bool:
    return any(value is not None for values in series.values() for value in values)


def _cell(value: float | None, digits: int) -> Any:
    return {"value": None if value is None else round(value, digits), "digits": digits}


def _percent(value: float | None) -> Any:
    return None if value is None else round(100 * value)


def _beside_random(found: Mapping[str, float | None] | None) -> Any:
    if found is None or found["value"] is None:
        return "–"
    marks = "" if found["random"] is None else f"vs {found['random']:.2f}"
    return {**_cell(found["value"], 2), "marks": marks}
