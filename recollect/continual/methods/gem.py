"""GEM and A-GEM: a step's gradient is changed as little as possible so that no memory objects to it.

With M the gradients m_k of the memories (rows), GEM keeps g where every m_k·g ≥ 0 and else uses g + Mᵀv, where v solves
min ½·vᵀMMᵀv + (Mg)ᵀv subject to v ≥ margin; then m_k·(g + Mᵀv) ≥ 0 for every k.  A-GEM has one
memory, the mean gradient m of batches drawn from all of them together, and uses g − m·(m·g)/|m|² where m·g < 0.  A
memory is a fixed choice of samples of a finished task; of `batches_per_step` of its batches, drawn anew at every step
(0 = all), the gradient is computed without dropout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.methods.config import GEMConfig
from recollect.continual.methods.objective import mean_gradient
from recollect.continual.methods.protocol import Batch, ContinualMethod, Task, make_live_state, trained_parameters
from recollect.rng import stream


class GEM(ContinualMethod):
    """One constraint per finished task."""

    name = "gem"

    def __init__(self, config: GEMConfig, adapter: MoELoraConfig) -> None:
        super().__init__(config, adapter)
        self.options = config
        self._memories: list[Sequence[Batch]] = []
        self._task = 0

    def before_task(self, task: Task, model: nn.Module) -> None:
        """Read the memories of the finished tasks and start counting steps."""
        self._task = task.index
        self._memories = [task.memory.batches(earlier, self.options.samples) for earlier in range(task.index)]
        device = next(model.parameters()).device
        make_live_state(model).put("step", torch.zeros((), dtype=torch.int64, device=device))

    def after_backward(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Replace the gradients by those no memory objects to."""
        if not self._memories:
            return
        parameters = list(trained_parameters(model).values())
        step = make_live_state(model).get("step")
        memories = torch.stack(
            [_flat(mean_gradient(model, chosen, parameters)) for chosen in self.constraints(int(step))]
        )
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        gradient = _flat(gradients)
        projected = self.project(gradient, memories)
        if projected is not gradient:
            start = 0
            for parameter in parameters:
                part = projected[start : start + parameter.numel()].view_as(parameter)
                parameter.grad = part.to(parameter.dtype).clone()
                start += parameter.numel()
        step += 1

    def constraints(self, step: int) -> list[list[Batch]]:
        """The batches behind each constraint of a step."""
        return [
            _drawn(batches, self.options.batches_per_step, self.options.seed, self._task, number, step)
            for number, batches in enumerate(self._memories)
        ]

    def project(self, gradient: Tensor, memories: Tensor) -> Tensor:
        """The gradient (P,) nearest to `gradient` that no memory (K, P) objects to; itself where none does."""
        return gem_projection(gradient, memories, self.options.margin)


class AGEM(GEM):
    """One constraint: the mean over batches drawn from all memories together."""

    name = "a-gem"

    def constraints(self, step: int) -> list[list[Batch]]:
        """Batches drawn from all memories together."""
        together = [batch for batches in self._memories for batch in batches]
        return [_drawn(together, self.options.batches_per_step, self.options.seed, self._task, 0, step)]

    def project(self, gradient: Tensor, memories: Tensor) -> Tensor:
        """g − m·(m·g)/|m|² where m·g < 0."""
        return agem_projection(gradient, memories[0])


def gem_projection(gradient: Tensor, memories: Tensor, margin: float = 0.0) -> Tensor:
    """x = g + Mᵀv of the quadratic program; `gradient` itself where no memory conflicts with it.

    The program is min ‖Mᵀu + h‖² over u ≥ 0 with u = v − margin and h = g + margin·Mᵀ1, which a non-negative
    least-squares active set solves exactly; M enters through MMᵀ alone (K × K, float64).

    Args:
        gradient: (P,).
        memories: (K, P).
        margin: lower bound of every multiplier.
    """
    from scipy.optimize import nnls

    products = memories.double() @ gradient.double()
    if bool((products >= 0).all()):
        return gradient
    gram = (memories.double() @ memories.double().t()).cpu().numpy()
    linear = products.cpu().numpy() + margin * gram.sum(1)  # M·h
    sizes = np.sqrt(np.maximum(np.diag(gram), np.finfo(np.float64).tiny))
    scaled = gram / np.outer(sizes, sizes)  # unit gradients: multipliers are u·|m|
    values, vectors = np.linalg.eigh(scaled)
    kept = values > 1e-14 * max(values[-1], 1e-300)
    roots = np.sqrt(values[kept])
    factor = roots[:, None] * vectors[:, kept].T  # factorᵀ·factor = scaled
    target = -(vectors[:, kept].T @ (linear / sizes)) / roots
    multipliers = nnls(factor, target)[0] / sizes + margin
    return gradient + (torch.from_numpy(multipliers).to(memories.device) @ memories.double()).to(gradient.dtype)


def agem_projection(gradient: Tensor, memory: Tensor) -> Tensor:
    """g − m·(m·g)/|m|² where m·g < 0, else `gradient` itself; both (P,)."""
    product = memory.double() @ gradient.double()
    if float(product) >= 0:
        return gradient
    return gradient - (product / (memory.double() @ memory.double())).to(gradient.dtype) * memory


def _drawn(batches: Sequence[Batch], count: int, seed: int, task: int, number: int, step: int) -> list[Batch]:
    """`count` of the batches, drawn by the step; all for 0."""
    if not count or count >= len(batches):
        return list(batches)
    chosen = stream(seed, "memory batches", task, number, step).choice(len(batches), count, replace=False)
    return [batches[int(index)] for index in chosen]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
