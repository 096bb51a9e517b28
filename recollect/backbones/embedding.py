"""Sentence embeddings from a BERT-like encoder: masked mean pooling and L2 norm, as sentence-transformers do it.

Loaded through `transformers` alone. Texts are cut at 256 tokens, the length the embedded model was trained for.
float32: an embedding depends on its batch by about 1e-7 only.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from recollect.backbones.store import check_folder, quiet_loading
from recollect.errors import ConfigError, ModelFileError
from recollect.io import canonical_json, sha256_text

MAX_TOKENS = 256


@runtime_checkable
class Embedder(Protocol):
    """Whatever embeds texts: an `EmbeddingModel`, or any `Backbone`."""

    @property
    def fingerprint(self) -> str: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(B, D) float32 unit rows."""
        ...

    def close(self) -> None: ...


class EmbeddingModel:
    """An encoder folder (config, tokenizer, safetensors) that embeds texts.

    Args:
        folder: the model folder; checked against its manifest where it has one.
        device: "cpu", "cuda", …; default: a GPU where there is one.
        batch_tokens: padded tokens read in one pass.

    Raises:
        ModelFileError: a file is missing, corrupt, pickled, or of a kind transformers does not know.
    """

    def __init__(self, folder: str | Path, *, device: str | None = None, batch_tokens: int = 8192) -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer

        if batch_tokens < 1:
            raise ConfigError(f"batch_tokens must be at least 1, got {batch_tokens!r}")
        folder = Path(folder)
        files = check_folder(folder)
        try:
            with quiet_loading():
                self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
                model = AutoModel.from_pretrained(
                    folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
                )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelFileError(f"the model in {folder} cannot be loaded: {str(error)[:500]}") from error
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval().requires_grad_(False)
        self._batch_tokens = batch_tokens
        self._window = min(MAX_TOKENS, int(getattr(model.config, "max_position_embeddings", MAX_TOKENS)))
        self._pad = self._tokenizer.pad_token_id or 0
        self._lock = threading.Lock()
        self.dimension = int(model.config.hidden_size)
        identity = {"engine": "mean-pooling", "dtype": "float32", "window": self._window, "files": files}
        self._fingerprint = f"embedding/{sha256_text(canonical_json(identity))}"

    @property
    def fingerprint(self) -> str:
        """Hash over weights, tokenizer and pooling."""
        return self._fingerprint

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(B, D) float32 unit rows, in the order of `texts`; equal texts are computed once."""
        import torch

        distinct = sorted(set(texts))
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in distinct]  # lone surrogates become "?"
        rows = (
            self._tokenizer(clean, truncation=True, max_length=self._window, return_attention_mask=False)["input_ids"]
            if distinct
            else []
        )
        vectors = np.zeros((len(distinct), self.dimension), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda index: (len(rows[index]), rows[index]))
        with self._lock, torch.inference_mode():
            start = 0
            while start < len(order):
                # Ascending lengths: the last row taken sets the width of the pass.
                end = start + 1
                while end < len(order) and (end + 1 - start) * len(rows[order[end]]) <= self._batch_tokens:
                    end += 1
                batch = order[start:end]
                width = len(rows[batch[-1]])
                ids = torch.full((len(batch), width), self._pad)
                mask = torch.zeros((len(batch), width), dtype=torch.long)
                for line, index in enumerate(batch):
                    ids[line, : len(rows[index])] = torch.tensor(rows[index])
                    mask[line, : len(rows[index])] = 1
                ids, mask = ids.to(self._device), mask.to(self._device)
                states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
                weights = mask[..., None].float()
                mean = (states * weights).sum(1) / weights.sum(1)
                vectors[batch] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
                start = end
        place = {text: index for index, text in enumerate(distinct)}
        return vectors[[place[text] for text in texts]]

    def close(self) -> None:
        """Drop the model; it cannot be used afterwards."""
        with self._lock:
            del self._model
