"""ROUGE-L over a whole summary, as the package `rouge` 1.0.1 computes it.

Texts are cut at every full stop.  For each sentence of the second text the words of a longest common subsequence with
every sentence of the first are collected; the overlap is the number of *distinct* words collected in all.  Recall and
precision divide it by the distinct words of the second and of the first text.  No stemming, no lower-casing.
Source: trace_benchmark 5 [paper]; the score is not symmetric, and the benchmark passes (reference, prediction).
"""

from __future__ import annotations

_EPSILON = 1e-8


def sentences(text: str) -> list[list[str]]:
    """Words of each piece between full stops; a piece of blanks alone is one empty word, as in the package."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def common_words(first: list[str], second: list[str]) -> set[str]:
    """Words of one longest common subsequence of two word lists.

    Several may be longest, and which is found decides which words count: walking back from the end, a word of `first`
    is skipped only where that leaves a strictly longer one than skipping a word of `second`.
    """
    lengths = [[0] * (len(second) + 1)]
    for word in first:
        above = lengths[-1]
        row = [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        lengths.append(row)
    words = set()
    at, column = len(first), len(second)
    while at and column:
        if first[at - 1] == second[column - 1]:
            words.add(first[at - 1])
            at, column = at - 1, column - 1
        elif lengths[at - 1][column] > lengths[at][column - 1]:
            at -= 1
        else:
            column -= 1
    return words


def rouge_l(first: str, second: str) -> float:
    """F-measure in 0..1 of two texts; 0 where either has no sentence (it is empty, or full stops alone).

    For the benchmark's numbers pass the reference first and the prediction second.
    """
    one, other = sentences(first), sentences(second)
    if not one or not other:
        return 0.0
    collected: set[str] = set()
    for sentence in other:
        for candidate in one:
            collected |= common_words(sentence, candidate)
    recall = len(collected) / len({word for sentence in other for word in sentence})
    precision = len(collected) / len({word for sentence in one for word in sentence})
    return 2.0 * recall * precision / (precision + recall + _EPSILON)
