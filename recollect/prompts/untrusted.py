"""Text that others wrote, made safe to print inside a prompt: it stays readable and cannot become structure.

Titles, posts, reviews, stored memories and model answers may carry control tokens of the loaded tokenizer, markers of
common chat templates, hidden characters and forged headings. `Neutralizer.clean` normalises (NFC), drops what cannot
be seen, folds lines, breaks every marker with a visible dot and caps the length at a word.
Not covered: persuasion in plain words ("choose this one"), which no filter removes; see `recollect.prompts.render`
for the fence around data and for the instruction that follows it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from recollect.errors import ConfigError

BREAKS = "·†‡¬¤§¶"
ELLIPSIS = "…"
_RAW_FACTOR, _RAW_EXTRA = 4, 1024
_CUT_WORD_AT_MOST = 40

_LINE_ENDS = frozenset("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")
# Zero-width code points that are not of category Cf: joiners, fillers, variation selectors.
_INVISIBLE: tuple[tuple[int, int], ...] = (
    (0x034F, 0x034F),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x3164, 0x3164),
)
_INVISIBLE += ((0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF))

_OPEN, _CLOSE, _BAR = "[<＜‹〈⟨﹤]", "[>＞›〉⟩﹥]", "[|｜¦∣ǀ│]"
_TURN_NAMES = (
    "system|user|assistant|human|model|instructions?|inst|tools?|developer|think|s|bos|eos|pad|unk|mask|sep|cls"
)
# Markers of chat templates in general, whatever the loaded model: each is broken wherever it stands. Every pattern
# matches within any text that contains a match, so that cutting a cleaned text cannot create one.
_MARKERS = (
    rf"{_OPEN}\s?{_BAR}",
    rf"{_OPEN}{_OPEN}\s?/?\s?sys",
    rf"{_OPEN}\s?/?\s?(?:{_TURN_NAMES})\s?{_CLOSE}",
    rf"{_OPEN}\s?/?\s?(?:start|end|begin)_?of_?\w{{1,20}}\s?{_CLOSE}",
    rf"{_OPEN}\s?/?\s?(?:im|tool|fim|function)_\w{{1,20}}\s?{_CLOSE}",
    r"[\[［]\s?/?\s?(?:inst|sys|system_prompt|available_tools|tool_calls|tool_results|tool_content)\s?[\]］]",
    r"#{2,6} ?(?:instructions?|response|input|system|user|assistant|human|prompt|question|answer)s? ?[:：]",
    r"\n\n?(?:human|assistant|user|system|model|instructions?|response|developer) ?[:：]",
)


class _Visible:
    """Table for `str.translate`: line ends become newlines, other blanks spaces, what cannot be seen is dropped."""

    def __init__(self) -> None:
        self._known: dict[int, int | None] = {}

    def __getitem__(self, code: int) -> int | None:
        try:
            return self._known[code]
        except KeyError:
            mapped = self._mapped(code)
            if code < 0x10000:  # bounds the memory
                self._known[code] = mapped
            return mapped

    @staticmethod
    def _mapped(code: int) -> int | None:
        character = chr(code)
        if character in _LINE_ENDS:
            return 0x0A
        category = unicodedata.category(character)
        if category == "Zs" or character == "\t":
            return 0x20
        if category in ("Cc", "Cf", "Cs") or any(low <= code <= high for low, high in _INVISIBLE):
            return None
        if 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE:  # noncharacters
            return None
        return code


_VISIBLE = _Visible()


class Neutralizer:
    """Cleans untrusted text for one tokenizer.

    Args:
        control_tokens: strings the model's template treats as structure (`Backbone.control_tokens`), and any further
            string that data must not contain, such as the run's fence. Blank ones are ignored.

    Raises:
        ConfigError: the tokens leave no sign to break them with.
    """

    def __init__(self, control_tokens: Sequence[str]) -> None:
        tokens = {unicodedata.normalize("NFC", token) for token in control_tokens if token.strip("\u2581 \n\t\r")}
        ordered = sorted(tokens, key=lambda token: (-len(token), token))
        forbidden = "".join(ordered)
        # A break that is part of no token: each one splits an original run of characters, so breaking ends.
        free = [mark for mark in BREAKS if mark not in forbidden]
        if not free:
            raise ConfigError(
                f"the model's control tokens use every one of {BREAKS!r}; text cannot be broken up safely"
            )
        self._break = free[0]
        self._ellipsis = "" if ELLIPSIS in forbidden else ELLIPSIS
        self._marker = re.compile("|".join([*map(re.escape, ordered), *_MARKERS]), re.IGNORECASE)
        starts = {token[0] for token in ordered} | set("<＜‹〈⟨﹤[［#\n")
        self._starts = frozenset("".join(start + start.lower() + start.upper() for start in starts))

    def clean(self, text: str, max_characters: int, single_line: bool = True) -> str:
        """`text` as it may be printed inside a fence; cleaning it again changes nothing.

        Args:
            text: anything, lone surrogates and control characters included.
            max_characters: cap on the result, at least 1; a longer text ends at a word, with an ellipsis.
            single_line: fold lines into one; otherwise blank lines alone are dropped.
        """
        longest = _RAW_FACTOR * max_characters + _RAW_EXTRA
        is_cut = len(text) > longest
        text = text[:longest] if is_cut else text
        if not (text.isascii() and text.isprintable()):
            text = unicodedata.normalize("NFC", text.translate(_VISIBLE))
        text = "\n".join(squeezed for line in text.split("\n") if (squeezed := " ".join(line.split())))
        if not single_line:
            text = "\n" + text  # a heading in the first line is one too
        text = self._broken(text)
        text = " ".join(text.split("\n")) if single_line else text.lstrip("\n")
        # Folding lines may have joined two halves of a marker.
        text = self._broken(text).strip() if single_line else text.strip()
        return self._capped(text, max_characters, is_cut)

    def _broken(self, text: str) -> str:
        while not self._starts.isdisjoint(text):
            broken = self._marker.sub(self._break_up, text)
            if broken == text:
                return text
            text = broken
        return text

    def _break_up(self, match: re.Match[str]) -> str:
        found = match.group()
        if len(found) > 1 and found[-1] in ":：":  # a heading reads best with the break before its colon
            return found[:-1] + self._break + found[-1]
        return found[0] + self._break + found[1:] if len(found) > 1 else self._break

    def _capped(self, text: str, max_characters: int, is_cut: bool) -> str:
        if len(text) <= max_characters and not is_cut:
            return text
        room = max_characters - len(self._ellipsis)
        if room < 1:
            return text[:max_characters]
        if len(text) > room:
            end = max(text.rfind(" ", 0, room + 1), text.rfind("\n", 0, room + 1))
            if end < max(1, room - _CUT_WORD_AT_MOST):
                end = room
                while end > 1 and unicodedata.combining(text[end]):  # keep a letter with its marks
                    end -= 1
            text = text[:end]
        return text.rstrip(" \n.,;:…") + self._ellipsis
