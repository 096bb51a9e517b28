"""Similarity of two lines of code, 0 to 100 in whole numbers, after literals are put back.

Two ways to count matching characters exist behind one call of the package the benchmark uses, and differ by up to ten
points on single lines: Ratcliff-Obershelp matching ("difflib", what its requirements install) and the longest common
subsequence ("levenshtein", where a C extension is present).  Reports name the one used.
Source: trace_benchmark 5 [paper].
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Literal

SimilarityBackend = Literal["difflib", "levenshtein"]

_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def restore_literals(code: str) -> str:
    """`<NUM_LIT>` becomes 0, `<STR_LIT>` and `<CHAR_LIT>` nothing, `<STR_LIT:v>` and its like v."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return _LITERAL.sub(lambda match: match.group(1), code)


def common_subsequence_length(first: str, second: str) -> int:
    """Length of a longest common subsequence; the bits of one integer stand for the characters of `first`."""
    places: dict[str, int] = {}
    for at, character in enumerate(first):
        places[character] = places.get(character, 0) | 1 << at
    everything = (1 << len(first)) - 1
    unmatched = everything  # bit i is cleared when the subsequence grows at character i
    for character in second:
        matching = unmatched & places.get(character, 0)
        unmatched = ((unmatched + matching) | (unmatched - matching)) & everything
    return len(first) - unmatched.bit_count()


def edit_similarity(prediction: str, reference: str, backend: SimilarityBackend = "difflib") -> int:
    """round(100 * 2 * matching / total characters); 100 where equal, 0 where either is empty once restored."""
    first, second = restore_literals(prediction), restore_literals(reference)
    if not first or not second:
        return 0
    if first == second:
        return 100
    if backend == "difflib":
        ratio = SequenceMatcher(None, first, second).ratio()
    else:
        ratio = 2.0 * common_subsequence_length(first, second) / (len(first) + len(second))
    return round(100 * ratio)
