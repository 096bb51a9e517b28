"""SAPT (ACL 2024) [recalled]: a LoRA block per task, mixed by the attention of the instance over the tasks' keys.

    y = W0·x + s·Σ_{i≤t} a_i·B_i·A_i·x,   a = softmax over tasks of c·cos(q, k_i),   q = query of the instance's prompt
    L = CE + w·KL(a°(pseudo-samples of old tasks) ‖ a(the same))

The same weights mix the blocks in training and in testing (`adapters.weighed.TaskAttention`).  Task t trains its block,
its key and the query's projection; earlier blocks and keys are frozen.  a° is the attention at the start of the task,
the new key included, so the KL term and its gradient are exactly zero at the task's first step.

Our design, where only the idea is recalled: what a query is made of; a new key starts as the mean query of the new
task's first batches, so that old prompts hardly look at it; a pseudo-sample is not a text but what the attention reads
of one, a draw from a Gaussian with the mean and the variances of the old task's pooled prompts.  No data are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.adapters.weighed import ATTENTION, TaskAttention
from recollect.continual.methods.banks import generations_of
from recollect.continual.methods.config import SAPTConfig
from recollect.continual.methods.lwf import distillation
from recollect.continual.methods.o_lora import start_pair
from recollect.continual.methods.objective import NO_LOSS, on_device_of
from recollect.continual.methods.protocol import Batch, ContinualMethod, Task
from recollect.errors import ConfigError, InputError
from recollect.rng import stream


class SAPT(ContinualMethod):
    """A block per task, shared attention over them.

    Raises:
        ConfigError: the adapters are not SAPT's.
    """

    name = "sapt"

    def __init__(self, config: SAPTConfig, adapter: MoELoraConfig) -> None:
        super().__init__(config, adapter)
        if adapter.kind != "sapt":
            raise ConfigError(
                f"sapt attends over a LoRA block per task and needs adapters 'sapt', got {adapter.kind!r}"
            )
        self.options = config
        self.statistics: list[tuple[Tensor, Tensor]] = []  # per finished task: means and deviations (d,)
        self.pseudo: Tensor | None = None  # (P, d) pooled pseudo-samples of the old tasks
        self.kept: Tensor | None = None  # (P, tasks) logits of the attention to keep

    def before_task(self, task: Task, model: nn.Module) -> None:
        """Add the task's block and key, freeze older ones, and note the attention of the old tasks' pseudo-samples."""
        attention = attention_of(model)
        is_new = len(generations_of(model)) == task.index
        start_pair(model, task)
        with torch.no_grad():
            key = attention.queries(self._pooled(task, model)).mean(0)
            if is_new:
                attention.add_key(key)
            elif not task.index:
                attention.keys[0].copy_(key)
        for number, own in enumerate(attention.keys):
            own.requires_grad_(number == task.index)
        self.pseudo = self.kept = None
        if self.statistics:
            self.pseudo = torch.cat(
                [self._drawn(number, task.index, *found) for number, found in enumerate(self.statistics)]
            )
            with torch.no_grad():
                self.kept = attention.logits(self.pseudo)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy through the attention of the batch's prompts, plus the attention that must be kept.

        Raises:
            InputError: a row of the batch has no prompt.
        """
        with attention_of(model).prompts(prompt_mask(model, batch)):
            value = super().loss(model, batch)
        return value + self.options.attention * self.attention_loss(model) if self.options.attention else value

    def attention_loss(self, model: nn.Module) -> Tensor | float:
        """Mean KL (nats) from the kept attention of the pseudo-samples to the present one; 0 in the first task."""
        if self.pseudo is None or self.kept is None:
            return 0.0
        return distillation(attention_of(model).logits(self.pseudo), self.kept, temperature=1.0)

    def after_task(self, task: Task, model: nn.Module) -> None:
        """Keep the mean and the deviations of the task's pooled prompts."""
        pooled = self._pooled(task, model)
        self.statistics = [*self.statistics[: task.index], (pooled.mean(0), pooled.std(0, correction=0))]
        self.pseudo = self.kept = None
        super().after_task(task, model)

    def own_state(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        parts: dict[str, Tensor] = {}
        for number, (mean, deviation) in enumerate(self.statistics):
            parts |= {f"mean.{number}": mean, f"deviation.{number}": deviation}
        return {}, parts

    def load_own_state(self, model: nn.Module, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.statistics = [
            (tensors[f"mean.{number}"], tensors[f"deviation.{number}"]) for number in range(len(tensors) // 2)
        ]

    def _pooled(self, task: Task, model: nn.Module) -> Tensor:
        """(n, d) pooled prompts of the task's first batches."""
        batches, attention, found = task.batches(0), attention_of(model), []
        for index in range(min(self.options.statistics_batches, len(batches))):
            batch = on_device_of(model, batches[index])
            found.append(attention.pooled(batch["input_ids"], prompt_mask(model, batch)))
        return torch.cat(found)

    def _drawn(self, old: int, task: int, mean: Tensor, deviation: Tensor) -> Tensor:
        """(p, d) draws for old task `old`, the same whenever task `task` is begun."""
        draws = stream(self.options.seed, "pseudo prompts", task, old)
        noise = draws.standard_normal((self.options.pseudo_samples, len(mean)))
        return mean + deviation * torch.tensor(noise).to(mean)


def attention_of(model: nn.Module) -> TaskAttention:
    """The attention of a model with SAPT's adapters."""
    attention = model.get_submodule(ATTENTION)
    assert isinstance(attention, TaskAttention)
    return attention


def prompt_mask(model: nn.Module, batch: Batch) -> Tensor:
    """(B, T) 1 = a real token of a prompt: what the model says is one, else those before and outside of the answer.

    Raises:
        InputError: a row has none.
    """
    told: Any = getattr(model, "prompt_tokens", None)
    if told is not None:
        return told(batch["input_ids"], batch["attention_mask"]).long()
    mask = (batch["attention_mask"] != 0) & (batch["labels"] == NO_LOSS)
    if not bool(mask.any(1).all()):
        raise InputError(
            "sapt attends with prompts, and a row has none: every token is learnt (loss_on must be answer)"
        )
    return mask.long()
