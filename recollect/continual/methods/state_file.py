"""A method's state as one safetensors file, JSON values in its header, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from recollect.continual.methods.protocol import MethodState
from recollect.errors import InputError
from recollect.io import atomic_open

STATE_FILE = "method_state.safetensors"
FORMAT = "1"


def write_state(state: MethodState, folder: str | Path) -> Path:
    """Write `state` into `folder` and return the file.

    Raises:
        StorageRefused: the disk refused.
    """
    from safetensors.torch import save

    path = Path(folder) / STATE_FILE
    header = {"format": FORMAT, "values": json.dumps(state.values, allow_nan=False)}
    with atomic_open(path, "wb") as handle:
        handle.write(save(state.tensors, metadata=header))
    return path


def read_state(folder: str | Path) -> MethodState:
    """Inverse of `write_state`.

    Raises:
        InputError: the file is missing, torn or of another format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise InputError(f"{path} does not exist; it is written after every finished task")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
        values = json.loads(header["values"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not the state of a method ({error}); start the run anew") from error
    return MethodState(values, tensors)
