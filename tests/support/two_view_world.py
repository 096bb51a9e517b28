"""The two-view noisy world of the distillation oracles: text-like contexts follow a rule, id-like ones do not.

400 items = 40 clusters x 10 members. A context is (type, last item). Type 0 ("text"): next is member k+3 of cluster
c+7, seen 3 times with 60 % of the labels uniform noise. Type 1 ("id"): next is a random permutation, seen 6 times with
20 % noise. A conventional stand-in memorises contexts; a language-model stand-in is linear in cluster and member, so it
sees the rule and no permutation. Everything is tested on every context once with its clean label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.distill.crossfit import crossfit_ranks, user_folds
from recollect.distill.losses import distillation_loss
from recollect.distill.weights import sample_weights, true_item_rank
from recollect.rng import call_seed, stream

N_ITEMS, N_CLUSTERS, N_MEMBERS = 400, 40, 10
TEXT, ID = 0, 1
TEMPERATURE = 2.0
BATCH = 256


@dataclass(frozen=True)
class World:
    """context, label: (M,) training samples.  clean: (800,) clean next item of each context; type = context // 400."""

    context: Tensor
    label: Tensor
    clean: Tensor
    seed: int

    def type_of(self, context: Tensor) -> Tensor:
        return context // N_ITEMS


def two_view_world(seed: int) -> World:
    generator = stream(seed, "two-view-world")
    item = np.arange(N_ITEMS)
    cluster, member = item // N_MEMBERS, item % N_MEMBERS
    rule = (cluster + 7) % N_CLUSTERS * N_MEMBERS + (member + 3) % N_MEMBERS
    clean = np.concatenate([rule, generator.permutation(N_ITEMS)])
    context = np.concatenate([np.repeat(item, 3), np.repeat(item + N_ITEMS, 6)])
    noise = np.where(context < N_ITEMS, 0.6, 0.2)
    is_noise = generator.random(len(context)) < noise
    label = np.where(is_noise, generator.integers(0, N_ITEMS, len(context)), clean[context])
    return World(torch.from_numpy(context), torch.from_numpy(label), torch.from_numpy(clean), seed)


