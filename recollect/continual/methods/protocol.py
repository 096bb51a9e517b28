"""What a method of continual learning is, and what it gets from whoever runs it.

A run of one task, in order (`driving.learn_task` does exactly this):

    method.prepare(model)                      once, before the first task; puts the adapters on
    method.before_task(task, model)            passes over the new data, freezing, growing
    for phase in method.phases(task, model):   each trained by `recollect.loop.train` with
        loss=lambda batch: method.loss(model, batch)
        before_step=lambda optimizer: method.after_backward(model, optimizer)
        after_step=lambda optimizer: method.after_step(model, optimizer)
    method.after_task(task, model)             consolidation
    state = method.state(model)                everything the next task starts from

Exact resume: load the state of the last finished task, then run the task from `before_task` again.  Phases already
trained are finished checkpoints of their folders, so they are only loaded; what a method keeps between optimiser steps
are buffers of the model (`LiveState`), which are part of those checkpoints.  Hooks are pure functions of the state, the
task and the model: the randomness of a method comes from named streams.

Methods know no data format: a batch is a mapping of tensors (`objective.Batch`), and samples of earlier
tasks come through `Memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from recollect.continual.adapters.attach import (
    adapter_state_dict,
    attach,
    attached,
    load_adapter_state_dict,
    routing_loss,
)
from recollect.continual.adapters.config import MoELoraConfig, config_to_dict
from recollect.continual.methods.banks import generations_of, grow_banks_to
from recollect.continual.methods.config import MethodConfig
from recollect.continual.methods.objective import Batch, answer_loss, sample_types
from recollect.errors import ResumeRefused


class Memory(Protocol):
    """Samples of the tasks seen so far, the one being learned included; reading is free of side effects."""

    def size(self, task: int) -> int:
        """Training samples of task number `task`."""
        ...

    def batches(self, task: int, samples: int) -> Sequence[Batch]:
        """A fixed random choice of `samples` training samples of a task (all of them if it has fewer), in batches."""
        ...

    def general(self) -> Sequence[Batch]:
        """Instructions of no task that replay may mix in, in batches; empty where there are none."""
        ...


@dataclass(frozen=True)
class Task:
    """One task as a method sees it.

    index: 0 first.  name.  n_tasks: in the whole sequence.  batches: epoch -> its training batches, a pure function.
    epochs: passes over them.  steps: optimiser steps of one epoch.  memory: see `Memory`.
    """

    index: int
    name: str
    n_tasks: int
    batches: Callable[[int], Sequence[Batch]]
    epochs: int
    steps: int
    memory: Memory


@dataclass(frozen=True)
class Phase:
    """One training run inside a task: every parameter that requires a gradient, on `batches`, for `epochs`.

    name: of its checkpoint folder; unique in the task.
    """

    name: str
    batches: Callable[[int], Sequence[Batch]]
    epochs: int


@dataclass
class MethodState:
    """Everything a method starts the next task from, and what a model needs to answer: JSON values and tensors."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class LiveState(nn.Module):
    """What a method changes between optimiser steps: buffers of the model, so that checkpoints hold them."""

    NAME: ClassVar[str] = "continual_state"

    def put(self, key: str, value: Tensor) -> None:
        """Create or replace a buffer."""
        self.register_buffer(key.replace(".", "/"), value)

    def get(self, key: str) -> Tensor:
        """The buffer put under `key`."""
        return self.get_buffer(key.replace(".", "/"))


