"""Batches without padding: the rows of a batch read as one long row, each attending to itself alone.

On a CPU a token costs the same whether it is padding or not, and padding is a third of a stream's tokens.  Joined, the
rows go through every linear end to end; attention alone sees them apart.  A row's result does not depend on its
neighbours beyond rounding, as it does not where rows are padded.

The lengths of the joined rows travel in the place of the attention mask as int64 (1, 1, 1, R): transformers hands a
mask of four dimensions to the attention as it is.  A float mask (B, 1, 1, S) means one token a row after S cached ones;
any other mask is what it always was.

Not covered: models whose layers are not all full causal attention, adapters that look at rows rather than tokens.
Source: our design.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.adapters.attach import adapter_parameters, attached

JOINED_ROWS = "recollect_joined_rows"
ROUNDED = "recollect_rounded"  # set on a model whose frozen weights are bf16
PER_TOKEN = frozenset({"lora", "loramoe", "mh_moe", "sd_lora_moe", "hydra_lora", "mixlora", "moelora"})
"""Kinds of adapters whose outputs at a token depend on the token alone."""
# Back and forth through torch's bf16 flash attention, a row of 80 tokens takes 3.5 ms, in fp32 1.1; they meet at 300.
SHORT_ROW = 256


def prepare_for_cpu(model: Any, arithmetic: Literal["fp32", "bf16"]) -> None:
    """Make a decoder with adapters fast on a CPU: rows are joined, frozen weights kept in the arithmetic's precision.

    Nothing happens on a GPU, to a model without adapters or of another make than transformers' with a plain vocabulary
    head, or where the adapters do not allow it.
    """
    from transformers import PreTrainedModel

    state = attached(model)
    if state is None or not isinstance(model, PreTrainedModel) or model.device.type != "cpu":
        return
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        return
    if state.config.kind in PER_TOKEN and not state.config.lbc and _attends_fully(model):
        _register()
        model.set_attn_implementation(JOINED_ROWS)
    if arithmetic == "bf16":
        _round_frozen(model)


def are_joined(model: Any) -> bool:
    """Whether the model reads joined rows."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == JOINED_ROWS


def joined_lengths(lengths: Sequence[int] | Tensor) -> Tensor:
    """(1, 1, 1, R) int64: what stands for the attention mask of joined rows of these lengths."""
    return torch.as_tensor(lengths, dtype=torch.int64).view(1, 1, 1, -1)


def is_rounded(model: Any) -> bool:
    """Whether the model's frozen weights are bf16 beside adapters in fp32."""
    return bool(getattr(model, ROUNDED, False))


def mixed_products(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Products of adapters in bf16, too, inside the block, where the frozen weights are."""
    return torch.autocast("cpu", torch.bfloat16) if is_rounded(model) else contextlib.nullcontext()


def _round_frozen(model: Any) -> None:
    """Frozen weights to bf16, but for the vocabulary's: logits stay fp32, for in bf16 the best of them would tie."""
    own = adapter_parameters(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    kept = {id(parameter) for module in (embedding, head) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        is_ours = name in own or id(parameter) in kept or parameter.requires_grad
        if not is_ours and parameter.dtype == torch.float32:
            parameter.data = parameter.data.bfloat16()
    embedding.register_forward_hook(_rounded_output)
    head.forward = functools.partial(_exact_head, head)
    setattr(model, ROUNDED, True)


def _rounded_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.bfloat16()


def _exact_head(head: nn.Linear, states: Tensor) -> Tensor:
    """Logits in fp32; products are rounded as the caller has set it."""
    with torch.autocast("cpu", enabled=False):
        return functional.linear(states.float(), head.weight, head.bias)


def _attends_fully(model: Any) -> bool:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return kinds == {"full_attention"} and not has_window and bool(type(model)._supports_attention_backend)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(JOINED_ROWS, _attention)
    AttentionMaskInterface.register(JOINED_ROWS, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """(B, T, H, D) of query (B, H, T, D), key and value (B, H/G, S, D); see the module's text for the masks."""
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        lengths = attention_mask.flatten().tolist()
        parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
        return torch.cat([_row(*part, dropout, scaling) for part in parts], dim=1), None
    if attention_mask is not None and attention_mask.is_floating_point() and query.shape[2] == 1:
        rows, heads, _, width = query.shape
        grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)  # queries that share keys, as tokens
        found = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return found.reshape(rows, 1, heads, width), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)


def _row(query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """(1, T, H, D) of one row's causal attention."""
    dtype = query.dtype
    if query.shape[2] < SHORT_ROW and dtype == torch.bfloat16:  # with or without a gradient: the numbers are the same
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast("cpu", enabled=False):
        found = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True
        )
    return found.to(dtype).transpose(1, 2)
