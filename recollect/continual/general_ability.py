"""Did tuning cost general ability? The published delta, and a small offline check of our own.

General Ability Delta: the mean over benchmarks of (score after - score before).  The benchmarks the paper names (MMLU,
GSM8K, BBH, TyDiQA, BoolQ, PIQA) need downloads and long prompts; the forty items here need neither.  An item is a
question with four short answers, each scored by its log-likelihood after the prompt, so no text is parsed and a model
that knows nothing gets a quarter right.  Forty items have a standard error of about 7 points: they show a collapse, not
a ranking of methods.
Source: trace_benchmark 6 (formula [paper]); the items are our own and no published benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recollect.continual.general_items import GENERAL_ITEMS, GeneralItem
from recollect.errors import InputError

LogLikelihoods = Callable[[str, tuple[str, ...]], Sequence[float]]
"""Log-likelihood (nats, summed over tokens) of each continuation after a prompt."""


def general_ability_delta(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Mean over benchmarks of after - before; negative is a loss.

    Raises:
        InputError: the benchmarks differ, or there are none.
    """
    if not before or before.keys() != after.keys():
        raise InputError(f"benchmarks before {sorted(before)!r} and after {sorted(after)!r} must be the same, and some")
    return float(np.mean([after[name] - before[name] for name in before]))


def item_prompt(item: GeneralItem) -> str:
    """The text an item's answers continue."""
    passage = f"{item.passage}\n\n" if item.passage else ""
    return f"{passage}Question: {item.question}\nAnswer:"


def continuations(item: GeneralItem) -> tuple[str, ...]:
    """The item's answers as they follow its prompt."""
    return tuple(f" {option}" for option in item.options)


@dataclass(frozen=True)
class GeneralScores:
    """Results of the items.

    correct: (I,) float64, 1 where the likeliest answer is right, by summed log-likelihood; a tie counts its share.
    correct_per_character: the same with the log-likelihood divided by the answer's length.  margin: (I,) log-odds of
    the right answer among the four, which moves before the choices do.
    """

    items: tuple[GeneralItem, ...]
    correct: np.ndarray
    correct_per_character: np.ndarray
    margin: np.ndarray

    def by_skill(self) -> dict[str, float]:
        """Accuracy of each skill, the form `general_ability_delta` takes."""
        skills = np.array([item.skill for item in self.items])
        return {skill: float(self.correct[skills == skill].mean()) for skill in dict.fromkeys(skills.tolist())}

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "n": len(self.items),
            "accuracy": float(self.correct.mean()),
            "accuracy_per_character": float(self.correct_per_character.mean()),
            "margin": float(self.margin.mean()),
            "by_skill": self.by_skill(),
        }


def score_general(log_likelihoods: LogLikelihoods, items: Sequence[GeneralItem] = GENERAL_ITEMS) -> GeneralScores:
    """Score every item with a model's likelihoods.

    Raises:
        InputError: the model gave another number of values than there are answers, or one that is not finite.
    """
    if not items:
        raise InputError("no items given; at least one is needed")
    correct, per_character, margin = [], [], []
    for item in items:
        answers = continuations(item)
        values = np.asarray(log_likelihoods(item_prompt(item), answers), dtype=np.float64)
        if values.shape != (len(answers),) or not np.isfinite(values).all():
            raise InputError(f"{item.question[:60]!r}: log-likelihoods {values.tolist()!r} for {len(answers)} answers")
        lengths = np.array([len(answer) for answer in answers])
        correct.append(_credit(values, item.correct))
        per_character.append(_credit(values / lengths, item.correct))
        others = np.delete(values, item.correct)
        margin.append(values[item.correct] - np.logaddexp.reduce(others))
    return GeneralScores(tuple(items), np.array(correct), np.array(per_character), np.array(margin))


def _credit(values: np.ndarray, right: int) -> float:
    """1 where the right answer is the only best one, a share where several are equally good, else 0."""
    best = values == values.max()
    return float(best[right] / best.sum())
