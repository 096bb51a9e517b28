"""Experts whose weights are made once for the whole model, not by a router per linear: MOELoRA and SAPT.

    y = W0·x + s·Σ_e g_e·B_e·A_e·x

MOELoRA [recalled]: g(t) = softmax(W_g·v_t) with a learned vector v_t of task t, which must be known (`TaskGates`).
SAPT (ACL 2024) [recalled]: expert e is the LoRA pair of task e; a prompt's query attends over one key per task, and the
same weights mix the pairs at every token of the prompt and of its answer (`TaskAttention`).  What a query is made of is
our design: c·cos(W_q·(ē − m), k_e) before the softmax, ē the mean input embedding of the prompt's tokens, m the mean
row of the (frozen) embedding matrix, without which all texts look alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.adapters.config import TASK_WIDTH, MoELoraConfig, SAPTAdapterConfig
from recollect.continual.adapters.routing import MaskHolder, Router, Routing
from recollect.continual.adapters.wrapped import AdapterLinear
from recollect.errors import ConfigError, InputError
from recollect.rng import stream

GATES = "task_gates"
ATTENTION = "task_attention"


class TaskGates(nn.Module):
    """v_t of every task met and W_g; weighs the experts for the task in `current`.

    Attributes:
        weight (E, 16), tasks: W_g and the v_t.
        current: buffer, the task that is answered; saved with the adapters.
    """

    current: Tensor

    def __init__(self, experts: int, seed: int, device: torch.device | None = None) -> None:
        super().__init__()
        self._seed = seed
        self.weight = nn.Parameter(self._drawn(experts, "gate").to(device))
        self.tasks = nn.ParameterList()  # each (16,)
        self.register_buffer("current", torch.zeros((), dtype=torch.int64, device=device))

    def _drawn(self, rows: int, *names: str | int) -> Tensor:
        values = stream(self._seed, "task gates", *names).standard_normal((rows, TASK_WIDTH)) / TASK_WIDTH**0.5
        return torch.tensor(values, dtype=torch.float32)

    def add_task(self) -> None:
        """Draw the vector of the next task."""
        vector = self._drawn(1, "task", len(self.tasks))[0]
        self.tasks.append(nn.Parameter(vector.to(self.weight.device)))

    def answer_as(self, task: int) -> None:
        """Weigh the experts for `task` from now on; one not met yet is answered as the last one met."""
        self.current.fill_(min(task, max(len(self.tasks) - 1, 0)))

    def forward(self) -> Tensor:
        """(1, E) weights; equal ones before any task was met."""
        if not len(self.tasks):
            return torch.full_like(self.weight[:, :1].t(), 1 / len(self.weight))
        return (self.weight @ self.tasks[int(self.current)]).softmax(-1)[None]

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        """Take the number of tasks of a saved state about to be loaded."""
        while f"tasks.{len(self.tasks)}" in state:
            self.add_task()


class TaskAttention(nn.Module):
    """A key per task, and the attention of prompts over them; weighs the pairs for the prompts of the pass under way.

    In generation the weights are those of the pass that read the whole prompt.  Where prompts and answers come in one
    pass, `prompts` says which tokens are the prompts', or the model itself does: a model whose rows are no texts has
    `prompt_tokens(input_ids, attention_mask)`, the mask of what is read alike in training and in testing.

    Args:
        embedding: the model's input embedding; frozen, not a part of this module.

    Attributes:
        query (w, d): W_q.
        keys: each (w,), one per task.
        centre (d,): buffer, m.
    """

    centre: Tensor

    def __init__(self, config: SAPTAdapterConfig, embedding: nn.Module, device: torch.device | None = None) -> None:
        super().__init__()
        weight: Any = embedding.weight
        width, self.sharpness, self._seed = weight.shape[1], config.sharpness, config.seed
        self._embedding = (embedding,)  # in a tuple, so that it is nobody's submodule twice
        values = stream(config.seed, "task attention", "query").standard_normal((config.query_width, width))
        self.query = nn.Parameter(torch.tensor(values / width**0.5, dtype=torch.float32, device=device))
        self.keys = nn.ParameterList()
        self.register_buffer("centre", weight.detach().float().mean(0).to(device))
        self._prompts: Tensor | None = None
        self._pass = _Pass()
        self.add_key()

    def add_key(self, key: Tensor | None = None) -> None:
        """Add the key (w,) of the next task; drawn where none is given."""
        if key is None:
            values = stream(self._seed, "task attention", "key", len(self.keys)).standard_normal(len(self.query))
            key = torch.tensor(values, dtype=torch.float32)
        self.keys.append(nn.Parameter(key.detach().to(self.query).clone()))

    @torch.no_grad()
    def pooled(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """(B, d) ē − m of prompts: float32 means over the tokens where `mask` (B, T) is not 0."""
        return self._pooled(self._embedding[0](input_ids), mask)

    def queries(self, pooled: Tensor) -> Tensor:
        """(B, w) unit queries of (B, d)."""
        return functional.normalize(pooled @ self.query.t(), dim=-1)

    def logits(self, pooled: Tensor) -> Tensor:
        """(B, tasks) before the softmax."""
        keys = functional.normalize(torch.stack(list(self.keys)), dim=-1)
        return self.sharpness * self.queries(pooled) @ keys.t()

    @contextlib.contextmanager
    def prompts(self, mask: Tensor) -> Iterator[None]:
        """Take the tokens where `mask` (B, T) is not 0 as the prompts of the passes inside the block."""
        before, self._prompts = self._prompts, mask
        try:
            yield
        finally:
            self._prompts = before

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of a decoder: weigh the pairs for a new batch of prompts, or keep on with the one at hand.

        Raises:
            InputError: the pass continues other prompts than the last one read.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        first = ids if ids is not None else embeds
        if first is None:
            raise InputError("a pass without input_ids or inputs_embeds has no prompt to attend with")
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            if self._pass.weights is None or len(self._pass.weights) != len(first):
                raise InputError(f"a cached pass over {len(first)} rows does not continue the prompts that were read")
            return
        if self._prompts is not None:
            mask = self._prompts
        elif ids is not None and (told := getattr(module, "prompt_tokens", None)) is not None:
            mask = told(ids, mask)
        elif mask is not None and mask.dim() != 2:
            mask = None
        with torch.no_grad():
            pooled = self._pooled(self._embedding[0](ids) if embeds is None else embeds, mask)
        with torch.autocast(pooled.device.type, enabled=False):
            self._pass.weights = self.logits(pooled).softmax(-1)

    def forward(self) -> Tensor:
        """(B, tasks) weights of the prompts in the pass under way.

        Raises:
            InputError: no prompt was read.
        """
        if self._pass.weights is None:
            raise InputError("no prompt was read: the linears of SAPT work inside their model alone")
        return self._pass.weights

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        """Take the number of keys of a saved state about to be loaded."""
        while f"keys.{len(self.keys)}" in state:
            self.add_key()

    def _pooled(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        rows = rows.detach().float()
        if mask is None:
            return rows.mean(1) - self.centre
        real = mask.to(rows)[..., None]
        return (rows * real).sum(1) / real.sum(1).clamp_min(1.0) - self.centre


def reading_prompts(model: nn.Module, mask: Tensor) -> contextlib.AbstractContextManager[None]:
    """Inside the block, prompts are the tokens where `mask` (B, T) is not 0 for a model that attends with prompts."""
    attention = getattr(model, ATTENTION, None)
    return attention.prompts(mask) if isinstance(attention, TaskAttention) else contextlib.nullcontext()


class _Pass:
    """Weights of the pass under way, with their graph; a copied model starts without one."""

    def __init__(self) -> None:
        self.weights: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> _Pass:
        return _Pass()


class WeighedLinear(AdapterLinear):
    """A frozen linear and its experts, weighed by what `weigh_by` gave it."""

    has_router = False

    def __init__(
        self,
        base: nn.Linear,
        config: MoELoraConfig,
        *,
        name: str = "linear",
        mask: MaskHolder | None = None,
        router: Router | None = None,
    ) -> None:
        super().__init__(base, config, name=name, mask=mask)
        self._weigher: tuple[TaskGates | TaskAttention, ...] = ()

    def weigh_by(self, weigher: TaskGates | TaskAttention) -> None:
        """Use the weights of `weigher`, which is a part of the model and not of this linear."""
        self._weigher = (weigher,)

    def route(self, x: Tensor, rows: Tensor | None = None) -> Routing:
        """The weights as a dense routing of x (…, d), alike for all tokens of a row; rows are not used."""
        return spread(self._weigher[0](), tuple(x.shape[:-1]))


def spread(weights: Tensor, batch_shape: Sequence[int]) -> Routing:
    """Weights (B, E), or (1, E) for all rows, as the dense routing of tokens of shape (B, …).

    Raises:
        InputError: there are other rows than weights.
    """
    if len(weights) not in (1, batch_shape[0]):
        raise InputError(f"weights of {len(weights)} rows do not fit tokens of shape {tuple(batch_shape)}")
    experts = weights.shape[1]
    rows = weights.view(len(weights), *(1 for _ in batch_shape[1:]), experts)
    tokens = rows.expand(*batch_shape, experts).reshape(-1, 1, experts)
    indices = torch.arange(experts, device=weights.device).expand_as(tokens)
    return Routing(tokens.log(), tokens, tokens, indices, None, tuple(batch_shape))


def make_weigher(config: MoELoraConfig, model: nn.Module, device: torch.device) -> tuple[str, nn.Module]:
    """What weighs the experts of a method, and the name it has as a module of the model.

    Raises:
        ConfigError: the model has no input embedding to make queries of.
    """
    if not isinstance(config, SAPTAdapterConfig):
        return GATES, TaskGates(config.experts, config.seed, device)
    get: Any = getattr(model, "get_input_embeddings", None)
    embedding = None if get is None else get()
    if embedding is None:
        raise ConfigError(f"{type(model).__name__} has no input embedding, of which SAPT makes its queries")
    return ATTENTION, TaskAttention(config, embedding, device)
