"""Word limits and title matching on texts that models wrote."""

from __future__ import annotations

import re
from typing import Literal

_SENTENCE_END = re.compile(r"(?<=[.!?。！？;])\s+|\n+")
_PHRASE_END = re.compile(r"(?<=[,:;，、])\s+|\s+(?=[-–—]\s)")
_FULL_ENOUGH = 0.6
_LONGEST_TITLE = 400


def word_limit(text: str, n_words: int) -> str:
    """`text` in at most `n_words` words (runs of non-blanks), never cut inside a word; idempotent.

    A text within the limit is returned with its outer blanks stripped. Otherwise sentences said before are dropped,
    then whole sentences are kept from the start; if they fill less than 60 % of the limit the next one is shortened
    at a phrase boundary, or between words where it has none. Source: our design (oracle 10).
    """
    text = text.strip()
    if len(text.split()) <= n_words:
        return text
    sentences = list(dict.fromkeys(" ".join(part.split()) for part in _SENTENCE_END.split(text)))
    kept, used, rest = _fitting([sentence for sentence in sentences if sentence], n_words)
    if rest and used < _FULL_ENOUGH * n_words:
        phrases, taken, left = _fitting([part for part in _PHRASE_END.split(rest[0]) if part], n_words - used)
        if used + taken < _FULL_ENOUGH * n_words and left:
            phrases += left[0].split()[: n_words - used - taken]
        if phrases:
            kept.append(" ".join(phrases).rstrip(",:;，、-–— ") + ".")
    return " ".join(kept)


def _fitting(parts: list[str], n_words: int) -> tuple[list[str], int, list[str]]:
    """(the longest run of leading parts that fits, its words, the parts after it)."""
    used = 0
    for position, part in enumerate(parts):
        size = len(part.split())
        if used + size > n_words:
            return parts[:position], used, parts[position:]
        used += size
    return list(parts), used, []


def common_subsequence(a: str, b: str) -> int:
    """Length of the longest common subsequence, by bit-parallel dynamic programming (Hyyrö 2004)."""
    positions: dict[str, int] = {}
    for index, character in enumerate(a):
        positions[character] = positions.get(character, 0) | 1 << index
    mask = (1 << len(a)) - 1
    state = mask
    for character in b:
        matched = state & positions.get(character, 0)
        state = (state + matched | state - matched) & mask
    return len(a) - state.bit_count()


def edit_ratio(a: str, b: str) -> float:
    """2 LCS / (|a| + |b|), in 0..1: one minus the normalised insert-and-delete distance; 1 for two empty texts."""
    total = len(a) + len(b)
    return 2 * common_subsequence(a, b) / total if total else 1.0


def match_title(choice: str, a: str, b: str) -> Literal["a", "b"] | None:
    """Which of two titles a model's words are closer to (case-folded edit ratio); None when neither is closer.

    Source: the official AgentCF++ code's rule for a free-text choice. It confuses editions of one series; prompts of
    ours ask for the labels A and B instead.
    """
    said, *titles = (" ".join(text.casefold().split())[:_LONGEST_TITLE] for text in (choice, a, b))
    to_a, to_b = (edit_ratio(said, title) for title in titles)
    if to_a == to_b:
        return None
    return "a" if to_a > to_b else "b"