class ContextModel(nn.Module):
    """The conventional stand-in: a free 64-d vector per context and an output over all items."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(2 * N_ITEMS, 64, generator=generator) * 0.1)
        self.output = nn.Parameter(torch.randn(N_ITEMS, 64, generator=generator) * 0.1)

    def forward(self, context: Tensor) -> Tensor:
        return self.vectors[context] @ self.output.T


class FeatureModel(nn.Module):
    """The language-model stand-in: bilinear in one-hot cluster and member of last item (by type) and next item."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        width = N_CLUSTERS + N_MEMBERS
        item = torch.arange(N_ITEMS)
        cluster = functional.one_hot(item // N_MEMBERS, N_CLUSTERS)
        features = torch.cat([cluster, functional.one_hot(item % N_MEMBERS, N_MEMBERS)], 1).float()  # (400, 50)
        self.register_buffer("features", features)
        self.register_buffer("typed", torch.block_diag(features, features))  # (800, 100), a context's own features
        self.weight = nn.Parameter(torch.randn(2 * width, width, generator=generator) * 0.01)

    def forward(self, context: Tensor) -> Tensor:
        return self.typed[context] @ self.weight @ self.features.T


Weights = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(sample numbers, student logits, teacher logits) -> (B,) weights."""


def train(
    model: nn.Module,
    context: Tensor,
    label: Tensor,
    *,
    epochs: int,
    rate: float,
    seed: int,
    teacher_logits: Tensor | None = None,
    weights: Weights | None = None,
    strength: float = 0.0,
    temperature: float = TEMPERATURE,
) -> nn.Module:
    """Adam on cross-entropy, plus the distillation term where a teacher's logits (M, N) are given."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    for epoch in range(epochs):
        order = torch.from_numpy(stream(seed, "two-view-order", epoch).permutation(len(label)))
        for index in order.split(BATCH):
            logits = model(context[index])
            if teacher_logits is None or weights is None:
                loss = functional.cross_entropy(logits, label[index])
            else:
                taught = teacher_logits[index]
                loss = distillation_loss(
                    logits,
                    label[index],
                    taught,
                    weights(index, logits, taught),
                    temperature=temperature,
                    strength=strength,
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return model


CONTEXT_EPOCHS, CONTEXT_RATE = 20, 3e-3
FEATURE_EPOCHS, FEATURE_RATE = 20, 3e-2
HALF_ROUND_EPOCHS, HALF_ROUND_RATE = 20, 4e-3


def fit_context_model(world: World, samples: Tensor, name: str) -> ContextModel:
    generator = torch.Generator().manual_seed(call_seed(world.seed, "context-model", name))
    model = ContextModel(generator)
    train(
        model, world.context[samples], world.label[samples], epochs=CONTEXT_EPOCHS, rate=CONTEXT_RATE, seed=world.seed
    )
    return model


def fit_feature_model(world: World, samples: Tensor, name: str) -> FeatureModel:
    generator = torch.Generator().manual_seed(call_seed(world.seed, "feature-model", name))
    model = FeatureModel(generator)
    train(
        model, world.context[samples], world.label[samples], epochs=FEATURE_EPOCHS, rate=FEATURE_RATE, seed=world.seed
    )
    return model


@torch.no_grad()
def all_logits(model: nn.Module, context: Tensor) -> Tensor:
    return model(context)


@torch.no_grad()
def hit_rates(model: nn.Module, world: World) -> tuple[float, float]:
    """HR@1 on clean labels, (text, id)."""
    context = torch.arange(2 * N_ITEMS)
    hit = (true_item_rank(model(context), world.clean) == 1).float()
    return hit[:N_ITEMS].mean().item(), hit[N_ITEMS:].mean().item()


@dataclass(frozen=True)
class Trained:
    """Both stand-alone models and what they say of every training sample.

    student_crossfit, teacher_crossfit: (M,) ranks under the models of the other folds.
    """

    world: World
    student: ContextModel
    teacher: FeatureModel
    teacher_logits: Tensor
    student_crossfit: Tensor
    teacher_crossfit: Tensor

    @property
    def is_text(self) -> Tensor:
        return self.world.context < N_ITEMS


def trained_world(seed: int) -> Trained:
    """The stand-alone models and cross-fitted ranks of one seed; every sample is a user of its own."""
    world = two_view_world(seed)
    everything = torch.arange(len(world.label))
    student = fit_context_model(world, everything, "all")
    teacher = fit_feature_model(world, everything, "all")
    fold = user_folds(everything.numpy(), 5, seed)

    def ranks_by(fit: Callable[[World, Tensor, str], nn.Module]) -> Tensor:
        def rank(model: nn.Module, index: np.ndarray) -> np.ndarray:
            chosen = torch.from_numpy(index)
            return true_item_rank(all_logits(model, world.context[chosen]), world.label[chosen]).numpy()

        return torch.from_numpy(
            crossfit_ranks(fold, lambda number, kept: fit(world, torch.from_numpy(kept), f"fold {number}"), rank)
        )

    return Trained(
        world,
        student,
        teacher,
        all_logits(teacher, world.context),
        ranks_by(fit_context_model),
        ranks_by(fit_feature_model),
    )


def static_weights(index: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    return torch.ones(len(index))


def online_weights(world: World) -> Weights:
    def weights(index: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        label = world.label[index]
        return sample_weights(true_item_rank(student, label), true_item_rank(teacher, label))

    return weights


def fixed_weights(weight: Tensor) -> Weights:
    return lambda index, student, teacher: weight[index]


def upward(
    trained: Trained,
    weights: Weights,
    strength: float,
    *,
    teacher_logits: Tensor | None = None,
    temperature: float = 2.0,
) -> ContextModel:
    """One upward half-round of 20 epochs from the stand-alone student; the student itself is left as it was."""
    world = trained.world
    model = ContextModel(torch.Generator().manual_seed(0))
    model.load_state_dict(trained.student.state_dict())
    train(
        model,
        world.context,
        world.label,
        epochs=HALF_ROUND_EPOCHS,
        rate=HALF_ROUND_RATE,
        seed=world.seed + 1,
        teacher_logits=trained.teacher_logits if teacher_logits is None else teacher_logits,
        weights=weights,
        strength=strength,
        temperature=temperature,
    )
    return model
