"""Baselines that distil in another way than by half-rounds: constant teachers, mutual learning, DLLM2Rec, LLM-SRec.

All start from the conventional model trained alone and see the same samples and validation as upward half-rounds.
Constant teachers go through as many of them as the alternation; mutual learning and DLLM2Rec train once, for at most
the epochs and with the patience of all rounds together, at the full learning rate throughout (half-rounds halve it from
round 2).

Ours, where the papers need generated text or a language model that was not fine-tuned: in DLLM2Rec the distance behind
the confidence is 1 - cosine of the LLM's state and the item's row of its output layer; in LLM-SRec the frozen LLM is
the LLM recommender trained alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recollect.config import to_dict
from recollect.distill.dllm2rec import EMBEDDING_SHARE, LIST_STRENGTH, list_loss, list_weights
from recollect.distill.fused import fused_distillation_loss
from recollect.distill.learners import Crm, Llm, constant_teacher, states_of, trained_samples
from recollect.distill.llm_srec_ranker import LlmSRec, shuffled_samples
from recollect.distill.rounds import Strength, half_loop, train_half
from recollect.distill.stages import Stage
from recollect.distill.workshop import Workshop, info_of
from recollect.loop import LoopConfig, train
from recollect.recommenders.losses import draw_negatives
from recollect.recommenders.neural import validation_ndcg
from recollect.rng import call_seed

LIST_LENGTH = 10
SREC_BATCH = 256
SREC_EPOCHS = 30


def _at_once(shop: Workshop, model: Any, name: str, seed: int) -> LoopConfig:
    """A training as long as all upward half-rounds together, and as patient."""
    loop = replace(model.config.loop, epochs=_all_epochs(shop), patience=_all_patience(shop))
    return replace(loop, seed=call_seed(seed, "distill", name))


def _all_epochs(shop: Workshop) -> int:
    return shop.config.rounds * shop.config.round_epochs


def _all_patience(shop: Workshop) -> int:
    return shop.config.rounds * shop.config.round_patience


def _recipe(shop: Workshop, seed: int, **more: Any) -> dict[str, Any]:
    return {"seed": seed, "epochs": _all_epochs(shop), "patience": shop.config.round_patience, **more}


def constant(shop: Workshop, seed: int, crm: Stage, kind: str, number: int) -> Stage:
    """An upward half-round under a teacher of popularity or of nothing: temperature and strength as ever, w = 1."""
    how: Strength = shop.strength("up", "static")

    def make(work: Path) -> tuple[Any, dict[str, Any]]:
        shop.progress.stage(f"round {number}, {kind} teacher, seed {seed}")
        model = crm.load()
        counts = np.bincount(shop.sequences.items, minlength=shop.dataset.n_items)
        if kind == "label-smoothing":
            counts = np.zeros_like(counts)
        result = train_half(
            Crm(model),
            constant_teacher(counts, shop.sequences),
            shop.sequences,
            how=how,
            loop=half_loop(
                replace(model.config.loop, epochs=shop.config.round_epochs, patience=shop.config.round_patience),
                round_number=number,
                seed=call_seed(seed, "distill", kind, number),
                halve=True,
            ),
            scratch=work / "teacher",
            validation=shop.validation,
            folder=work,
            progress=shop.progress,
        )
        return model, info_of(model, result, shop.validation, shop.cut)

    recipe = _recipe(shop, seed, crm=crm.key, kind=kind, how=to_dict(how))
    recipe |= {"round": number, "epochs": shop.config.round_epochs}
    return shop.stages.get("crm-constant", recipe, make)


def mutual(shop: Workshop, seed: int, first: Stage, second: Stage) -> Stage:
    """Two conventional models trained at once, each the other's teacher with weight 1; the first is reported."""
    how = shop.strength("up", "static")

    def make(work: Path) -> tuple[Any, dict[str, Any]]:
        shop.progress.stage(f"mutual learning, seed {seed}")
        model, other = first.load(), second.load()
        sides = Crm(model), Crm(other)
        options: dict[str, Any] = {"temperature": how.temperature, "strength": how.strength, "t_squared": how.t_squared}

        def loss(batch: Any) -> Tensor:
            one, two = sides[0].factors(batch), sides[1].factors(batch)
            of_one, _ = fused_distillation_loss(one, batch.targets, two.detach(), **options)
            of_two, _ = fused_distillation_loss(two, batch.targets, one.detach(), **options)
            return of_one + of_two

        loop = _at_once(shop, model, "mutual", seed)
        result = train(
            nn.ModuleList([model.module, other.module]),
            batches=sides[0].training(shop.sequences, loop.seed),
            loss=loss,
            config=loop,
            validate=lambda: validation_ndcg(model, shop.validation),
            folder=work,
            progress=shop.progress,
        )
        return model, info_of(model, result, shop.validation, shop.cut)

    recipe = _recipe(shop, seed, first=first.key, second=second.key, how=to_dict(how))
    recipe["patience"] = _all_patience(shop)
    return shop.stages.get("crm-mutual", recipe, make)


class _WithText(nn.Module):
    """Item rows plus a share of projected frozen vectors, as a parametrisation that can be folded in again."""

    def __init__(self, vectors: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors)
        self.project = nn.Linear(vectors.shape[1], width)
        nn.init.zeros_(self.project.weight)  # starts as the model that was trained alone
        nn.init.zeros_(self.project.bias)

    def forward(self, rows: Tensor) -> Tensor:
        return rows + EMBEDDING_SHARE * self.project(self.vectors)


