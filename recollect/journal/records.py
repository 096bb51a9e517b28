"""What a journal holds, as plain records, and how each becomes bytes."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recollect.errors import JournalError
from recollect.io import canonical_json


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One paid model call. `call` and `answer` are JSON values; `seconds` is what it took (accounting only).

    `key` names everything that determines the answer, `fingerprint` the model, `site` the place that asked.
    """

    key: str
    primitive: str
    site: str
    fingerprint: str
    call: Mapping[str, Any]
    answer: Mapping[str, Any]
    prompt_tokens: int
    completion_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RecordedText:
    """One paid embedding: `vector` (D,) float32 of `text`."""

    key: str
    text: str
    vector: np.ndarray


@dataclass(frozen=True, slots=True)
class MemoryWrite:
    """The whole new state of one memory, as text (JSON text allowed)."""

    owner: str
    key: str
    text: str


@dataclass(frozen=True, slots=True)
class StepCommit:
    """What one finished step leaves. Every event holds `step` (the number) and `kind`, and may hold `ok`: false."""

    number: int
    events: tuple[dict[str, Any], ...]
    memory: tuple[MemoryWrite, ...]


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """The latest state of a memory; `version` counts its writes from 1, `step` made the last one."""

    text: str
    version: int
    step: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that got no usable answer. `kind` is the error's class name."""

    key: str
    site: str
    kind: str
    message: str


def stored_json(value: Any) -> str:
    """Canonical JSON that is valid UTF-8: text with lone surrogates is written with escapes throughout."""
    text = canonical_json(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text


def to_bytes(text: str) -> bytes:
    """UTF-8 that keeps lone surrogates, which SQLite's own text type refuses."""
    return text.encode("utf-8", "surrogatepass")


def from_bytes(raw: bytes) -> str:
    """Inverse of `to_bytes`."""
    return raw.decode("utf-8", "surrogatepass")


def checksum(key: str, content: bytes) -> int:
    """CRC-32 of a row's content under its key: finds torn and flipped bytes, not forgery."""
    return zlib.crc32(content, zlib.crc32(key.encode()))


def step_digest(lines: Sequence[str]) -> str:
    """Hex SHA-256 over a step's event lines."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


StepRows = tuple[str, list[tuple[int, int, str, int, str]], list[tuple[bytes, bytes, int, bytes]]]


def step_rows(step: StepCommit) -> StepRows:
    """A step as rows: its digest, its events, its memory writes.

    Raises:
        JournalError: an event does not name the step and a kind.
    """
    lines = []
    for event in step.events:
        if event.get("step") != step.number or not isinstance(event.get("kind"), str):
            raise JournalError(f"an event of step {step.number} must hold that step and a kind, got {event!r:.200}")
        lines.append(stored_json(event))
    events = [
        (step.number, position, event["kind"], int(bool(event.get("ok", True))), line)
        for position, (event, line) in enumerate(zip(step.events, lines, strict=True))
    ]
    writes = [(to_bytes(write.owner), to_bytes(write.key), step.number, to_bytes(write.text)) for write in step.memory]
    return step_digest(lines), events, writes


def rolled(digest: str, next_step: str) -> str:
    """Digest of a prefix of the log, extended by the digest of the next step."""
    return hashlib.sha256(f"{digest}{next_step}".encode()).hexdigest()


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any], shown: int = 60) -> list[str]:
    """ "name: old -> new" for every option that differs, names sorted, long values cut to `shown` characters."""
    before, after = flattened(old), flattened(new)

    def text(flat: dict[str, Any], name: str) -> str:
        if name not in flat:
            return "absent"
        value = repr(flat[name])
        return value if len(value) <= shown else value[: shown - 1] + "…"

    absent = object()
    return [
        f"{name}: {text(before, name)} -> {text(after, name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, absent) != after.get(name, absent)
    ]
