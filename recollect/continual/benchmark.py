"""What a run needs to know of a benchmark: its tasks as training rows, its exams, and what its report must say.

TRACE (`trace_benchmark`) and streams of recommendation domains (`domain_benchmark`) are two of the kind; methods,
rounds, resume, aggregates and intervals know neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np

    from recollect.continual.examples import Example
    from recollect.continual.learner import Generation
    from recollect.continual.run_config import ContinualConfig
    from recollect.continual.task_stream import TaskRows
    from recollect.continual.trace_floors import Floor
    from recollect.continual.trace_scores import TaskScores
    from recollect.types import Report


class Record(Protocol):
    """One test example: what its stored answer is found under, and what is right."""

    @property
    def prompt_hash(self) -> str:
        """SHA-256 of the question."""
        ...

    @property
    def answer(self) -> str:
        """The right answer."""
        ...


class Examination(NamedTuple):
    """The outcome of one exam: examples, what was answered to each, and the scores, in one order."""

    records: Sequence[Record]
    predictions: Sequence[str]
    scores: TaskScores


class OpenedLearner(Protocol):
    """A model that learns. arithmetic: of products on a CPU, see `LoopConfig.precision`."""

    model: Any
    arithmetic: Literal["fp32", "bf16"]

    @property
    def device(self) -> Any:
        """Where the weights are."""
        ...


class Benchmark(Protocol):
    """The tasks of a run.

    names: of the tasks, in order.  folder: of the decoder.  pad_id: what batches are padded with.  loss_label: unit of
    the training loss.  clusters_span_tasks: equal labels of `clusters` in two tasks are one cluster.
    """

    names: tuple[str, ...]
    folder: Path
    loss_label: str
    clusters_span_tasks: bool

    @property
    def pad_id(self) -> int: ...

    @property
    def floors(self) -> Mapping[str, Floor]:
        """What each task is worth without a model."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 over everything that is read of the tasks' data, in order."""
        ...

    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """{task: (training rows, epochs, test examples)}, without a model."""
        ...

    def training_rows(self, after_task: Callable[[], None]) -> list[TaskRows]:
        """The rows of every task, in order."""
        ...

    def general_rows(self) -> Sequence[Example]:
        """Rows of no task that replay may mix in."""
        ...

    def general_fingerprint(self) -> str:
        """SHA-256 over what these rows are made of; `fingerprint` leaves them out, for most methods never see them."""
        ...

    def open_learner(self) -> OpenedLearner:
        """A bare model, the same each time."""
        ...

    def examine(
        self, learner: OpenedLearner, task: str, how: Generation, after_batch: Callable[[int], None]
    ) -> Examination:
        """Ask the model everything of one task."""
        ...

    def clusters(self) -> dict[str, np.ndarray]:
        """{task: (n,) label per test example}: examples that intervals resample together."""
        ...

    def facts(self) -> dict[str, dict[str, Any]]:
        """What each task holds, JSON values."""
        ...

    def protocol(self) -> dict[str, Any]:
        """How the tasks were made and scored, JSON values."""
        ...

    def warnings(self) -> list[str]:
        """What a reader should know of the data before quoting a number."""
        ...

    def task_panel(self, report: Report, method: str) -> dict[str, Any]:
        """Every task's scores beside its floors."""
        ...

    def data_panels(self, report: Report) -> list[dict[str, Any]]:
        """What the data hold."""
        ...


def open_benchmark(config: ContinualConfig, *, replays: bool) -> Benchmark:
    """The benchmark a run asks for; data and tokenizer are read and checked, no model is loaded.

    Args:
        replays: a method of the run mixes in rows of no task where there are any.

    Raises:
        InputError: bad data or options.
        ModelFileError: the decoder cannot be had.
    """
    if config.benchmark == "trace":
        from recollect.continual.trace_benchmark import TraceBenchmark

        return TraceBenchmark(config, replays=replays)
    from recollect.continual.domain_benchmark import DomainBenchmark

    return DomainBenchmark(config)
