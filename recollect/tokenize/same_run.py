"""Whether a run folder holds the run that is to be continued."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recollect.errors import ResumeRefused


def check_same_run(held: Mapping[str, Any], command: str, identity: Mapping[str, Any], out: Path) -> None:
    """Refuse to continue a run of another command, other options or other data.

    Args:
        held: content of its run.json.
        identity: what must be equal, JSON values.

    Raises:
        ResumeRefused: something differs; the message names the first difference.
    """
    if held.get("command") != command:
        raise ResumeRefused(f"{out} holds a run of {held.get('command')!r}, not of {command}; use another --out")
    before = held.get("identity") or {}
    for name in sorted(before.keys() | identity.keys()):
        if before.get(name) != identity.get(name):
            raise ResumeRefused(
                f"the run in {out} has {name} {before.get(name)!r}, not {identity.get(name)!r}; use the same options "
                "or another --out"
            )