def dllm2rec(shop: Workshop, seed: int, crm: Stage, llm: Stage) -> Stage:
    """DLLM2Rec: CE + lambda * weighted BCE towards the LLM's top items, and LLM item vectors in the embedding.

    The text part is folded into the embedding afterwards, so the served model is as large as before.
    """

    def make(work: Path) -> tuple[Any, dict[str, Any]]:
        shop.progress.stage(f"DLLM2Rec, seed {seed}")
        model, teacher = crm.load(), Llm(llm.load())
        student = Crm(model)
        lists, distances = teacher_lists(teacher, shop.sequences, trained_samples(student, shop.sequences))
        embedding = next(
            layer
            for layer in model.module.modules()
            if isinstance(layer, nn.Embedding) and layer.weight is model.module.item_vectors()
        )
        vectors = teacher.module.head.weight.detach().clone()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(call_seed(seed, "distill", "dllm2rec", "projection"))
            text = _WithText(vectors / vectors.norm(dim=1).mean().clamp_min(1e-12), embedding.embedding_dim)
        text.to(vectors.device)
        parametrize.register_parametrization(embedding, "weight", text)

        def loss(batch: Any) -> Tensor:
            with parametrize.cached():
                factors = student.factors(batch)
                logits = factors.state @ factors.items.T
                own = torch.from_numpy(lists[batch.position]).to(logits.device)
                far = torch.from_numpy(distances[batch.position]).to(logits.device)
                negative = draw_negatives(batch.targets, 1, student.n_items)[:, 0]
                towards = list_loss(logits, own, list_weights(own, far, logits), negative)
                return nn.functional.cross_entropy(logits, batch.targets) + LIST_STRENGTH * towards

        loop = _at_once(shop, model, "dllm2rec", seed)
        result = train(
            model.module,
            batches=student.training(shop.sequences, loop.seed),
            loss=loss,
            config=loop,
            validate=lambda: validation_ndcg(model, shop.validation),
            folder=work,
            progress=shop.progress,
        )
        parametrize.remove_parametrizations(embedding, "weight", leave_parametrized=True)
        return model, info_of(model, result, shop.validation, shop.cut)

    recipe = _recipe(shop, seed, crm=crm.key, llm=llm.key, strength=LIST_STRENGTH, length=LIST_LENGTH)
    recipe["patience"] = _all_patience(shop)
    return shop.stages.get("crm-dllm2rec", recipe, make)


def teacher_lists(teacher: Llm, sequences: Any, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's best items (E, K) int64 of every wanted sample and their distances (E, K) float32 in 0..2."""
    length = min(LIST_LENGTH, teacher.n_items)
    lists = np.zeros((len(wanted), length), dtype=np.int64)
    distances = np.zeros((len(wanted), length), dtype=np.float32)
    for position, factors in states_of(teacher, sequences, wanted):
        top = (factors.state @ factors.items.T).topk(length, dim=1).indices
        rows = nn.functional.normalize(factors.items, dim=1)[top]
        cosine = (nn.functional.normalize(factors.state, dim=1)[:, None] * rows).sum(2)
        lists[position], distances[position] = top.cpu().numpy(), (1 - cosine).cpu().numpy()
    return lists, distances


def llm_srec(shop: Workshop, seed: int, crm: Stage, llm: Stage) -> Stage:
    """LLM-SRec: heads on the frozen LLM, towards the next item and the conventional model's user vectors."""

    def make(work: Path) -> tuple[Any, dict[str, Any]]:
        shop.progress.stage(f"LLM-SRec, seed {seed}")
        frozen, collaborative = llm.load(), Crm(crm.load())
        wanted = trained_samples(collaborative, shop.sequences)
        position = np.flatnonzero(wanted)
        user = _joined(states_of(Llm(frozen), shop.sequences, wanted), position)
        taught = _joined(states_of(collaborative, shop.sequences, wanted), position)
        target = torch.from_numpy(shop.sequences.items[position].astype(np.int64))
        model = LlmSRec(frozen, collaborative_width=taught.shape[1], seed=seed, source=str(llm.folder / "model"))
        items = frozen.module.head.weight.detach()
        cases = model.prepared(shop.validation)

        def loss(batch: dict[str, Tensor]) -> Tensor:
            return model.module.losses(batch["user"], batch["taught"], items, batch["target"]).total

        loop = LoopConfig(
            epochs=SREC_EPOCHS,
            learning_rate=1e-3,
            patience=shop.config.round_patience,
            seed=call_seed(seed, "distill", "llm-srec"),
        )
        result = train(
            model.module,
            batches=lambda epoch: shuffled_samples(user, taught, target, SREC_BATCH, loop.seed, epoch),
            loss=loss,
            config=loop,
            validate=lambda: model.prepared_ndcg(cases),
            folder=work,
            progress=shop.progress,
            size=lambda batch: len(batch["target"]),
        )
        return model, info_of(model, result, shop.validation, shop.cut)

    return shop.stages.get(
        "llm-srec", _recipe(shop, seed, crm=crm.key, llm=llm.key, batch=SREC_BATCH, epochs=SREC_EPOCHS), make
    )


def _joined(states: Iterator[tuple[np.ndarray, Any]], position: np.ndarray) -> Tensor:
    """(M, D) states in the order of `position`."""
    places: list[np.ndarray] = []
    rows: list[Tensor] = []
    for found, factors in states:
        places.append(found)
        rows.append(factors.state)
    order = np.argsort(np.concatenate(places), kind="stable")
    joined = torch.cat(rows)[torch.from_numpy(order)].clone()
    assert len(joined) == len(position)
    return joined


__all__: Sequence[str] = ["constant", "dllm2rec", "llm_srec", "mutual", "teacher_lists"]
