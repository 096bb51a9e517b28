"""InfLoRA (CVPR 2024) [recalled]: a pair per task whose A reads only input directions that earlier tasks did not use.

Per wrapped linear, before task t: C = covariance of its inputs on the new data, C' = (I − MMᵀ)·C·(I − MMᵀ) with M the
stored directions of the past; A_t = the r leading eigenvectors of C' (as rows, fixed), B_t = 0 is trained.  Inputs in
the span of M therefore see no change.  After the task M takes in leading directions of what is left of the inputs'
energy, until the kept share is ε.  That ε rises is recalled; that it rises linearly from `energy` to 1 over the
sequence, and how many batches are behind a covariance, is ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from recollect.continual.adapters.attach import adapters, attached
from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.methods.banks import banks
from recollect.continual.methods.config import InfLoraConfig
from recollect.continual.methods.o_lora import require_pairs, start_pair
from recollect.continual.methods.objective import pass_over
from recollect.continual.methods.protocol import Batch, ContinualMethod, Task
from recollect.rng import stream

_NO_ENERGY = 1e-8
"""Eigenvalues below this share of the inputs' energy are rounding; no row of A reads them, no direction is stored."""


class InfLora(ContinualMethod):
    """A pair per task in the complement of what earlier tasks' inputs span.

    Raises:
        ConfigError: the adapters are not plain LoRA pairs.
    """

    name = "inflora"

    def __init__(self, config: InfLoraConfig, adapter: MoELoraConfig) -> None:
        super().__init__(config, adapter)
        require_pairs(self.name, adapter)
        self.options = config
        self.past: dict[str, Tensor] = {}  # linear -> M (d, m)

    def before_task(self, task: Task, model: nn.Module) -> None:
        """Add the task's pair; its A is drawn from the inputs, and only its B is trained."""
        start_pair(model, task)
        covariances = self._covariances(task, model)
        for name, bank in banks(model).items():
            rows = new_rows(covariances.pop(name), self.past.get(name), self.adapter.rank)
            with torch.no_grad():
                bank.lora_A[-1].copy_(rows[None, None])
            bank.lora_A[-1].requires_grad_(False)

    def after_task(self, task: Task, model: nn.Module) -> None:
        """Store the directions the task's inputs used."""
        energy = self.options.energy + (1 - self.options.energy) * task.index / max(task.n_tasks - 1, 1)
        covariances = self._covariances(task, model)
        for name in list(covariances):
            self.past[name] = extended(covariances.pop(name), self.past.get(name), energy)
        super().after_task(task, model)

    def facts(self) -> dict[str, Any]:
        """Share of each linear's input directions that is protected, mean over linears."""
        if not self.past:
            return {}
        shares = [past.shape[1] / past.shape[0] for past in self.past.values()]
        return {"protected_share": sum(shares) / len(shares)}

    def own_state(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {f"past.{name}": past for name, past in self.past.items()}

    def load_own_state(self, model: nn.Module, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.past = {name.removeprefix("past."): tensor for name, tensor in tensors.items()}

    def _covariances(self, task: Task, model: nn.Module) -> dict[str, Tensor]:
        batches = task.batches(0)
        order = stream(self.options.seed, "covariance batches", task.index).permutation(len(batches))
        count = self.options.covariance_batches or len(batches)
        return input_covariances(model, (batches[int(index)] for index in order[:count]))


@torch.no_grad()
def input_covariances(model: nn.Module, batches: Iterator[Batch]) -> dict[str, Tensor]:
    """C (d, d) = Σ x·xᵀ / tokens of every wrapped linear's inputs at real tokens, without dropout; float32."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    state = attached(model)
    assert state is not None

    def add(name: str, inputs: Tensor) -> None:
        rows = inputs.detach().flatten(0, -2).float()
        mask = state.mask.tokens(tuple(inputs.shape[:-1]))
        rows = rows if mask is None else rows[mask]
        product = rows.t() @ rows
        sums[name] = sums[name] + product if name in sums else product
        counts[name] = counts.get(name, 0) + len(rows)

    was_training = model.training
    model.eval()
    with contextlib.ExitStack() as hooks:
        for name, module in adapters(model).items():
            handle = module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
            hooks.callback(handle.remove)
        for batch in batches:
            pass_over(model, batch)
    model.train(was_training)
    return {name: sums[name] / max(counts[name], 1) for name in sums}


def new_rows(covariance: Tensor, past: Tensor | None, rank: int) -> Tensor:
    """(rank, d) orthonormal rows of A: leading eigenvectors of the covariance outside of span(past).

    Rows for which no energy is left are zero: the pair then has fewer directions than its rank.
    """
    values, vectors = _outside(covariance, past, rank)
    rows = torch.zeros(rank, len(covariance), device=covariance.device)
    found = vectors[:, values > _NO_ENERGY * _energy(covariance)][:, :rank]
    rows[: found.shape[1]] = found.t().to(rows.dtype)
    return rows


def extended(covariance: Tensor, past: Tensor | None, energy: float) -> Tensor:
    """M (d, m') orthonormal: `past` and as few leading directions outside of it as keep `energy` of tr(covariance)."""
    total = _energy(covariance)
    values, vectors = _outside(covariance, past)
    values = values.clamp_min(0)
    kept = total - values.sum()
    real = values > _NO_ENERGY * total
    reached = (kept + values.cumsum(0)) >= energy * total
    missing = 0 if bool(kept >= energy * total) else int((~reached).sum()) + 1
    new = vectors[:, : min(missing, int(real.sum()))].to(covariance.dtype)
    return new.contiguous() if past is None else torch.cat([past, new], dim=1)


def _energy(covariance: Tensor) -> Tensor:
    return covariance.diagonal().double().sum()


def _outside(covariance: Tensor, past: Tensor | None, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The `count` (None = all d) largest eigenvalues (m,) and their vectors (d, m) of (I − MMᵀ)·C·(I − MMᵀ); float64.

    The vectors of non-zero values are orthogonal to M up to rounding, which is removed once more.
    """
    from scipy.linalg import eigh

    matrix = covariance.double()
    span = None if past is None or not past.shape[1] else torch.linalg.qr(past.double())[0]
    if span is not None:
        matrix = matrix - span @ (span.t() @ matrix)
        matrix = matrix - (matrix @ span) @ span.t()
    width = len(matrix)
    wanted = None if count is None else [max(width - count, 0), width - 1]
    found = eigh(((matrix + matrix.t()) / 2).cpu().numpy(), subset_by_index=wanted)
    values, vectors = (torch.from_numpy(array.copy()).to(matrix.device) for array in found)
    if span is not None:
        vectors = vectors - span @ (span.t() @ vectors)
    return values.flip(0), vectors.flip(1)
