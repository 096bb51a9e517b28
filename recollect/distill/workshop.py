"""Makes the models of a distillation run, each as a stage: both sides alone, half-rounds, cross-fitted ranks.

Nothing here decides what is compared (`recollect.distill.methods`) or how a half-round trains
(`recollect.distill.rounds`); it turns options and earlier stages into recipes, and recipes into models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from recollect.config import to_dict
from recollect.data.examples import Cases, Sequences, held_out_cases, training_sequences
from recollect.distill.config import LONG_HISTORIES, DistillConfig
from recollect.distill.crossfit import crossfit_ranks, rows_without, user_folds
from recollect.distill.ensemble import WeightChoice
from recollect.distill.learners import Crm, KeptStates, Llm, ranks_of, wrap
from recollect.distill.llm_srec_ranker import LlmSRec
from recollect.distill.rounds import (
    LABELS_ONLY,
    CrossfitRanks,
    RankSource,
    Strength,
    half_loop,
    train_half,
    weight_statistics,
)
from recollect.distill.samples import training_samples
from recollect.distill.stages import Stage, Stages, read_columns
from recollect.eval.statistics import cluster_codes
from recollect.io import write_arrays
from recollect.loop import LoopResult
from recollect.progress import Progress
from recollect.recommenders.llm_sequential import LlmConfig, LlmSequential
from recollect.recommenders.models import ModelSpec, model_spec
from recollect.recommenders.neural import validation_ndcg
from recollect.rng import call_seed
from recollect.types import Dataset, Split

CHECKPOINT_STEPS = 100
FRESH = "fresh"


@dataclass
class Workshop:
    """What every stage of one run shares."""

    config: DistillConfig
    dataset: Dataset
    split: Split
    stages: Stages
    progress: Progress

    def __post_init__(self) -> None:
        self.sequences: Sequences = training_sequences(self.dataset, self.split.train)
        self.validation: Cases = held_out_cases(self.dataset, self.split, "valid")
        self.spec: ModelSpec = model_spec(self.config.student)

    # What the options mean for each side

    def student_options(self, seed: int) -> Any:
        """Options of the conventional model."""
        config = self.config
        length = config.student_length
        if length is None:
            length = 200 if float(np.median(self.sequences.lengths)) > LONG_HISTORIES else 50
        values = {
            "max_length": length,
            "hidden": config.student_hidden,
            "batch_size": config.student_batch,
            "epochs": config.student_epochs,
            "patience": config.patience,
            "learning_rate": config.student_learning_rate,
            "dropout": config.student_dropout,
            **({} if config.student_loss is None else {"loss": config.student_loss}),
        }
        return replace(self.spec.options(values, "the options of the student"), seed=seed)

    def teacher_options(self, seed: int) -> LlmConfig:
        """Options of the LLM recommender."""
        config = self.config
        return LlmConfig(
            base=config.teacher,
            keep_layers=config.keep_layers,
            supervision=config.supervision,
            max_length=config.teacher_length,
            batch_size=config.teacher_batch,
            epochs=config.teacher_epochs,
            learning_rate=config.teacher_learning_rate,
            text=config.text,
            semantic_init=config.semantic_init,
            precision=config.precision,
            seed=seed,
        )

    def strength(self, direction: Literal["down", "up"], ranks: RankSource) -> Strength:
        """How a half-round of this direction weighs its teacher."""
        config = self.config
        down = direction == "down"
        return Strength(
            temperature=config.temperature_down if down else config.temperature_up,
            strength=config.strength_down if down else config.strength_up,
            ranks=ranks,
            t_squared=config.t_squared,
        )

    # Each side alone

    def crm(self, seed: int) -> Stage:
        """The conventional model trained with its own loss, the best epoch on validation."""
        options = self.student_options(seed)

        def make(work: Path) -> tuple[Any, dict[str, Any]]:
            self.progress.stage(f"{self.config.student} alone, seed {seed}")
            model = self.spec.model_class(options)
            model.fit(self.dataset, self.split, folder=work, progress=self.progress)
            return model, self._info(model, model.result)

        return self.stages.get("crm", {"model": self.config.student, "options": to_dict(options)}, make)

    def llm(self, seed: int, crm: Stage) -> Stage:
        """The LLM recommender trained with cross-entropy alone over the item vectors of `crm`."""
        options = self.teacher_options(seed)

        def make(work: Path) -> tuple[Any, dict[str, Any]]:
            self.progress.stage(f"the LLM alone, seed {seed}")
            model = LlmSequential(options, item_embedding=item_vectors(crm))
            model.fit(self.dataset, self.split, folder=work, checkpoint_every=CHECKPOINT_STEPS, progress=self.progress)
            return model, self._info(model, model.result)

        return self.stages.get("llm", {"options": to_dict(options), "embedding": crm.key}, make)

    # Half-rounds

    def down(
        self,
        seed: int,
        number: int,
        llm: Stage | None,
        crm: Stage | None,
        *,
        embedding: Stage,
        ranks: RankSource,
        crossfit: Stage | None = None,
    ) -> Stage:
        """Downward half-round: `crm` teaches the LLM, which first takes in the item vectors of `embedding`.

        Args:
            llm: the student; None = with fresh weights.
            crm: None = labels alone, without a teacher.
        """
        options = self.teacher_options(seed)
        how = LABELS_ONLY if crm is None else self.strength("down", ranks)

        def make(work: Path) -> tuple[Any, dict[str, Any]]:
            self.progress.stage(f"round {number}, downward, seed {seed}")
            vectors = item_vectors(embedding)
            if llm is None:
                model = LlmSequential(options).build(self.dataset, vectors)
            else:
                model = llm.load()
                assert model.module is not None
                model.module.inject(torch.from_numpy(vectors))
            teacher = None if crm is None else Crm(crm.load())
            loop = half_loop(
                options.loop(self.config.teacher_round_epochs),
                round_number=number,
                seed=call_seed(seed, "distill", "down", number),
                halve=False,
            )
            fixed = None if crossfit is None else read_crossfit(crossfit)
            result = train_half(
                Llm(model),
                teacher,
                self.sequences,
                how=how,
                loop=loop,
                scratch=work / "teacher",
                fixed_ranks=None if fixed is None else (fixed.llm, fixed.crm),
                validation=self.validation,
                folder=work,
                checkpoint_every=CHECKPOINT_STEPS,
                progress=self.progress,
            )
            return model, self._info(model, result, **self._weights(model, teacher, seed))

        recipe = {
            "options": to_dict(options),
            "student": FRESH if llm is None else llm.key,
            "teacher": None if crm is None else crm.key,
            "embedding": embedding.key,
            "round": number,
            "epochs": self.config.teacher_round_epochs,
            "how": to_dict(how),
            "crossfit": None if crossfit is None else crossfit.key,
            "seed": seed,
        }
        return self.stages.get("llm-down", recipe, make)

    def up(
        self,
        seed: int,
        number: int,
        crm: Stage,
        teacher: Stage | None,
        *,
        ranks: RankSource,
        crossfit: Stage | None = None,
        read: KeptStates | None = None,
    ) -> Stage:
        """Upward half-round: `teacher`, an LLM or another conventional model (or nobody), teaches `crm`."""
        how = LABELS_ONLY if teacher is None else self.strength("up", ranks)
        config = self.config

        def make(work: Path) -> tuple[Any, dict[str, Any]]:
            self.progress.stage(f"round {number}, upward, seed {seed}")
            model, frozen = crm.load(), None if teacher is None else wrap(teacher.load())
            loop = half_loop(
                replace(model.config.loop, epochs=config.round_epochs, patience=config.round_patience),
                round_number=number,
                seed=call_seed(seed, "distill", "up", number),
                halve=True,
            )
            fixed = None if crossfit is None else read_crossfit(crossfit)
            reader = read or KeptStates(work / "teacher")
            result = train_half(
                Crm(model),
                frozen,
                self.sequences,
                how=how,
                loop=loop,
                scratch=work / "teacher",
                read=reader,
                fixed_ranks=None if fixed is None else (fixed.crm, fixed.llm),
                validation=self.validation,
                folder=work,
                progress=self.progress,
            )
            return model, self._info(model, result, **self._weights(model, frozen, seed, reader.rank))

        recipe = {
            "student": crm.key,
            "teacher": None if teacher is None else teacher.key,
            "round": number,
            "epochs": config.round_epochs,
            "patience": config.round_patience,
            "how": to_dict(how),
            "crossfit": None if crossfit is None else crossfit.key,
            "seed": seed,
        }
        return self.stages.get("crm-up", recipe, make)

    # What both sides give together

    def crossfit(self, seed: int) -> Stage:
        """Ranks of every training sample under fold models of both sides (`ranks.safetensors` of the stage).

        A fold model is fitted without the fold's users. Its epoch is chosen on the validation cases of everybody, which
        are no training samples.
        """
        options = self.teacher_options(seed), self.student_options(seed)

        def make(work: Path) -> tuple[Any, dict[str, Any]]:
            samples = training_samples(self.sequences)
            fold = user_folds(samples.user, self.config.folds, seed)
            columns = {}
            fitted: dict[int, Any] = {}
            seconds: list[float] = []

            def fit_crm(number: int, kept: np.ndarray) -> Any:
                self.progress.stage(f"fold {number + 1} of {self.config.folds}: {self.config.student}, seed {seed}")
                rows = rows_without(self.dataset, self.split.train, np.unique(samples.user[fold == number]))
                model = self.spec.model_class(options[1])
                fitted[number] = model.fit(
                    self.dataset, self.split, rows=rows, folder=work / f"crm-{number}", progress=self.progress
                )
                seconds.append(model.result.wall_seconds)
                return model

            def fit_llm(number: int, kept: np.ndarray) -> Any:
                self.progress.stage(f"fold {number + 1} of {self.config.folds}: the LLM, seed {seed}")
                rows = rows_without(self.dataset, self.split.train, np.unique(samples.user[fold == number]))
                vectors = fitted[number].module.item_vectors().detach().cpu().numpy()
                model = LlmSequential(options[0], item_embedding=vectors)
                model.fit(
                    self.dataset,
                    self.split,
                    rows=rows,
                    folder=work / f"llm-{number}",
                    checkpoint_every=CHECKPOINT_STEPS,
                    progress=self.progress,
                )
                assert model.result is not None
                seconds.append(model.result.wall_seconds)
                return model

            def rank(model: Any, index: np.ndarray) -> np.ndarray:
                wanted = np.zeros(len(self.sequences.items), dtype=bool)
                wanted[samples.position[index]] = True
                return ranks_of(wrap(model), self.sequences, wanted)[samples.position[index]]

            for name, fit in (("crm", fit_crm), ("llm", fit_llm)):
                column = np.full(len(self.sequences.items), np.nan, dtype=np.float32)
                column[samples.position] = crossfit_ranks(fold, fit, rank)
                columns[name] = column
            write_arrays(work.parent / "ranks.safetensors", columns)
            medians = {name: float(np.nanmedian(column)) for name, column in columns.items()}
            return None, {**medians, "seconds": round(sum(seconds), 3)}

        recipe = {"llm": to_dict(options[0]), "crm": to_dict(options[1]), "model": self.config.student}
        return self.stages.get("crossfit", {**recipe, "folds": self.config.folds, "seed": seed}, make)

    def ensemble(self, first: Stage, second: Stage) -> Stage:
        """The share of the second model that is best on validation, seen items masked as in the evaluation."""

        def make(work: Path) -> tuple[Any, dict[str, Any]]:
            self.progress.stage("weighing the ensemble on validation")
            choice = WeightChoice(k=self.cut)
            models = [stage.load() for stage in (first, second)]
            cases = self.validation
            index = np.repeat(np.arange(len(cases)), cases.last - cases.first)
            histories, target = cases.histories(index), np.concatenate(cases.targets())
            codes, _ = cluster_codes(cases.user[index])
            share = 1.0 / np.bincount(codes)[codes]  # users weigh alike, as in the tables
            parts = [model.score_batches(histories) for model in models]
            for (part, one), (_, two) in zip(*parts, strict=True):
                masked = _seen(histories[part], target[part], one.shape[1])
                choice.add(one, two, target[part], masked=masked, share=share[part])
            return None, {
                "weight": choice.best,
                "validation": float(choice.curve.max()),
                "curve": choice.curve.tolist(),
            }

        recipe = {"first": first.key, "second": second.key, "k": self.cut, "standardised": "whole catalogue"}
        return self.stages.get("ensemble", recipe, make)

    @property
    def cut(self) -> int:
        return int(self.config.primary_metric.partition("@")[2])

    def _weights(
        self, student: Any, teacher: Crm | Llm | None, seed: int, teacher_rank: np.ndarray | None = None
    ) -> dict[str, Any]:
        if teacher is None:
            return {}
        found = weight_statistics(wrap(student), teacher, self.sequences, self.validation, seed, teacher_rank)
        return {"weights": found}

    def _info(self, model: Any, result: LoopResult | None, **more: Any) -> dict[str, Any]:
        return info_of(model, result, self.validation, self.cut, **more)


def info_of(model: Any, result: LoopResult | None, validation: Cases, cut: int, **more: Any) -> dict[str, Any]:
    """What is known of a trained model: its validation metric, its curve, what serving it takes, what it cost."""
    assert result is not None
    value = result.best_validation if cut == 10 else None  # what training validated by
    return {
        "validation": validation_ndcg(model, validation, cut) if value is None else value,
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "steps": result.steps,
        "curve": result.history,
        "parameters": served_parameters(model),
        "seconds": round(result.wall_seconds, 3),
        "samples_per_second": round(result.samples_per_second, 1),
        **more,
    }


def served_parameters(model: Any) -> int:
    """Numbers that a model reads when it serves: weights, trained or frozen, and item vectors.

    Of an LLM recommender the decoder's table of words is left out: it reads item vectors in their place, and of the
    words those of the instruction alone, which it keeps apart (not counted). LLM-SRec is served with its frozen LLM and
    without the head for conventional users, which only training needs.
    """
    if isinstance(model, LlmSRec):
        unused = sum(parameter.numel() for parameter in model.module.collaborative.parameters())
        return served_parameters(model.frozen) + sum(part.numel() for part in model.module.parameters()) - unused
    total = sum(parameter.numel() for parameter in model.module.parameters())
    if isinstance(model, LlmSequential):
        module = model.module
        assert module is not None
        total += module.embedding.numel() + (0 if module.text is None else module.text.numel())
        total -= module.decoder.get_input_embeddings().weight.numel()
    return total


def item_vectors(stage: Stage) -> np.ndarray:
    """(N, d) float32 item vectors of a conventional model's stage."""
    return stage.load().module.item_vectors().detach().cpu().numpy()


def read_crossfit(stage: Stage) -> CrossfitRanks:
    """The ranks a `crossfit` stage holds."""
    return CrossfitRanks(**read_columns(stage.folder / "ranks.safetensors"))


def _seen(histories: Sequence[np.ndarray], target: np.ndarray, n_items: int) -> np.ndarray:
    """(B, n_items) bool: items of each history, the target excepted."""
    seen = np.zeros((len(histories), n_items), dtype=bool)
    seen[np.repeat(np.arange(len(histories)), [len(history) for history in histories]), np.concatenate(histories)] = (
        True
    )
    seen[np.arange(len(target)), target] = False
    return seen
