"""The one training loop: accumulation, schedule, validation, best weights, checkpoints and exact resume.

A run is a pure function of (module as given, batches, config, number of processes).  Batch i of an epoch comes from
`batches(epoch)[i]` and the randomness of its step (dropout, negatives) from a seed made of (config.seed, epoch, i), so
a checkpoint needs no generator state and a resumed run repeats the uninterrupted one: bit for bit on a CPU.  The
process's global torch generator is left as it was found.

Not covered: what a batch or a loss is; moving frozen weights to disk (a checkpoint holds what is trained, and buffers).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from recollect.checkpoints import Moments, Position, RunState
from recollect.errors import ConfigError, TrainingDiverged
from recollect.progress import Progress, SilentProgress
from recollect.rng import call_seed
from recollect.tracking import Tracker

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Batch = TypeVar("Batch")
Batch_co = TypeVar("Batch_co", covariant=True)


class Batches(Protocol[Batch_co]):
    """The batches of an epoch: a list, or anything with a length that makes batch i when asked for it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch_co: ...


@dataclass(frozen=True)
class LoopConfig:
    """How a module is trained; what it is trained on comes with the call of `train`."""

    epochs: int = 100
    """Passes over the batches, unless patience ends the run before."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; 0 = nothing moves (a check)."""
    weight_decay: float = 0.0
    """Decoupled weight decay; 0 makes it Adam."""
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or half a cosine to 0 over all epochs."""
    schedule_span: tuple[float, float] = (0.0, 1.0)
    """The part of the schedule this run is; less than (0, 1) where several runs share one."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's averaging factors."""
    clip_norm: float | None = None
    """Largest gradient norm; none = no clipping."""
    accumulation: int = 1
    """Batches whose mean gradient makes one optimiser step."""
    patience: int | None = 10
    """Validations without improvement before the run ends; none = never end early."""
    validate_every: int = 1
    """Epochs between validations."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 = products in bfloat16, sums and weights in fp32."""
    seed: int = 0
    """Of all randomness inside the steps."""

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulation", "validate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not self.learning_rate >= 0 or not math.isfinite(self.learning_rate):
            raise ConfigError(f"learning_rate must be a number not below 0, got {self.learning_rate!r}")
        if self.weight_decay < 0 or self.warmup_steps < 0:
            raise ConfigError(
                f"weight_decay and warmup_steps must not be negative, got {self.weight_decay!r}, {self.warmup_steps!r}"
            )
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience must be at least 1 or none, got {self.patience!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm must be positive or none, got {self.clip_norm!r}")
        if self.schedule not in ("constant", "cosine"):
            raise ConfigError(f"schedule must be 'constant' or 'cosine', got {self.schedule!r}")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")
        if len(self.schedule_span) != 2 or not 0 <= self.schedule_span[0] < self.schedule_span[1] <= 1:
            raise ConfigError(f"schedule_span must be two rising numbers in [0, 1], got {self.schedule_span!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be two numbers in [0, 1), got {self.betas!r}")


@dataclass(frozen=True)
class LoopResult:
    """How a run went.

    epochs: passes made.  steps: optimiser steps.  best_epoch: passes behind the weights the module now holds.
    best_validation: None without validation.  history: one {"epoch", "loss", "validation"?} per epoch, the loss being
    the mean over its batches.  samples_per_second, wall_seconds: of training alone and of everything, this process
    and since the last resume.
    """

    epochs: int
    steps: int
    best_epoch: int
    best_validation: float | None
    history: list[dict[str, float]]
    samples_per_second: float
    wall_seconds: float


def train(
    module: nn.Module,
    *,
    batches: Callable[[int], Batches[Batch]],
    loss: Callable[[Batch], Tensor],
    config: LoopConfig,
    validate: Callable[[], float] | None = None,
    folder: Path | None = None,
    checkpoint_every: int | None = None,
    tracker: Tracker | None = None,
    progress: Progress | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    undecayed: Collection[nn.Parameter] = (),
    size: Callable[[Batch], int] = len,  # type: ignore[assignment]
    identity: Mapping[str, Any] | None = None,
    before_step: Callable[[torch.optim.Optimizer], None] | None = None,
    after_step: Callable[[torch.optim.Optimizer], None] | None = None,
    moments: Moments | None = None,
) -> LoopResult:
    """Train `module` in place and leave it with its best weights (the last ones without validation), in eval mode.

    Args:
        module: trained where accelerate places it: the CPU, the GPU, or one process's share under torchrun.
        batches: epoch -> its batches, a pure function (any randomness from a seed and the epoch); an object with
            `.to(device)` or a collection of tensors.  Under torchrun a process takes every n-th batch.
        loss: mean loss of a batch, called in training mode; it closes over `module`.
        config: how to train.
        validate: called in eval mode without gradients; higher is better.
        folder: where checkpoints live; a run found there is continued, a finished one only loaded.  None = no files.
        checkpoint_every: optimiser steps between checkpoints inside an epoch; every epoch ends with one anyhow.
        tracker: gets loss, learning rate and validation per epoch.
        progress: one step per batch.
        parameters: what is trained; default every parameter that requires a gradient.
        undecayed: those of them that `config.weight_decay` does not shrink.
        size: samples in a batch, for the samples per second.
        identity: JSON values that with `config` tell this run from others (model options, fingerprint of the data); a
            checkpoint of another identity is refused.
        before_step: called with the optimiser when the gradients of a step are complete, before they are clipped.
        after_step: called with the optimiser right after its step; what it keeps between steps must be in buffers of
            the module, or a resumed run differs from an uninterrupted one.
        moments: what the optimiser remembers of an earlier run, and after this one of this.  None = it begins anew.

    Raises:
        ConfigError: nothing to train on, or no parameter to train.
        ResumeRefused: `folder` holds a run of other options or another module.
        TrainingDiverged: a loss, a validation value or a trained weight is NaN or infinite.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    accelerator = Accelerator(mixed_precision="no")  # precision is the config's, whatever the environment says
    progress = progress or SilentProgress()
    trained = _trained(module, parameters)
    optimizer = torch.optim.AdamW(
        _decay_groups(trained.values(), undecayed),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if moments is not None:
        moments.give(optimizer, trained)
    stepper = accelerator.prepare(_step_module(module, loss))
    state = RunState(module, trained, optimizer, {**(identity or {}), **asdict(config)})
    position = state.load(folder) if folder is not None else Position()
    if tracker is not None and accelerator.is_main_process:
        tracker.rewind(position.step)
    started, training_seconds, samples = time.perf_counter(), 0.0, 0

    def checkpoint() -> None:
        if folder is not None and accelerator.is_main_process:
            state.save(folder, position)

    with _own_randomness(accelerator.device):
        while not position.done:
            epoch_batches = batches(position.epoch)
            if len(epoch_batches) == 0:
                raise ConfigError("there is no batch to train on; give longer sequences or a smaller batch")
            if position.batch == 0:
                progress.stage(f"epoch {position.epoch + 1} of at most {config.epochs}", len(epoch_batches))
            module.train()
            epoch_started = time.perf_counter()
            per_step = config.accumulation * accelerator.num_processes
            for window in _windows(position.batch, len(epoch_batches), per_step):
                mine = _share(window, accelerator.process_index, accelerator.num_processes)
                optimizer.zero_grad(set_to_none=True)
                total = torch.zeros((), device=accelerator.device)
                for index in mine:
                    torch.manual_seed(call_seed(config.seed, "step", position.epoch, index))
                    batch = send_to_device(epoch_batches[index], accelerator.device)
                    samples += size(batch)
                    last = index == mine[-1]
                    with _precision(config, accelerator.device), _synchronised(accelerator, stepper, last):
                        value = stepper(batch)
                        accelerator.backward(value / len(mine))
                    total += value.detach()
                    progress.advance(1)
                mean = float(accelerator.reduce(total / len(mine), "mean"))
                if not math.isfinite(mean):
                    raise TrainingDiverged(
                        f"the loss is {mean} at step {position.step + 1} (epoch {position.epoch + 1}, "
                        f"batch {window[0] + 1} of {len(epoch_batches)}); lower the learning rate "
                        f"({config.learning_rate:g}), set clip_norm, or use fp32"
                    )
                if before_step is not None:
                    before_step(optimizer)
                if config.clip_norm is not None:
                    accelerator.clip_grad_norm_(list(trained.values()), config.clip_norm)
                reached = (position.epoch + window[0] / len(epoch_batches)) / config.epochs
                low, high = config.schedule_span
                rate = config.learning_rate * learning_rate_factor(config, position.step, low + (high - low) * reached)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                if after_step is not None:
                    after_step(optimizer)
                position.step += 1
                position.batch = window[-1] + 1
                position.loss_sum += mean * len(window)
                if checkpoint_every and position.step % checkpoint_every == 0 and position.batch < len(epoch_batches):
                    checkpoint()
            training_seconds += time.perf_counter() - epoch_started
            row = {"epoch": position.epoch + 1, "loss": position.loss_sum / len(epoch_batches)}
            position.epoch, position.batch, position.loss_sum = position.epoch + 1, 0, 0.0
            last_epoch = position.epoch == config.epochs
            if validate is not None and (last_epoch or position.epoch % config.validate_every == 0):
                row["validation"] = _validated(module, validate, position, config)
                if position.stale == 0:
                    state.keep_best()
            position.history.append(row)
            position.done = last_epoch or (config.patience is not None and position.stale >= config.patience)
            if tracker is not None and accelerator.is_main_process:
                tracker.log(position.step, {**row, "learning_rate": rate})
            checkpoint()
        state.restore_best()
    if moments is not None:
        moments.take(optimizer, trained)
    if validate is None:
        position.best_epoch = position.epoch
    _check_finite(trained, config)
    module.eval()
    return LoopResult(
        epochs=position.epoch,
        steps=position.step,
        best_epoch=position.best_epoch,
        best_validation=position.best_validation,
        history=position.history,
        samples_per_second=samples / training_seconds if training_seconds else 0.0,
        wall_seconds=time.perf_counter() - started,
    )


def learning_rate_factor(config: LoopConfig, step: int, reached: float) -> float:
    """Share of the peak learning rate at optimiser step `step` (0 first), with `reached` in [0, 1) of the schedule
    done; only a schedule's first part warms up."""
    warms_up = config.warmup_steps > 0 and config.schedule_span[0] == 0
    factor = min(1.0, (step + 1) / config.warmup_steps) if warms_up else 1.0
    return factor * (0.5 * (1 + math.cos(math.pi * reached)) if config.schedule == "cosine" else 1.0)


def _windows(start: int, count: int, per_step: int) -> Iterator[range]:
    """Batches of each optimiser step from batch `start` on; the last step of an epoch may have fewer."""
    for first in range(start, count, per_step):
        yield range(first, min(first + per_step, count))


def _share(window: range, process: int, n_processes: int) -> range:
    """Batches of one process; one that would have none repeats another's, for all must meet in the backward."""
    return window[process::n_processes] or window[process % len(window) :][:1]


def _trained(module: nn.Module, parameters: Iterable[nn.Parameter] | None) -> dict[str, nn.Parameter]:
    chosen = None if parameters is None else {id(parameter) for parameter in parameters}
    trained = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (chosen is None or id(parameter) in chosen)
    }
    if not trained or (chosen is not None and len(trained) != len(chosen)):
        found = f"{len(trained)} of the {len(chosen)} given" if chosen is not None else "none"
        raise ConfigError(f"every parameter to train must belong to the module and require a gradient; found {found}")
    return trained


