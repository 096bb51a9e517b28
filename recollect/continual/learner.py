"""The decoder that learns a stream of tasks: loading, training batches, greedy answers in batches.

Greedy answers do not depend on the order of the questions: batches are made of questions sorted by their own content,
so the same set of questions gives the same batches, and every question the same answer.
Not covered: what is trained (`recollect.continual.methods`) and in which order (`recollect.continual.sequence`).
Source: trace_benchmark 3, 4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from recollect.backbones.store import check_folder
from recollect.backbones.transformers_engine import load_causal_model
from recollect.continual.examples import (
    Example,
    Lengths,
    TaskTokenizer,
    Template,
    encode_prompt,
    pad_left,
    prompt_row,
)
from recollect.continual.greedy import greedy_answers
from recollect.continual.joined_rows import are_joined, mixed_products
from recollect.continual.trace_data import TraceRecord
from recollect.continual.trace_tasks import TraceTask
from recollect.errors import ModelFileError
from recollect.rng import call_seed

Precision = Literal["auto", "fp32", "bf16"]


def token_batch(rows: Sequence[Example], chosen: Sequence[int] | np.ndarray, pad_id: int) -> dict[str, Tensor]:
    """The rows with the numbers `chosen` as one batch: input_ids, attention_mask, labels, position_ids (B, T) int64."""
    padded = pad_left([rows[int(at)] for at in chosen], pad_id)
    return {name: torch.from_numpy(array) for name, array in padded._asdict().items()}


class RowBatches(Sequence[Mapping[str, Tensor]]):
    """Batches of rows in a given order, each made when it is asked for; the last may be smaller.

    Args:
        rows: what the numbers in `order` mean.
        order: (n,) row numbers.
    """

    def __init__(self, rows: Sequence[Example], order: np.ndarray, batch_size: int, pad_id: int) -> None:
        self._rows, self._order, self._batch_size, self._pad_id = rows, order, batch_size, pad_id

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch_size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = (index % len(self)) * self._batch_size
        return token_batch(self._rows, self._order[start : start + self._batch_size], self._pad_id)


@dataclass(frozen=True)
class Generation:
    """How answers are made. temperature: 0 = greedy; else sampled from the whole vocabulary with `seed`."""

    batch_size: int = 16
    temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int | None = None


class Learner:
    """A decoder and its tokenizer.

    Args:
        model: a transformers decoder with a vocabulary head.
        tokens: its tokenizer for tasks.
        lengths: tokens allowed per row.
        name: for messages and the report.
        arithmetic: of products on a CPU (see `LoopConfig.precision`); on a GPU the weights' dtype says it.

    Raises:
        ConfigError: rows of that length do not fit the model's context.
    """

    def __init__(
        self,
        model: Any,
        tokens: TaskTokenizer,
        lengths: Lengths,
        name: str,
        arithmetic: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        from transformers import GenerationConfig

        self.model, self.tokens, self.lengths, self.name = model, tokens, lengths, name
        self.arithmetic = arithmetic
        self.model.generation_config = GenerationConfig()  # a folder's penalties have no place in a measurement
        check_context(model.config, lengths)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def answers(
        self,
        task: TraceTask,
        records: Sequence[TraceRecord],
        how: Generation,
        *,
        after_batch: Callable[[int], None] | None = None,
    ) -> list[str]:
        """The model's answers to the prompts of `records`, in their order, blanks as generated.

        Args:
            after_batch: called with the number of questions answered by each batch.

        Raises:
            DataError: a prompt cannot be made to fit; the message names file and row.
        """
        prompts = [
            prompt_row(encode_prompt(task, record.prompt, self.tokens, self.lengths, record.where))
            for record in records
        ]
        ceiling = min(task.max_new_tokens, how.max_new_tokens or task.max_new_tokens, self.lengths.max_answer)
        order = sorted(range(len(prompts)), key=lambda at: (-len(prompts[at]), prompts[at].input_ids.tolist()))
        texts = [""] * len(records)
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), how.batch_size):
                chosen = order[start : start + how.batch_size]
                seed = call_seed(how.seed, "continual answers", task.name, start)
                generated = self._generate([prompts[at] for at in chosen], ceiling, how.temperature, seed)
                for at, ids in zip(chosen, generated, strict=True):
                    texts[at] = self.tokens.decode(ids)
                if after_batch is not None:
                    after_batch(len(chosen))
        finally:
            self.model.train(was_training)
        return texts

    def _generate(
        self, prompts: list[Example], ceiling: int, temperature: float, seed: int
    ) -> Sequence[Sequence[int] | np.ndarray]:
        """New ids of each prompt, up to `ceiling`; anything may follow a row's end token."""
        if temperature == 0 and are_joined(self.model):
            with products_in(self.arithmetic, self.device):
                rows = [prompt.input_ids.tolist() for prompt in prompts]
                return greedy_answers(self.model, rows, ceiling, self.tokens.end_id)
        from transformers import GenerationConfig

        batch = token_batch(prompts, range(len(prompts)), self.tokens.pad_id)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        config = GenerationConfig(
            max_new_tokens=ceiling, eos_token_id=self.tokens.end_id, pad_token_id=self.tokens.pad_id, **sampling
        )
        inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
        devices = [self.device] if self.device.type == "cuda" else []
        forked = torch.random.fork_rng(devices=devices, enabled=bool(temperature))
        with torch.no_grad(), forked, products_in(self.arithmetic, self.device), mixed_products(self.model):
            if temperature:
                torch.manual_seed(seed)
            ids = self.model.generate(**inputs, generation_config=config)
        return list(ids[:, batch["input_ids"].shape[1] :].cpu().numpy())


