"""Finished evaluations on disk: one cell is one task after one round, its answers and the scores of each.

    cells/ROUND-TASK.jsonl    one line per test example, in file order: prompt_hash, prediction, reference, scores
    cells/ROUND-TASK.json     means, settings, counts; written last: the cell is finished

A finished cell is never computed again.  Scores are read back from the answers' file, so a report rests on them alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recollect.continual.benchmark import Record
from recollect.continual.evaluation_plan import Cell
from recollect.continual.trace_scores import TaskScores
from recollect.errors import InputError
from recollect.io import read_json, sha256_text, write_json, write_text


@dataclass(frozen=True)
class CellResult:
    """One finished evaluation. items: {metric: (n,) float64 in 0..1}; facts: the JSON file."""

    cell: Cell
    items: dict[str, np.ndarray]
    facts: dict[str, Any]

    @property
    def primary(self) -> np.ndarray:
        """(n,) scores that enter OP and BWT."""
        return self.items[self.facts["primary"]]


def _stem(folder: Path, cell: Cell, task: str) -> Path:
    return folder / f"{cell.round}-{task}"


def is_finished(folder: Path, cell: Cell, task: str) -> bool:
    """Whether the cell has been evaluated."""
    return _stem(folder, cell, task).with_suffix(".json").is_file()


def write_cell(
    folder: Path,
    cell: Cell,
    records: Sequence[Record],
    predictions: Sequence[str],
    scores: TaskScores,
    seconds: float,
) -> None:
    """Store a cell; the file that marks it as finished comes last."""
    lines = []
    for at, (record, prediction) in enumerate(zip(records, predictions, strict=True)):
        line = {
            "prompt_hash": record.prompt_hash,
            "prediction": prediction,
            "reference": record.answer,
            "scores": {name: float(values[at]) for name, values in scores.items.items()},
        }
        lines.append(json.dumps(line, allow_nan=False) + "\n")
    text = "".join(lines)
    stem = _stem(folder, cell, scores.task)
    write_text(stem.with_suffix(".jsonl"), text)
    facts = {
        "round": cell.round,
        **scores.to_json(),
        "n": len(records),
        "empty_predictions": sum(not prediction for prediction in predictions),
        "predictions_sha256": sha256_text(text),
        "seconds": round(seconds, 3),
    }
    write_json(stem.with_suffix(".json"), facts)


def read_cell(folder: Path, cell: Cell, task: str) -> CellResult:
    """A finished cell.

    Raises:
        InputError: a file is missing, torn or of another evaluation.
    """
    stem = _stem(folder, cell, task)
    facts = read_json(stem.with_suffix(".json"))
    path = stem.with_suffix(".jsonl")
    try:
        text = path.read_text(encoding="utf-8")
        if sha256_text(text) != facts["predictions_sha256"]:
            raise ValueError("its hash is not the one that was written")
        rows = [json.loads(line)["scores"] for line in text.splitlines()]
        items = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in facts["metrics"]}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not the answers of a finished evaluation ({error}); remove it and {stem.name}.json, and resume"
        ) from error
    return CellResult(cell, items, facts)
