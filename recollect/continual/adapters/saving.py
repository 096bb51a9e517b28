"""Adapters as a folder: `recollect_adapter.json` (options, growth, the base they belong to) and their tensors alone.

A reloaded model is the saved one in everything training starts from, too: which parameters are frozen is kept.

The tensors are safetensors; the JSON holds their hash, so that two files of different saves cannot be taken for one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recollect.continual.adapters.attach import (
    adapter_parameters,
    adapter_state_dict,
    adapters,
    attach,
    attached,
    attached_config,
    detach,
    load_adapter_state_dict,
)
from recollect.continual.adapters.config import config_from_dict, config_to_dict
from recollect.continual.adapters.growth import add_generation, generations, open_experts
from recollect.errors import InputError
from recollect.io import atomic_open, read_json, sha256_file, write_json

CONFIG_FILE = "recollect_adapter.json"
WEIGHTS_FILE = "recollect_adapter.safetensors"
FORMAT = 2
_FINGERPRINT_VALUES = 1024  # of each tensor, evenly spaced
_SAVED: dict[str, type] = {
    "format": int,
    "kind": str,
    "options": dict,
    "generations": list,
    "open_generations": int,
    "trained": list,
    "base": dict,
    "weights_sha256": str,
}


def base_fingerprint(model: nn.Module) -> str:
    """Identity of a bare model's weights, the same with adapters on and off and in float32 or bfloat16.

    Hex SHA-256 over name, shape and 1 024 evenly spaced values (rounded to bfloat16) of every parameter: it tells
    fine-tuned variants apart without reading every weight of a large model.
    """
    own = set(adapter_state_dict(model)) if attached(model) is not None else set()
    wrapped = tuple(adapters(model)) if attached(model) is not None else ()
    digest = hashlib.sha256()
    values = {}
    for name, parameter in model.named_parameters():
        if name not in own:
            prefix = next((prefix for prefix in wrapped if name.startswith(f"{prefix}.base.")), None)
            values[name if prefix is None else prefix + name.removeprefix(f"{prefix}.base")] = parameter
    for name in sorted(values):
        flat = values[name].detach().reshape(-1)
        step = max(1, len(flat) // _FINGERPRINT_VALUES)
        sample = flat[::step].to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(f"{name}{tuple(values[name].shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def save_pretrained(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapters and routers of a model, and nothing of its base, into `folder`.

    Raises:
        InputError: the model has no adapters.
        StorageRefused: the disk refused.
    """
    from safetensors.torch import save

    folder = Path(folder)
    config = attached_config(model)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_state_dict(model).items()}
    with atomic_open(folder / WEIGHTS_FILE, "wb") as handle:
        handle.write(save(tensors))
    sizes, n_open = generations(model)
    write_json(
        folder / CONFIG_FILE,
        {
            "format": FORMAT,
            "kind": config.kind,
            "options": config_to_dict(config),
            "generations": sizes,
            "open_generations": n_open,
            "trained": [name for name, one in adapter_parameters(model).items() if one.requires_grad],
            "base": {"name": _name(model), "fingerprint": base_fingerprint(model)},
            "weights_sha256": sha256_file(folder / WEIGHTS_FILE),
        },
    )
    return folder


def from_pretrained(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapters saved in `folder` on the bare `model`, in place; its logits are those of the saved one,
    and the same parameters require gradients.

    Raises:
        InputError: a file is missing, torn or of another save; the adapters belong to another base (both are named).
        ConfigError: the model has adapters already, or the saved options are illegal.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / CONFIG_FILE
    saved = read_json(path)
    _check_saved(saved, path)
    here = base_fingerprint(model)
    if saved["base"]["fingerprint"] != here:
        raise InputError(
            f"{path} was saved for the base {saved['base']['name']!r} ({saved['base']['fingerprint'][:12]}), and this "
            f"model is {_name(model)!r} ({here[:12]}); load the base it was trained on"
        )
    weights = Path(folder) / WEIGHTS_FILE
    if not weights.is_file() or sha256_file(weights) != saved["weights_sha256"]:
        raise InputError(f"{weights} is missing, or not the file that {path} was written with; save the adapters anew")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise InputError(f"{weights} is not a safetensors file: {error}") from error
    attach(model, config_from_dict(saved["kind"], saved["options"], str(path)))
    try:
        for experts in saved["generations"][1:]:
            add_generation(model, experts)
        open_experts(model, saved["open_generations"])
        load_adapter_state_dict(model, tensors)
    except BaseException:
        detach(model)
        raise
    trained = set(saved["trained"])
    for name, parameter in adapter_parameters(model).items():
        parameter.requires_grad_(name in trained)
    return model


def _check_saved(saved: Any, path: Path) -> None:
    if isinstance(saved, dict) and saved.get("format", FORMAT) != FORMAT:
        raise InputError(f"{path} has format {saved['format']!r}; this version reads {FORMAT}")
    if not isinstance(saved, dict) or any(key not in saved for key in _SAVED):
        raise InputError(f"{path} does not describe saved adapters; it must hold {', '.join(_SAVED)}")
    for key, kind in _SAVED.items():
        if not isinstance(saved[key], kind):
            raise InputError(f"{path} is damaged: {key} is {saved[key]!r}; save the adapters anew")
    whole = all(isinstance(size, int) and size > 0 for size in saved["generations"])
    if not whole or not saved["generations"] or not {"name", "fingerprint"} <= saved["base"].keys():
        raise InputError(
            f"{path} is damaged: generations {saved['generations']!r}, base {saved['base']!r}; save the adapters anew"
        )


def _name(model: nn.Module) -> str:
    """What the model calls itself: the last part of its name or path, or its class."""
    named = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return Path(named).name
