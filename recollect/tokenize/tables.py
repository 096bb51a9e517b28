"""Tables of vectors on disk that are filled a part at a time, because they may be larger than memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from recollect.io import disk_errors


@contextlib.contextmanager
def written_table(path: Path, dtype: DTypeLike, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """A memory-mapped table (N, D) to fill; it replaces the .npy file `path` when the block ends without an error.

    Raises:
        StorageRefused: the disk is full, read-only or over quota; `path` is left as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with disk_errors(path):
            table = np.lib.format.open_memmap(temporary, "w+", dtype=dtype, shape=shape)
            _reserve(temporary)
            yield table
            table.flush()
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _reserve(path: Path) -> None:
    """Have the disk set aside every block of a file that is as long as it will be.

    A fresh memory map is a file of holes. Were the disk to fill up while they are filled, the assignment would end the
    process by SIGBUS, which nothing catches; a reservation is refused with an error.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        with path.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, os.fstat(handle.fileno()).st_size)
