"""What a score is worth: predictors without a model, fitted on the training data alone.

On the shipped test files their mean is about 30.7 OP points, so half of what papers print is free.  Reports print the
floors beside every score, and OP_norm is measured from them.
Source: trace_benchmark 8 [measured].
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recollect.continual.metric_accuracy import first_number, option_letter
from recollect.continual.metric_edit import SimilarityBackend
from recollect.continual.trace_data import TraceData, TraceRecord
from recollect.continual.trace_prompts import paragraph
from recollect.continual.trace_scores import SariSource, score_task
from recollect.continual.trace_tasks import TraceTask

TRANSCRIPT_CHARACTERS = 300
LEAD_SENTENCES = 3
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

Predictor = Callable[[TraceTask, Sequence[TraceRecord]], Callable[[TraceRecord], str]]


@dataclass(frozen=True)
class Floor:
    """A task's floor.

    value: score (0..1) of the task's trivial predictor.  predictor: its name.  others: scores of further trivial
    predictors that were tried on the task.
    """

    task: str
    predictor: str
    value: float
    others: dict[str, float]


def most_frequent(values: Sequence[str]) -> str:
    """The commonest value, among equals the first to occur."""
    return Counter(values).most_common(1)[0][0]


def _commonest_letter(task: TraceTask, train: Sequence[TraceRecord]) -> Callable[[TraceRecord], str]:
    letter = most_frequent([option_letter(record.answer) for record in train])
    return lambda record: letter


def _commonest_number(task: TraceTask, train: Sequence[TraceRecord]) -> Callable[[TraceRecord], str]:
    numbers = [record.answer for record in train if first_number(record.answer) is not None]
    number = most_frequent(numbers or [record.answer for record in train])
    return lambda record: number


def _beginning(task: TraceTask, train: Sequence[TraceRecord]) -> Callable[[TraceRecord], str]:
    return lambda record: paragraph(task, record.prompt, record.where)[:TRANSCRIPT_CHARACTERS]


def _last_line(task: TraceTask, train: Sequence[TraceRecord]) -> Callable[[TraceRecord], str]:
    return lambda record: last_code_line(record.prompt)


def _dash(task: TraceTask, train: Sequence[TraceRecord]) -> Callable[[TraceRecord], str]:
    return lambda record: "-"


def _lead(task: TraceTask, train: Sequence[TraceRecord]) -> Callable[[TraceRecord], str]:
    return lambda record: lead_sentences(paragraph(task, record.prompt, record.where))


def _copy(task: TraceTask, train: Sequence[TraceRecord]) -> Callable[[TraceRecord], str]:
    return lambda record: paragraph(task, record.prompt, record.where)


def last_code_line(prompt: str) -> str:
    """The last line of tokenised code, whose lines end with <EOL>; "" where there is none."""
    lines = [line for line in prompt.removeprefix("<s>").split("<EOL>") if line.strip()]
    return lines[-1].strip() if lines else ""


def lead_sentences(text: str, n: int = LEAD_SENTENCES) -> str:
    """The first `n` sentences, cut after . ! or ? and white space."""
    return " ".join(_SENTENCE_END.split(text.strip())[:n])


_PREDICTORS: dict[str, dict[str, Predictor]] = {
    "letter": {"most frequent training letter": _commonest_letter},
    "letter_and_text": {"most frequent training letter": _commonest_letter},
    "number": {"most frequent training number": _commonest_number},
    "rouge_l": {f"first {TRANSCRIPT_CHARACTERS} characters of the transcript": _beginning},
    "code": {"last line of the prompt": _last_line},
    "sari": {"the single character '-'": _dash, f"first {LEAD_SENTENCES} sentences": _lead, "copy": _copy},
}


def task_floor(
    task: TraceTask,
    train: Sequence[TraceRecord],
    test: Sequence[TraceRecord],
    *,
    similarity_backend: SimilarityBackend = "difflib",
    sari_source: SariSource = "prompt",
) -> Floor:
    """Fit the trivial predictors of a task on `train` and score them on `test`; the first named is the floor.

    Args:
        similarity_backend, sari_source: see `score_task`.
    """
    predictors = _PREDICTORS[task.metric if task.answer == "text" else task.answer]
    scores = {
        name: score_task(
            task,
            test,
            [predict(record) for record in test],
            similarity_backend=similarity_backend,
            sari_source=sari_source,
        ).value
        for name, predict in ((name, make(task, train)) for name, make in predictors.items())
    }
    first, *_ = scores
    return Floor(task.name, first, scores.pop(first), scores)


def trace_floors(
    data: Mapping[str, TraceData],
    *,
    similarity_backend: SimilarityBackend = "difflib",
    sari_source: SariSource = "prompt",
) -> dict[str, Floor]:
    """The floor of every task, in the order given, scored as the answers are."""
    how: Any = {"similarity_backend": similarity_backend, "sari_source": sari_source}
    return {name: task_floor(one.task, one.train, one.test, **how) for name, one in data.items()}
