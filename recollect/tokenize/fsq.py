"""Finite scalar quantisation: an encoder's few scalars, each rounded to one of a few values (arXiv 2309.15505).

Scalar l of the latent is bounded by a tanh, shifted by half a step where its count of values is even, and rounded with
a straight-through gradient (vector-quantize-pytorch's FSQ). There is no codebook to learn and no auxiliary loss.

The grid is fixed, so the encoder must fill it. Of unit rows of a few hundred dimensions an untrained network makes
latents of some hundredths, which all round to the middle digit, the value 0; and from zeros alone a decoder with ReLU
learns nothing but its last bias, the mean of the items. So FSQ learns from rows of mean variance 1 per dimension.

The ID has one level per scalar: digit l in 0..counts[l]-1. `index_of` gives the one number the paper writes,
the mixed-radix number whose least significant digit is the first, and `digits_of` its inverse. In the artefact
`codebook.{l}` (counts[l], 1) holds the values of scalar l, which the decoder reads side by side: they are not summands.
Levels are not ordered from coarse to fine, as those of a residual tokenizer are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from recollect.errors import InputError, MissingExtra
from recollect.tokenize.autoencoder import AutoencoderTokenizer, Quantised
from recollect.tokenize.neural_config import FSQConfig


class ScalarQuantiser(nn.Module):
    """Rounds each of len(counts) scalars; a `Quantiser` without parameters, so no code is ever placed anew."""

    reseeded: Tensor

    def __init__(self, counts: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = counts
        self.register_buffer("reseeded", torch.zeros(len(counts), dtype=torch.int64), persistent=False)
        self.rounding: Any = _import_fsq()(list(counts), return_indices=False)

    def forward(self, latent: Tensor) -> Quantised:
        """Round latents (B, L); no penalty."""
        values = self._round(latent)
        return Quantised(values, latent.new_zeros(len(latent)), self._digits(values.detach()))

    def _round(self, latent: Tensor) -> Tensor:
        """(B, L) values in [-1, 1] with straight-through gradients."""
        return self.rounding(latent[:, None])[0][:, 0]

    def _digits(self, values: Tensor) -> Tensor:
        """(B, L) int64 digits of values: value -1 + l / (K // 2) has digit l."""
        half = torch.tensor([size // 2 for size in self.sizes], device=values.device)
        return (values * half + half).round().to(torch.int64)

    def codes_of(self, latent: Tensor, beam: int) -> Tensor:
        """(B, L) digits of latents (B, L); scalars do not depend on each other, so a beam has nothing to add."""
        return self._digits(self._round(latent))

    def alternatives(self, latent: Tensor, codes: Tensor, count: int) -> Tensor:
        """(B, L, count) digits nearest to each bounded scalar, whatever the other scalars are."""
        found = []
        for level, size in enumerate(self.sizes):
            distance = (self.bounded(latent, level)[:, None] - torch.arange(size, dtype=latent.dtype)).abs()
            distance.scatter_(1, codes[:, level : level + 1], -1.0)  # the emitted digit leads, also in a tie
            found.append(distance.argsort(dim=1, stable=True)[:, :count])
        return torch.stack(found, dim=1)

    def bounded(self, latent: Tensor, level: int) -> Tensor:
        """(B,) position of scalar `level` among its digits before it is rounded, in (-1/2, K - 1/2)."""
        size = self.sizes[level]
        half_width = (size - 1) * (1 + 1e-3) / 2  # the library's margin, so that the outer digits are reached
        offset = 0.5 if size % 2 == 0 else 0.0
        shift = float(np.arctanh(offset / half_width))
        return (latent[:, level] + shift).tanh() * half_width - offset + size // 2

    def vectors(self, codes: Tensor) -> Tensor:
        """(B, L) values of digits (B, l <= L); scalars not given are 0, the middle of their range."""
        values = torch.zeros(len(codes), len(self.sizes), dtype=torch.float64)
        for level in range(codes.shape[1]):
            half = self.sizes[level] // 2
            values[:, level] = (codes[:, level] - half) / half
        return values

    def codebook_arrays(self) -> dict[str, np.ndarray]:
        """`codebook.{level}` (K_level, 1) float32: the values of a scalar."""
        return {
            f"codebook.{level}": ((np.arange(size) - size // 2) / (size // 2)).astype(np.float32)[:, None]
            for level, size in enumerate(self.sizes)
        }

    def take_codebooks(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Nothing is learned; other values than ours are refused.

        Raises:
            InputError: a stored codebook does not hold the values of its scalar.
        """
        for name, values in self.codebook_arrays().items():
            if not np.array_equal(arrays[name], values):
                raise InputError(f"fsq: the stored array {name!r} does not hold the {len(values)} values of its scalar")


class FSQ(AutoencoderTokenizer):
    """FSQ; see the module's text and `FSQConfig`. It has no beam: every scalar is rounded on its own."""

    name = "fsq"
    config_class: ClassVar[type] = FSQConfig
    unit_variance = "mean"
    remedy = "use smaller counts or more steps"

    def quantiser(self) -> ScalarQuantiser:
        """Rounding to the config's counts."""
        return ScalarQuantiser(tuple(self.config.counts))

    @property
    def has_joint_decoder(self) -> bool:
        """See `ItemTokenizer.has_joint_decoder`: a decoder without hidden layers is linear in the scalars."""
        return bool(self.config.hidden)

    def check_search(self, *, beam: int = 1, top_m: int = 1) -> None:
        """See `ItemTokenizer.check_search`."""
        super().check_search(beam=beam, top_m=top_m)
        if beam > 1:
            raise InputError(f"beam must be 1: every scalar of {self.name} is rounded on its own, got {beam!r}")

    @property
    def latent_dim(self) -> int:
        """Number of scalars."""
        return len(self.config.counts)


def index_of(digits: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """(N,) int64 mixed-radix numbers of digits (N, L), the first digit the least significant.

    Raises:
        InputError: a digit outside 0..counts[l]-1, or more than 2^63 numbers.
    """
    _check_product(counts)
    if digits.ndim != 2 or digits.shape[1] != len(counts):
        raise InputError(f"digits must be (N, {len(counts)}), got {digits.shape}")
    if digits.size and ((digits < 0) | (digits >= np.asarray(counts))).any():
        raise InputError(f"digits must be below {tuple(counts)!r} and at least 0")
    basis = np.cumprod([1, *counts[:-1]], dtype=np.int64)
    return digits.astype(np.int64) @ basis


def digits_of(index: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """(N, L) int32 digits of numbers (N,); inverse of `index_of`.

    Raises:
        InputError: a number outside 0..prod(counts)-1, or more than 2^63 numbers.
    """
    total = _check_product(counts)
    if index.size and (index.min() < 0 or index.max() >= total):
        raise InputError(f"an index must be in 0..{total - 1}, got {int(index.min())}..{int(index.max())}")
    basis = np.cumprod([1, *counts[:-1]], dtype=np.int64)
    return (index[:, None].astype(np.int64) // basis % np.asarray(counts)).astype(np.int32)


def _check_product(counts: Sequence[int]) -> int:
    total = 1
    for count in counts:
        total *= int(count)
    if total > 2**63:
        raise InputError(f"{tuple(counts)!r} makes {total} numbers, more than 64 bits hold; use the digits")
    return total


def _import_fsq() -> type:
    try:
        from vector_quantize_pytorch import FSQ as Rounding
    except ImportError as error:
        raise MissingExtra("vector-quantize-pytorch", "tokenize", "fsq") from error
    return Rounding
