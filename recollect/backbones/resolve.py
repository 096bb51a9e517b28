"""Backbones by name: one string says which model and which engine.

    smollm2                                  the embedded default, in process
    hf:Qwen/Qwen3-0.6B                       a hub model, in process
    path:./my-model                          a folder, in process
    openai:http://127.0.0.1:8000/v1#qwen3    a model of an OpenAI-compatible server (without #: the one it serves)
    vllm:Qwen/Qwen3-8B                       vLLM in process (a hub id, a folder, or an embedded model's name)
    minilm                                   the embedded embedding model (`open_embedder` only)

with `+adapter=PATH` behind any of them but `minilm` and servers (a server names its adapters as models).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from recollect.backbones.embedding import Embedder, EmbeddingModel
from recollect.backbones.protocol import Backbone
from recollect.backbones.store import EMBEDDED, HUB_FILES, model_folder
from recollect.errors import ConfigError, InputError, ModelFileError, UnknownName

ADAPTER = "+adapter="
SCHEMES = ("smollm2", "hf:ID", "path:DIR", "openai:URL#MODEL", "vllm:ID")
EMBEDDER_SCHEMES = ("minilm", "hf:ID", "path:DIR", "openai:URL#MODEL", "smollm2")


class ModelName(NamedTuple):
    """A parsed model string. `target` is what follows the scheme ("" for embedded models)."""

    scheme: str
    target: str
    adapter: Path | None


def parse_model_name(name: str) -> ModelName:
    """Split a model string; loads nothing.

    Raises:
        UnknownName: the scheme is not known; the message lists those that are.
        ConfigError: the part behind the scheme is missing or malformed.
    """
    body, found, adapter = name.partition(ADAPTER)
    if found and not adapter:
        raise ConfigError(f"{name!r} ends in {ADAPTER!r}; give the adapter's folder behind it")
    if body in EMBEDDED:
        scheme, target = body, ""
    else:
        scheme, colon, target = body.partition(":")
        if not colon or scheme not in ("hf", "path", "openai", "vllm"):
            raise UnknownName("model", name, list(dict.fromkeys(SCHEMES + EMBEDDER_SCHEMES)))
        if not target:
            raise ConfigError(f"{name!r} lacks what follows {scheme + ':'!r}; write {_example(scheme)}")
    if scheme == "openai" and not target.startswith(("http://", "https://")):
        raise ConfigError(f"{name!r} is not a server's model; write {_example(scheme)}")
    if adapter and scheme in ("openai", "minilm"):
        raise ConfigError(f"{name!r}: {ADAPTER}PATH works in process only; a server offers an adapter as a model name")
    return ModelName(scheme, target, Path(adapter) if adapter else None)


def open_backbone(
    name: str | Backbone,
    *,
    concurrency: int = 64,
    patience_s: float = 600.0,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    batch_invariant: bool = False,
) -> Backbone:
    """Open the backbone a string names; an already opened one is passed through.

    Args:
        concurrency: calls in flight at a server; chats written at once by vLLM. In-process transformers batches by
            its own size.
        patience_s: how long a server may stay away before the call fails.
        dtype, device, threads, batch_invariant: of the in-process transformers engine.

    Raises:
        UnknownName, ConfigError: the string is not a model name.
        ModelFileError: the model cannot be had or is refused.
        MissingExtra: `vllm:` without vLLM.
    """
    if not isinstance(name, str):
        return name
    if concurrency < 1:
        raise ConfigError(f"concurrency must be at least 1, got {concurrency!r}")
    scheme, target, adapter = parse_model_name(name)
    if adapter is not None and not adapter.is_dir():
        raise ModelFileError(f"adapter folder {str(adapter)!r} does not exist")
    if scheme == "openai":
        from recollect.backbones.server import ServerBackbone

        url, _, model = target.partition("#")
        return ServerBackbone(url, model or None, concurrency=concurrency, patience_s=patience_s)
    if scheme == "vllm":
        from recollect.backbones.vllm_engine import VLLMBackbone

        folder = (
            _folder(target, "") if target in EMBEDDED else Path(target) if Path(target).is_dir() else hub_folder(target)
        )
        return VLLMBackbone(folder, adapter=adapter, concurrency=concurrency)
    if EMBEDDED.get(scheme) is not None and EMBEDDED[scheme].kind == "embedding":
        raise InputError(f"{name!r} only embeds texts; give it as --embedder, and as --backbone one of {SCHEMES!r}")
    from recollect.backbones.transformers_engine import TransformersBackbone

    return TransformersBackbone(
        _folder(scheme, target),
        adapter=adapter,
        dtype=dtype,  # type: ignore[arg-type]  # checked by the engine
        device=device,
        threads=threads,
        batch_invariant=batch_invariant,
    )


def open_embedder(name: str | Embedder, *, concurrency: int = 64, device: str | None = None) -> Embedder:
    """Open what embeds texts; an already opened one is passed through.

    An encoder (BERT-like) is mean-pooled; a causal model embeds by the mean of its last hidden states.

    Raises:
        UnknownName, ConfigError, ModelFileError: as `open_backbone`.
    """
    if not isinstance(name, str):
        return name
    scheme, target, adapter = parse_model_name(name)
    if scheme in ("openai", "smollm2"):
        return open_backbone(name, concurrency=concurrency, device=device)
    if scheme == "vllm":
        raise ConfigError(f"{name!r}: vLLM in process does not embed here; known embedders: {EMBEDDER_SCHEMES!r}")
    folder = _folder(scheme, target)
    if adapter is not None or _is_causal(folder):
        return open_backbone(name, concurrency=concurrency, device=device)
    return EmbeddingModel(folder, device=device)


def _folder(scheme: str, target: str) -> Path:
    if scheme in EMBEDDED:
        return model_folder(scheme)
    if scheme == "path":
        folder = Path(target).expanduser()
        if not folder.is_dir():
            raise ModelFileError(f"model folder {target!r} does not exist")
        return folder
    return hub_folder(target)


def hub_folder(hub_id: str) -> Path:
    """The local snapshot of a hub model, fetched when it is not in the hub's cache: safetensors, never code.

    Raises:
        ModelFileError: the hub is out of reach or has no such model.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, httpx.HTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(
            f"model {hub_id!r} is not in the hub's cache and cannot be fetched: {reason}; "
            "check the name and the network, or use path:DIR"
        ) from error


