"""The text of a semantic ID, `<a_12><b_200><c_7>`: level letter and code, one token per level.

Levels beyond the 26th are called `aa`, `ab`, …; an absent last digit (-1) is not written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from recollect.errors import InputError

_TOKEN = re.compile(r"<([a-z]+)_(0|[1-9][0-9]{0,8})>")
_WHOLE = re.compile(rf"(?:{_TOKEN.pattern})+")


def level_name(level: int) -> str:
    """The letters of a level: a, b, …, z, aa, ab, …"""
    name = ""
    level += 1
    while level:
        level, rest = divmod(level - 1, 26)
        name = chr(ord("a") + rest) + name
    return name


def token_text(level: int, code: int) -> str:
    """The token of one code."""
    return f"<{level_name(level)}_{code}>"


def level_tokens(codebook_sizes: Sequence[int]) -> list[list[str]]:
    """The tokens of every level, in the order of their codes."""
    return [[token_text(level, code) for code in range(size)] for level, size in enumerate(codebook_sizes)]


def texts_of(codes: np.ndarray) -> np.ndarray:
    """(N,) object array of the text of each row of codes (N, l) int, -1 at the end of a row left out."""
    texts = np.full(len(codes), "", dtype=object)
    for level in range(codes.shape[1]):
        column = codes[:, level]
        table = np.array([token_text(level, code) for code in range(int(column.max(initial=-1)) + 1)] + [""], object)
        texts = texts + table[column]  # -1 picks the empty text at the end
    return texts


def codes_of(text: str) -> tuple[int, ...]:
    """The codes a text stands for, at least one.

    Raises:
        InputError: it is not the text of a semantic ID or of a prefix of one.
    """
    found = _TOKEN.findall(text) if _WHOLE.fullmatch(text) else []
    if not found or any(name != level_name(level) for level, (name, _) in enumerate(found)):
        raise InputError(
            f"{text[:80]!r} is not a semantic ID; expected text such as {token_text(0, 12)}{token_text(1, 3)}"
        )
    return tuple(int(code) for _, code in found)


def find_ids(text: str) -> list[tuple[int, ...]]:
    """Every semantic ID (or prefix of one) inside a longer text, in order; a new one begins at each level-a token."""
    ids: list[list[int]] = []
    end = -1
    for match in _TOKEN.finditer(text):
        name, code = match.group(1), int(match.group(2))
        if name == level_name(0):
            ids.append([code])
        elif ids and match.start() == end and name == level_name(len(ids[-1])):
            ids[-1].append(code)
        else:
            end = -1
            continue
        end = match.end()
    return [tuple(found) for found in ids]
