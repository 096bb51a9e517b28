"""Half-rounds of LLMD4Rec: one side frozen, the other trained towards the labels and the frozen side's distribution.

A half-round is a pure function of (student weights, teacher weights, samples, options): the teacher is read once and
its states cached, ranks that stay fixed are known before the first step, and the training loop resumes exactly, so a
killed half-round repeats itself.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from recollect.data.examples import Cases, Sequences
from recollect.distill.fused import fused_distillation_loss
from recollect.distill.learners import (
    KeptStates,
    Learner,
    SampleTeacher,
    ranks_of,
    require_same_items,
    states_of,
    trained_samples,
    weights_hash,
)
from recollect.distill.weights import sample_weights, true_item_rank
from recollect.errors import ConfigError
from recollect.loop import LoopConfig, LoopResult, train
from recollect.progress import Progress
from recollect.recommenders.losses import cross_entropy
from recollect.recommenders.neural import validation_ndcg
from recollect.rng import stream

RankSource = Literal["static", "online", "round_start", "crossfit"]
WEIGHT_USERS = 100  # whose samples the statistics of the weights are taken from
WEIGHT_BINS = 20


@dataclass(frozen=True)
class Strength:
    """temperature: T.  strength: lambda.  ranks: where the sample weights come from; "static" is w = 1."""

    temperature: float = 2.0
    strength: float = 0.5
    ranks: RankSource = "online"
    t_squared: bool = True


LABELS_ONLY = Strength(temperature=1.0, strength=0.0, ranks="static")
"""Of a half-round without a teacher."""


@dataclass(frozen=True)
class CrossfitRanks:
    """Ranks (E,) float32 of the true items of training samples under models that were not fitted on them."""

    crm: np.ndarray
    llm: np.ndarray


def train_half(
    student: Learner,
    teacher: Learner | SampleTeacher | None,
    sequences: Sequences,
    *,
    how: Strength,
    loop: LoopConfig,
    scratch: Path,
    read: KeptStates | None = None,
    fixed_ranks: tuple[np.ndarray, np.ndarray] | None = None,
    validation: Cases | None = None,
    folder: Path | None = None,
    checkpoint_every: int | None = None,
    progress: Progress | None = None,
) -> LoopResult:
    """Train the student in place; the teacher is only read.

    Args:
        teacher: None where `how` has strength 0.
        read: reads the teacher for several half-rounds; None = for this one.
        fixed_ranks: (student's, teacher's) ranks (E,) for cross-fitted weights.
        scratch: the teacher's states are kept here while the half-round lasts.
        validation: cases by whose NDCG@10 the best epoch is chosen; None keeps the last.
        folder: of checkpoints; a half-round found there is continued if it is this one.

    Raises:
        InputError: the teacher scores other items than the student.
        ConfigError: cross-fitted weights without their ranks.
        ResumeRefused: `folder` holds a half-round under another teacher or other options.
        TrainingDiverged: a loss or weight became NaN or infinite.
    """
    if teacher is not None:
        require_same_items(student, teacher)
    weight_of: Callable[[np.ndarray], dict[str, Tensor]]
    if how.strength == 0:
        return train(
            student.module,
            batches=student.training(sequences, loop.seed),
            loss=lambda batch: cross_entropy(*student.factors(batch)[:2], batch.targets),
            config=loop,
            validate=_validator(student, validation),
            folder=folder,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
    if teacher is None:
        raise ConfigError(f"a half-round of strength {how.strength!r} needs a teacher")
    wanted = trained_samples(student, sequences)
    # Before the teacher is wrapped: a checkpoint under another teacher or other weights is not continued.
    identity = {"how": asdict(how), "teacher": _teacher_identity(teacher)}
    try:
        if not isinstance(teacher, SampleTeacher):
            if progress is not None:
                progress.stage("reading the teacher")
            teacher = (read or KeptStates(scratch))(teacher, sequences, wanted)
        known = teacher
        weight_of = _weights(student, known, sequences, wanted, how, fixed_ranks)

        def loss(batch: Any) -> Tensor:
            if loop.epochs > 1:
                taught = known.take_often(batch.position, how.temperature)
            else:
                taught = known.take(batch.position)
            value, _ = fused_distillation_loss(
                student.factors(batch),
                batch.targets,
                taught.to(batch.targets.device) if isinstance(taught, Tensor) else taught,
                temperature=how.temperature,
                strength=how.strength,
                t_squared=how.t_squared,
                **{name: column.to(batch.targets.device) for name, column in weight_of(batch.position).items()},
            )
            return value

        return train(
            student.module,
            batches=student.training(sequences, loop.seed),
            loss=loss,
            config=loop,
            validate=_validator(student, validation),
            folder=folder,
            checkpoint_every=checkpoint_every,
            progress=progress,
            identity=identity,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _teacher_identity(teacher: Learner | SampleTeacher) -> str:
    if isinstance(teacher, SampleTeacher):
        return hashlib.sha256(teacher.rank.tobytes()).hexdigest()
    return weights_hash(teacher.module, trained=True)


def _validator(student: Learner, validation: Cases | None) -> Callable[[], float] | None:
    if validation is None or not len(validation):
        return None
    return lambda: validation_ndcg(student.recommender, validation)


def _weights(
    student: Learner,
    teacher: SampleTeacher,
    sequences: Sequences,
    wanted: np.ndarray,
    how: Strength,
    fixed_ranks: tuple[np.ndarray, np.ndarray] | None,
) -> Callable[[np.ndarray], dict[str, Tensor]]:
    """position -> what `fused_distillation_loss` needs to weigh these samples."""
    if how.ranks == "static":
        return lambda position: {}
    if how.ranks == "online":
        return lambda position: {"teacher_rank": torch.from_numpy(teacher.rank[position])}
    if how.ranks == "round_start":
        fixed_ranks = ranks_of(student, sequences, wanted), teacher.rank
    elif fixed_ranks is None:
        raise ConfigError("cross-fitted weights need the ranks of the fold models")
    fixed = fixed_weights(*fixed_ranks, wanted)
    return lambda position: {"weight": torch.from_numpy(fixed[position])}


def fixed_weights(student_rank: np.ndarray, teacher_rank: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(E,) float32 weights of the wanted samples, 1 elsewhere.

    A wanted sample without a rank (its user is too short for a fold model) trusts its teacher as an equal: 1.
    """
    known = wanted & np.isfinite(student_rank) & np.isfinite(teacher_rank)
    weights = np.ones(len(wanted), dtype=np.float32)
    ranks = (torch.from_numpy(np.asarray(column[known], dtype=np.float32)) for column in (student_rank, teacher_rank))
    weights[known] = sample_weights(*ranks).numpy()
    return weights