def _decay_groups(trained: Collection[nn.Parameter], undecayed: Collection[nn.Parameter]) -> list[dict[str, Any]]:
    """The optimiser's groups: what decays as the config says, and what does not."""
    exempt = {id(parameter) for parameter in undecayed}
    decaying = [parameter for parameter in trained if id(parameter) not in exempt]
    spared = [parameter for parameter in trained if id(parameter) in exempt]
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _step_module(module: nn.Module, loss: Callable[[Any], Tensor]) -> nn.Module:
    """A module whose forward is the loss, so that distributed wrappers see the backward of all parameters."""
    from torch import nn

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, batch: Any) -> Tensor:
            return loss(batch)

    return Step()


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _precision(config: LoopConfig, device: torch.device) -> Iterator[None]:
    """bf16 on a GPU: autocast.  On a CPU: fp32 tensors whose products alone are rounded to bf16 and summed in fp32,
    which is what matrix units (AMX) do fastest and keeps scores from tying."""
    import torch

    if config.precision == "fp32":
        yield
    elif device.type == "cpu":
        matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before
    else:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield


def _synchronised(accelerator: Any, stepper: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if last else accelerator.no_sync(stepper)


def _validated(module: nn.Module, validate: Callable[[], float], position: Position, config: LoopConfig) -> float:
    """Validate after `position.epoch` epochs and note in `position` whether it is the best so far."""
    import torch

    module.eval()
    with torch.no_grad():
        value = float(validate())
    if not math.isfinite(value):
        raise TrainingDiverged(
            f"validation after epoch {position.epoch} is {value}; lower the learning rate ({config.learning_rate:g})"
        )
    if position.best_validation is None or value > position.best_validation:
        position.best_validation, position.best_epoch, position.stale = value, position.epoch, 0
    else:
        position.stale += 1
    return value


def _check_finite(trained: dict[str, nn.Parameter], config: LoopConfig) -> None:
    for name, tensor in trained.items():
        if not bool(tensor.isfinite().all()):
            raise TrainingDiverged(
                f"the weights {name!r} are not finite after the last step; lower the learning rate "
                f"({config.learning_rate:g}) or set clip_norm"
            )
