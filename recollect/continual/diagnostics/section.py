"""What the report says of the diagnostics: every measured round of every method, means over seeds.

Pure functions of the rounds' files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recollect.continual.diagnostics.forgetting import RoutePoints, by_fifths, collision_vs_forgetting, joined
from recollect.continual.diagnostics.n_eff_report import MEASURES
from recollect.continual.diagnostics.rounds import RoundDiagnostics, points_between

TOKENS = ("answer", "all")
_STRIDE = 1_000_000  # more than routers or layers


@dataclass(frozen=True)
class SequenceDiagnostics:
    """The measured rounds of one method and seed.

    facts: diagnostics.json per round.  points: per task after the first, {"answer", "all"}.
    """

    facts: list[dict[str, Any]]
    points: list[dict[str, RoutePoints]]


def sequence_diagnostics(rounds: Sequence[RoundDiagnostics]) -> SequenceDiagnostics:
    """The rounds of one sequence with the routes between them."""
    points = []
    if rounds and rounds[0].facts["no_routes"] is None:
        points = [points_between(before, after) for before, after in itertools.pairwise(rounds)]
    return SequenceDiagnostics([one.facts for one in rounds], points)


def diagnostics_section(
    results: Mapping[str, Sequence[Any]], tasks: Sequence[str], *, seed: int
) -> dict[str, Any] | None:
    """The report's section; None where nothing was measured.

    Args:
        results: {method: its sequences (`SequenceResult`)}, whose `diagnostics` are read.
        tasks: of the stream.
        seed: of the intervals.
    """
    methods = {}
    for name, runs in results.items():
        measured = [run.diagnostics for run in runs if run.diagnostics is not None]
        if measured:
            methods[name] = method_diagnostics(measured, [run.rounds for run in runs], tasks, seed=seed)
    if not methods:
        return None
    facts = next(run.diagnostics.facts for runs in results.values() for run in runs if run.diagnostics is not None)
    return {"examples": facts[-1]["examples"], "tokens": facts[-1]["tokens"], "methods": methods}


def method_diagnostics(
    measured: Sequence[SequenceDiagnostics],
    training: Sequence[Sequence[Mapping[str, Any]]],
    tasks: Sequence[str],
    *,
    seed: int,
) -> dict[str, Any]:
    """One method: {"no_routes"} alone, or with "rounds" (after each task), "layers", "collision", "probes".

    Args:
        measured: per seed.
        training: result.json of every round, per seed.
    """
    first = measured[0].facts[0]
    if first["no_routes"] is not None:
        return {"no_routes": first["no_routes"]}
    n_rounds = len(measured[0].facts)
    rounds = []
    for at in range(n_rounds):
        facts = [one.facts[at] for one in measured]
        entries = [entry for one in facts for entry in one["neff"]]
        alignment = [entry for one in facts for entry in one["alignment"]]
        gated = [run[at]["facts"].get("gated_share") for run in training]
        rounds.append(
            {
                "after": tasks[at] if n_rounds == len(tasks) else "all tasks",
                "tokens": facts[0]["tokens"],
                "compositions": facts[0]["compositions"],
                "is_dense": any(entry["is_dense"] for entry in entries),
                "neff": {name: mean_known(entry[name] for entry in entries) for name in MEASURES},
                "gated_share": mean_known(gated),
                "alignment": {
                    **{name: mean_known(entry[name] for entry in alignment) for name in ("sharing", "apart")},
                    **{name: sum(entry[name] for entry in alignment) for name in ("sharing_pairs", "apart_pairs")},
                },
                "spectra": mean_spectra([entry for one in facts for entry in one["spectra"]]),
            }
        )
    last = [one.facts[-1] for one in measured]
    return {
        "no_routes": None,
        "seeds": len(measured),
        "layers_looked_at": first["layers_looked_at"],
        "rounds": rounds,
        "layers": by_layer([entry for one in last for entry in one["neff"]]),
        "collision": collisions(measured, tasks, seed=seed),
        "probes": mean_probes([entry for one in last for entry in one["probes"]]),
    }


def collisions(measured: Sequence[SequenceDiagnostics], tasks: Sequence[str], *, seed: int) -> list[dict[str, Any]]:
    """One entry per task that came after another and per kind of token, and one over all such tasks.

    Seeds' routes are pooled; the layers of one seed stay apart from those of another.
    """
    found = []
    n_later = len(measured[0].points)
    for kind in TOKENS:
        every = []
        for at in range(n_later):
            points = joined([_of_seed(one.points[at][kind], number) for number, one in enumerate(measured)])
            every.append(_of_task(points, at))
            found.append({"learning": tasks[at + 1], "tokens": kind, **collision_vs_forgetting(points, seed=seed)})
        if n_later > 1:
            pooled = joined(every)
            entry = collision_vs_forgetting(pooled, seed=seed)
            found.append({"learning": None, "tokens": kind, **entry, "fifths": by_fifths(pooled)})
        elif n_later:
            found[-1]["fifths"] = by_fifths(every[0])
    return found


def by_layer(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """[{"layer", "joint", "bank", "one_route"}]: means over the routers of each layer."""
    layers = sorted({entry["layer"] for entry in entries})
    names = ("joint", "bank", "one_route")
    return [
        {
            "layer": layer,
            **{name: mean_known(entry[name] for entry in entries if entry["layer"] == layer) for name in names},
        }
        for layer in layers
    ]


def mean_probes(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """[{"factor", "slice", "value", "layers": {layer: value}, "classes", "test"}], means over layers and seeds."""
    groups: dict[tuple[str, int | None], list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["factor"], entry["slice"]), []).append(entry)
    found = []
    for (factor, part), members in groups.items():
        layers = sorted({entry["layer"] for entry in members})
        found.append(
            {
                "factor": factor,
                "slice": part,
                "value": mean_known(entry["value"] for entry in members),
                "layers": {
                    str(layer): mean_known(entry["value"] for entry in members if entry["layer"] == layer)
                    for layer in layers
                },
                "classes": members[0]["classes"],
                "test": members[0]["test"],
            }
        )
    return found


def mean_spectra(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """{metric: {"value", "random"}}: means over linears and seeds, random None where no baseline is known.

    Overlaps are keyed "@rank", the largest number of directions asked for, and "@1".
    """
    grouped: dict[str, dict[str, list[float | None]]] = {}
    for entry in entries:
        for name, value in entry["metrics"].items():
            held = grouped.setdefault(_at_rank(name), {"value": [], "random": []})
            held["value"].append(value)
            held["random"].append(entry["random"].get(name))
    return {name: {key: mean_known(values) for key, values in held.items()} for name, held in grouped.items()}


def mean_known(values: Iterable[float | None]) -> float | None:
    """Mean of those that are numbers; None where none is."""
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _at_rank(metric: str) -> str:
    name, sign, k = metric.partition("@")
    return metric if not sign or k == "1" else f"{name}@rank"


def _of_seed(points: RoutePoints, number: int) -> RoutePoints:
    """The points with routers and layers that no other seed has."""
    return replace(points, router=points.router + _STRIDE * number, layer=points.layer + _STRIDE * number)


def _of_task(points: RoutePoints, number: int) -> RoutePoints:
    """The points with routers that no other task has; what is measured of a layer stays together."""
    return replace(points, router=points.router + _STRIDE * _STRIDE * number)