def weight_statistics(
    student: Learner,
    teacher: Learner,
    sequences: Sequences,
    validation: Cases,
    seed: int,
    teacher_rank: np.ndarray | None = None,
) -> dict[str, Any]:
    """The weights both models as they are now would give, over samples of some users and their validation cases.

    Training ranks favour whoever memorises more; the validation mean beside the training mean shows by how much.

    Args:
        teacher_rank: (E,) the teacher's ranks of the true items, where it was read already.

    Returns:
        {"train": mean, "valid": mean or None, "histogram": share of training samples per bin over [0, 2], "n": count}.
    """
    users = stream(seed, "distill", "weight users").permutation(len(sequences))[:WEIGHT_USERS]
    chosen = np.zeros(len(sequences.items), dtype=bool)
    for index in users:
        chosen[sequences.starts[index] : sequences.starts[index + 1]] = True
    chosen &= trained_samples(student, sequences)
    if teacher_rank is None:
        teacher_rank = ranks_of(teacher, sequences, chosen)
    weights = fixed_weights(ranks_of(student, sequences, chosen), teacher_rank, chosen)[chosen]
    cases = validation.take(np.isin(validation.user, sequences.user[users]))
    edges = np.linspace(0, 2, WEIGHT_BINS + 1)
    counts, _ = np.histogram(weights, edges)
    of_valid = None
    if len(cases):
        ranks = (torch.from_numpy(_case_ranks(side, cases)) for side in (student, teacher))
        of_valid = float(sample_weights(*ranks).mean())
    return {
        "train": float(weights.mean()) if len(weights) else 1.0,
        "valid": of_valid,
        "histogram": (counts / max(1, len(weights))).tolist(),
        "n": len(weights),
    }


def _case_ranks(side: Learner, cases: Cases) -> np.ndarray:
    target = np.array([targets[0] for targets in cases.targets()], dtype=np.int64)
    ranks = np.empty(len(target), dtype=np.float32)
    for part, scores in side.recommender.score_batches(cases.histories()):
        ranks[part] = true_item_rank(torch.from_numpy(scores), torch.from_numpy(target[part])).numpy()
    return ranks


def half_loop(loop: LoopConfig, *, round_number: int, seed: int, halve: bool) -> LoopConfig:
    """The loop of one half-round: its own seed, and half the learning rate from round 2 where asked for."""
    factor = 0.5 if halve and round_number > 1 else 1.0
    return replace(loop, seed=seed, learning_rate=loop.learning_rate * factor)


__all__ = [
    "LABELS_ONLY",
    "CrossfitRanks",
    "RankSource",
    "Strength",
    "fixed_weights",
    "half_loop",
    "states_of",
    "train_half",
    "weight_statistics",
]
