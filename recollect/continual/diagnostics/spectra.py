"""How far the experts of some layers differ after a task, in weights and in the old tasks' gradients.

`spectral_report` for low-rank experts inside a decoder: overlaps, energy, alignment of the gate, what the experts
compute, and for SD-LoRA-MoE how much of an expert lies inside the common directions.
Source: sd_moe 5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recollect.continual.adapters.attach import adapters
from recollect.continual.adapters.sd_lora_moe import SDLoraMoELinear
from recollect.continual.adapters.wrapped import AdapterLinear
from recollect.continual.diagnostics.factors import OldExamples
from recollect.continual.diagnostics.n_eff_report import finite, layer_number
from recollect.continual.diagnostics.watching import Choices
from recollect.continual.learner import token_batch
from recollect.continual.methods.objective import answer_loss, on_device_of
from recollect.continual.spectral.report import MICRO_BATCHES, spectral_report


def round_spectra(
    model: Any,
    old: OldExamples,
    layers: Sequence[int],
    pad_id: int,
    *,
    inputs: Mapping[str, np.ndarray],
    choices: Mapping[str, Choices],
    labels: np.ndarray,
) -> list[dict[str, Any]]:
    """One entry per adapted linear of the given layers; a bank beside a whole FFN has no matrices and is left out.

    Args:
        old: the micro-batches of the gradients, one example each; fewer than 32 give no gradient overlap.
        layers: numbers.
        inputs: (m, d) by router.  choices: of the same m tokens, by router.
        labels: (m,) task of each of these tokens.

    Returns:
        [{"linear", "layer", "metrics": {name: mean over slices}, "random": {name: the same of unrelated experts}}].
    """
    modules = {
        name: module
        for name, module in adapters(model).items()
        if isinstance(module, AdapterLinear) and layer_number(name) in layers
    }
    gradients = {}
    if modules and len(old) >= MICRO_BATCHES:
        gradients = adapter_gradients(model, modules, old, pad_id)
    found = []
    for name, module in modules.items():
        seen: dict[str, Tensor] = {}
        if name in inputs and choices[name].winners.shape[1] == 1:
            arrays = {"inputs": inputs[name], "selected": choices[name].winners[:, 0], "labels": labels}
            seen = {key: torch.from_numpy(array).to(module.base.weight.device) for key, array in arrays.items()}
        with torch.no_grad():
            report = spectral_report(
                module,
                seen.get("inputs"),
                gradients=gradients.get(name),
                selected=seen.get("selected"),
                labels=seen.get("labels"),
            )
        metrics = over_slices(report.metrics)
        if isinstance(module, SDLoraMoELinear):
            metrics["leak_left"], metrics["leak_right"] = module.leak()
        found.append(
            {"linear": name, "layer": layer_number(name), "metrics": metrics, "random": over_slices(report.random)}
        )
    return found


def adapter_gradients(
    model: Any, modules: Mapping[str, AdapterLinear], old: OldExamples, pad_id: int
) -> dict[str, dict[str, Tensor]]:
    """Gradients of the answer loss in each expert's effective update, by module and "slice_j": (E, d_out, d/H).

    With y = W0·x + Σ_j Σ_e g_{j,e}·D_{j,e}·x^(j) this is Σ_t g_{t,j,e}·δ_t·x_t^(j)ᵀ, δ = ∂L/∂y, summed over the
    examples; what a low-rank expert cannot follow is in it too.  No `.grad` is touched.  Empty for MixLoRA, whose FFNs
    compute their linears together.
    """
    total: dict[str, list[list[Tensor]]] = {}
    with _recorded(model, modules) as record:
        for row in old.rows:
            loss = answer_loss(model, on_device_of(model, token_batch([row], [0], pad_id)))
            names = list(record)
            if not names:
                return {}
            found = torch.autograd.grad(loss, [record[name][1] for name in names], allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is None:
                    continue
                routing = modules[name].last_routing
                assert routing is not None
                gates = routing.gates().detach()  # (n, H, E)
                outputs = gradient.reshape(-1, gradient.shape[-1]).float()
                slices = record[name][0].detach().reshape(len(outputs), gates.shape[1], -1).float()
                parts = total.setdefault(name, [[] for _ in range(gates.shape[1])])
                for head, part in enumerate(parts):
                    stack = [
                        (outputs * gates[:, head, expert, None]).T @ slices[:, head] for expert in range(gates.shape[2])
                    ]
                    if part:
                        for summed, more in zip(part, stack, strict=True):
                            summed += more
                    else:
                        part += stack
    return {
        name: {f"slice_{head}": torch.stack(part) for head, part in enumerate(parts)} for name, parts in total.items()
    }


def over_slices(values: Mapping[str, float]) -> dict[str, float | None]:
    """{"slice_0/overlap_left@8": …, "slice_1/…": …} as {"overlap_left@8": mean}; other names as they are."""
    grouped: dict[str, list[float]] = {}
    for name, value in values.items():
        first, _, rest = name.partition("/")
        grouped.setdefault(rest if first.startswith("slice_") else name, []).append(value)
    return {name: finite(float(np.mean(found))) for name, found in grouped.items()}


@contextlib.contextmanager
def _recorded(model: Any, modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """{module: its input and output in the last pass}, with a graph even where nothing is trained."""
    record: dict[str, tuple[Tensor, Tensor]] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            record[name] = (args[0], output)

        return keep

    def begin_graph(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.requires_grad_(True)

    handles = [module.register_forward_hook(recorder(name)) for name, module in modules.items()]
    handles.append(model.get_input_embeddings().register_forward_hook(begin_graph))
    was_training = model.training
    model.eval()
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
