"""Accuracy of short answers: the benchmark's exact rule and a lenient one, always reported together.

Official: the prediction equals the answer character for character, so " A" and "A\\n" are wrong.  Normalised: blanks at
the ends are dropped, then the first option letter or the first number is compared; numbers as decimals, so 5.0 is 5.
Source: trace_benchmark 5 (official rule [paper], normalised rule [our design]).
"""

from __future__ import annotations

import re
from decimal import Decimal

_LETTER = re.compile(r"(?<![A-Za-z])[A-E](?![A-Za-z])")
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|[-+]?\.[0-9]+")


def exact_match(prediction: str, answer: str) -> float:
    """1.0 where both are the same non-empty string, else 0.0."""
    return float(prediction == answer and answer != "")


def first_letter(text: str) -> str | None:
    """The first of A to E that is no part of a Latin word; None where there is none."""
    found = _LETTER.search(text)
    return found.group() if found else None


def first_number(text: str) -> Decimal | None:
    """The first number, digits grouped by commas included; None where there is none."""
    found = _NUMBER.search(text.replace("\u2212", "-"))
    return Decimal(found.group().replace(",", "")) if found else None


def letter_match(prediction: str, answer: str) -> float:
    """1.0 where both name the same option first; an answer without a letter is compared as it stands."""
    wanted = first_letter(answer)
    if wanted is None:
        return exact_match(prediction.strip(), answer.strip())
    return float(first_letter(prediction) == wanted)


def number_match(prediction: str, answer: str) -> float:
    """1.0 where both hold the same number first; an answer without a number ("Friday") is compared as it stands."""
    wanted = first_number(answer)
    if wanted is None:
        return exact_match(prediction.strip(), answer.strip())
    return float(first_number(prediction) == wanted)


def option_letter(text: str) -> str:
    """The letter of an answer "B\\nexplanation": its first character, "" where it is empty."""
    return text[:1]


def explanation(text: str) -> str:
    """What follows the letter and the one character after it, "" where there is nothing."""
    return text[2:]