class ContinualMethod:
    """The base of every method: adapters, the loss on answers, and hooks that do nothing.

    Args:
        config: of the method.
        adapter: of the adapters it trains.
    """

    name: ClassVar[str]

    def __init__(self, config: MethodConfig, adapter: MoELoraConfig) -> None:
        self.config, self.adapter = config, adapter
        self.finished = 0  # tasks

    def prepare(self, model: nn.Module) -> nn.Module:
        """Put the method's adapters on the bare model, in place, and return it.

        Raises:
            ConfigError: the model has adapters already, or the adapters' options do not fit it.
        """
        if live_state(model) is not None:
            delattr(model, LiveState.NAME)  # of a method that trained this model before
        return attach(model, self.adapter)

    def before_task(self, task: Task, model: nn.Module) -> None:
        """Called before the task's first optimiser step, and again when the task is resumed."""

    def phases(self, task: Task, model: nn.Module) -> Iterator[Phase]:
        """The task's training runs in order; code between two of them runs between them."""
        yield Phase("train", task.batches, task.epochs)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the answer tokens plus the routers' losses; a scalar with its graph."""
        return answer_loss(model, batch) + self.routing_loss(model, batch)

    def after_backward(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called when a step's gradients are complete, before they are clipped."""

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called right after the optimiser's step."""

    def after_task(self, task: Task, model: nn.Module) -> None:
        """Called once a task is learned; a method that overrides this calls it last."""
        self.finished = task.index + 1

    def undecayed(self, model: nn.Module) -> Collection[nn.Parameter]:
        """Parameters that weight decay leaves alone."""
        return ()

    def select(self, model: nn.Module, task: int | None) -> None:
        """Make the model answer as after training, for a method that needs to know the task (None = as trained)."""

    def facts(self) -> dict[str, Any]:
        """JSON values about the last task worth reporting."""
        return {}

    def routing_loss(self, model: nn.Module, batch: Batch) -> Tensor | float:
        """The routers' weighted losses of the last pass."""
        if not (self.adapter.balance or self.adapter.z_loss or self.adapter.lbc):
            return 0.0
        return routing_loss(model, sample_types(batch))

    def state(self, model: nn.Module) -> MethodState:
        """Adapters, live buffers and what `own_state` adds, between two tasks."""
        values, tensors = self.own_state(model)
        live = live_state(model)
        kept = {f"live.{name}": buffer for name, buffer in live.named_buffers()} if live is not None else {}
        weights = adapter_state_dict(model) if attached(model) is not None else {}
        everything = {f"adapter.{name}": tensor for name, tensor in weights.items()} | kept
        everything |= {f"own.{name}": tensor for name, tensor in tensors.items()}
        return MethodState(
            {
                "method": self.name,
                "adapter_kind": self.adapter.kind,
                "adapter": config_to_dict(self.adapter),
                "finished": self.finished,
                "generations": generations_of(model) if attached(model) is not None else [],
                "trained": list(trained_parameters(model)),
                "own": values,
            },
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in everything.items()},
        )

    def load_state(self, model: nn.Module, state: MethodState) -> None:
        """Inverse of `state`, on a model that `prepare` has just made.

        Raises:
            ResumeRefused: the state is of another method or of other adapters.
        """
        here = {"method": self.name, "adapter_kind": self.adapter.kind, "adapter": config_to_dict(self.adapter)}
        for key, value in here.items():
            if _plain(state.values.get(key)) != _plain(value):
                raise ResumeRefused(
                    f"the state is of {key} {state.values.get(key)!r}, not {value!r}; give the same or start anew"
                )
        device = next(model.parameters()).device
        if attached(model) is not None:
            grow_banks_to(model, state.values["generations"])
            load_adapter_state_dict(model, _below(state.tensors, "adapter."))
        live = _below(state.tensors, "live.")
        for name, value in live.items():
            make_live_state(model).put(name, value.to(device, copy=True))
        self.finished = state.values["finished"]
        own = {name: tensor.to(device, copy=True) for name, tensor in _below(state.tensors, "own.").items()}
        self.load_own_state(model, state.values["own"], own)
        trained = set(state.values["trained"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)

    def own_state(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON values and tensors of the method itself; names of tensors are free."""
        return {}, {}

    def load_own_state(self, model: nn.Module, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Inverse of `own_state`; the tensors are on the model's device."""


def live_state(model: nn.Module) -> LiveState | None:
    """The buffers a method keeps in the model, or None."""
    found = getattr(model, LiveState.NAME, None)
    return found if isinstance(found, LiveState) else None


def make_live_state(model: nn.Module) -> LiveState:
    """The buffers a method keeps in the model, made if there are none."""
    found = live_state(model)
    if found is None:
        found = LiveState()
        model.add_module(LiveState.NAME, found)
    return found


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that requires a gradient, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
