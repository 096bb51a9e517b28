"""Every language model behind one protocol; see `protocol` for the four primitives and `resolve` for names."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Backbone": "protocol",
    "ConcurrentBackbone": "protocol",
    "Message": "protocol",
    "Request": "protocol",
    "Choice": "protocol",
    "Scoring": "protocol",
    "Completion": "protocol",
    "Chosen": "protocol",
    "Scored": "protocol",
    "open_backbone": "resolve",
    "open_embedder": "resolve",
    "TransformersBackbone": "transformers_engine",
    "EmbeddingModel": "embedding",
    "ScriptedBackbone": "scripted",
    "ServerBackbone": "server",
    "VLLMBackbone": "vllm_engine",
    "check_backbone": "conformance",
    "list_models": "store",
    "model_folder": "store",
    "pull": "store",
    "verify": "store",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that importing the package stays cheap."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
