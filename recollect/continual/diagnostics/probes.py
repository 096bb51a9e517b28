"""Which factor of a token can be read from the router's input, and from which slice of it: logistic probes.

A probe that reads a factor from one slice alone says that a private router there could separate its values.
Source: moe_lora 4.1, 5.3 (balanced accuracy, chance-corrected); standardisation, regularisation and split are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from recollect.continual.diagnostics.factors import ABSENT

LEAST_PER_CLASS = 10
STRENGTH = 0.1
"""Inverse strength of the L2 penalty on standardised inputs."""


def factor_probes(
    inputs: np.ndarray, n_slices: int, factors: Mapping[str, np.ndarray], prompts: np.ndarray
) -> list[dict[str, Any]]:
    """Probes of every factor from the whole input and from each slice.

    Prompts with an even number train, those with an odd number test, so no prompt is on both sides.

    Args:
        inputs: (m, d) router inputs of tokens.
        n_slices: H, which divides d.
        factors: {name: (m,) values, `ABSENT` = leave the token out}.
        prompts: (m,) number of the prompt of each token's example.

    Returns:
        Per factor and part {"factor", "slice": None = the whole, "value": (balanced accuracy − 1/K) / (1 − 1/K) on
        the test half, 0 = chance, 1 = always right, "classes": K, "train", "test": tokens}; "value" None where fewer
        than two values occur ten times on both sides.
    """
    found = []
    width = inputs.shape[1] // n_slices
    parts: list[tuple[int | None, np.ndarray]] = [(None, inputs)]
    if n_slices > 1:
        parts += [(part, inputs[:, part * width : (part + 1) * width]) for part in range(n_slices)]
    for name, values in factors.items():
        train, test, n_classes = _halves(values, prompts)
        for part, columns in parts:
            value = None
            if n_classes > 1:
                accuracy = _balanced_accuracy(columns[train], values[train], columns[test], values[test])
                value = (accuracy - 1 / n_classes) / (1 - 1 / n_classes)
            sizes = {"classes": n_classes, "train": int(train.sum()), "test": int(test.sum())}
            found.append({"factor": name, "slice": part, "value": value, **sizes})
    return found


def _halves(values: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Training and test tokens (m,) bool of the values that occur often enough in both, and how many values."""
    even = prompts % 2 == 0
    classes = [
        value
        for value in np.unique(values)
        if value != ABSENT and min((values[even] == value).sum(), (values[~even] == value).sum()) >= LEAST_PER_CLASS
    ]
    kept = np.isin(values, classes)
    return even & kept, ~even & kept, len(classes)


def _balanced_accuracy(train: np.ndarray, train_values: np.ndarray, test: np.ndarray, test_values: np.ndarray) -> float:
    """Mean over classes of the share of test tokens named rightly."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, scale = train.mean(axis=0), train.std(axis=0)
    scale = np.where(scale > 1e-8, scale, 1.0)
    probe = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=200, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe one step short of its optimum is as good
        probe.fit((train - mean) / scale, train_values)
    right = probe.predict((test - mean) / scale) == test_values
    return float(np.mean([right[test_values == value].mean() for value in np.unique(test_values)]))
