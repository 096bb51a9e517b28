"""Tiny decoders and helpers for tests of low-rank expert adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recollect.continual.adapters.attach import adapter_parameters


def tiny_decoder(family: str = "llama", seed: int = 0, **changes: Any) -> nn.Module:
    """A randomly initialised decoder: hidden 32, FFN 48, 4 heads in 2 key-value groups, 2 layers, 50 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = classes[family]
    options: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config_class(**(options | changes))).eval()


def tokens(batch: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    """(batch, length) token ids without the padding id."""
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomize(model: nn.Module, scale: float = 0.3, seed: int = 0) -> nn.Module:
    """Give every adapter parameter Gaussian values, so that nothing is zero by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model).values():
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model
