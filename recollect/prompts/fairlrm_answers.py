"""A model's free ranking as positions of the candidates it names (fairlrm 5.4): total, and it invents nothing.

Entries are read from a JSON list, whole or cut short, else line by line. Each is stripped of numbering, quotes,
markdown and years and matched within the candidate set only: by label, exact title, normalised title (case, articles,
punctuation), then by edit ratio with a threshold and a margin to the second best. Anything else is invalid and
counted.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from recollect.errors import MalformedOutput
from recollect.prompts.parsing import parse_json
from recollect.prompts.words import edit_ratio

FUZZY_THRESHOLD = 0.85
FUZZY_MARGIN = 0.08
MAX_CHARACTERS = 20_000
MAX_ENTRIES = 400
_LONGEST_ENTRY = 400

_NUMBERING = re.compile(r"^\s*(?:[-*•>]+\s+|#+\s+|\(?\d{1,3}\s*[.):]\s*)+")
_WRAPPING = " \t\"'`*_“”‘’«»[]{}<>,;"
_NUMBER = re.compile(r"\d+")
_TRAILER = re.compile(r"\s*[(\[][^()\[\]]*[)\]]\s*$")
_LABELLED = re.compile(r"^([A-Z]{1,2})\s*[.):\]-]\s*(.+)$")
_SEPARATORS = re.compile(r"\s*(?:[,;>|]|→|-->|\s-\s)\s*")
_ARTICLE = re.compile(r"^(?:the|a|an|der|die|das|ein|eine|le|la|les)\s+|,?\s+(?:the|a|an|der|die|das|le|la|les)$")
_NOT_WORD = re.compile(r"[^\w]+")


@dataclass(frozen=True)
class ParsedRanking:
    """What a model listed.

    order: positions among the candidates, best first, each once.  entries: what was read as an entry of its list.
    invalid, duplicates: entries that name no candidate, or one named before.  missing: candidates it did not name.
    """

    order: tuple[int, ...]
    entries: int
    invalid: int
    duplicates: int
    missing: int


def normalised(title: str) -> str:
    """A title without case, accents, articles and punctuation."""
    folded = unicodedata.normalize("NFKD", title).casefold()
    folded = " ".join("".join(c for c in folded if not unicodedata.combining(c)).split())
    return _NOT_WORD.sub(" ", _ARTICLE.sub("", folded)).strip()


class RankingParser:
    """Matches entries against one candidate set.

    Args:
        labels: of the candidates, in their order; may be empty.
        titles: of the candidates, in their order.
    """

    def __init__(self, labels: Sequence[str], titles: Sequence[str]) -> None:
        self._n = len(titles)
        self._by_label = {label: at for at, label in enumerate(labels)}
        self._exact = _unique(titles)
        self._plain_titles = [normalised(title)[:_LONGEST_ENTRY] for title in titles]
        self._plain = _unique(self._plain_titles)

    def parse(self, text: str | bytes) -> ParsedRanking:
        """Read any answer; never raises on its content."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        text = text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text
        matched = [found for entry in self._entries(text[:MAX_CHARACTERS]) for found in entry][:MAX_ENTRIES]
        order = tuple(dict.fromkeys(found for found in matched if found is not None))
        invalid = sum(found is None for found in matched)
        return ParsedRanking(order, len(matched), invalid, len(matched) - invalid - len(order), self._n - len(order))

    def _entries(self, text: str) -> list[list[int | None]]:
        listed = parse_json(text, {"type": "array"})
        if not isinstance(listed, MalformedOutput):
            return [[self.match(entry) if isinstance(entry, str) else None for entry in listed]]
        return [self._line(line) for line in text.splitlines() if line.strip(_WRAPPING)]

    def _line(self, line: str) -> list[int | None]:
        """The entry a line is, or the entries it lists where at least half of them are candidates."""
        whole = self.match(line)
        if whole is not None:
            return [whole]
        pieces = [piece for piece in _SEPARATORS.split(line) if piece.strip(_WRAPPING)]
        found = [self.match(piece) for piece in pieces]
        hits = sum(piece is not None for piece in found)
        return found if len(pieces) > 1 and 2 * hits >= len(pieces) else [None]

    def match(self, entry: str) -> int | None:
        """The candidate an entry names, None where it names none or more than one."""
        entry = entry[: 4 * _LONGEST_ENTRY]
        unnumbered = _NUMBERING.sub("", entry)
        for text in (entry, unnumbered, _without_trailers(unnumbered)):
            said = text.strip(_WRAPPING)
            if said in self._by_label:
                return self._by_label[said]
            if said in self._exact:
                return self._exact[said]
        if labelled := _LABELLED.match(said):
            titled = self._title(labelled[2])
            return self._by_label.get(labelled[1]) if titled is None else titled
        return self._title(said)

    def _title(self, said: str) -> int | None:
        said = said.strip(_WRAPPING)
        if said in self._exact:
            return self._exact[said]
        plain = normalised(said)[:_LONGEST_ENTRY]
        return self._plain.get(plain, self._resembling(plain))

    def _resembling(self, plain: str) -> int | None:
        if len(plain) < 3 or not self._n:
            return None
        # Numbers tell the parts of a series apart, and one digit is a small edit: they must agree.
        ratios = [
            edit_ratio(plain, title) if _NUMBER.findall(plain) == _NUMBER.findall(title) else 0.0
            for title in self._plain_titles
        ]
        best = max(range(self._n), key=ratios.__getitem__)
        second = max((ratio for at, ratio in enumerate(ratios) if at != best), default=0.0)
        return best if ratios[best] >= FUZZY_THRESHOLD and ratios[best] - second >= FUZZY_MARGIN else None


def _without_trailers(text: str) -> str:
    """Without up to three bracketed remarks at its end, such as a year, categories and a class tag."""
    for _ in range(3):
        text = _TRAILER.sub("", text.rstrip(" \t*_`\"',;"))
    return text


def _unique(texts: Sequence[str]) -> dict[str, int]:
    """Where each text stands; texts that stand more than once, and empty ones, name nothing."""
    places: dict[str, int] = {}
    doubled = set()
    for at, text in enumerate(texts):
        if text in places:
            doubled.add(text)
        places[text] = at
    return {text: at for text, at in places.items() if text and text not in doubled}


__all__ = ["FUZZY_MARGIN", "FUZZY_THRESHOLD", "ParsedRanking", "RankingParser", "normalised"]
