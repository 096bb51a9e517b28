"""BLEU of one prediction against one reference: uniform weights over 1..n, no smoothing, brevity penalty.

Words are what lies between white space and full stops.  Source: trace_benchmark 5 [paper], a secondary output.
"""

from __future__ import annotations

import math
import re
from collections import Counter

_BETWEEN = re.compile(r"\s|\.")


def words(text: str) -> list[str]:
    """Pieces between white space and full stops."""
    return [piece for piece in _BETWEEN.split(text) if piece]


def _ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))


def bleu(prediction: str, reference: str, n: int) -> float:
    """BLEU-n in 0..1; 0 where any order up to n has no match, a prediction shorter than n words included."""
    predicted, wanted = words(prediction), words(reference)
    if not predicted or not wanted:
        return 0.0
    total = 0.0
    for order in range(1, n + 1):
        grams = _ngrams(predicted, order)
        matched = sum((grams & _ngrams(wanted, order)).values())
        if not matched:
            return 0.0
        total += math.log(matched / sum(grams.values())) / n
    penalty = min(0.0, 1.0 - len(wanted) / len(predicted))
    return math.exp(total + penalty)
