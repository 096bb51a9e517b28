"""Several models, each with its seeds, in one table: means with intervals, paired differences, Holm.

A user's value is the mean over the user's cases, then over the seeds; users are resampled. Differences are tested on
the same users with the same draws. No row is accepted without its protocol block, and rows of different protocols only
with `allow_mixed=True`, which prints what differs under the table.

Source: recsys_evaluation 2, 6 and 10.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recollect.errors import InputError, UnknownName
from recollect.eval.case_table import RESAMPLES, CaseTable
from recollect.eval.list_metrics import popularity_lift
from recollect.eval.protocol import TRAIN, mixed_lines, protocol_hash, require_same_protocol
from recollect.eval.statistics import PERMUTATIONS, bootstrap_ratios, entry, holm, paired_differences


@dataclass(frozen=True)
class Comparison:
    """What a table prints; JSON-ready.

    models: {model: {metric: {"value", "ci95": [low, high], "n": cases, "per_seed": [mean per seed], "sd": between seeds
    (null for one), "n_seeds"}}}.
    differences: one per pair and metric, {"model", "against", "metric", "value": model - against, "ci95", "n": users,
    "p", "p_holm": adjusted over the pairs of that metric, "users_changed", "relative": value / against, or null,
    "per_seed": differences of the runs in order (against a single run, of each), or null where the two have other
    numbers of runs, "sd": between those, null for one}.
    protocols: {model: block}, seeds of all its tables joined.  mixed: fields in which they differ.
    unpaired: pairs that do not share their users and were not tested.
    """

    models: dict[str, dict[str, dict[str, Any]]]
    differences: tuple[dict[str, Any], ...]
    protocols: dict[str, dict[str, Any]]
    mixed: dict[str, dict[str, Any]]
    unpaired: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """{"models", "differences", "protocols", "protocol_hashes", "mixed", "unpaired"}."""
        return {
            "models": self.models,
            "differences": list(self.differences),
            "protocols": self.protocols,
            "protocol_hashes": {name: protocol_hash(block) for name, block in self.protocols.items()},
            "mixed": self.mixed,
            "unpaired": [list(pair) for pair in self.unpaired],
        }

    def to_text(self, metrics: Sequence[str] | None = None, *, digits: int = 4) -> str:
        """A Markdown table: one row per model with interval and number of seeds, then the protocol, then differences.

        Args:
            metrics: columns; default all that every model has.
        """
        require_same_protocol(self.protocols, allow_mixed=bool(self.mixed))
        rows = list(self.models)
        common = [name for name in self.models[rows[0]] if all(name in self.models[row] for row in rows)]
        chosen = common if metrics is None else list(metrics)
        for name in chosen:
            if name not in common:
                raise UnknownName("metric", name, common)
        lines = ["| model | seeds | " + " | ".join(chosen) + " |", "|---|---|" + "---|" * len(chosen)]
        for row in rows:
            cells = [_cell(self.models[row][name], digits) for name in chosen]
            trained_on = self.protocols[row]["trained_on"]
            label = row if trained_on == TRAIN else f"{row}, {trained_on}"
            lines.append(f"| {label} | {_seed_words(self.models[row][chosen[0]])} | " + " | ".join(cells) + " |")
        hashes = {row: protocol_hash(block) for row, block in self.protocols.items()}
        if self.mixed:
            lines += ["", "These rows were made under different protocols and do not measure the same thing:"]
            lines += [f"- {line}" for line in mixed_lines(self.mixed)]
        else:
            block = self.protocols[rows[0]]
            lines += ["", f"Protocol {hashes[rows[0]]}: " + ", ".join(f"{key} {block[key]}" for key in _PRINTED)]
        shown = [difference for difference in self.differences if difference["metric"] in chosen]
        if shown:
            lines += ["", "| difference | metric | value | p (Holm) | users changed |", "|---|---|---|---|---|"]
            lines += [
                f"| {d['model']} - {d['against']} | {d['metric']} | {_cell(d, digits, sign='+')} | {d['p_holm']:.4f} "
                f"| {d['users_changed']} of {d['n']} |"
                for d in shown
            ]
        return "\n".join(lines) + "\n"


_PRINTED = ("name", "fingerprint", "filters", "split", "part", "history", "mask", "tie", "candidates", "n_cases")


def _cell(cell: Mapping[str, Any], digits: int, sign: str = "") -> str:
    if cell["value"] is None:
        return "-"
    text = f"{cell['value']:{sign}.{digits}f}"
    low, high = cell["ci95"]
    return text if low is None or high is None else f"{text} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _seed_words(cell: Mapping[str, Any]) -> str:
    return "1 seed" if cell["n_seeds"] == 1 else f"{cell['n_seeds']} seeds"


def compare_models(
    tables: Mapping[str, CaseTable | Sequence[CaseTable]],
    *,
    metrics: Sequence[str] | None = None,
    against: str | None = None,
    tested: Sequence[str] | None = None,
    totals: Mapping[str, Sequence[Mapping[str, Mapping[str, Any]]]] | None = None,
    allow_mixed: bool = False,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Comparison:
    """One table of several models.

    Args:
        tables: {model: its table, or one per seed}; all seeds of a model have the same cases.
        metrics: per-case metrics to report; default all that every table has.
        against: the row all others are tested against; None tests every pair.
        tested: metrics to test, default `metrics`; p-values are adjusted by Holm over the pairs of each metric.
        totals: {model: per seed, entries of `list_totals`}, averaged over seeds. With several seeds dgap@k is resampled
            from their per-case columns; other bounds are the means of the seeds' bounds: no narrower than the interval
            of the mean as far as the draws are normal.
        allow_mixed: let rows of different protocols stand together; the fields that differ are then part of the table.
        resamples, permutations: of the bootstrap over users and of the sign-flip test.

    Raises:
        InputError: no table, a row without a complete protocol block, protocols that differ, seeds of one model on
            different cases, or a metric a table lacks.
        UnknownName: `against` is no row.
    """
    by_seed = {name: [table] if isinstance(table, CaseTable) else list(table) for name, table in tables.items()}
    if not by_seed or not all(by_seed.values()):
        raise InputError(f"a comparison needs a table for every model, got {sorted(by_seed)!r}")
    if against is not None and against not in by_seed:
        raise UnknownName("model", against, list(by_seed))
    blocks = {
        name if len(runs) == 1 else f"{name} (run {index + 1})": dict(run.protocol)
        for name, runs in by_seed.items()
        for index, run in enumerate(runs)
    }
    mixed = require_same_protocol(blocks, allow_mixed=allow_mixed)
    first = next(iter(by_seed.values()))[0]
    every = [run for runs in by_seed.values() for run in runs]
    if metrics is None:
        metrics = [name for name in first.metrics if all(name in run.metrics for run in every)]
    tested = list(metrics) if tested is None else list(tested)
    wanted = list(dict.fromkeys([*metrics, *tested]))
    users, values = {}, {}
    for name, runs in by_seed.items():
        if any(not np.array_equal(run.user, runs[0].user) for run in runs[1:]):
            raise InputError(
                f"the seeds of {name!r} were evaluated on different cases; their mean over seeds has no meaning"
            )
        users[name] = np.unique(runs[0].user)
        values[name] = {metric: np.stack([run.per_user(metric)[1] for run in runs]) for metric in wanted}  # (S, U)

    models = {name: _entries(by_seed[name], values[name], metrics, resamples, seed) for name in by_seed}
    for name, per_seed in (totals or {}).items():
        models[name] |= _total_entries(per_seed)
        if len(per_seed) > 1:
            for metric, lift in _lifts(by_seed[name], per_seed[0], resamples, seed).items():
                models[name][metric]["ci95"] = lift["ci95"]
    pairs = [(name, against) for name in by_seed if name != against] if against is not None else []
    pairs = pairs if against is not None else [(b, a) for a, b in itertools.combinations(by_seed, 2)]
    paired = [(a, b) for a, b in pairs if np.array_equal(users[a], users[b])]
    differences = _differences(paired, tested, users, values, resamples, permutations, seed)
    return Comparison(
        models=models,
        differences=tuple(differences),
        protocols={name: _joined_protocol(runs) for name, runs in by_seed.items()},
        mixed=mixed,
        unpaired=tuple(pair for pair in pairs if pair not in paired),
    )


def _joined_protocol(runs: Sequence[CaseTable]) -> dict[str, Any]:
    return {**runs[0].protocol, "seeds": [seed for run in runs for seed in run.protocol["seeds"]]}


def _entries(
    runs: Sequence[CaseTable], values: Mapping[str, np.ndarray], metrics: Sequence[str], resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    n_users = values[metrics[0]].shape[1] if metrics else 0
    ratios = {metric: (values[metric].mean(axis=0), np.ones(n_users)) for metric in metrics}
    intervals = bootstrap_ratios(ratios, np.arange(n_users), n=resamples, seed=seed)
    return {
        metric: {**entry(intervals[metric]), "n": len(runs[0]), **_over_seeds(values[metric].mean(axis=1))}
        for metric in metrics
    }


def _over_seeds(per_seed: np.ndarray) -> dict[str, Any]:
    """{"per_seed", "sd", "n_seeds"}; the sample deviation, null for one seed."""
    spread = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else math.nan
    return {
        "per_seed": [float(value) if math.isfinite(value) else None for value in per_seed],
        "sd": spread if math.isfinite(spread) else None,
        "n_seeds": len(per_seed),
    }


def _total_entries(per_seed: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, one in per_seed[0].items():
        values = np.array([math.nan if row[name]["value"] is None else row[name]["value"] for row in per_seed])
        bounds = [_mean([row[name]["ci95"][side] for row in per_seed]) for side in (0, 1)]
        mean = float(values.mean())
        value = mean if math.isfinite(mean) else None
        found[name] = {"value": value, "ci95": bounds, "n": one["n"], **_over_seeds(values)}
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _lifts(runs: Sequence[CaseTable], names: Iterable[str], resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Entries of the mean over seeds of every "dgap@k" whose "arp@k" and "gap_profile" all runs have.

    The profiles of all seeds are the same, so the mean of the lifts is the lift of the mean popularity.
    """
    found = {}
    for name in names:
        columns = (name.replace("dgap@", "arp@"), "gap_profile")
        if name.startswith("dgap@") and all(column in run.metrics for run in runs for column in columns):
            of_list, of_profile = (np.mean([run.per_user(column)[1] for run in runs], axis=0) for column in columns)
            found[name] = entry(popularity_lift(np.arange(len(of_list)), of_list, of_profile, resamples, seed))
    return found


