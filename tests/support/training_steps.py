"""What a reloaded model must repeat: its logits, which parameters it trains, and a step of training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recollect.continual.adapters.attach import adapters, routing_loss
from recollect.continual.methods.objective import answer_loss
from recollect.continual.spectral.projector import StepAware
from tests.support.method_worlds import rows


def step(model: nn.Module, n_steps: int = 1, seed: int = 0) -> None:
    """Steps of AdamW on every parameter that wants gradients, with dropout."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    aware = [module for module in adapters(model).values() if isinstance(module, StepAware)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number in range(n_steps):
            optimizer.zero_grad()
            batch = rows(0, number)
            types = torch.ones(len(batch["input_ids"]), dtype=torch.long)
            (answer_loss(model, batch) + routing_loss(model, types)).backward()
            for module in aware:
                module.before_step(optimizer)
            optimizer.step()
            for module in aware:
                module.after_step(optimizer)
    model.eval()


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    batch = rows(1, 0)
    return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
