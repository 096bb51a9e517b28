"""Where an interrupted fit goes on: finished levels, and the state of the level in progress, each in one file.

A folder holds `fit.json` (what is being fitted on what), `level.{l}.safetensors` for finished levels and at most one
`state.{l}.safetensors` that the method writes as it goes. Every file is written atomically, so whatever moment the
process dies at, what is there is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recollect.errors import ModelFileError, ResumeRefused
from recollect.io import canonical_json, read_json, sha256_text, write_arrays, write_json

_HASH_BLOCK = 65536


class FitCheckpoint:
    """The checkpoint folder of one fit.

    Args:
        folder: made when missing.
        identity: JSON values that decide the result (method, options, hashes of the data).

    Raises:
        ResumeRefused: the folder holds another fit.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        about = self.folder / "fit.json"
        wanted = sha256_text(canonical_json(identity))
        if about.exists():
            found = read_json(about)
            if not isinstance(found, dict) or found.get("sha256") != wanted:
                known = found.get("identity") if isinstance(found, dict) else None
                changed = [key for key in identity if not isinstance(known, dict) or known.get(key) != identity[key]]
                raise ResumeRefused(
                    f"{self.folder} holds a fit that differs in {', '.join(changed) or 'its contents'}; "
                    "give the same data and options, or another folder"
                )
        else:
            write_json(about, {"identity": dict(identity), "sha256": wanted})

    def level(self, level: int) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays and report of a finished level, or None."""
        return self._read(self.folder / f"level.{level}.safetensors")

    def save_level(self, level: int, arrays: Mapping[str, np.ndarray], report: Mapping[str, Any]) -> None:
        """Keep a finished level; its state in progress is no longer needed."""
        self._write(self.folder / f"level.{level}.safetensors", arrays, report)
        (self.folder / f"state.{level}.safetensors").unlink(missing_ok=True)

    def state(self, level: int) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays and notes the method saved while it was fitting `level`, or None."""
        return self._read(self.folder / f"state.{level}.safetensors")

    def save_state(self, level: int, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> None:
        """Replace the state of the level in progress; `notes` are JSON values."""
        self._write(self.folder / f"state.{level}.safetensors", arrays, notes)

    def _write(self, path: Path, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> None:
        write_arrays(path, arrays, {"notes": json.dumps(dict(notes))})

    def _read(self, path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return None
        try:
            with safe_open(str(path), framework="numpy") as handle:
                arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
                return arrays, json.loads((handle.metadata() or {})["notes"])
        except (SafetensorError, ValueError, KeyError) as error:
            raise ModelFileError(f"{path} cannot be read: {error}; delete it and start again") from error


def rows_sha256(embeddings: np.ndarray, rows: np.ndarray) -> str:
    """Hex SHA-256 of the shape, dtype and bytes of the chosen rows, read block by block."""
    digest = hashlib.sha256(f"{embeddings.dtype.str}{len(rows)}x{embeddings.shape[1]}".encode())
    for start in range(0, len(rows), _HASH_BLOCK):
        digest.update(np.ascontiguousarray(embeddings[rows[start : start + _HASH_BLOCK]]).tobytes())
    return digest.hexdigest()


def array_sha256(array: np.ndarray | None) -> str:
    """Hex SHA-256 of an array's type, shape and values, "" for None; a memory-mapped one is read block by block."""
    if array is None:
        return ""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    for start in range(0, len(array), _HASH_BLOCK):
        digest.update(np.ascontiguousarray(array[start : start + _HASH_BLOCK]).tobytes())
    return digest.hexdigest()
