"""Scores of a task's predictions: every metric of every test example, on one scale.

All scores are 0..1 (similarity and SARI, which the benchmark prints as 0..100, are divided by 100), one per example in
file order, so that means, intervals and paired comparisons all start from the same arrays.  A pair whose prediction or
answer is the empty string scores 0 and counts.
Source: trace_benchmark 5; secondary outputs and normalised accuracies are printed beside the primary metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from recollect.continual.metric_accuracy import exact_match, explanation, letter_match, number_match, option_letter
from recollect.continual.metric_bleu import bleu
from recollect.continual.metric_edit import SimilarityBackend, edit_similarity
from recollect.continual.metric_rouge import rouge_l
from recollect.continual.metric_sari import sari
from recollect.continual.trace_data import TraceRecord
from recollect.continual.trace_prompts import paragraph
from recollect.continual.trace_tasks import TraceTask
from recollect.errors import ConfigError, InputError

SariSource = Literal["prompt", "paragraph"]


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task.

    primary: name of the metric that enters OP and BWT.  items: {metric: (n,) float64 in 0..1}, file order.
    settings: what the numbers depend on beside the texts (the similarity's backend, SARI's source).
    """

    task: str
    primary: str
    items: dict[str, np.ndarray]
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """Mean of the primary metric, 0..1."""
        return float(self.items[self.primary].mean())

    @property
    def means(self) -> dict[str, float]:
        """Mean of every metric, 0..1."""
        return {name: float(values.mean()) for name, values in self.items.items()}

    def to_json(self) -> dict[str, Any]:
        """Means and settings as JSON values."""
        return {"task": self.task, "primary": self.primary, "metrics": self.means, "settings": self.settings}


def score_task(
    task: TraceTask,
    records: Sequence[TraceRecord],
    predictions: Sequence[str],
    *,
    similarity_backend: SimilarityBackend = "difflib",
    sari_source: SariSource = "prompt",
) -> TaskScores:
    """All metrics of one task.

    Args:
        predictions: one per record, in their order; blanks are significant.
        similarity_backend: how matching characters are counted (Py150).
        sari_source: what a simplification is compared with: the whole prompt, as the benchmark does, or the paragraph
            (20Minuten).  The other one is reported, too.

    Raises:
        InputError: not one prediction per record, or none at all: a failed run and never a score.
        ConfigError: an unknown backend or source.
    """
    if not records or len(predictions) != len(records):
        raise InputError(
            f"{task.name}: {len(predictions)} predictions for {len(records)} test examples; generate them again"
        )
    if similarity_backend not in ("difflib", "levenshtein"):
        raise ConfigError(f"similarity_backend must be 'difflib' or 'levenshtein', got {similarity_backend!r}")
    if sari_source not in ("prompt", "paragraph"):
        raise ConfigError(f"sari_source must be 'prompt' or 'paragraph', got {sari_source!r}")
    answers = [record.answer for record in records]

    def per_item(score: Callable[[str, str], float]) -> np.ndarray:
        return _per_item(score, predictions, answers)

    settings: dict[str, str] = {}
    if task.metric == "edit_similarity":
        settings["similarity_backend"] = similarity_backend
        items = {"edit_similarity": per_item(lambda text, answer: edit_similarity(text, answer, similarity_backend))}
        items["edit_similarity"] /= 100.0
    elif task.metric == "rouge_l":
        items = _summary_scores(per_item, "")
    elif task.metric == "sari":
        settings["sari_source"] = sari_source
        items = _simplification_scores(task, records, predictions, sari_source)
    elif task.answer == "letter_and_text":
        items = {
            "accuracy": per_item(lambda text, answer: exact_match(option_letter(text), option_letter(answer))),
            "accuracy_normalized": per_item(lambda text, answer: letter_match(text, option_letter(answer))),
            **_explanation_scores(predictions, answers),
        }
    else:
        lenient = number_match if task.answer == "number" else letter_match
        items = {"accuracy": per_item(exact_match), "accuracy_normalized": per_item(lenient)}
    return TaskScores(task.name, task.metric, items, settings)


def _per_item(score: Callable[[str, str], float], predictions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Scores (n,) with the benchmark's rule of empty texts."""
    values = [
        float(score(prediction, answer)) if prediction and answer else 0.0
        for prediction, answer in zip(predictions, answers, strict=True)
    ]
    return np.array(values, dtype=np.float64)


def _summary_scores(per_item: Callable[[Callable[[str, str], float]], np.ndarray], name: str) -> dict[str, np.ndarray]:
    """ROUGE-L in the benchmark's order of arguments, BLEU-1 and BLEU-4."""
    return {
        f"{name}rouge_l": per_item(lambda text, answer: rouge_l(answer, text)),
        f"{name}bleu_1": per_item(lambda text, answer: bleu(text, answer, 1)),
        f"{name}bleu_4": per_item(lambda text, answer: bleu(text, answer, 4)),
    }


def _explanation_scores(predictions: Sequence[str], answers: Sequence[str]) -> dict[str, np.ndarray]:
    texts, wanted = [explanation(text) for text in predictions], [explanation(text) for text in answers]
    return _summary_scores(lambda score: _per_item(score, texts, wanted), "explanation_")


def _simplification_scores(
    task: TraceTask, records: Sequence[TraceRecord], predictions: Sequence[str], source: SariSource
) -> dict[str, np.ndarray]:
    whole = [record.prompt for record in records]
    body = [paragraph(task, record.prompt, record.where) for record in records]
    both = {"prompt": whole, "paragraph": body}
    other: SariSource = "paragraph" if source == "prompt" else "prompt"

    def scores(sources: Sequence[str]) -> np.ndarray:
        values = [
            sari(text, prediction, [record.answer]) / 100.0 if prediction and record.answer else 0.0
            for text, prediction, record in zip(sources, predictions, records, strict=True)
        ]
        return np.array(values, dtype=np.float64)

    return {"sari": scores(both[source]), f"sari_{other}": scores(both[other])}
