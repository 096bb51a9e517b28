"""Usage-gated updates: an expert moves as far as the new task uses it more than the old ones did.

Head-wise routing lowers collisions, yet every bank still receives the new task's error, so unaffected banks drift.
Here each expert's parameter update (after the optimiser, since Adam cancels a scaled gradient) is multiplied by
s = clip((q_new − q_old) / (q_new + q_old), 0, 1), where q(j,e) is the share of real tokens that chose expert e of bank
j.  Only running counts of past tasks are kept, no data.  Our design; exact only where usage shifts identify the
responsible experts: where all banks' usage shifts it degrades to plain training, and where routes are not separated it
costs plasticity.  Log `gated_share` per task.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recollect.continual.adapters.attach import adapters, routers
from recollect.continual.adapters.routing import Router
from recollect.errors import ConfigError, InputError


def update_scale(new: Tensor, old: Tensor) -> Tensor:
    """s = clip((q_new − q_old) / (q_new + q_old), 0, 1) of usage shares (…, E); 1 for experts the past never used."""
    scale = ((new - old) / (new + old).clamp_min(torch.finfo(new.dtype).tiny)).clamp(0.0, 1.0)
    return torch.where(old == 0, torch.ones_like(scale), scale)


class UsageGate:
    """Counts of expert usage on past tasks, and the scaling of updates on the present one.

    Per task: passes over some first batches, each followed by `observe`; `start`; then around every optimiser step
    `before_step` and `after_step`; at the end passes over (some of) the task again with `observe`, then `finish`.
    For the first task every scale is 1.

    Args:
        model: with adapters whose method has routers.

    Raises:
        ConfigError: it has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers: dict[str, Router] = routers(model)
        if not self._routers:
            raise ConfigError("usage-gated updates need routers; plain LoRA has none")
        named = {id(router): name for name, router in self._routers.items()}
        self._banks = [(named[id(module.router)], module.bank) for module in adapters(model).values()]
        self.old = {name: _zeros(router) for name, router in self._routers.items()}
        self.new = {name: _zeros(router) for name, router in self._routers.items()}
        self.old_tokens = 0.0
        self.new_tokens = 0.0
        self._scales: dict[str, Tensor] = {}
        self._before: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def observe(self) -> None:
        """Count the last pass's choices of real tokens."""
        for name, router in self._routers.items():
            if router.last_routing is None:
                raise InputError(f"the router of {name} has seen no tokens; run a pass before observe()")
            self.new[name] = _padded(self.new[name], router) + _padded(router.last_routing.usage().cpu(), router)
        self.new_tokens += float(next(iter(self._routers.values())).last_routing.real().sum())  # type: ignore[union-attr]

    def start(self, *, freeze_routers: bool = True) -> dict[str, Tensor]:
        """Fix the scales (H, E) of the task observed, return them by router, and forget its counts.

        Args:
            freeze_routers: stop training the routers where a task came before; the counts of old tasks stay true only
                while routes do (or after a router replay).
        """
        self._scales = self._all_scales()
        self.new = {name: _zeros(router) for name, router in self._routers.items()}
        self.new_tokens = 0.0
        if freeze_routers and self.old_tokens:
            for router in self._routers.values():
                router.requires_grad_(False)
        return self._scales

    def _all_scales(self) -> dict[str, Tensor]:
        if not self.old_tokens:
            return {name: torch.ones_like(_zeros(router)) for name, router in self._routers.items()}
        if not self.new_tokens:
            raise InputError("usage on the new task is unknown; run passes over its first batches, each with observe()")
        return {
            name: update_scale(
                _padded(self.new[name], router) / self.new_tokens, _padded(self.old[name], router) / self.old_tokens
            )
            for name, router in self._routers.items()
        }

    def gated_share(self) -> float:
        """Share of experts whose updates are scaled below 1."""
        scales = torch.cat([scale.flatten() for scale in self._scales.values()])
        return float((scales < 1).double().mean())

    def before_step(self) -> None:
        """Remember the experts' parameters; call right before the optimiser's step."""
        self._before = []
        for name, bank in self._banks:
            start = 0
            for down, up in zip(bank.lora_A, bank.lora_B, strict=True):
                scale = self._scales[name][:, start : start + down.shape[1], None, None]
                start += down.shape[1]
                if bool((scale < 1).any()):
                    for parameter in (down, up):
                        on_device = scale.to(parameter.device, parameter.dtype)
                        self._before.append((parameter, parameter.detach().clone(), on_device))

    @torch.no_grad()
    def after_step(self) -> None:
        """Take back the part of the step that the scales withhold: exactly all of it where a scale is 0."""
        for parameter, before, scale in self._before:
            gated = before + scale * (parameter - before)
            parameter.copy_(torch.where(scale == 1, parameter, torch.where(scale == 0, before, gated)))
        self._before = []

    def finish(self) -> None:
        """Add what was observed since `start` to the past."""
        for name, router in self._routers.items():
            self.old[name] = _padded(self.old[name], router) + _padded(self.new[name], router)
        self.old_tokens += self.new_tokens
        self.new = {name: _zeros(router) for name, router in self._routers.items()}
        self.new_tokens = 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Counts and scales as tensors."""
        state = {"old_tokens": torch.tensor(self.old_tokens), "new_tokens": torch.tensor(self.new_tokens)}
        for part, tensors in (("old", self.old), ("new", self.new), ("scale", self._scales)):
            state |= {f"{part}.{name}": tensor.clone() for name, tensor in tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.old_tokens, self.new_tokens = float(state["old_tokens"]), float(state["new_tokens"])
        self.old = {name: state[f"old.{name}"].clone() for name in self._routers}
        self.new = {name: state[f"new.{name}"].clone() for name in self._routers}
        self._scales = {name: state[f"scale.{name}"].clone() for name in self._routers if f"scale.{name}" in state}


def _zeros(router: Router) -> Tensor:
    experts = sum(rows.shape[1] for rows in router.rows)
    return torch.zeros(router.heads, experts, dtype=torch.float64)


def _padded(counts: Tensor, router: Router) -> Tensor:
    """Counts (H, E) widened by zeros to all experts the router has by now."""
    wide = _zeros(router)
    wide[:, : counts.shape[1]] = counts
    return wide
