"""Known-truth world of routed adapters: four factors in slices of their own, whose effects add up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.adapters.attach import adapters, attach, routers, routing_loss
from recollect.continual.adapters.collision import mean_n_eff
from recollect.continual.adapters.config import LoRAMoEConfig, MHMoEConfig, MoELoraConfig
from recollect.continual.adapters.mh_moe import route_numbers
from recollect.continual.adapters.usage_gate import UsageGate

FACTORS, VALUES, SLICE, OUT = 4, 4, 16, 32
FLAT = LoRAMoEConfig(
    experts=4, rank=8, alpha=8.0, dropout=0.0, gate="topk_full", balance=0.01, target_modules=("proj",)
)
HEADWISE = MHMoEConfig(heads=4, experts=4, rank=4, alpha=4.0, balance=0.01, target_modules=("proj",))


class World:
    """x = factor vectors (norm 4) side by side + 0.05 noise; y = W0·x + Σ_j T[j, v_j]."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        vectors = self._normal(FACTORS, VALUES, SLICE)
        self.vectors = 4 * vectors / vectors.norm(dim=-1, keepdim=True)
        self.frozen = self._normal(OUT, FACTORS * SLICE) / (FACTORS * SLICE) ** 0.5
        self.effects = self._normal(FACTORS, VALUES, OUT)
        self.new_effects = self.effects.clone()
        self.new_effects[0, 0] = self._normal(OUT)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def draw(self, n: int, task: str) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (n, 64), targets (n, 32), factor values (n, 4); "a": all, "b": value 0 of factor 0 alone and changed,
        "old": another value of factor 0."""
        values = torch.randint(0, VALUES, (n, FACTORS), generator=self.generator)
        if task == "b":
            values[:, 0] = 0
        elif task == "old":
            values[:, 0] = torch.randint(1, VALUES, (n,), generator=self.generator)
        factor = torch.arange(FACTORS)
        inputs = self.vectors[factor, values].flatten(1) + 0.05 * self._normal(n, FACTORS * SLICE)
        effects = self.new_effects if task == "b" else self.effects
        return inputs, inputs @ self.frozen.t() + effects[factor, values].sum(1), values


class Toy(nn.Module):
    """The frozen map alone."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.proj = nn.Linear(FACTORS * SLICE, OUT, bias=False)
        self.proj.weight.data.copy_(world.frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@dataclass
class Outcome:
    """Errors (MSE) of one model on one world."""

    parameters: int
    task_a: float
    joint_n_eff: float
    old_rise: float
    new: float


def play(config: MoELoraConfig, seed: int, *, gated: bool = False) -> Outcome:
    """400 steps on task A, then 200 on task B."""
    world, model, optimizer = trained_on_a(config, seed, 400)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    task_a, old_before = _error(model, world, "a"), _error(model, world, "old")
    inputs, _, values = world.draw(20_000, "a")
    with torch.no_grad():
        model(inputs)
    routes = route_numbers(next(iter(routers(model).values())).last_routing)
    compositions = (values * VALUES ** torch.arange(FACTORS)).sum(1)
    joint, _ = mean_n_eff(routes.numpy(), compositions.numpy(), least_tokens=20)
    gate = None
    if gated:
        gate = UsageGate(model)
        _look(model, world, "a", gate)
        gate.finish()
        _look(model, world, "b", gate)
        gate.start()
    _train(model, world, "b", 200, optimizer, gate)
    rise = _error(model, world, "old") - old_before
    return Outcome(trained, task_a, joint, rise, _error(model, world, "b"))


def trained_on_a(config: MoELoraConfig, seed: int, steps: int) -> tuple[World, nn.Module, torch.optim.Optimizer]:
    """A world, a model after so many steps on its task A, and the optimiser to go on with."""
    world = World(seed)
    model = attach(Toy(world), config)
    _initialise(model, seed)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    _train(model, world, "a", steps, optimizer, None)
    return world, model, optimizer


def _initialise(model: nn.Module, seed: int) -> None:
    """A and router N(0, 1/fan_in); B stays zero."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    module = adapters(model)["proj"]
    for parameter in (module.bank.lora_A[0], module.own_router.rows[0]):
        fan_in = parameter.shape[-1]
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def _train(
    model: nn.Module, world: World, task: str, steps: int, optimizer: torch.optim.Optimizer, gate: UsageGate | None
) -> None:
    model.train()
    for _ in range(steps):
        inputs, targets, _ = world.draw(256, task)
        loss = functional.mse_loss(model(inputs), targets) + routing_loss(model)
        optimizer.zero_grad()
        loss.backward()
        if gate is not None:
            gate.before_step()
        optimizer.step()
        if gate is not None:
            gate.after_step()


@torch.no_grad()
def _look(model: nn.Module, world: World, task: str, gate: UsageGate) -> None:
    model(world.draw(4_000, task)[0])
    gate.observe()


@torch.no_grad()
def _error(model: nn.Module, world: World, task: str) -> float:
    model.eval()
    inputs, targets, _ = world.draw(4_000, task)
    return float(functional.mse_loss(model(inputs), targets))
