"""Durable files: atomic writes, confined paths, canonical JSON.

A file appears whole or not at all: temporary file in the same folder, fsync, rename, fsync of the folder.
The disk's refusal (full, read-only, quota) becomes `StorageRefused`, exit code 74.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from recollect.errors import InputError, StorageRefused

if TYPE_CHECKING:
    import numpy as np

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG})


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a refusal of the disk while writing `path` into `StorageRefused`."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            remedy = "make it writable" if error.errno == errno.EROFS else "free some space"
            raise StorageRefused(f"cannot write {path}: {error.strerror}; {remedy} and resume") from error
        raise


@contextlib.contextmanager
def atomic_open(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` when the block ends without an error.

    Raises:
        StorageRefused: the disk is full, read-only or over quota; `path` is left as it was.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with disk_errors(path):
            encoding = None if "b" in mode else "utf-8"
            with os.fdopen(descriptor, mode, encoding=encoding, newline=None if "b" in mode else "\n") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            fsync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` atomically as UTF-8."""
    with atomic_open(path) as handle:
        handle.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` atomically as indented JSON; NaN is refused, for no reader agrees on it.

    Text with lone surrogates (item text may hold them) is written with ASCII escapes, since UTF-8 cannot hold them.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    if any("\ud800" <= character <= "\udfff" for character in text):
        text = json.dumps(value, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: it is missing or not JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def tensor_bytes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Arrays as the content of a safetensors file.

    Views with strides are copied first: the format stores memory as it lies and would read them back scrambled.
    """
    import numpy as np
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(whole, metadata=None if metadata is None else dict(metadata))


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays atomically as a safetensors file (see `tensor_bytes`)."""
    with atomic_open(path, "wb") as handle:
        handle.write(tensor_bytes(arrays, metadata))


def canonical_json(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, UTF-8 as is, NaN refused."""
    return _CANONICAL.encode(value)


def sha256_text(text: str) -> str:
    """Hex SHA-256 of the UTF-8 bytes of `text` (lone surrogates kept, as they may occur in item text)."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def confined(root: str | Path, name: str) -> Path:
    """The path of `name` under `root`.

    Raises:
        InputError: `name` is absolute, climbs out of `root`, or passes through a symbolic link.
    """
    root = Path(root).resolve()
    if "\x00" in name or name.startswith(("/", "\\", "~")) or not name:
        raise InputError(f"path {name!r} is not allowed; give a name inside {root}")
    path = root
    for part in Path(name).parts:
        path = path / part
        if part == ".." or path.is_symlink():
            raise InputError(f"path {name!r} is not allowed; give a name inside {root} without '..' or links")
    return path


def check_out(out: str | Path, *, resume: bool, overwrite: bool) -> Path:
    """The run folder, not made yet; refuse one that already holds something.

    Raises:
        InputError: `out` is a file, or a non-empty folder and neither `resume` nor `overwrite` was given.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is not a folder")
    if out.is_dir() and any(out.iterdir()) and not (resume or overwrite):
        raise InputError(f"--out {out} is not empty; add --resume to continue it or --overwrite to replace it")
    return out


def prepare_out(out: str | Path, *, resume: bool, overwrite: bool) -> Path:
    """`check_out`, then make the folder.

    Raises:
        InputError: see `check_out`; no folder can be there.
    """
    out = check_out(out, resume=resume, overwrite=overwrite)
    try:
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made: {error.strerror}; choose another folder") from error
    return out
