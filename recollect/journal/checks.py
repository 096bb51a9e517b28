"""Is a journal what it says? Pure functions over what was read from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recollect.journal.records import MemoryRow, rolled, step_digest


def first_unfolded(
    events: Iterable[Mapping[str, Any]], memories: Mapping[tuple[str, str], MemoryRow]
) -> tuple[str, str] | None:
    """The first (owner, key) whose memory is not the last `after` of the events that name it; None when all are.

    Args:
        events: in step order; one without an `owner` changed no memory.
    """
    folded: dict[tuple[str, str], tuple[str, int]] = {}
    for event in events:
        if event.get("owner"):
            folded[event["owner"], event["key"]] = (event["after"], event["step"])
    held = {name: (row.text, row.step) for name, row in memories.items()}
    return next((name for name in sorted(folded.keys() | held.keys()) if folded.get(name) != held.get(name)), None)


def wrong_steps(
    stored: Mapping[int, str], lines: Mapping[int, Sequence[str]], last_step: int, digest: str
) -> list[str]:
    """Steps whose events do not have the digest they were committed with, and whether the prefix adds up.

    Args:
        stored: step number -> digest.  lines: step number -> event lines.
        last_step, digest: end of the finished prefix and the digest rolled over it.
    """
    found = []
    reached = ""
    for number in range(last_step + 1):
        reached = rolled(reached, stored.get(number, "missing"))
    if reached != digest:
        found.append(f"the steps up to {last_step} do not add up to the recorded digest")
    found += [
        f"step {number} is not what was committed"
        for number in sorted(stored.keys() | lines.keys())
        if step_digest(lines.get(number, [])) != stored.get(number)
    ]
    return found
