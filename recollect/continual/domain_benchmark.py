"""A stream of recommendation domains, or of periods of one log, as a benchmark of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.backbones.resolve import decoder_folder
from recollect.continual.benchmark import Examination, OpenedLearner
from recollect.continual.domain_items import (
    INSTRUCTION,
    ItemVectors,
    ItemVocabulary,
    catalogue_names,
    item_vectors,
    texts_of,
)
from recollect.continual.domain_panels import data_panel, task_panel
from recollect.continual.domain_ranking import AROUND, CUT, LAST_ITEMS, PRIMARY, SCALE, task_floor
from recollect.continual.domain_tasks import TIME_CUT, DomainTask, cut_stream
from recollect.continual.examples import Example, TaskTokenizer
from recollect.continual.run_config import ContinualConfig
from recollect.continual.task_stream import TaskRows
from recollect.continual.trace_floors import Floor
from recollect.continual.trace_scores import TaskScores
from recollect.data.registry import load_dataset
from recollect.errors import ConfigError, ModelFileError
from recollect.io import canonical_json, sha256_text
from recollect.recommenders.llm_module import require_layers
from recollect.types import Report

if TYPE_CHECKING:
    from recollect.continual.domain_learner import DomainLearner
    from recollect.continual.learner import Generation

HOLDOUTS = {
    "last": "each user's last event of a task, after two training events at least; nothing is selected, so no "
    "validation event is held back",
    "time": f"each user's last event after the task's {TIME_CUT:g} quantile of time; later events are not learnt",
}


class DomainBenchmark:
    """See `recollect.continual.benchmark.Benchmark`.

    Raises:
        InputError: bad data or options.  ModelFileError: the decoder cannot be had.
    """

    loss_label = "nats per predicted item"
    clusters_span_tasks = True

    def __init__(self, config: ContinualConfig) -> None:
        self.config = config
        dataset = load_dataset(config.data, config.seed)
        self.stream = cut_stream(
            dataset,
            period=config.period,
            tasks=config.tasks,
            holdout=config.holdout,
            max_history=config.max_history,
            train_rows=config.train_examples,
            test_cases=config.test_examples,
            seed=config.seed,
        )
        self.tasks: dict[str, DomainTask] = {task.name: task for task in self.stream.tasks}
        self.names = tuple(self.tasks)
        self.texts = texts_of(self.stream)
        self.folder: Path = decoder_folder(config.backbone)
        require_layers(self.folder, config.keep_layers)
        self.tokens = _open_tokens(self.folder)
        words = (*self.tokens.start_ids, *self.tokens.encode_answer(INSTRUCTION))
        self.vocabulary = ItemVocabulary(len(self.stream.items), words, len(self.names))
        _check_context(self.folder, len(words) + 1, config.max_history)

    @property
    def pad_id(self) -> int:
        """Of the item vocabulary."""
        return self.vocabulary.pad_id

    @cached_property
    def vectors(self) -> ItemVectors:
        """Made once for all models of a run."""
        from recollect.continual.domain_learner import word_table

        names = catalogue_names(self.stream.dataset, self.names, self.config.period)
        table = word_table(self.folder)
        kind = self.config.item_vectors
        return item_vectors(self.stream, self.vocabulary, names, self.tokens, table, kind, self.config.seed)

    @cached_property
    def floors(self) -> dict[str, Floor]:
        """Of every task, in order."""
        return {name: task_floor(task, self.vectors.outputs) for name, task in self.tasks.items()}

    def fingerprint(self) -> str:
        """SHA-256 over items, their texts, rows and cases, in order."""
        parts = [
            [
                task.name,
                task.catalogue.tolist(),
                [[row.items.tolist(), row.n_context] for row in task.rows],
                [[case.user, case.history.tolist(), case.target] for case in task.cases],
            ]
            for task in self.stream.tasks
        ]
        return sha256_text(canonical_json([self.stream.item_ids.tolist(), self.texts, parts]))

    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """{task: (training rows, epochs, test cases)}."""
        epochs = self.config.epochs
        assert epochs is not None  # the config refuses it
        return {name: (len(task.rows), epochs, len(task.cases)) for name, task in self.tasks.items()}

    def training_rows(self, after_task: Callable[[], None]) -> list[TaskRows]:
        """The rows of every task, in order."""
        found = []
        for number, (name, task) in enumerate(self.tasks.items()):
            rows = [self.vocabulary.training_row(number, row) for row in task.rows]
            found.append(TaskRows(name, rows, self.sizes()[name][1]))
            after_task()
        return found

    def general_rows(self) -> Sequence[Example]:
        """There are none."""
        return ()

    def general_fingerprint(self) -> str:
        """Of no rows."""
        return sha256_text(canonical_json([]))

    def open_learner(self) -> DomainLearner:
        """The bare decoder over items."""
        from recollect.continual.domain_learner import open_domain_learner

        return open_domain_learner(
            self.folder,
            self.vectors,
            self.vocabulary,
            keep_layers=self.config.keep_layers,
            max_history=self.config.max_history,
            precision=self.config.precision,
        )

    def examine(
        self, learner: OpenedLearner, task: str, how: Generation, after_batch: Callable[[int], None]
    ) -> Examination:
        """Rank the task's catalogue for every test case; a prediction is the ids of the first ten, one a line."""
        from recollect.continual.domain_learner import DomainLearner

        assert isinstance(learner, DomainLearner)
        one = self.tasks[task]
        ranked = learner.rank(one, self.names.index(task), how.batch_size, after_batch)
        lists = ["\n".join(self.stream.item_ids[row[row >= 0]]) for row in ranked.lists]
        settings = {"candidates": f"all {len(one.catalogue)} items of the task's catalogue"}
        return Examination(one.cases, lists, TaskScores(task, PRIMARY, ranked.items, settings))

    def clusters(self) -> dict[str, np.ndarray]:
        """The users: each has one case in a task, and those of one user in several tasks move together."""
        numbers: dict[str, int] = {}
        return {
            name: np.array([numbers.setdefault(case.user, len(numbers)) for case in task.cases], dtype=np.int64)
            for name, task in self.tasks.items()
        }

    def facts(self) -> dict[str, dict[str, Any]]:
        """What each task holds."""
        return {name: vars(task.facts) for name, task in self.tasks.items()}

    def protocol(self) -> dict[str, Any]:
        """How the tasks were made and scored."""
        config = self.config
        return {
            "tasks": list(self.names),
            "tasks_are": "domains of the log" if config.period is None else f"periods of the log ({config.period})",
            "backbone": config.backbone,
            "keep_layers": config.keep_layers,
            "item_vectors": config.item_vectors,
            "score": f"{SCALE:g} cos(h + {AROUND:g} u, item vector): h the last hidden state, u the mean of the last "
            f"{LAST_ITEMS} items' vectors, both of length 1; nothing but adapters is learnt",
            "arithmetic": config.precision,
            "cases_at_a_time": config.eval_batch,
            "max_history": config.max_history,
            "holdout": HOLDOUTS[config.holdout],
            "candidates": "full ranking of the task's catalogue, target never masked",
            "mask": f"items of the history; {PRIMARY}_unmasked and hr@{CUT}_unmasked without it",
            "tie": "expectation",
            "evaluation": config.evaluation,
            "scores": f"{PRIMARY} of each task, 0 to 1; R[t][i] = task i after learning t tasks",
            "loss_on": "the next item among the task's catalogue, at every position of a history",
            "floors": "the best of popularity and a Markov chain, counted on the model's training rows, and of the "
            "similarity of texts",
            "optimiser": "AdamW, anew for each task unless a method's reset_optimizer is false",
        }

    def warnings(self) -> list[str]:
        """What holds of the tests as they were drawn."""
        found = []
        later = {
            name: task.facts.later_training / task.facts.cases
            for name, task in self.tasks.items()
            if task.facts.later_training
        }
        if later:
            listed = ", ".join(f"{name} {share:.0%}" for name, share in later.items())
            found.append(
                f"test cases older than some training event of other users: {listed}; --holdout time learns nothing "
                "that is later than a test"
            )
        tied = {
            name: task.facts.tied_tests / task.facts.cases for name, task in self.tasks.items() if task.facts.tied_tests
        }
        if tied:
            listed = ", ".join(f"{name} {share:.0%}" for name, share in tied.items())
            found.append(f"test items with the time of the event before, whose order is arbitrary: {listed}")
        if self.vectors.n_random:
            found.append(f"{self.vectors.n_random} items have no text; their vectors are random")
        return found

    def task_panel(self, report: Report, method: str) -> dict[str, Any]:
        """See `domain_panels.task_panel`."""
        return task_panel(report, method)

    def data_panels(self, report: Report) -> list[dict[str, Any]]:
        """See `domain_panels.data_panel`."""
        return [data_panel(report)]


def _open_tokens(folder: Path) -> TaskTokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"the tokenizer in {folder} cannot be loaded: {str(error)[:500]}") from error
    return TaskTokenizer(tokenizer)


def _check_context(folder: Path, n_prompt: int, max_history: int) -> None:
    """Refuse histories that are longer than the decoder's context."""
    from transformers import AutoConfig

    described: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    context = getattr(described.get_text_config(), "max_position_embeddings", None)
    if context and n_prompt + max_history + 1 > context:
        raise ConfigError(
            f"max_history {max_history} and the instruction of {n_prompt} tokens do not fit the model's context of "
            f"{context}; use at most {context - n_prompt - 1}"
        )
