"""The two sides of a distillation under one face: what a half-round needs of a student or a teacher.

A sample is the position of its target in the users' sequences. Both sides read a window of items in one pass and give
a state per position; scores are products of states with item rows (`Factors`), so either can teach the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from recollect.data.examples import Sequences
from recollect.distill.factors import Factors, Shares
from recollect.distill.teachers import CachedStateTeacher, PopularityTeacher
from recollect.distill.weights import true_item_rank
from recollect.errors import ConfigError, InputError
from recollect.recommenders.llm_batches import reading_batches, windows_of
from recollect.recommenders.llm_sequential import LlmSequential
from recollect.recommenders.neural import NeuralRecommender
from recollect.recommenders.packing import Batch, EpochBatches, make_batch

READ_POSITIONS = 16_384  # conventional side: positions read at a time without training
READ_ROWS = 64  # LLM side: windows read at a time without training
READ_ROWS_ON_CPU = 32  # more leave the cache
CHUNK_SCORES = 2**22
SHARE_CELLS = 2**27  # a teacher's distributions are kept up to so many numbers
FULL_PRECISION_BYTES = 2**31  # larger caches of states are kept in bfloat16


class Learner(Protocol):
    """One side of a distillation."""

    recommender: Any

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        ...

    @property
    def n_items(self) -> int: ...

    def training(self, sequences: Sequences, seed: int) -> Callable[[int], Sequence[Any]]:
        """epoch -> batches of samples."""
        ...

    def reading(self, sequences: Sequences, wanted: np.ndarray) -> Sequence[Any]:
        """Batches that hold every wanted sample (E,) bool once, each seen with as much history as a window shows."""
        ...

    def factors(self, batch: Any) -> Factors:
        """States (M, D) of the batch's samples and item rows (N, D)."""
        ...


@dataclass(frozen=True)
class CrmBatch:
    """A jagged batch and which samples it predicts; pick: (M',) batch positions that are scored, None = all."""

    batch: Batch
    position: np.ndarray
    pick: Tensor | None = None

    def __len__(self) -> int:
        return len(self.position)

    @property
    def targets(self) -> Tensor:
        """(M,) int64."""
        assert self.batch.targets is not None
        return self.batch.targets if self.pick is None else self.batch.targets[self.pick]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CrmBatch:
        """The same batch on another device."""
        pick = None if self.pick is None else self.pick.to(device)
        return replace(self, batch=self.batch.to(torch.device(device)), pick=pick)


