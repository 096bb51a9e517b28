"""An LLM recommender whose answers to the same histories are wanted several times: it reads each of them once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recollect.recommenders.closed_form import check_question, of_candidates
from recollect.recommenders.llm_sequential import LlmSequential


class ReadOnce:
    """Keeps the user vector of every history it was asked about, by the items the model reads of it.

    Masks, cut-offs and cosines then cost no further pass through the decoder. Scores equal the model's own up to the
    rounding of batches of other sizes.
    """

    def __init__(self, model: LlmSequential) -> None:
        self.name, self.n_items, self.config = model.name, model.n_items, model.config
        self._model = model
        self._states: dict[bytes, Tensor] = {}

    def user_states(self, histories: Sequence[np.ndarray]) -> Tensor:
        """As `LlmSequential.user_states`."""
        window = self.config.max_length
        keys = [np.asarray(history[-window:], dtype=np.int64).tobytes() for history in histories]
        new = {key: history for key, history in zip(keys, histories, strict=True) if key not in self._states}
        self._states |= dict(zip(new, self._model.user_states(list(new.values())), strict=True))
        return torch.stack([self._states[key] for key in keys])

    def score(self, histories: Sequence[np.ndarray], candidates: np.ndarray | None = None) -> np.ndarray:
        """As `LlmSequential.score`."""
        check_question(self.name, self.n_items, histories, candidates)
        assert self._model.module is not None
        with torch.inference_mode():
            scores = (self.user_states(histories) @ self._model.module.head.weight.T).cpu().numpy()
        return of_candidates(scores, candidates)
