"""What the models trained by gradient share: fit with early stopping, scoring in batches, files.

A model is a torch module with three methods (`SequenceModule`) and a config; `NeuralRecommender` makes it a
`Recommender`.  A padding row exists in no model: batches are jagged (`recollect.recommenders.packing`).
An empty history has the zero vector as its user, so every item scores 0 (a bias excepted) and ties with every other.

Not covered: the training loop itself (`recollect.loop`), metrics (`recollect.eval`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from recollect.config import to_dict
from recollect.data.examples import Cases, Sequences, held_out_cases, training_sequences
from recollect.errors import ConfigError, InputError, ModelFileError
from recollect.eval.metrics import ndcg, rank_counts
from recollect.eval.protocol import data_fingerprint
from recollect.eval.statistics import cluster_codes
from recollect.loop import LoopResult, train
from recollect.progress import Progress
from recollect.recommenders.closed_form import check_question, fitted_rows, load_folder, save_folder
from recollect.recommenders.configs import NeuralConfig
from recollect.recommenders.losses import next_item_loss, starting_offset
from recollect.recommenders.packing import Batch, TrainingBatches, history_batches
from recollect.rng import call_seed
from recollect.tracking import Tracker
from recollect.types import Dataset, Split

SCORE_POSITIONS = 16384  # positions encoded at a time when scoring
SCORE_CELLS = 2**22  # scores held at a time when validating (16 MB)


@runtime_checkable
class SequenceModule(Protocol):
    """What a torch module must offer to be a recommender; column j of every score is item j."""

    def training_loss(self, batch: Batch) -> Tensor:
        """() mean loss of a training batch."""
        ...

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, D) what stands for each history of the batch after its last item."""
        ...

    def item_vectors(self) -> Tensor:
        """(n_items, D); the score of an item is its product with the user's vector."""
        ...


