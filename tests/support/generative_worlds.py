"""Worlds with a known answer for models that write the codes of the next item, and an untrained one to score with."""

import numpy as np
import torch
from support.recommender_worlds import small_log

from recollect.tokenize.generator import CodeTransformer


def tiny_generator(n_items, *, sizes, shape, codes=None, seed=0):
    """A generator with random weights, large enough to tell items apart, over distinct random codes."""
    generator = np.random.default_rng(seed)
    if codes is None:
        chosen = generator.choice(int(np.prod(sizes)), n_items, replace=False)
        codes = np.stack(np.unravel_index(chosen, sizes), axis=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CodeTransformer(codes, sizes, shape)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def successor_log(n_items=30, n_users=150, length=8, seed=0):
    """Users who walk along one cycle through all items; random codes, two items sharing some; (log, codes, sizes)."""
    generator = np.random.default_rng(seed)
    after = np.empty(n_items, dtype=np.int64)
    cycle = generator.permutation(n_items)
    after[cycle] = np.roll(cycle, -1)
    sequences = []
    for _ in range(n_users):
        items = [int(generator.integers(n_items))]
        while len(items) < length:
            items.append(int(after[items[-1]]))
        sequences.append(items)
    codes = np.stack([generator.integers(5, size=n_items), generator.integers(4, size=n_items)], axis=1)
    return small_log(sequences, n_items, name="cycle"), codes, (5, 4)


def themed_walks(n_themes=12, per_theme=25, n_users=250, length=6, seed=0):
    """Every item is followed by some item of the next theme; an item is seen five times. (log, theme of each item)."""
    generator = np.random.default_rng(seed)
    n_items = n_themes * per_theme
    themes = np.arange(n_items) % n_themes
    sequences = []
    for _ in range(n_users):
        first = int(generator.integers(n_themes))
        sequences.append(
            [(first + step) % n_themes + n_themes * int(generator.integers(per_theme)) for step in range(length)]
        )
    return small_log(sequences, n_items, name="walks"), themes
