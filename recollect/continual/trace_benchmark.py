"""TRACE as a benchmark of a run: task folders, answers in words, the metrics of each task, its trivial floors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from recollect.backbones.resolve import decoder_folder
from recollect.continual.benchmark import Examination, OpenedLearner
from recollect.continual.examples import Example, Lengths, encode_prompt
from recollect.continual.learner import Generation, Learner, open_learner, open_tokens
from recollect.continual.report_panels import data_panel, task_panel
from recollect.continual.run_config import ContinualConfig
from recollect.continual.task_stream import TaskRows, encode_rows, task_rows
from recollect.continual.trace_data import TraceData, TraceRecord, leak_key, load_replay_buffer, load_trace
from recollect.continual.trace_floors import trace_floors
from recollect.continual.trace_scores import score_task
from recollect.continual.trace_tasks import LIMA
from recollect.io import canonical_json, sha256_text
from recollect.rng import stream
from recollect.types import Report

GENERAL_PER_TRAINING = 1030 / 5000  # rows of Lima beside the rows of a task in the benchmark's largest variant


class TraceBenchmark:
    """See `recollect.continual.benchmark.Benchmark`.

    Raises:
        InputError: bad data.  ModelFileError: the decoder cannot be had.
    """

    loss_label = "nats per answer token"
    clusters_span_tasks = False

    def __init__(self, config: ContinualConfig, *, replays: bool) -> None:
        self.config = config
        self.data: dict[str, TraceData] = load_trace(
            config.data,
            config.tasks,
            clean=config.mode == "clean",
            train_examples=config.train_examples,
            test_examples=config.test_examples,
            seed=config.seed,
        )
        self.names = tuple(self.data)
        self.lengths = Lengths(config.max_prompt, config.max_answer, config.truncation)
        self.folder: Path = decoder_folder(config.backbone)
        self.tokens = open_tokens(self.folder, config.template, self.lengths)
        self._replays = replays
        self.general = _general(config) if replays else ()
        self.floors = trace_floors(
            self.data, similarity_backend=config.similarity_backend, sari_source=config.sari_source
        )

    @property
    def pad_id(self) -> int:
        """Of the model's tokenizer."""
        return self.tokens.pad_id

    def fingerprint(self) -> str:
        """SHA-256 over every record of a task that is read, in order."""
        parts = [
            [name, split, [record[:2] for record in getattr(one, split)]]
            for name, one in self.data.items()
            for split in ("train", "test")
        ]
        return sha256_text(canonical_json(parts))

    def general_fingerprint(self) -> str:
        """SHA-256 over the instructions of Lima that are read."""
        return sha256_text(canonical_json([record[:2] for record in self.general]))

    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """{task: (training rows, epochs, test examples)}."""
        return {
            name: (len(one.train), self.config.epochs or one.task.epochs_lora, len(one.test))
            for name, one in self.data.items()
        }

    def training_rows(self, after_task: Callable[[], None]) -> list[TaskRows]:
        """The rows of every task, in order.

        Test prompts are turned into tokens, too: one that cannot be asked is met here, not hours of training later.
        """
        rows = task_rows(
            self.data,
            self.tokens,
            self.lengths,
            epochs=self.config.epochs,
            loss_on=self.config.loss_on,
            after_task=after_task,
        )
        _ = self.shortened_tests
        return rows

    @cached_property
    def shortened_tests(self) -> dict[str, int]:
        """{task: test prompts that are longer than is asked}.

        Raises:
            DataError: a prompt cannot be shortened enough; the message names file and row.
        """
        found = {}
        for name, one in self.data.items():
            asked = [encode_prompt(one.task, each.prompt, self.tokens, self.lengths, each.where) for each in one.test]
            found[name] = sum(prompt.n_dropped > 0 for prompt in asked)
        return found

    def token_text(self, token: int) -> str:
        """Of the model's tokenizer."""
        return str(self.tokens.tokenizer.decode([token]))

    def general_rows(self) -> Sequence[Example]:
        """Instructions of Lima."""
        return encode_rows(LIMA, self.general, self.tokens, self.lengths, "answer")

    def open_learner(self) -> Learner:
        """The bare decoder."""
        return open_learner(self.folder, self.tokens, self.lengths, self.config.precision)

    def examine(
        self, learner: OpenedLearner, task: str, how: Generation, after_batch: Callable[[int], None]
    ) -> Examination:
        """Generate an answer to every test prompt and score them."""
        assert isinstance(learner, Learner)
        one = self.data[task]
        predictions = learner.answers(one.task, one.test, how, after_batch=after_batch)
        scores = score_task(
            one.task,
            one.test,
            predictions,
            similarity_backend=self.config.similarity_backend,
            sari_source=self.config.sari_source,
        )
        return Examination(one.test, predictions, scores)

    def clusters(self) -> dict[str, np.ndarray]:
        """Rows of one prompt move together."""
        return {name: _prompt_labels(one) for name, one in self.data.items()}

    def facts(self) -> dict[str, dict[str, Any]]:
        """What each task's files hold, and how many test prompts are longer than is asked."""
        found = {name: one.facts.to_json() for name, one in self.data.items()}
        for name, count in self.shortened_tests.items():
            found[name]["test"]["shortened_prompts"] = count
        return found

    def protocol(self) -> dict[str, Any]:
        """How the tasks were made and scored."""
        config = self.config
        general = {"general_rows": len(self.general)} if self._replays else {}
        return {
            "mode": config.mode,
            "tasks": list(self.names),
            "backbone": config.backbone,
            "evaluation": config.evaluation,
            "arithmetic": config.precision,
            "answers": "greedy" if not config.temperature else f"sampled at temperature {config.temperature:g}",
            "answers_at_a_time": config.eval_batch,
            "scores": "primary metric of each task, 0 to 1; R[t][i] = task i after learning t tasks",
            "loss_on": config.loss_on,
            "optimiser": "AdamW, anew for each task unless a method's reset_optimizer is false",
            **general,
        }

    def warnings(self) -> list[str]:
        """Leaks of the official files; prompts asked in part; a replay that has no instructions to mix in."""
        found = []
        if self._replays and not self.general and self.config.general_examples is None:
            found.append("no Lima/train.json: what is replayed are rows of earlier tasks alone, without instructions")
        if shortened := {name: count for name, count in self.shortened_tests.items() if count}:
            listed = ", ".join(f"{name} {count} of {len(self.data[name].test)}" for name, count in shortened.items())
            found.append(f"test prompts longer than --max-prompt {self.config.max_prompt} were shortened: {listed}")
        leaking = {name: one.facts.test_in_train for name, one in self.data.items() if one.facts.test_in_train}
        if self.config.mode == "official" and leaking:
            listed = ", ".join(f"{name} {count}" for name, count in leaking.items())
            found.append(f"test prompts that training holds, too: {listed}; --mode clean leaves them out of training")
        return found

    def task_panel(self, report: Report, method: str) -> dict[str, Any]:
        """See `report_panels.task_panel`."""
        return task_panel(report, method)

    def data_panels(self, report: Report) -> list[dict[str, Any]]:
        """See `report_panels.data_panel`."""
        return [data_panel(report)]


def _general(config: ContinualConfig) -> tuple[TraceRecord, ...]:
    """Instructions of no task.

    Raises:
        DataError: some are asked for by number, and the folder has none.
    """
    wanted = config.general_examples
    is_there = (Path(config.data) / "Lima" / "train.json").is_file()
    if wanted == 0 or (wanted is None and not is_there):
        return ()
    records = load_replay_buffer(config.data)
    if wanted is None:
        in_proportion = max(1, round(GENERAL_PER_TRAINING * config.train_examples))
        wanted = in_proportion if config.train_examples else len(records)
    chosen = stream(config.seed, "general subset").permutation(len(records))[:wanted]
    return tuple(records[at] for at in sorted(chosen.tolist()))


def _prompt_labels(one: TraceData) -> np.ndarray:
    """(n,) a number per test example, equal where prompts are."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(leak_key(record.prompt), len(known)) for record in one.test])
