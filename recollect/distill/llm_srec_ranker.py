"""LLM-SRec's heads as a recommender: a frozen LLM recommender, and two small perceptrons behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from recollect.data.examples import Cases
from recollect.distill.llm_srec import Heads
from recollect.errors import ModelFileError
from recollect.eval.metrics import ndcg, rank_counts
from recollect.eval.statistics import cluster_codes
from recollect.io import atomic_open, read_json, write_json
from recollect.recommenders.closed_form import check_question, of_candidates
from recollect.recommenders.llm_sequential import LlmSequential
from recollect.recommenders.neural import SCORE_CELLS
from recollect.rng import call_seed, stream


class Prepared(NamedTuple):
    """Validation cases as `LlmSRec` reads them: states (M, D), histories, targets (M,), what each counts for (M,)."""

    states: Tensor
    histories: list[np.ndarray]
    target: np.ndarray
    share: np.ndarray


class LlmSRec:
    """Scores by inner products after the heads.

    Args:
        frozen: the LLM recommender that reads histories.
        collaborative_width: of the conventional model's user vectors the heads are trained towards.
        source: folder of the frozen recommender; the heads are saved with its path relative to theirs, not with a copy,
            so that a folder which holds both may move.
    """

    name: ClassVar[str] = "llm-srec"

    def __init__(self, frozen: LlmSequential, *, collaborative_width: int, seed: int, source: str) -> None:
        assert frozen.module is not None
        self.frozen, self.source = frozen, source
        self.collaborative_width, self.seed = collaborative_width, seed
        self.n_items, self.data = frozen.n_items, frozen.data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(call_seed(seed, "llm-srec", "initial weights"))
            self.module = Heads(frozen.module.head.in_features, collaborative_width)

    def score(self, histories: Sequence[np.ndarray], candidates: np.ndarray | None = None) -> np.ndarray:
        """(B, n_items) or (B, C) float32."""
        check_question(self.name, self.n_items, histories, candidates)
        return of_candidates(self._logits(self.frozen.user_states(histories)), candidates)

    def score_batches(self, histories: Sequence[np.ndarray]) -> Iterator[tuple[slice, np.ndarray]]:
        """Full-catalogue scores (C, n_items) of consecutive histories, as (rows, scores)."""
        states = self.frozen.user_states(histories)
        rows = max(1, SCORE_CELLS // self.n_items)
        for low in range(0, len(histories), rows):
            part = slice(low, min(low + rows, len(histories)))
            yield part, self._logits(states[part])

    def user_states(self, histories: Sequence[np.ndarray]) -> Tensor:
        """(B, d) vector of each history after the head of users; eval mode, no gradient."""
        states = self.frozen.user_states(histories)
        with torch.inference_mode():
            return self.module.eval().user(states)

    def _logits(self, states: Tensor) -> np.ndarray:
        assert self.frozen.module is not None
        self.module.eval()
        with torch.inference_mode():
            return self.module.logits(states, self.frozen.module.head.weight).cpu().numpy()

    def prepared(self, cases: Cases) -> Prepared:
        """The frozen model's states of validation cases, one per target; users weigh alike."""
        index = np.repeat(np.arange(len(cases)), cases.last - cases.first)
        histories = cases.histories(index)
        codes, _ = cluster_codes(cases.user[index])
        share = 1.0 / np.bincount(codes)[codes]
        return Prepared(self.frozen.user_states(histories).clone(), histories, np.concatenate(cases.targets()), share)

    def prepared_ndcg(self, prepared: Prepared, k: int = 10) -> float:
        """As `recollect.recommenders.neural.validation_ndcg`, over prepared cases."""
        states, histories, target, share = prepared
        total = 0.0
        for low in range(0, len(target), 512):
            part = slice(low, low + 512)
            scores, own = self._logits(states[part]), histories[part]
            of_target = scores[np.arange(len(own)), target[part]]
            scores[np.repeat(np.arange(len(own)), [len(history) for history in own]), np.concatenate(own)] = -np.inf
            scores[np.arange(len(own)), target[part]] = of_target
            total += float((ndcg(*rank_counts(scores, target[part]), k) * share[part]).sum())
        return total / float(share.sum())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the heads and where the frozen model is."""
        from safetensors.torch import save

        folder = Path(folder)
        with atomic_open(folder / "model.safetensors", "wb") as handle:
            handle.write(save({name: tensor.contiguous() for name, tensor in self.module.state_dict().items()}))
        source = Path(os.path.relpath(self.source, folder)).as_posix()
        content = {"kind": self.name, "source": source, "seed": self.seed, "width": self.collaborative_width}
        write_json(folder / "config.json", content)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The inverse of `save_pretrained`.

        Raises:
            ModelFileError: the folder holds something else, or the frozen model is gone.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        content: dict[str, Any] = read_json(folder / "config.json")
        if content.get("kind") != cls.name:
            raise ModelFileError(
                f"{folder} holds a model of kind {content.get('kind')!r} where {cls.name!r} is expected"
            )
        source = Path(os.path.normpath(folder / content["source"]))
        if not source.is_dir():
            raise ModelFileError(
                f"the LLM recommender that {folder} was trained on is not at {str(source)!r}; train again"
            )
        frozen = LlmSequential.from_pretrained(source)
        model = cls(frozen, collaborative_width=content["width"], seed=content["seed"], source=str(source))
        model.module.load_state_dict(load_file(folder / "model.safetensors"))
        return model


def shuffled_samples(
    user: Tensor, taught: Tensor, target: Tensor, batch_size: int, seed: int, epoch: int
) -> list[dict[str, Tensor]]:
    """The batches of an epoch: all samples in an order drawn from (seed, epoch), the rest below two left out."""
    order = torch.from_numpy(stream(seed, "llm-srec", epoch).permutation(len(target)))
    return [
        {"user": user[part], "taught": taught[part], "target": target[part]}
        for part in order.split(batch_size)
        if len(part) > 1
    ]
