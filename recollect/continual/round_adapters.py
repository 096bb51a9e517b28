"""The adapters after a round as a folder of their own, to be used without the run they come from.

    adapter/round-T/
        recollect_adapter.json, recollect_adapter.safetensors    for `adapters.saving.from_pretrained`
        adapter_config.json, adapter_model.safetensors    for PEFT and vLLM, where the adapters are plain LoRA pairs
        manifest.json    method, seed, task, the base model, hashes of the files; written last

Pairs of several tasks (O-LoRA, InfLoRA) leave for PEFT as one pair, concatenated along the rank.
Source: trace_benchmark 9.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recollect.io import read_json, sha256_file, write_json

if TYPE_CHECKING:
    from torch import nn

MANIFEST = "manifest.json"


def write_round_adapter(model: nn.Module, folder: Path, about: dict[str, Any]) -> Path | None:
    """Write the adapters on `model` into `folder`; None where a method has none, for it tunes the weights themselves.

    Args:
        about: JSON values of the manifest, beside the base and the files.

    Raises:
        StorageRefused: the disk refused.
    """
    from transformers import PreTrainedModel

    from recollect.continual.adapters.attach import attached
    from recollect.continual.adapters.export import Route, export_route
    from recollect.continual.adapters.saving import CONFIG_FILE, save_pretrained

    state = attached(model)
    if state is None:
        return None
    save_pretrained(model, folder)
    if state.config.kind == "lora" and isinstance(model, PreTrainedModel):
        export_route(model, Route({}), folder)
    files = {file.name: sha256_file(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    saved = read_json(folder / CONFIG_FILE)
    write_json(folder / MANIFEST, {**about, "kind": saved["kind"], "base": saved["base"], "files": files})
    return folder
