"""A decoder of a few thousand weights with its tokenizer, and a small log with a pattern, for tests of structure."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recollect.rng import stream
from recollect.types import Catalog, Dataset, Interactions, Users


def write_tiny_decoder(folder: Path, seed: int = 0, n_layers: int = 3, hidden: int = 32) -> Path:
    """A randomly initialised Llama and a word tokenizer in `folder`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["[UNK]", "<s>", "</s>", "Below", "is", "the", "history", "items", "chose"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def patterned_log(n_users: int = 60, n_items: int = 30, length: int = 9, seed: int = 0) -> Dataset:
    """Users who mostly step from item i to i + 3 (mod n_items); lengths vary a little."""
    generator = stream(seed, "patterned log")
    user, item, time = [], [], []
    for number in range(n_users):
        own = int(generator.integers(n_items))
        for step in range(length + int(generator.integers(-2, 3))):
            own = (own + 3) % n_items if generator.random() < 0.85 else int(generator.integers(n_items))
            user.append(number)
            item.append(own)
            time.append(1_000 * step + number)
    log = Interactions(
        user=np.array(user, dtype=np.int64),
        item=np.array(item, dtype=np.int64),
        time=np.array(time, dtype=np.int64),
        row=np.arange(len(user), dtype=np.int64),
        domain=np.zeros(len(user), dtype=np.int16),
    )
    names = np.array([f"i{index}" for index in range(n_items)], dtype=object)
    catalog = Catalog(
        item_ids=names,
        titles=np.array([f"Title {index}" for index in range(n_items)], dtype=object),
        domain=np.zeros(n_items, dtype=np.int16),
        categories=tuple(() for _ in range(n_items)),
        texts=np.array([None] * n_items, dtype=object),
    )
    users = Users(user_ids=np.array([f"u{index}" for index in range(n_users)], dtype=object))
    return Dataset("patterned", log, catalog, users, ("all",), {"clock": "unix"})
