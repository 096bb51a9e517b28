"""Random codes: the floor of every comparison, and still a function of the embedding alone.

A row's code at a level is 64 bits of SHAKE-256 over the seed, the level and the float32 bytes of the row's residual,
modulo K: uniform, unrelated to what the row means, equal for equal rows, the same in any batch and after reloading.
The codebooks are the best such codes allow: a code's centroid is the mean residual of the fitted items that have it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from recollect.errors import InputError
from recollect.progress import Progress
from recollect.tokenize.baseline_options import RandomCodesConfig
from recollect.tokenize.residual import FittedLevel, ResidualTokenizer
from recollect.tokenize.rows import RowSource, spans


def drawn_codes(rows: np.ndarray, seed: int, level: int, codebook_size: int) -> np.ndarray:
    """(B,) int64 codes of rows (B, D) float32; the bias of 64 bits modulo K is below K / 2^64."""
    key = f"{int(seed)} {level}:".encode()
    plain = np.ascontiguousarray(rows, dtype="<f4") + np.float32(0)  # -0.0 and 0.0 are the same number
    bits = b"".join(hashlib.shake_256(key + row.tobytes()).digest(8) for row in plain)
    return (np.frombuffer(bits, dtype="<u8") % np.uint64(codebook_size)).astype(np.int64)


class _DrawnLevel(FittedLevel):
    """Codes drawn by `drawn_codes`."""

    def __init__(self, means: Tensor, seed: int, level: int) -> None:
        super().__init__(means)
        self._seed, self._level = seed, level

    def candidates(self, residual: Tensor, m: int) -> tuple[Tensor, Tensor | None]:
        assert m == 1  # `RandomCodes.check_search` refused more
        codes = drawn_codes(residual.cpu().numpy(), self._seed, self._level, len(self.means))
        return torch.from_numpy(codes).to(residual.device)[:, None], None


class RandomCodes(ResidualTokenizer):
    """See the module's text."""

    name: ClassVar[str] = "random"
    config_class: ClassVar[type] = RandomCodesConfig

    def fit_level(self, level: int, residuals: RowSource, weight: np.ndarray | None, progress: Progress) -> FittedLevel:
        """See `ResidualTokenizer.fit_level`."""
        progress.stage(f"random codes, level {level + 1}")
        size = self.level_sizes()[level]
        sums = torch.zeros(size, residuals.dimension, dtype=torch.float64)
        masses = torch.zeros(size, dtype=torch.float64)
        for start, stop in spans(len(residuals), self.config.block_rows):
            block = residuals.block(start, stop).cpu()
            codes = torch.from_numpy(drawn_codes(block.numpy(), self.config.seed, level, size))
            share = torch.ones(len(block)) if weight is None else torch.from_numpy(weight[start:stop])
            sums.index_add_(0, codes, block.double() * share.double()[:, None])
            masses.index_add_(0, codes, share.double())
        means = (sums / torch.where(masses > 0, masses, 1)[:, None]).float()
        return _DrawnLevel(means.to(self.device), self.config.seed, level)

    def check_search(self, *, beam: int = 1, top_m: int = 1) -> None:
        """See `ItemTokenizer.check_search`."""
        super().check_search(beam=beam, top_m=top_m)
        if beam > 1 or top_m > 1:
            raise InputError(
                f"random: codes are drawn, not searched; use beam 1 and top_m 1, got beam {beam!r} and top_m {top_m!r}"
            )

    def level_from_arrays(self, level: int, arrays: Mapping[str, np.ndarray]) -> FittedLevel:
        """See `ResidualTokenizer.level_from_arrays`."""
        means = torch.tensor(arrays[f"codebook.{level}"], device=self.device)
        return _DrawnLevel(means, self.config.seed, level)
