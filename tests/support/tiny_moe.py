"""Randomly initialised mixtures of experts of a few thousand weights, in the layouts of transformers."""

from __future__ import annotations

from typing import Any

MODELS = ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")


def tiny_moe(kind: str, seed: int = 0) -> Any:
    """A causal language model of two layers, six experts and a vocabulary of 50, in eval mode."""
    import torch
    import transformers

    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    latent = {
        "kv_lora_rank": 8,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "qwen2_moe":
            config = transformers.Qwen2MoeConfig(
                **shape, num_experts=6, shared_expert_intermediate_size=16, decoder_sparse_step=1
            )
            model: Any = transformers.Qwen2MoeForCausalLM(config)
        elif kind == "qwen3_moe":
            model = transformers.Qwen3MoeForCausalLM(
                transformers.Qwen3MoeConfig(**shape, num_experts=6, head_dim=8, decoder_sparse_step=1)
            )
        elif kind == "deepseek_v2":
            model = transformers.DeepseekV2ForCausalLM(
                transformers.DeepseekV2Config(**shape, **latent, topk_method="greedy")
            )
        else:
            model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**shape, **latent))
        for parameter in model.parameters():  # routers are born as zeros
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
