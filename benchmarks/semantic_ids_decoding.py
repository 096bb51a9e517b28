"""What `semantic_ids.py` has done in a process of its own: decoding steps by ours or transformers, with their cost."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from memory import peak_mb

from recollect.rng import stream

END_TOKEN = 2


class _Constraint:
    """One side's way to keep a beam on items: `trie` and `vocabulary` are ours, `processor` either side's."""

    def __init__(self, side: str, table: np.ndarray, codes: int, beam: int, other_tokens: int) -> None:
        from transformers import PrefixConstrainedLogitsProcessor

        from recollect.tokenize.constrained import TrieLogitsProcessor
        from recollect.tokenize.trie import PrefixTrie
        from recollect.tokenize.vocabulary import SemanticVocabulary

        self.offsets = other_tokens + codes * np.arange(3)
        before = peak_mb()
        began = time.perf_counter()
        self.processor: Any
        if side == "ours":
            self.vocabulary = SemanticVocabulary.consecutive((codes,) * 3, other_tokens, END_TOKEN)
            self.trie = PrefixTrie(table, (codes,) * 3)
            self.processor = TrieLogitsProcessor(self.trie, self.vocabulary, 1)
        else:
            children: dict[tuple[int, ...], set[int]] = {}
            for row in (table + self.offsets).tolist():
                for depth in range(3):
                    children.setdefault(tuple(row[:depth]), set()).add(row[depth])
            allowed_after = {prefix: sorted(tokens) for prefix, tokens in children.items()}
            self.processor = PrefixConstrainedLogitsProcessor(
                lambda _, written: allowed_after.get(tuple(written[1:].tolist()), [END_TOKEN]), beam
            )
        self.costs = {"build_s": time.perf_counter() - began, "mb_above_start": peak_mb() - before}


def _catalogue(items: int, codes: int, seed: int) -> np.ndarray:
    """(items, 3) int32 random codes; what a code means does not matter to a tree."""
    return stream(seed, "benchmark", "decoding", items).integers(codes, size=(items, 3)).astype(np.int32)


def decoding_mask(
    items: int, codes: int, beam: int, requests: int, rounds: int, other_tokens: int, side: str, seed: int
) -> dict[str, Any]:
    """The logits processor of one side at every depth; `check` counts the tokens it left."""
    import torch

    table = _catalogue(items, codes, seed)
    constraint = _Constraint(side, table, codes, beam, other_tokens)
    generator = stream(seed, "benchmark", "decoding", "prefixes")
    offsets = torch.from_numpy(constraint.offsets)
    scores = torch.zeros(requests * beam, other_tokens + 3 * codes)
    seconds, counted = 0.0, 0
    for number in range(rounds + 1):  # the first round warms up
        for depth in range(3):
            chosen = torch.from_numpy(table[generator.integers(items, size=requests * beam), :depth].astype(np.int64))
            written = torch.cat([torch.zeros(len(chosen), 1, dtype=torch.int64), chosen + offsets[:depth]], dim=1)
            began = time.perf_counter()
            masked = constraint.processor(written, scores)
            if number:
                seconds += time.perf_counter() - began
                counted += int((masked > -torch.inf).sum())
    return {"ms_per_step": 1000 * seconds / (3 * rounds), "check": counted, **constraint.costs}


class _GivenLogits:
    """A decoder whose logits are drawn beforehand, so that only the search costs anything."""

    def __init__(self, logits: list[Any], requests: int) -> None:
        self._logits = logits
        self._requests = requests
        self._step = 0

    def start(self) -> Any:
        self._step = 0
        return self._logits[0][: self._requests]

    def advance(self, parents: Any, tokens: Any) -> Any:
        self._step += 1
        return self._logits[self._step][: len(tokens)]


def decoding_search(
    items: int, codes: int, beam: int, requests: int, rounds: int, other_tokens: int, side: str, seed: int
) -> dict[str, Any]:
    """A whole beam search over given logits; `check` is the sum of the codes of the best ID of every request.

    Logits of a step do not depend on the beam, so both sides rank the same sums whatever order they keep beams in.
    """
    import torch

    from recollect.tokenize.constrained import beam_search

    table = _catalogue(items, codes, seed)
    constraint = _Constraint(side, table, codes, beam, other_tokens)
    torch_generator = torch.Generator().manual_seed(seed)
    one = [torch.randn(1, other_tokens + 3 * codes, generator=torch_generator) for _ in range(3)]
    logits = [row.repeat(requests * beam, 1) for row in one]
    seconds = 0.0
    for number in range(rounds + 1):  # the first round warms up
        began = time.perf_counter()
        if side == "ours":
            decoder = _GivenLogits(logits, requests)
            best = beam_search(decoder, constraint.trie, constraint.vocabulary, beam).codes[:, 0]
        else:
            best = _masked_search(constraint.processor, logits, requests, beam) - torch.from_numpy(constraint.offsets)
        if number:
            seconds += time.perf_counter() - began
    return {"ms_per_step": 1000 * seconds / (3 * rounds), "check": int(best.sum()), **constraint.costs}


def _masked_search(processor: Any, logits: list[Any], requests: int, beam: int) -> Any:
    """(requests, 3) tokens of the best beam, as transformers searches: log-softmax, mask, top of beams x vocabulary."""
    import torch

    written = torch.zeros(requests * beam, 1, dtype=torch.int64)
    totals = torch.full((requests, beam), -1e9)
    totals[:, 0] = 0.0  # at first all beams of a request are the same one
    for step in logits:
        scores = processor(written, torch.log_softmax(step, dim=-1)) + totals.reshape(-1, 1)
        n_tokens = scores.shape[1]
        totals, place = scores.view(requests, beam * n_tokens).topk(beam, dim=1)
        parents = torch.arange(requests)[:, None] * beam + place // n_tokens
        written = torch.cat([written[parents.flatten()], (place % n_tokens).view(-1, 1)], dim=1)
    return written.view(requests, beam, -1)[:, 0, 1:]