class CausalModule(nn.Module):
    """A `SequenceModule` whose state at every position predicts the item after it; a model gives `forward`.

    config: with `hidden` and `loss` (`recollect.recommenders.losses.next_item_loss`).  items: the embedding of items,
    read and scored with.  offset: (1,) added to every score in training (`starting_offset`), None under most losses.
    """

    offset: nn.Parameter | None

    def __init__(self, config: Any, n_items: int) -> None:
        super().__init__()
        self.config = config
        self.items = nn.Embedding(n_items, config.hidden)
        start = starting_offset(config, n_items)
        self.register_parameter("offset", None if start is None else nn.Parameter(torch.tensor([start])))

    def training_loss(self, batch: Batch) -> Tensor:
        """() mean loss over all positions."""
        return next_item_loss(self.config, self(batch), self.item_vectors(), batch.targets, self.offset)

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, D) the state after the last item."""
        return self(batch)[batch.last]

    def item_vectors(self) -> Tensor:
        """(n_items, D)."""
        return self.items.weight


class NeuralRecommender:
    """A sequence module as a `Recommender`; a model's file names its config and module.

    Attributes:
        module: the torch module; None before `fit` or `from_pretrained`.
        result: how training went; None for a loaded model.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[NeuralConfig]]
    module_class: ClassVar[Any]
    windows_with_targets: ClassVar[bool] = True
    min_items: ClassVar[int] = 2

    def __init__(self, config: Any = None) -> None:
        self.config = self.config_class() if config is None else config
        self.n_items = 0
        self.data = ""
        self.module: Any = None
        self.result: LoopResult | None = None

    @property
    def reads_times(self) -> bool:
        """Its `score` must be told when the items of a history were, see `score`."""
        return False

    def build(self, n_items: int) -> nn.Module:
        """A module with fresh weights drawn from the config's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(call_seed(self.config.seed, self.name, "initial weights"))
            return self.module_class(self.config, n_items)

    def batches(self, sequences: Sequences) -> TrainingBatches:
        """The training batches of this model."""
        return TrainingBatches(
            sequences,
            max_length=self.config.max_length,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            with_targets=self.windows_with_targets,
            min_items=self.min_items,
            with_times=self.reads_times,
        )

    def fit(
        self,
        dataset: Dataset,
        split: Split | None = None,
        *,
        rows: np.ndarray | None = None,
        folder: Path | None = None,
        checkpoint_every: int | None = None,
        tracker: Tracker | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Train on `rows` (default the split's training rows); with a split, keep the epoch best on validation.

        Args:
            folder: where checkpoints live; a run found there is continued.
            checkpoint_every: optimiser steps between checkpoints inside an epoch.

        Raises:
            InputError: no sequence is long enough.
            ConfigError: the model reads times, and the data have no clock.
            TrainingDiverged: a loss became NaN or infinite.
        """
        if self.reads_times and dataset.clock != "unix":
            raise ConfigError(
                f"{self.name!r} as configured reads the times of events, and {dataset.name!r} has no clock; "
                "leave time_bias off"
            )
        sequences = training_sequences(dataset, fitted_rows(dataset, split, rows))
        batches = self.batches(sequences)
        module = self.build(dataset.n_items)
        self.module, self.n_items, self.data = module, dataset.n_items, data_fingerprint(dataset)
        cases = None if split is None else held_out_cases(dataset, split, "valid")
        validate = None if cases is None or not len(cases) else lambda: validation_ndcg(self, cases)
        self.result = train(
            module,
            batches=batches,
            loss=module.training_loss,  # type: ignore[arg-type]
            config=self.config.loop,
            validate=validate,
            folder=folder,
            checkpoint_every=checkpoint_every,
            tracker=tracker,
            progress=progress,
            identity=training_identity(self, sequences, cases, *self.frozen_inputs()),
        )
        return self

    def score(
        self,
        histories: Sequence[np.ndarray],
        candidates: np.ndarray | None = None,
        *,
        times: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """Score candidates (B, C), or every item where None, for histories (T,) oldest first.

        Only the last `max_length` items of a history are read.

        Args:
            times: Unix seconds (T,) int64 of each history's items; needed where `reads_times`, else not looked at.

        Returns:
            (B, C) or (B, n_items) float32.

        Raises:
            InputError: not fitted, an item the model does not know, or times are missing or of another length.
        """
        check_question(self.name, self.n_items, histories, candidates)
        with torch.inference_mode():
            users = self._users(histories, times)
            items = self.module.item_vectors()
            if candidates is None:
                return (users @ items.T).float().cpu().numpy()
            chosen = torch.from_numpy(np.ascontiguousarray(candidates, dtype=np.int64)).to(items.device)
            scores = np.empty(candidates.shape, dtype=np.float32)
            rows = max(1, SCORE_CELLS // max(1, chosen.shape[1] * items.shape[1]))
            for low in range(0, len(chosen), rows):
                part = slice(low, low + rows)
                scores[part] = torch.bmm(items[chosen[part]], users[part, :, None]).squeeze(2).float().cpu().numpy()
            return scores

    def user_states(self, histories: Sequence[np.ndarray], times: Sequence[np.ndarray] | None = None) -> Tensor:
        """(B, D) vector of each history, which is cut to its last `max_length` items; eval mode, no gradient."""
        with torch.inference_mode():
            return self._users(histories, times)

    def _users(self, histories: Sequence[np.ndarray], times: Sequence[np.ndarray] | None) -> Tensor:
        """(B, D) user vectors."""
        times = self._checked_times(histories, times)
        module = self.module.eval()
        items = module.item_vectors()
        users = self.empty_user(items).repeat(len(histories), 1)
        for rows, batch in history_batches(self.read(histories), self.config.max_length, SCORE_POSITIONS, times):
            users[torch.from_numpy(rows)] = module.user_vectors(batch.to(items.device))
        return users

    def _checked_times(
        self, histories: Sequence[np.ndarray], times: Sequence[np.ndarray] | None
    ) -> Sequence[np.ndarray] | None:
        if not self.reads_times:
            return None
        if times is None or [len(row) for row in times] != [len(row) for row in histories]:
            raise InputError(
                f"{self.name!r} as configured reads the times of events: score(histories, times=...) needs one array "
                "per history, of its length"
            )
        return times

    def read(self, histories: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """What the module is given for each history; itself, unless a model marks where it is to predict."""
        return histories

    def frozen_inputs(self) -> Sequence[np.ndarray]:
        """What training reads beside the log and the options, such as text vectors; a checkpoint tells them apart."""
        return ()

    def empty_user(self, items: Tensor) -> Tensor:
        """(D,) vector of a user without history, given the item vectors (N, D): zero."""
        return items.new_zeros(items.shape[1])

    def score_batches(
        self, histories: Sequence[np.ndarray], times: Sequence[np.ndarray] | None = None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Full-catalogue scores (C, n_items) of consecutive histories, never all at once, as (rows, scores)."""
        rows = max(1, SCORE_CELLS // self.n_items)
        with torch.inference_mode():
            users, items = self._users(histories, times), self.module.item_vectors()
        for low in range(0, len(histories), rows):
            part = slice(low, min(low + rows, len(histories)))
            with torch.inference_mode():
                scores = (users[part] @ items.T).float().cpu().numpy()
            yield part, scores

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, each atomically.

        Raises:
            InputError: the model is not fitted.
            StorageRefused: the disk refused.
        """
        arrays = {}
        if self.module is not None:
            arrays = {name: tensor.detach().cpu().numpy() for name, tensor in self.module.state_dict().items()}
        save_folder(folder, kind=self.name, options=self.config, n_items=self.n_items, data=self.data, arrays=arrays)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The inverse of `save_pretrained`; scores are identical.

        Raises:
            ModelFileError: a file is missing, changed, of another kind or of other shapes.
            ConfigError: its options are not ones of this version.
        """
        config, content, arrays = load_folder(folder, cls.name, cls.config_class)
        model = cls(config)
        model.n_items, model.data = int(content["n_items"]), str(content["data_fingerprint"])
        model.module = model.build(model.n_items)
        expected = {name: tuple(tensor.shape) for name, tensor in model.module.state_dict().items()}
        found = {name: array.shape for name, array in arrays.items()}
        if expected != found:
            differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise ModelFileError(f"{folder} does not hold the weights its config.json describes: {differing[0]!r}")
        model.module.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
        model.module.eval()
        return model


def training_identity(
    recommender: Any, sequences: Sequences, cases: Cases | None, *frozen: np.ndarray
) -> dict[str, Any]:
    """What tells a training run from others beside the loop's options: the model, what it is trained on, and the cases
    its best epoch is chosen on.  A checkpoint of another identity is not continued.

    Args:
        recommender: with `name`, `data` (a fingerprint) and `config`.
        cases: of the validation; None = none.
        frozen: what else training reads.
    """
    chosen_on = [] if cases is None else [cases.start, cases.end, cases.first, cases.last]
    read = [sequences.starts, sequences.items]
    if getattr(recommender, "reads_times", False):
        assert sequences.time is not None  # its batches were built with times
        read.append(sequences.time)
    return {
        "model": recommender.name,
        "data": recommender.data,
        "rows": _digest(*read),
        "chosen_on": _digest(*chosen_on),
        "frozen_inputs": _digest(*frozen),
        **to_dict(recommender.config),
    }


def _digest(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def validation_ndcg(recommender: NeuralRecommender, cases: Cases, k: int = 10) -> float:
    """Mean over users of their mean NDCG@k: full ranking of the log's items, the history's masked, never the target.

    Users weigh alike however many cases they have (global temporal split), as in the tables of `recollect.eval`.  A
    case with several targets counts each of them as one case of its own.
    """
    per_case = cases.last - cases.first
    index = np.repeat(np.arange(len(cases)), per_case)
    target = np.concatenate(cases.targets())
    histories = cases.histories(index)
    if not len(histories):
        raise InputError("there is no validation case; use another split, or none")
    absent = np.flatnonzero(np.bincount(cases.item, minlength=recommender.n_items) == 0)
    codes, n_users = cluster_codes(cases.user[index])
    weight = 1.0 / np.bincount(codes)[codes]
    total = 0.0
    clock = [cases.times(index)] if getattr(recommender, "reads_times", False) else []
    for part, scores in recommender.score_batches(histories, *clock):
        own, target_part = histories[part], target[part]
        row = np.repeat(np.arange(len(own)), [len(history) for history in own])
        of_target = scores[np.arange(len(own)), target_part]
        scores[row, np.concatenate(own)] = -np.inf
        scores[:, absent] = -np.inf
        scores[np.arange(len(own)), target_part] = of_target
        total += float((ndcg(*rank_counts(scores, target_part), k) * weight[part]).sum())
    return total / n_users