def _is_causal(folder: Path) -> bool:
    from recollect.io import read_json

    architectures = read_json(folder / "config.json").get("architectures") or []
    return any(str(name).endswith("ForCausalLM") for name in architectures)


def _example(scheme: str) -> str:
    return next(text for text in SCHEMES if text.startswith(scheme))


def decoder_folder(name: str) -> Path:
    """The folder of a decoder: an embedded model's name, `hf:ID`, `path:DIR`, or a folder as it is.

    Raises:
        UnknownName: none of these.  ConfigError: it only embeds, or does not run in this process.
        ModelFileError: the model cannot be had.
    """
    if Path(name).is_dir():
        return Path(name)
    scheme, target, adapter = parse_model_name(name)
    if adapter is not None:
        raise ConfigError(f"{name!r}: it is trained with an adapter of its own; give the base model alone")
    if scheme in EMBEDDED:
        if EMBEDDED[scheme].kind != "generation":
            raise ConfigError(f"{name!r} only embeds texts; give a decoder, e.g. smollm2")
        return model_folder(scheme)
    if scheme == "hf":
        return hub_folder(target)
    if scheme == "path":
        if not Path(target).is_dir():
            raise ModelFileError(f"model folder {target!r} does not exist")
        return Path(target)
    raise ConfigError(f"{name!r} does not run in this process; give smollm2, hf:ID or path:DIR")
