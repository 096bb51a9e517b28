"""Answers from the journal of a finished run, without any model; shows where a run now asks something else."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from recollect.backbones.protocol import Answer, Call, answer_from_json, call_key, call_to_json
from recollect.errors import ContextTooLong, MalformedOutput, ReplayMismatch
from recollect.io import canonical_json, sha256_text
from recollect.journal import Journal


class Replay:
    """The same face without a model: every answer comes from the journal of a finished run.

    Args:
        journal: the recorded run, may be read-only.
        fingerprint: of the backbone it was made with.  embedder_fingerprint: of its embedder.
    """

    is_concurrent = False

    def __init__(self, journal: Journal, fingerprint: str, embedder_fingerprint: str = "") -> None:
        self.journal = journal
        self.fingerprint = fingerprint
        self._embedder_fingerprint = embedder_fingerprint or fingerprint

    def answer(self, calls: Sequence[Call]) -> list[Answer]:
        """Recorded answers in order.

        Raises:
            ReplayMismatch: a call was never recorded; shows the first one as a diff against the recorded call of the
                same site that is most like it.
            MalformedOutput, ContextTooLong: the call got no usable answer in the recorded run either.
        """
        keys = [call_key(self.fingerprint, call) for call in calls]
        found = self.journal.answers(dict.fromkeys(keys), answer_from_json)
        for key, call in zip(keys, calls, strict=True):
            if key not in found:
                raise self._fault(key) or ReplayMismatch(self._difference(call))
        return [found[key] for key in keys]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Recorded vectors (B, D) in order; raises `ReplayMismatch` for a text that was never embedded."""
        keys = [text_key(self._embedder_fingerprint, text) for text in texts]
        found = self.journal.embeddings(dict.fromkeys(keys))
        for key, text in zip(keys, texts, strict=True):
            if key not in found:
                nearest = _most_alike(text, self.journal.embedded_texts(), lambda recorded: recorded)
                raise ReplayMismatch(f"a text was not embedded in {self.journal.path}:\n{_diff(nearest or '', text)}")
        return np.stack([found[key] for key in keys]) if keys else np.zeros((0, 0), dtype=np.float32)

    def _fault(self, key: str) -> Exception | None:
        """How a call failed for good in the recorded run; None where it did not."""
        kinds = {kind.__name__: kind for kind in (MalformedOutput, ContextTooLong)}
        for failure in self.journal.failures():
            if failure.key == key:
                return kinds[failure.kind](failure.message)
        return None

    def _difference(self, call: Call) -> str:
        asked = _readable(call_to_json(call))
        recorded = _most_alike(asked, (value for *_, value in self.journal.calls(call.site)), _readable)
        if recorded is None:
            return f"no call of site {call.site!r} is recorded in {self.journal.path}; the run never asked:\n{asked}"
        if recorded == asked:
            return (
                f"a call of site {call.site!r} is recorded in {self.journal.path} under another model than "
                f"{self.fingerprint!r}, or its answer is damaged:\n{asked}"
            )
        return f"a call of site {call.site!r} differs from what {self.journal.path} recorded:\n{_diff(recorded, asked)}"


def text_key(fingerprint: str, text: str) -> str:
    return sha256_text(canonical_json([fingerprint, "embed", text]))


def _readable(call: dict[str, Any]) -> str:
    """A call as lines: one per parameter, then the messages as they stand."""
    lines = [f"{name}: {canonical_json(value)}" for name, value in sorted(call.items()) if name != "messages"]
    for role, content in call["messages"]:
        lines += [f"[{role}]", *content.split("\n")]
    return "\n".join(lines)


def _diff(recorded: str, asked: str) -> str:
    lines = difflib.unified_diff(recorded.split("\n"), asked.split("\n"), "recorded", "asked now", lineterm="", n=1)
    return "\n".join(lines)


def _most_alike(asked: str, recorded: Iterable[Any], render: Callable[[Any], str]) -> str | None:
    """The rendered text sharing the longest beginning and end with `asked`; None where nothing is recorded."""
    best, best_shared = None, -1
    for value in recorded:
        text = render(value)
        shared = _shared_prefix(text, asked) + _shared_prefix(text[::-1], asked[::-1])
        if shared > best_shared:
            best, best_shared = text, shared
    return best


def _shared_prefix(first: str, second: str) -> int:
    """Length of the common beginning, by bisection over slices."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