def _differences(
    pairs: Sequence[tuple[str, str]],
    metrics: Sequence[str],
    users: Mapping[str, np.ndarray],
    values: Mapping[str, Mapping[str, np.ndarray]],
    resamples: int,
    permutations: int,
    seed: int,
) -> list[dict[str, Any]]:
    found: dict[tuple[str, str, str], Any] = {}
    by_users: dict[bytes, list[tuple[str, str]]] = {}
    for pair in pairs:
        by_users.setdefault(users[pair[0]].tobytes(), []).append(pair)
    for group in by_users.values():  # pairs over the same users share their draws
        keys = [(a, b, metric) for a, b in group for metric in metrics]
        columns = {
            str(index): values[a][metric].mean(axis=0) - values[b][metric].mean(axis=0)
            for index, (a, b, metric) in enumerate(keys)
        }
        results = paired_differences(columns, users[group[0][0]], n=resamples, permutations=permutations, seed=seed)
        found |= {key: results[str(index)] for index, key in enumerate(keys)}
    rows = []
    for metric in metrics:
        adjusted = holm(np.array([found[a, b, metric].p_value for a, b in pairs]))
        for (a, b), p_holm in zip(pairs, adjusted, strict=True):
            result = found[a, b, metric]
            base = float(values[b][metric].mean())
            rows.append(
                {
                    "model": a,
                    "against": b,
                    "metric": metric,
                    **entry(result.difference),
                    "p": result.p_value,
                    "p_holm": float(p_holm),
                    "users_changed": result.n_changed,
                    "relative": result.difference.value / base if base else None,
                    **_differences_of_seeds(values[a][metric], values[b][metric]),
                }
            )
    return rows


def _differences_of_seeds(model: np.ndarray, against: np.ndarray) -> dict[str, Any]:
    """{"per_seed", "sd"} of values (S, U) and (S', U)."""
    if len(model) != len(against) and 1 not in (len(model), len(against)):
        return {"per_seed": None, "sd": None}
    found = _over_seeds(model.mean(axis=1) - against.mean(axis=1))
    return {key: found[key] for key in ("per_seed", "sd")}
