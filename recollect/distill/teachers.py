"""Frozen teachers: who gives the target distribution of a training sample, and at what cost.

A teacher answers `logits(index)` with (B, N) for sample numbers 0..M-1, always from a model in evaluation mode and
never with a gradient. An LLM whose output is `W_out h` is run once: `CachedStateTeacher` keeps h on disk and makes
logits per batch, exact up to the precision of h (spec 4.3). `recollect.distill.topk_teacher` keeps top lists instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from recollect.distill.factors import Factors
from recollect.errors import ConfigError, InputError, ModelFileError
from recollect.io import atomic_open, disk_errors, fsync_folder, read_json, sha256_file, write_json
from recollect.recommenders.protocol import Recommender

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
_STORED: dict[str, tuple[str, torch.dtype]] = {
    "fp32": ("<f4", torch.float32),
    "fp16": ("<f2", torch.float16),
    "bf16": ("<i2", torch.bfloat16),  # numpy has no bfloat16: its bits travel as integers
}


class Teacher(Protocol):
    """Whoever gives the soft target of a training sample."""

    n_items: int

    def logits(self, index: np.ndarray) -> Tensor:
        """(B, n_items) float32 logits of the samples `index` (B,) int64."""
        ...


class OnlineTeacher:
    """A fitted recommender asked anew for every batch; its `score` is in evaluation mode by contract.

    Args:
        recommender: fitted; its scores must be logits (untempered, unmasked).
        histories: gives the prefixes of the samples with these numbers, e.g. `Samples.histories`.
        device: where the logits are wanted.
    """

    def __init__(
        self,
        recommender: Recommender,
        histories: Callable[[np.ndarray], Sequence[np.ndarray]],
        device: str | torch.device = "cpu",
    ) -> None:
        self.n_items = recommender.n_items
        self._recommender = recommender
        self._histories = histories
        self._device = device

    def logits(self, index: np.ndarray) -> Tensor:
        """(B, n_items) float32 logits of the samples `index` (B,) int64."""
        scores = self._recommender.score(self._histories(index))
        return torch.from_numpy(np.asarray(scores, dtype=np.float32)).to(self._device)


class PopularityTeacher:
    """The same distribution for every sample: proportional to training counts. A control, not a teacher.

    Whatever a student gains from it is smoothing towards popular items. Zero counts give the uniform teacher, which is
    label smoothing.

    Args:
        counts: (N,) training events per item.
        smoothing: added to every count; must leave every item a positive mass.
    """

    def __init__(self, counts: np.ndarray, smoothing: float = 1.0, device: str | torch.device = "cpu") -> None:
        mass = np.asarray(counts, dtype=np.float64) + smoothing
        if mass.ndim != 1 or not len(mass) or not np.isfinite(mass).all() or mass.min() <= 0:
            raise InputError(f"counts + smoothing must be (N,) positive numbers; smoothing is {smoothing!r}")
        self.n_items = len(mass)
        self._log_share = torch.from_numpy(np.log(mass / mass.sum()).astype(np.float32)).to(device)

    def logits(self, index: np.ndarray) -> Tensor:
        """(B, n_items) float32; every row is the same memory."""
        return self._log_share.expand(len(index), -1)


class CachedStateTeacher:
    """Last hidden states of a frozen model, one row per training sample, memory-mapped; logits = W_out h per batch.

    A folder holds `states.bin` (M rows of D numbers), `head.safetensors` (W_out, and a bias if the model has one) and,
    written last, `config.json`; a folder without it was not finished and is refused.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        """Open a finished cache.

        Raises:
            ModelFileError: the cache is unfinished, or its files do not fit their description.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ModelFileError(f"{folder} holds no finished cache of teacher states; write it again")
        description = read_json(folder / "config.json")
        precision = description.get("precision")
        if precision not in _STORED or description.get("kind") != "teacher-states":
            raise ModelFileError(f"{folder} is not a cache of teacher states: kind {description.get('kind')!r}")
        stored, self._type = _STORED[precision]
        shape = (int(description["n_samples"]), int(description["width"]))
        size = (folder / "states.bin").stat().st_size if (folder / "states.bin").is_file() else 0
        if size != shape[0] * shape[1] * np.dtype(stored).itemsize:
            raise ModelFileError(f"{folder / 'states.bin'} has {size} bytes where {shape} {precision} are expected")
        if sha256_file(folder / "head.safetensors") != description["head_sha256"]:
            raise ModelFileError(f"{folder / 'head.safetensors'} is not the head these states were made with")
        head = load_file(folder / "head.safetensors")
        self._items = head["items"].to(device)
        self._bias = head["bias"].to(device) if "bias" in head else None
        self._states = np.memmap(folder / "states.bin", dtype=stored, mode="r", shape=shape)
        self._device = device
        self.fingerprint: str = description["fingerprint"]
        self.n_items = len(self._items)

    def __len__(self) -> int:
        return len(self._states)

    @classmethod
    def write(
        cls,
        folder: str | Path,
        states: Iterable[Tensor],
        items: Tensor,
        *,
        n_samples: int,
        bias: Tensor | None = None,
        precision: Precision = "bf16",
        fingerprint: str = "",
        device: str | torch.device = "cpu",
    ) -> CachedStateTeacher:
        """Keep the states of all samples and open the cache.

        Args:
            folder: created; a cache in it is replaced, and is unreadable until the new one is whole.
            states: batches (b, D) in sample order, n_samples rows together; taken one at a time.
            items: (N, D) W_out.  bias: (N,) or None.
            precision: of the states on disk; the head stays in float32.
            fingerprint: says which weights and samples these are; the caller compares it on resume.

        Raises:
            ConfigError: an unknown precision.
            InputError: the states are too few, too many, of another width, not finite, or too large for the precision.
            StorageRefused: the disk refused.
        """
        from safetensors.torch import save_file

        if precision not in _STORED:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        folder = Path(folder)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").unlink(missing_ok=True)
            fsync_folder(folder)
        with atomic_open(folder / "states.bin", "wb") as handle:
            written = 0
            for batch in states:
                handle.write(_as_bytes(batch, items.shape[1], precision, written))
                written += len(batch)
        if written != n_samples:
            raise InputError(f"{written} teacher states were given for {n_samples} samples")
        head = {"items": items.detach().float().cpu().contiguous()}
        if bias is not None:
            head["bias"] = bias.detach().float().cpu().contiguous()
        with disk_errors(folder):
            save_file(head, folder / "head.safetensors.part")
            os.replace(folder / "head.safetensors.part", folder / "head.safetensors")
        description = {
            "kind": "teacher-states",
            "precision": precision,
            "n_samples": n_samples,
            "width": int(items.shape[1]),
            "head_sha256": sha256_file(folder / "head.safetensors"),
            "fingerprint": fingerprint,
        }
        write_json(folder / "config.json", description)
        return cls(folder, device)

    def factors(self, index: np.ndarray) -> Factors:
        """The states (B, D) float32 of some samples and W_out, for losses that never make (B, N)."""
        rows = torch.from_numpy(np.ascontiguousarray(self._states[np.asarray(index)]))
        if self._type == torch.bfloat16:
            rows = rows.view(torch.bfloat16)
        return Factors(rows.to(self._device).float(), self._items, self._bias)

    def logits(self, index: np.ndarray) -> Tensor:
        """(B, n_items) float32 logits of the samples `index` (B,) int64."""
        state, items, bias = self.factors(index)
        logits = state @ items.T
        return logits if bias is None else logits + bias


def _as_bytes(batch: Tensor, width: int, precision: Precision, written: int) -> bytes:
    batch = batch.detach()
    if batch.ndim != 2 or batch.shape[1] != width:
        raise InputError(f"teacher states must be (b, {width}) like the head, got {tuple(batch.shape)}")
    kept = batch.to("cpu", _STORED[precision][1]).contiguous()
    if not bool(kept.isfinite().all()):
        row = written + int(kept.isfinite().all(1).logical_not().nonzero()[0])
        why = "holds NaN or infinity" if not bool(batch.isfinite().all()) else f"does not fit {precision}; use bf16"
        raise InputError(f"the teacher's state of sample {row} {why}")
    if precision == "bf16":
        kept = kept.view(torch.int16)
    return kept.numpy().astype(_STORED[precision][0], copy=False).tobytes()
