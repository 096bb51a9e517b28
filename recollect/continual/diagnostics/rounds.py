"""All diagnostics of a model after T tasks, on a bounded number of old examples, kept in its round's folder.

    round-T/diagnostics.safetensors    losses (n,), compositions (n,), is_answer (n,), routes (routers, n)
    round-T/diagnostics.json           the reports and how they were made; written last: the round is measured

They are functions of the round's state and of the examples alone, so a resumed run repeats them bit for bit on a CPU,
and they can be added to a finished run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recollect.continual.benchmark import OpenedLearner
from recollect.continual.diagnostics.factors import FACTORS, OldExamples
from recollect.continual.diagnostics.forgetting import RoutePoints, joined, route_points
from recollect.continual.diagnostics.n_eff_report import layer_number, neff_report
from recollect.errors import InputError
from recollect.io import read_json, write_arrays, write_json
from recollect.progress import Progress

JSON_FILE = "diagnostics.json"
ARRAY_FILE = "diagnostics.safetensors"
PROBE_TOKENS = 2_000
GRADIENT_EXAMPLES = 32
ALIGNMENT_EXAMPLES = 16
COMPOSITIONS = 6
LAYERS = 3


@dataclass(frozen=True)
class RoundDiagnostics:
    """One measured round. facts: the JSON file.  arrays: the other one; empty where the method has no routes."""

    facts: dict[str, Any]
    arrays: Mapping[str, np.ndarray]


def is_measured(folder: Path, old: OldExamples) -> bool:
    """Whether the round in `folder` has been measured on these examples."""
    path = folder / JSON_FILE
    return path.is_file() and read_json(path).get("examples_sha256") == old.fingerprint()


def measure_round(learner: OpenedLearner, pad_id: int, old: OldExamples, folder: Path, progress: Progress) -> None:
    """Measure a model and write the round's files; the model is left as it was.

    Args:
        learner: with the round's state loaded.
        pad_id: what batches are padded with.
        old: examples of the tasks learnt so far.
    """
    from recollect.continual.diagnostics.watching import why_no_routes
    from recollect.continual.learner import products_in

    facts: dict[str, Any] = {
        "examples_sha256": old.fingerprint(),
        "tasks": list(old.tasks),
        "examples": len(old),
        "tokens": len(old.token_row),
        "compositions": len(np.unique(old.compositions)),
        "no_routes": why_no_routes(learner.model),
    }
    if facts["no_routes"] is None:
        with products_in(learner.arithmetic, learner.device):
            facts |= _reports(learner.model, pad_id, old, folder, progress)
    write_json(folder / JSON_FILE, facts)


def _reports(model: Any, pad_id: int, old: OldExamples, folder: Path, progress: Progress) -> dict[str, Any]:
    from recollect.continual.adapters.attach import routers
    from recollect.continual.diagnostics.alignment import (
        composition_gradient_alignment,
        composition_gradients,
        main_routes,
    )
    from recollect.continual.diagnostics.probes import factor_probes
    from recollect.continual.diagnostics.spectra import round_spectra
    from recollect.continual.diagnostics.watching import Choices, watch

    names = list(routers(model))
    layers = chosen_layers(names)
    looked_at = [name for name in names if layer_number(name) in layers]
    sampled = old.spread_tokens(PROBE_TOKENS)
    watched = watch(model, old, pad_id, inputs_of=looked_at, input_tokens=sampled, after_rows=progress.advance)
    factors = {name: old.factors[name][sampled] for name in FACTORS}
    probes = []
    for name in first_of_each_layer(looked_at):
        heads = watched.choices[name].winners.shape[1]
        entries = factor_probes(watched.inputs[name], heads, factors, old.row_prompt[old.token_row[sampled]])
        probes += [{"router": name, "layer": layer_number(name), **entry} for entry in entries]
    few = old.spread_rows(ALIGNMENT_EXAMPLES)
    compositions = old.compositions[np.isin(old.token_row, few)]
    wanted = most_frequent(compositions, COMPOSITIONS)
    gradients = composition_gradients(model, old.some(few), compositions, wanted, looked_at, pad_id)
    alignment = [
        {
            "router": name,
            "layer": layer_number(name),
            **composition_gradient_alignment(table, main_routes(watched.choices[name], old.compositions, wanted)),
        }
        for name, table in gradients.items()
    ]
    spectra = round_spectra(
        model,
        old.some(old.spread_rows(GRADIENT_EXAMPLES)),
        layers,
        pad_id,
        inputs=watched.inputs,
        choices={
            name: Choices(one.winners[sampled], one.n_experts, one.is_dense) for name, one in watched.choices.items()
        },
        labels=factors["task"],
    )
    write_arrays(
        folder / ARRAY_FILE,
        {
            "losses": watched.losses,
            "compositions": old.compositions.astype(np.int32),
            "is_answer": old.is_answer.astype(np.uint8),
            "routes": _compact(np.stack([watched.choices[name].routes() for name in names])),
        },
    )
    return {
        "routers": names,
        "layers_looked_at": layers,
        "neff": neff_report(watched.choices, old.compositions),
        "probes": probes,
        "alignment": alignment,
        "spectra": spectra,
    }


def chosen_layers(routers: list[str]) -> list[int]:
    """The first, the middle and the last layer that has a router."""
    layers = sorted({layer_number(name) for name in routers})
    return sorted({layers[at * (len(layers) - 1) // (LAYERS - 1)] for at in range(LAYERS)})


def first_of_each_layer(routers: list[str]) -> list[str]:
    """One router per layer: the linears of an FFN mostly read the same input."""
    found: dict[int, str] = {}
    for name in routers:
        found.setdefault(layer_number(name), name)
    return list(found.values())


def most_frequent(compositions: np.ndarray, n: int) -> list[int]:
    """The `n` compositions with the most tokens, the smaller number first among equals."""
    counts = np.bincount(compositions)
    order = np.lexsort((np.arange(len(counts)), -counts))[:n]
    return [int(one) for one in order if counts[one]]


def read_round(folder: Path) -> RoundDiagnostics:
    """What `measure_round` wrote.

    Raises:
        InputError: a file is missing or torn.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    facts = read_json(folder / JSON_FILE)
    if facts.get("no_routes") is not None:
        return RoundDiagnostics(facts, {})
    path = folder / ARRAY_FILE
    try:
        return RoundDiagnostics(facts, load_file(path))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is not what the diagnostics wrote ({error}); remove {JSON_FILE} beside it, and resume"
        ) from error


def points_between(before: RoundDiagnostics, after: RoundDiagnostics) -> dict[str, RoutePoints]:
    """Routes before a task against what it cost their old tokens: {"answer", "all"} by the tokens that count."""
    n = len(before.arrays["losses"])
    rise = after.arrays["losses"][:n] - before.arrays["losses"]
    compositions = before.arrays["compositions"].astype(np.int64)
    is_answer = before.arrays["is_answer"].astype(bool)
    found = {}
    for name, increase in (("answer", np.where(is_answer, rise, np.nan)), ("all", rise)):
        found[name] = joined(
            [
                route_points(routes.astype(np.int64), compositions, increase, router=at, layer=layer_number(router))
                for at, (router, routes) in enumerate(
                    zip(before.facts["routers"], before.arrays["routes"], strict=True)
                )
            ]
        )
    return found


def _compact(routes: np.ndarray) -> np.ndarray:
    """Routes (routers, n) in the smallest unsigned type that holds them."""
    return routes.astype(np.uint8 if routes.max() < 256 else np.uint32)
