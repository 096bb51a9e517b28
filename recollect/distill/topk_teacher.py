"""A teacher kept as top lists: the alternative to cached states when W_out h for every item is too dear (N > 10^6).

The mass of all other items is one bucket, so the loss is `top_k_rest_kl`, a lower bound of the full KL (spec 4.3).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recollect.distill.losses import TopK, top_k_of, top_k_rest_kl
from recollect.distill.teachers import Teacher
from recollect.distill.weights import true_item_rank
from recollect.errors import InputError, ModelFileError
from recollect.io import atomic_open, read_json, sha256_file, write_json

_NAMES = ("items", "log_probability", "log_rest", "true_rank")


class TopKTeacher:
    """Top-K lists of all training samples at one temperature, with the rank of each true item under the teacher.

    items: (M, K) int32.  log_probability: (M, K) float32.  log_rest: (M,) float32.  true_rank: (M,) float32.
    The ranks are kept because a list of K cannot give the rank of an item outside it, and the sample weights need it.
    """

    def __init__(
        self,
        n_items: int,
        temperature: float,
        items: Tensor,
        log_probability: Tensor,
        log_rest: Tensor,
        true_rank: Tensor,
    ) -> None:
        self.n_items = n_items
        self.temperature = temperature
        self.items = items
        self.log_probability = log_probability
        self.log_rest = log_rest
        self.true_rank = true_rank

    def __len__(self) -> int:
        return len(self.items)

    @classmethod
    def of(
        cls, teacher: Teacher, target: np.ndarray, *, k: int, temperature: float, batch_size: int = 256
    ) -> TopKTeacher:
        """Ask a teacher once for every sample.

        Args:
            teacher: answers for samples 0..M-1.
            target: (M,) int64 true next items.
            k: length of a list, 1..N.
            temperature: of the distribution that is kept.

        Raises:
            ConfigError: k or the temperature is out of range.
            InputError: there is no sample.
        """
        if not len(target):
            raise InputError("there is no training sample to ask the teacher about")
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for begin in range(0, len(target), batch_size):
            index = np.arange(begin, min(begin + batch_size, len(target)))
            logits = teacher.logits(index)
            kept = top_k_of(logits, k, temperature)
            rank = true_item_rank(logits, torch.from_numpy(target[index]).to(logits.device))
            parts.append((kept.items.int().cpu(), kept.log_probability.cpu(), kept.log_rest.cpu(), rank.cpu()))
        return cls(teacher.n_items, temperature, *(torch.cat(column) for column in zip(*parts, strict=True)))

    def kl(self, student_logits: Tensor, index: np.ndarray) -> Tensor:
        """(B,) KL of a student's logits (B, N) of the samples `index` to the kept lists, differentiable.

        Raises:
            InputError: the student scores another number of items.
        """
        if student_logits.shape[1] != self.n_items:
            raise InputError(f"the student scores {student_logits.shape[1]} items, the teacher {self.n_items}")
        device, rows = student_logits.device, torch.from_numpy(np.asarray(index))
        kept = TopK(
            self.items[rows].long().to(device), self.log_probability[rows].to(device), self.log_rest[rows].to(device)
        )
        return top_k_rest_kl(student_logits, kept, self.temperature)

    def save(self, folder: str | Path) -> None:
        """Write `lists.safetensors`, then `config.json`, each atomically."""
        from safetensors.torch import save

        folder = Path(folder)
        tensors = {name: getattr(self, name).contiguous() for name in _NAMES}
        with atomic_open(folder / "lists.safetensors", "wb") as handle:
            handle.write(save(tensors))
        description = {
            "kind": "teacher-lists",
            "n_items": self.n_items,
            "temperature": self.temperature,
            "sha256": sha256_file(folder / "lists.safetensors"),
        }
        write_json(folder / "config.json", description)

    @classmethod
    def load(cls, folder: str | Path) -> TopKTeacher:
        """The inverse of `save`.

        Raises:
            ModelFileError: the files are not such lists, or not the ones described.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        description = read_json(folder / "config.json")
        if description.get("kind") != "teacher-lists":
            raise ModelFileError(f"{folder} holds no teacher lists: kind {description.get('kind')!r}")
        if sha256_file(folder / "lists.safetensors") != description["sha256"]:
            raise ModelFileError(f"{folder / 'lists.safetensors'} is damaged; write the lists again")
        tensors = load_file(folder / "lists.safetensors")
        return cls(description["n_items"], description["temperature"], *(tensors[name] for name in _NAMES))
