"""Token sequences that share prefixes, cut into segments so that each shared prefix is computed once.

Pure planning: no model, no tensors. Prompts ordered static -> dynamic (instructions, memory, task, answer) give a
tree whose inner segments are the shared parts; an engine computes the tree level by level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MIN_SAVING = 48  # tokens; sharing that saves fewer costs more in an extra pass
MAX_SEGMENT = 1024  # tokens; bounds the memory of one pass, longer parts are chained


@dataclass
class Segment:
    """A run of tokens behind its parent's path.

    start: tokens on the path before this segment.  parent: index of the segment before it, or -1.
    wants: (position inside the segment, token that follows, sequence, index of that token's answer).
    """

    tokens: Sequence[int]
    start: int
    parent: int
    level: int
    wants: list[tuple[int, int, int, int]] = field(default_factory=list)
    n_children: int = 0

    @property
    def end(self) -> int:
        """Tokens on the path up to and including this segment."""
        return self.start + len(self.tokens)


def plan_segments(sequences: Sequence[tuple[int, ...]]) -> tuple[list[Segment], list[int]]:
    """Cut non-empty sequences into shared segments.

    Returns:
        The segments, parents before children, and for each sequence the index of the segment it ends in. The plan
        depends on the multiset of sequences only, not on their order (beyond the numbering).
    """
    segments: list[Segment] = []
    ends = [-1] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: sequences[index])

    def add(tokens: Sequence[int], start: int, parent: int) -> int:
        for offset in range(0, len(tokens), MAX_SEGMENT):
            level = segments[parent].level + 1 if parent >= 0 else 0
            segments.append(Segment(tokens[offset : offset + MAX_SEGMENT], start + offset, parent, level))
            if parent >= 0:
                segments[parent].n_children += 1
            parent = len(segments) - 1
        return parent

    def grow(members: list[int], start: int, parent: int) -> None:
        """Place sorted `members`, which agree before `start`, below `parent`."""
        pending = [(members, start, parent)]
        while pending:
            members, start, parent = pending.pop()
            first, last = sequences[members[0]], sequences[members[-1]]
            shared = _common(first, last, start)
            if first == last or (shared - start) * (len(members) - 1) >= MIN_SAVING:
                if shared > start:
                    parent = add(first[start:shared], start, parent)
                start = shared
                done = [member for member in members if len(sequences[member]) == shared]
                for member in done:
                    ends[member] = parent
                members = members[len(done) :]  # sorted: those that end here come first
                if not members:
                    continue
            pending += [(part, start, parent) for part in _parts(sequences, members, shared)]

    if order:
        grow(order, 0, -1)
    return segments, ends


def _parts(sequences: Sequence[tuple[int, ...]], members: list[int], at: int) -> list[list[int]]:
    """Split sorted `members` by their token at `at`; those that end there form their own part."""
    parts: dict[int, list[int]] = {}
    for member in members:
        tokens = sequences[member]
        parts.setdefault(tokens[at] if len(tokens) > at else -1, []).append(member)
    return list(parts.values())


def _common(first: tuple[int, ...], last: tuple[int, ...], start: int) -> int:
    """Length of the common prefix, which is at least `start`."""
    limit = min(len(first), len(last))
    at = start
    while at < limit and first[at] == last[at]:
        at += 1
    return at


def add_wants(segments: list[Segment], end: int, tokens: Sequence[int], n_context: int, sequence: int) -> None:
    """Note on the path ending in segment `end` that the log-probabilities of `tokens[n_context:]` are wanted.

    The path holds `tokens[:-1]`: the last token is predicted, never read.
    """
    at = end
    for position in range(len(tokens) - 2, n_context - 2, -1):
        while segments[at].start > position:
            at = segments[at].parent
        segments[at].wants.append(
            (position - segments[at].start, tokens[position + 1], sequence, position + 1 - n_context)
        )


def level_batches(segments: list[Segment], batch_tokens: int) -> list[list[int]]:
    """Group the segments into passes: one level at a time, similar lengths together, at most `batch_tokens` padded.

    A pass holds segments of one level only, so that every parent was computed in an earlier pass.
    """
    passes: list[list[int]] = []
    order = sorted(
        range(len(segments)),
        key=lambda i: (segments[i].level, -len(segments[i].tokens), segments[i].start, segments[i].tokens),
    )
    current: list[int] = []
    waste = real = 0
    for index in order:
        length = len(segments[index].tokens)
        if current:
            longest = len(segments[current[0]].tokens)
            too_wide = (len(current) + 1) * longest > batch_tokens
            too_ragged = waste + longest - length > 64 + (real + length) // 8
            if segments[index].level != segments[current[0]].level or too_wide or too_ragged:
                passes.append(current)
                current, waste, real = [], 0, 0
        longest = len(segments[current[0]].tokens) if current else length
        current.append(index)
        waste += longest - length
        real += length
    if current:
        passes.append(current)
    return passes
