"""What a sequence of tasks did to a model: OP, BWT and its variants, forgetting, transfer, normalised OP.

R[t, i] is the score (0..1) on task i after training task t, both counted in the order of training; R0[i] that of the
untouched model.  Cells that were not evaluated are NaN, and an aggregate that needs one is NaN.  Every function works
along the last axes, so matrices (..., T, T) of resamples or seeds give (...,) values.

Papers print different things as "BWT"; each variant has its own name here:
  bwt           mean over the first T-1 tasks of R[T, i] - R[i, i]; negative is forgetting.  Reproduces the 17 published
                values.
  bwt_T         the same sum divided by T.
  bwt_clipped_T mean over T of min(R[T, i] - R[i, i], 0): cannot show positive transfer.
  forgetting    mean over the first T-1 tasks of (best score before the last task) - R[T, i]; negative where tasks end
                better than they ever were.
  forgetting_nonnegative  the same with the last score among the candidates for the best, so never below 0.
Source: trace_benchmark 6; the last is the form behind the `forgetting` that was computed from the published matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from recollect.errors import InputError


def _diagonal(matrix: np.ndarray) -> np.ndarray:
    return np.diagonal(matrix, axis1=-2, axis2=-1)


def overall_performance(matrix: np.ndarray, after: int | None = None) -> np.ndarray:
    """OP_t = mean of R[t, i] over the tasks i <= t; after: t from 1, None = the last."""
    last = matrix.shape[-1] if after is None else after
    return matrix[..., last - 1, :last].mean(axis=-1)


def _changes(matrix: np.ndarray) -> np.ndarray:
    """R[T, i] - R[i, i] (..., T-1) of the tasks before the last."""
    return (matrix[..., -1, :] - _diagonal(matrix))[..., :-1]


def _mean_of_earlier(values: np.ndarray) -> np.ndarray:
    """Mean over the tasks before the last; NaN where there is none."""
    return values.mean(axis=-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)


def bwt(matrix: np.ndarray) -> np.ndarray:
    """Backward transfer, divided by T-1; NaN for one task."""
    return _mean_of_earlier(_changes(matrix))


def bwt_T(matrix: np.ndarray) -> np.ndarray:
    """Backward transfer divided by T, the zero of the last task included."""
    return _changes(matrix).sum(axis=-1) / matrix.shape[-1]


def bwt_clipped_T(matrix: np.ndarray) -> np.ndarray:
    """Backward transfer divided by T with gains counted as 0."""
    return np.minimum(_changes(matrix), 0.0).sum(axis=-1) / matrix.shape[-1]


def forgetting(matrix: np.ndarray) -> np.ndarray:
    """Mean over the earlier tasks of the best score before the last task minus the last; needs the lower triangle."""
    return _mean_of_earlier(_drops(matrix))


def forgetting_nonnegative(matrix: np.ndarray) -> np.ndarray:
    """`forgetting` with a task that ends better than ever counted as 0."""
    return _mean_of_earlier(np.maximum(_drops(matrix), 0.0))


def _drops(matrix: np.ndarray) -> np.ndarray:
    """max over i <= t < T of R[t, i], minus R[T, i], (..., T-1)."""
    n_tasks = matrix.shape[-1]
    drops = [matrix[..., task : n_tasks - 1, task].max(axis=-1) - matrix[..., -1, task] for task in range(n_tasks - 1)]
    return np.stack(drops, axis=-1) if drops else np.empty((*matrix.shape[:-2], 0))


def average_incremental(matrix: np.ndarray) -> np.ndarray:
    """Mean of OP_1 to OP_T; needs the lower triangle."""
    n_tasks = matrix.shape[-1]
    return np.stack([overall_performance(matrix, after) for after in range(1, n_tasks + 1)], axis=-1).mean(axis=-1)


def forward_transfer(matrix: np.ndarray, untouched: np.ndarray) -> np.ndarray:
    """Mean over the tasks after the first of R[i-1, i] - R0[i], with untouched (..., T) = R0."""
    before = np.diagonal(matrix, offset=1, axis1=-2, axis2=-1)
    return _mean_of_earlier(before - untouched[..., 1:])


def normalized_performance(matrix: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """Mean of (R[T, i] - floor_i) / (1 - floor_i): 0 is what no model gets, 1 a perfect score; floors (T,) below 1."""
    return ((matrix[..., -1, :] - floors) / (1.0 - floors)).mean(axis=-1)


@dataclass(frozen=True)
class Aggregates:
    """Aggregates of one matrix; None where a cell it needs was not evaluated (or there is one task only)."""

    op: float | None
    bwt: float | None
    bwt_T: float | None
    bwt_clipped_T: float | None
    forgetting: float | None
    forgetting_nonnegative: float | None
    average_incremental: float | None
    fwt: float | None
    op_norm: float | None

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


def score_matrix(values: np.ndarray) -> np.ndarray:
    """A checked matrix (T, T) float64; NaN is a cell without a value.

    Raises:
        InputError: it is not square, or a value is not between 0 and 1.
    """
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise InputError(f"a score matrix has a row and a column for every task, got shape {matrix.shape}")
    if ((matrix < 0) | (matrix > 1)).any():
        worst = matrix[(matrix < 0) | (matrix > 1)][0]
        raise InputError(f"scores are between 0 and 1, got {float(worst)!r}; divide percentages by 100")
    return matrix


def summarize(
    matrix: np.ndarray,
    untouched: np.ndarray | None = None,
    floors: Mapping[str, float] | np.ndarray | None = None,
    tasks: Sequence[str] | None = None,
) -> Aggregates:
    """Every aggregate of one matrix (T, T).

    Args:
        untouched: (T,) scores before any training, for forward transfer.
        floors: (T,) trivial scores in the order of the tasks, or by the names in `tasks`; for OP_norm.
        tasks: names of the matrix's tasks in order; needed where floors have names.

    Raises:
        InputError: the matrix is malformed, lengths differ, or floors by name are not those of `tasks`.
    """
    matrix = score_matrix(matrix)
    n_tasks = len(matrix)
    values: dict[str, np.ndarray | None] = {
        "op": overall_performance(matrix),
        "bwt": bwt(matrix),
        "bwt_T": bwt_T(matrix) if n_tasks > 1 else None,
        "bwt_clipped_T": bwt_clipped_T(matrix) if n_tasks > 1 else None,
        "forgetting": forgetting(matrix),
        "forgetting_nonnegative": forgetting_nonnegative(matrix),
        "average_incremental": average_incremental(matrix),
        "fwt": None if untouched is None else forward_transfer(matrix, _per_task("untouched", untouched, n_tasks)),
        "op_norm": None,
    }
    if floors is not None:
        given = _in_order(floors, tasks) if isinstance(floors, Mapping) else floors
        values["op_norm"] = normalized_performance(matrix, _floors(given, n_tasks))
    return Aggregates(**{name: _number(value) for name, value in values.items()})


def _in_order(floors: Mapping[str, float], tasks: Sequence[str] | None) -> list[float]:
    """Floors by name in the order of the tasks."""
    if tasks is None or sorted(floors) != sorted(tasks):
        known = "none" if tasks is None else ", ".join(tasks)
        raise InputError(f"floors are of {', '.join(floors)}, the tasks given are {known}; give the same names")
    return [floors[name] for name in tasks]


def _per_task(name: str, values: Any, n_tasks: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (n_tasks,):
        raise InputError(f"{name} has shape {array.shape} where there are {n_tasks} tasks")
    return array


def _floors(values: Any, n_tasks: int) -> np.ndarray:
    floors = _per_task("floors", values, n_tasks)
    if not ((floors >= 0) & (floors < 1)).all():
        raise InputError(f"floors must be at least 0 and below 1, got {floors.tolist()!r}")
    return floors


def _number(value: np.ndarray | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def matrix_rows(matrix: np.ndarray) -> list[list[float | None]]:
    """`accuracy_matrix` of a report: R[t][i], null where not evaluated."""
    return [[_number(value) for value in row] for row in np.asarray(matrix, dtype=np.float64)]


def matrix_from_rows(rows: list[list[float | None]]) -> np.ndarray:
    """Inverse of `matrix_rows`."""
    return score_matrix(np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=float))


def matrix_csv(matrix: np.ndarray, tasks: tuple[str, ...]) -> str:
    """The matrix as a table: one line a round, one column a task, empty where not evaluated."""
    lines = [",".join(["after", *tasks])]
    for name, row in zip(tasks, matrix_rows(matrix), strict=True):
        lines.append(",".join([name, *("" if value is None else repr(value) for value in row)]))
    return "\n".join(lines) + "\n"
