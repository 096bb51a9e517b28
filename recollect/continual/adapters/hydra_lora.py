"""HydraLoRA [recalled]: one A shared by all experts, a B per expert, a dense router.

y = W0·x + s·Σ_e p_e(x)·B_e·A·x with p = softmax(W_r·x): what experts read is common, what they write is their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.adapters.experts import ExpertBank
from recollect.continual.adapters.routing import MaskHolder, Router, Routing
from recollect.continual.adapters.wrapped import AdapterLinear


class SharedDownBank(ExpertBank):
    """Experts of one slice with a common A (1, 1, r, d) and B (1, E, r, d_out) of their own."""

    @property
    def n_experts(self) -> int:
        """E."""
        return self.lora_B[0].shape[1]

    def grow(self, experts: int, device: torch.device | None = None) -> None:
        """Draw the first generation; there is no other."""
        super().grow(experts, device)
        self.lora_A[0] = nn.Parameter(self.lora_A[0].detach()[:, :1].clone())

    def weights(self) -> tuple[Tensor, Tensor]:
        """A (1, E, r, d), the same for every expert, and B (1, E, r, d_out)."""
        return self.lora_A[0].expand(-1, self.n_experts, -1, -1), self.lora_B[0]

    def rows_beside(self, router: Router, x: Tensor) -> None:
        """As `ExpertBank.rows_beside`: nothing, for the one A here is not a row per expert."""

    def forward(self, tokens: Tensor, routing: Routing | None, scaling: float, output: Tensor | None = None) -> Tensor:
        """As `ExpertBank.forward`; A is applied once, whatever the number of experts."""
        assert routing is not None
        down, up = self.lora_A[0][0, 0], self.lora_B[0][0]
        if not torch.is_autocast_enabled(tokens.device.type):
            tokens = tokens.to(down.dtype)
        hidden = tokens @ down.t()  # (n, r)
        gates = (routing.gates()[:, 0] * scaling).to(hidden.dtype)
        mixed = (gates[:, :, None] * hidden[:, None]).flatten(1) @ up.flatten(0, 1)
        return mixed if output is None else output + mixed.to(output.dtype)


class HydraLoraLinear(AdapterLinear):
    """A frozen linear with one A and several routed B."""

    def __init__(
        self,
        base: nn.Linear,
        config: MoELoraConfig,
        *,
        name: str = "linear",
        mask: MaskHolder | None = None,
        router: Router | None = None,
    ) -> None:
        super().__init__(base, config, name=name, mask=mask, router=router)
        self.bank = SharedDownBank(
            1,
            config.experts,
            config.rank,
            base.in_features,
            base.out_features,
            seed=config.seed,
            name=name,
            device=base.weight.device,
        )
