"""Decoders without a network, and slow exhaustive scoring, for tests of constrained decoding."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from recollect.rng import stream
from recollect.tokenize.vocabulary import SemanticVocabulary


class HashDecoder:
    """Logits (V) that depend on (request, tokens written so far) alone, drawn from their hash."""

    def __init__(self, n_requests: int, n_vocabulary: int, seed: int = 0, scale: float = 2.0) -> None:
        self.n_vocabulary, self.seed, self.scale = n_vocabulary, seed, scale
        self._written: list[tuple[int, ...]] = [(request,) for request in range(n_requests)]
        self.calls = 0

    def logits(self, written: tuple[int, ...]) -> np.ndarray:
        """(V,) after request number written[0] has written the rest."""
        key = int.from_bytes(hashlib.sha256(repr((self.seed, written)).encode()).digest()[:4], "big")
        return (self.scale * stream(key, "logits").standard_normal(self.n_vocabulary)).astype(np.float32)

    def start(self) -> torch.Tensor:
        return self._all()

    def advance(self, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        pairs = zip(parents.tolist(), tokens.tolist(), strict=True)
        self._written = [(*self._written[parent], token) for parent, token in pairs]
        return self._all()

    def _all(self) -> torch.Tensor:
        self.calls += 1
        return torch.from_numpy(np.stack([self.logits(written) for written in self._written]))


def exhaustive(
    decoder: HashDecoder, request: int, codes: np.ndarray, vocabulary: SemanticVocabulary, *, renormalise: bool = False
) -> dict[tuple[int, ...], float]:
    """The score of every ID in `codes`, one token at a time in float64."""
    rows = sorted({tuple(row) for row in codes.tolist()})
    scores = {}
    for row in rows:
        written, total = (request,), 0.0
        for depth, code in enumerate(row):
            logits = decoder.logits(written).astype(np.float64)
            log_probs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            token = vocabulary.end_token if code < 0 else int(vocabulary.token_ids[depth][code])
            step = log_probs[token]
            if renormalise:
                siblings = {other[depth] for other in rows if other[:depth] == row[:depth]}
                ids = [vocabulary.end_token if c < 0 else int(vocabulary.token_ids[depth][c]) for c in siblings]
                step -= np.log(np.exp(log_probs[ids]).sum())
            total += step
            written = (*written, token)
            if code < 0:
                break
        scores[row] = total
    return scores