def open_tokens(folder: Path, template: Template, lengths: Lengths) -> TaskTokenizer:
    """The tokenizer of a decoder's folder.

    Raises:
        ModelFileError: folder or tokenizer cannot be loaded, or the tokenizer lacks what `template` needs.
        ConfigError: rows of that length do not fit the model's context.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        described: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"the model in {folder} cannot be loaded: {str(error)[:500]}") from error
    check_context(described, lengths)
    return TaskTokenizer(tokenizer, template)


def check_context(config: Any, lengths: Lengths) -> None:
    """Refuse rows longer than the context that a transformers config speaks of.

    Raises:
        ConfigError: they are.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context:
        lengths.check_context(int(context))


def open_learner(folder: Path, tokens: TaskTokenizer, lengths: Lengths, precision: Precision = "auto") -> Learner:
    """The decoder of a folder with frozen weights, on the GPU where there is one.

    Args:
        precision: bf16 = weights in bf16 on a GPU, products rounded to bf16 on a CPU; auto = where that is faster.

    Raises:
        ModelFileError: the weights cannot be loaded.
        ConfigError: rows of that length do not fit the model's context.
    """
    check_folder(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    best = best_precision(precision, device)
    on_gpu = device.type == "cuda"
    model: Any = load_causal_model(folder, None, "bfloat16" if on_gpu and best == "bf16" else "float32")
    return Learner(model.to(device), tokens, lengths, folder.name, "fp32" if on_gpu else best)


def usual_batch() -> int:
    """Questions answered at a time: a GPU takes many in the time of one, a CPU half a hundred in the time of four."""
    return 128 if torch.cuda.is_available() else 50


def best_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """bf16 where the hardware multiplies it faster, else fp32."""
    if precision != "auto":
        return precision
    if device.type != "cpu":
        return "bf16"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


@contextlib.contextmanager
def products_in(arithmetic: Literal["fp32", "bf16"], device: torch.device) -> Iterator[None]:
    """On a CPU, round the products of fp32 tensors to bf16 inside the block, as training does; else change nothing."""
    if arithmetic == "fp32" or device.type != "cpu":
        yield
        return
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