class CrmEpoch(Sequence[CrmBatch]):
    """A model's own training batches, with the samples each predicts."""

    def __init__(self, batches: EpochBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        own = self._batches
        batch = own[index]
        chosen = own.order[index * own.batch_size : (index + 1) * own.batch_size]
        falling = chosen[np.argsort(own.begin[chosen] - own.end[chosen], kind="stable")]
        position = np.concatenate([np.arange(own.begin[row], own.end[row]) for row in falling]) + 1
        return CrmBatch(batch, position)


class Crm:
    """The conventional side: any causal sequence model of the toolkit."""

    def __init__(self, recommender: NeuralRecommender) -> None:
        if not recommender.windows_with_targets or not callable(getattr(recommender.module, "forward", None)):
            raise ConfigError(
                f"{recommender.name!r} does not predict every position of a history; use sasrec or gru4rec"
            )
        if getattr(recommender, "reads_times", False):
            raise ConfigError(f"{recommender.name!r} reads the times of events, which a distillation does not pass on")
        self.recommender = recommender

    @property
    def module(self) -> nn.Module:
        return self.recommender.module

    @property
    def n_items(self) -> int:
        return self.recommender.n_items

    def training(self, sequences: Sequences, seed: int) -> Callable[[int], CrmEpoch]:
        config = replace(self.recommender.config, seed=seed)
        batches = type(self.recommender)(config).batches(sequences)
        return lambda epoch: CrmEpoch(batches(epoch))

    def reading(self, sequences: Sequences, wanted: np.ndarray) -> list[CrmBatch]:
        length = self.recommender.config.max_length
        windows = windows_of(sequences, length, max(1, length // 2))
        order = np.argsort(windows.begin - windows.end, kind="stable")
        step = max(1, READ_POSITIONS // length)
        found = []
        for low in range(0, len(order), step):
            begin, scored, end = (column[order[low : low + step]] for column in windows)
            inputs = np.concatenate([np.arange(first, last) for first, last in zip(begin, end, strict=True)])
            is_scored = inputs >= np.repeat(scored, end - begin)
            pick = np.flatnonzero(is_scored & wanted[inputs + 1])
            if len(pick):
                items = sequences.items.astype(np.int64, copy=False)
                batch = make_batch(items[inputs], end - begin, items[inputs + 1])
                found.append(CrmBatch(batch, inputs[pick] + 1, torch.from_numpy(pick)))
        return found

    def factors(self, batch: CrmBatch) -> Factors:
        state = self.module(batch.batch)
        return Factors(state if batch.pick is None else state[batch.pick], self.recommender.module.item_vectors())


class Llm:
    """The LLM side."""

    def __init__(self, recommender: LlmSequential) -> None:
        if recommender.module is None:
            raise InputError("the LLM recommender has no weights yet; build or fit it first")
        self.recommender = recommender

    @property
    def module(self) -> Any:
        return self.recommender.module

    @property
    def n_items(self) -> int:
        return self.recommender.n_items

    def training(self, sequences: Sequences, seed: int) -> Callable[[int], Sequence[Any]]:
        return self.recommender.batches(sequences, seed)

    def reading(self, sequences: Sequences, wanted: np.ndarray) -> Sequence[Any]:
        config = self.recommender.config
        return reading_batches(
            sequences,
            wanted,
            supervision=config.supervision,
            max_length=config.max_length,
            batch_size=READ_ROWS_ON_CPU if self.module.head.weight.device.type == "cpu" else READ_ROWS,
        )

    def factors(self, batch: Any) -> Factors:
        return Factors(self.module.states(batch), self.module.head.weight)


def wrap(recommender: Any) -> Crm | Llm:
    """The learner of a recommender."""
    return Llm(recommender) if isinstance(recommender, LlmSequential) else Crm(recommender)


def trained_samples(learner: Learner, sequences: Sequences) -> np.ndarray:
    """(E,) bool, the samples one epoch of this side's training holds."""
    wanted = np.zeros(len(sequences.items), dtype=bool)
    epoch = learner.training(sequences, 0)(0)
    for index in range(len(epoch)):
        wanted[epoch[index].position] = True
    return wanted


def states_of(learner: Learner, sequences: Sequences, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, Factors]]:
    """(positions (m,), factors) of all wanted samples, batch by batch, in eval mode and without gradient."""
    learner.module.eval()
    device = next(learner.module.parameters()).device
    for batch in learner.reading(sequences, wanted):
        with torch.no_grad():
            factors = learner.factors(batch.to(device)).detach()
        yield batch.position, factors


def ranks_of(learner: Learner, sequences: Sequences, wanted: np.ndarray) -> np.ndarray:
    """(E,) float32 1-based rank of the true item of every wanted sample; NaN elsewhere."""
    ranks = np.full(len(sequences.items), np.nan, dtype=np.float32)
    for position, factors in states_of(learner, sequences, wanted):
        ranks[position] = _ranks(factors, sequences.items[position])
    return ranks


def _ranks(factors: Factors, target: np.ndarray) -> np.ndarray:
    found = np.empty(len(target), dtype=np.float32)
    own = torch.from_numpy(np.asarray(target, dtype=np.int64)).to(factors.state.device)
    step = max(16, CHUNK_SCORES // len(factors.items))
    for low in range(0, len(target), step):
        part = slice(low, low + step)
        with torch.no_grad():
            found[part] = true_item_rank(factors.block(part, slice(None)), own[part]).cpu().numpy()
    return found


class SampleTeacher:
    """A frozen teacher of training samples, with its ranks of their true items.

    Args:
        source: factors or logits by row number.
        row: (E,) int64, the row of each sample; -1 where it has none.
        rank: (E,) float32, NaN where it has none.
    """

    def __init__(self, source: CachedStateTeacher | PopularityTeacher, row: np.ndarray, rank: np.ndarray) -> None:
        self.source, self.row, self.rank = source, row, rank
        self.n_items = source.n_items
        self._shares: Shares | None = None

    @classmethod
    def cached(cls, folder: Path, teacher: Learner, sequences: Sequences, wanted: np.ndarray) -> Self:
        """Run the teacher once over the wanted samples and keep its states in `folder`.

        States are float32 up to 2 GiB, bfloat16 beyond.
        """
        row = np.full(len(wanted), -1, dtype=np.int64)
        rank = np.full(len(wanted), np.nan, dtype=np.float32)
        with torch.no_grad():
            items = _item_rows(teacher)
        count = int(wanted.sum())

        def states() -> Iterator[Tensor]:
            seen = 0
            for position, factors in states_of(teacher, sequences, wanted):
                row[position] = np.arange(seen, seen + len(position))
                rank[position] = _ranks(factors, sequences.items[position])
                seen += len(position)
                yield factors.state

        precise = count * items.shape[1] * 4 <= FULL_PRECISION_BYTES
        source = CachedStateTeacher.write(
            folder,
            states(),
            items,
            n_samples=count,
            precision="fp32" if precise else "bf16",
            device=items.device,
        )
        return cls(source, row, rank)

    def take(self, position: np.ndarray) -> Factors | Tensor:
        """What teaches some samples.

        Raises:
            InputError: a sample the teacher was not asked about.
        """
        rows = self._rows(position)
        if isinstance(self.source, CachedStateTeacher):
            return self.source.factors(rows)
        return self.source.logits(rows)

    def take_often(self, position: np.ndarray, temperature: float) -> Factors | Tensor | Shares:
        """As `take`, for samples that are gone through in several epochs at one temperature: where all distributions
        together take up to 512 MB, they are made once."""
        if not isinstance(self.source, CachedStateTeacher) or len(self.source) * self.n_items > SHARE_CELLS:
            return self.take(position)
        if self._shares is None or self._shares.temperature != temperature:
            self._shares = _all_shares(self.source, temperature)
        rows = torch.from_numpy(self._rows(position)).to(self._shares.share.device)
        return Shares(self._shares.share[rows], self._shares.log_mass[rows], temperature)

    def _rows(self, position: np.ndarray) -> np.ndarray:
        rows = self.row[position]
        if (rows < 0).any():
            raise InputError(f"the teacher was not asked about the sample at position {int(position[rows < 0][0])}")
        return rows


def _all_shares(source: CachedStateTeacher, temperature: float) -> Shares:
    step = max(16, CHUNK_SCORES // source.n_items)
    device = source.factors(np.arange(1)).state.device
    share = torch.empty(len(source), source.n_items, device=device)
    log_mass = torch.empty(len(source), device=device)
    for low in range(0, len(source), step):
        rows = np.arange(low, min(low + step, len(source)))
        share[low : low + step], log_mass[low : low + step], _ = Shares.of(
            source.factors(rows).block(slice(None), slice(None)), temperature
        )
    return Shares(share, log_mass, temperature)


class KeptStates:
    """Reads a frozen teacher once for several half-rounds over the same samples."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: tuple[np.ndarray, SampleTeacher] | None = None

    def __call__(self, teacher: Learner, sequences: Sequences, wanted: np.ndarray) -> SampleTeacher:
        """As `SampleTeacher.cached`; always of the same teacher and sequences."""
        if self._found is None or not np.array_equal(self._found[0], wanted):
            self._found = wanted, SampleTeacher.cached(self.folder, teacher, sequences, wanted)
        return self._found[1]

    @property
    def rank(self) -> np.ndarray | None:
        """(E,) float32 the teacher's ranks of the true items, NaN where it was not asked; None before it was read."""
        return None if self._found is None else self._found[1].rank


def constant_teacher(counts: np.ndarray, sequences: Sequences, smoothing: float = 1.0) -> SampleTeacher:
    """The controls: a teacher of popularity, or of nothing (zero counts: label smoothing)."""
    share = (np.asarray(counts, dtype=np.float64) + smoothing)[sequences.items]
    log_mass = np.asarray(counts, dtype=np.float64) + smoothing
    above = np.sort(log_mass)
    greater = len(above) - np.searchsorted(above, share, "right")
    equal = np.searchsorted(above, share, "right") - np.searchsorted(above, share, "left") - 1
    rank = (greater + 1 + equal / 2).astype(np.float32)
    return SampleTeacher(PopularityTeacher(counts, smoothing), np.zeros(len(rank), dtype=np.int64), rank)


def _item_rows(learner: Learner) -> Tensor:
    module: Any = learner.module
    return (module.head.weight if isinstance(learner, Llm) else module.item_vectors()).detach()


def require_same_items(student: Learner, teacher: Learner | SampleTeacher) -> None:
    """Refuse a teacher of another catalogue, by size or by the data it was fitted on.

    Raises:
        InputError: columns of the two models do not name the same items.
    """
    if student.n_items != teacher.n_items:
        raise InputError(
            f"the teacher scores {teacher.n_items} items, the student {student.n_items}: they were fitted on other "
            "item vocabularies; fit both on the same data"
        )
    data = getattr(student.recommender, "data", ""), getattr(getattr(teacher, "recommender", None), "data", "")
    if all(data) and data[0] != data[1]:
        raise InputError(
            f"the teacher was fitted on data {data[1][:12]}…, the student on {data[0][:12]}…: "
            "column j of the two is not the same item; fit both on the same data"
        )


def weights_hash(module: nn.Module, trained: bool) -> str:
    """SHA-256 over the parameters that are trained, or over those that are frozen, buffers included."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        if tensor.requires_grad == trained:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
