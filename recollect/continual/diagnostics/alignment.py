"""Do compositions that share a route pull its experts the same way?  Cosines of expert-parameter gradients.

The gradient of a composition is that of the mean next-token loss at its tokens, in the old examples as they stand.
Under top-1 routing two compositions on different routes mostly move different parameters, so their cosine is near 0 by
construction; what tells something is the cosine of those that share.
Source: moe_lora 4.1, 5.3; which loss and which compositions are ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.adapters.attach import adapters
from recollect.continual.adapters.complement import ComplementBank
from recollect.continual.diagnostics.factors import OldExamples
from recollect.continual.diagnostics.watching import Choices, next_token_losses, passes
from recollect.continual.joined_rows import mixed_products
from recollect.continual.learner import token_batch
from recollect.continual.methods.objective import model_inputs, on_device_of


def composition_gradient_alignment(gradients: Tensor, main_routes: np.ndarray) -> dict[str, Any]:
    """Mean cosine over pairs of compositions with one main route, and over the other pairs.

    Args:
        gradients: (C, P) of each composition; pairs with a zero gradient are left out.
        main_routes: (C,) the route most tokens of each composition take.

    Returns:
        {"sharing", "apart": mean cosine (None without pairs), "sharing_pairs", "apart_pairs"}.
    """
    norms = gradients.norm(dim=1)
    unit = functional.normalize(gradients.double(), dim=1)
    cosines = (unit @ unit.T).cpu().numpy()
    known = (norms > 0).cpu().numpy()
    pairs = np.triu(np.ones(cosines.shape, dtype=bool), 1) & known[:, None] & known[None, :]
    same = main_routes[:, None] == main_routes[None, :]
    found: dict[str, Any] = {}
    for name, chosen in (("sharing", pairs & same), ("apart", pairs & ~same)):
        found[name] = float(cosines[chosen].mean()) if chosen.any() else None
        found[f"{name}_pairs"] = int(chosen.sum())
    return found


def main_routes(choices: Choices, compositions: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
    """(C,) the route most tokens of each wanted composition take at one router."""
    routes = choices.routes()
    return np.array([np.bincount(routes[compositions == one]).argmax() for one in wanted])


def composition_gradients(
    model: Any, old: OldExamples, compositions: np.ndarray, wanted: Sequence[int], names: Sequence[str], pad_id: int
) -> dict[str, Tensor]:
    """(C, P) float32 per router: the gradient of each wanted composition's mean loss in the experts behind it.

    Args:
        compositions: (n,) of the tokens of `old`.
        wanted: (C,) compositions.
        names: routers.

    The model is evaluated without dropout; no `.grad` is touched.
    """
    index = {composition: at for at, composition in enumerate(wanted)}
    marks = np.array([index.get(int(one), -1) for one in compositions])
    seen = 0
    with open_experts_of(model, names) as parameters:
        every = [parameter for group in parameters.values() for parameter in group]
        totals = [torch.zeros(len(wanted), parameter.numel()) for parameter in every]
        counted = np.zeros(len(wanted))
        for chosen in passes([len(row) for row in old.rows]):
            batch = on_device_of(model, token_batch(old.rows, chosen, pad_id))
            real = batch["attention_mask"].bool()
            with mixed_products(model):
                logits = model(**model_inputs(batch), use_cache=False).logits
            losses = next_token_losses(logits, batch)[real]
            here = torch.from_numpy(marks[seen : seen + len(losses)]).to(losses.device)
            here = torch.where(losses.isnan(), -1, here)
            seen += len(losses)
            present = here.unique().tolist()
            present = [at for at in present if at >= 0]
            for at in present:
                counted[at] += int((here == at).sum())
                found = torch.autograd.grad(
                    losses[here == at].sum(), every, retain_graph=at != present[-1], allow_unused=True
                )
                for total, gradient in zip(totals, found, strict=True):
                    if gradient is not None:
                        total[at] += gradient.float().flatten().cpu()
    for total in totals:
        total /= torch.from_numpy(counted).float().clamp_min(1.0)[:, None]
    gradients, start = {}, 0
    for name, group in parameters.items():
        gradients[name] = torch.cat(totals[start : start + len(group)], dim=1)
        start += len(group)
    return gradients


@contextlib.contextmanager
def open_experts_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[nn.Parameter]]]:
    """Evaluation mode, and gradients for the expert parameters behind each named router; all as before afterwards.

    Frozen experts get gradients too, except those of SD-LoRA-MoE: there a frozen expert is another function than a
    trained one, for its projections are fixed.
    """
    found: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    by_router = {id(router): name for name, router in _named_routers(model, names).items()}
    for module in adapters(model).values():
        name = by_router.get(id(module.router))
        if name is not None:
            is_complement = isinstance(module.bank, ComplementBank)
            weights = [*module.bank.lora_A, *module.bank.lora_B]
            found[name] += [weight for weight in weights if weight.requires_grad or not is_complement]
    found = {name: group for name, group in found.items() if group}
    closed = [weight for group in found.values() for weight in group if not weight.requires_grad]
    was_training = model.training
    model.eval()
    for weight in closed:
        weight.requires_grad_(True)
    try:
        yield found
    finally:
        for weight in closed:
            weight.requires_grad_(False)
        model.train(was_training)


def _named_routers(model: nn.Module, names: Sequence[str]) -> Mapping[str, nn.Module]:
    from recollect.continual.adapters.attach import routers

    known = routers(model)
    return {name: known[name] for name in names}
