"""Does a model read the order of a history? Its metric and its user vectors with histories shuffled at test time.

A model that loses nothing, and whose user vectors stay where they were, takes a history for a set of items. Only what
the model reads is shuffled, the last `max_length` items: with more, it would also lose recent items to old ones.
Source: llmd4rec 7.18 (LLM-SRec, arXiv 2502.13909 [paper]: a conventional model loses 4 to 8 % of NDCG@10 at a cosine of
.65 to .75, prompted LLM recommenders lose about nothing at more than .93).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from recollect.data.examples import held_out_cases
from recollect.distill.llm_srec_ranker import LlmSRec
from recollect.distill.stages import Stage
from recollect.distill.workshop import Workshop
from recollect.eval.ranking import evaluate_ranker
from recollect.io import read_json, sha256_text, write_json
from recollect.rng import stream


class Shuffled:
    """A model that reads every history in a random order, fixed per history and seed."""

    def __init__(self, model: Any, seed: int) -> None:
        self.name, self.n_items = model.name, model.n_items
        self._model, self._seed = model, seed

    def score(self, histories: Sequence[np.ndarray], candidates: np.ndarray | None = None) -> np.ndarray:
        """As the model's own `score`."""
        return np.asarray(self._model.score(shuffled(histories, window_of(self._model), self._seed), candidates))


def window_of(model: Any) -> int:
    """How many items of a history the model reads: the last ones."""
    reader = model.frozen if isinstance(model, LlmSRec) else model
    return int(reader.config.max_length)


def shuffled(histories: Sequence[np.ndarray], window: int, seed: int) -> list[np.ndarray]:
    """Each history (T,) with its last `window` items in a random order; equal ends are ordered alike."""
    mixed = []
    for history in map(np.asarray, histories):
        start = max(0, len(history) - window)
        generator = stream(seed, "shuffled history", sha256_text(history[start:].tobytes().hex()))
        mixed.append(np.concatenate([history[:start], generator.permutation(history[start:])]))
    return mixed


def order_sensitivity(shop: Workshop, stage: Stage, load: Callable[[], Any], seed: int) -> dict[str, float]:
    """{"shuffled": the primary metric with shuffled histories, "cosine": mean over test cases of the cosine between
    the user vectors of a history in order and shuffled}, of the model `load` gives; kept beside its stage."""
    metric = shop.config.primary_metric
    path = stage.folder / f"shuffled-window-{metric.replace('@', '-')}.json"
    if not path.is_file():
        model = load()
        table = evaluate_ranker(
            Shuffled(model, seed), shop.dataset, shop.split, ks=shop.config.k, seed=seed, progress=shop.progress
        )
        histories = held_out_cases(shop.dataset, shop.split, "test").histories()
        cosine = user_cosine(model, histories, shuffled(histories, window_of(model), seed))
        write_json(path, {"shuffled": table.mean(metric), "cosine": cosine})
    found: dict[str, float] = read_json(path)
    return found


def user_cosine(model: Any, first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """Mean cosine between a model's user vectors of two lists of histories, pair by pair."""
    with torch.inference_mode():
        pair = (model.user_states(histories).float() for histories in (first, second))
        return float(cosine_similarity(*pair).mean())
