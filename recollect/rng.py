"""Named random streams: the numbers depend on the names alone, never on the order of calls.

A stream is keyed by (seed, name, name, …) through SHA-256, so batching, resuming and concurrency cannot
change what an agent draws.
"""

import hashlib

import numpy as np


def stream_key(seed: int, *names: str | int) -> int:
    """128-bit key of a stream; equal for equal (seed, names), whatever the platform or hash seed."""
    text = "\x1f".join([str(int(seed)), *(f"{type(name).__name__[0]}{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Generator of the stream called `names` under `seed`."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, *names)))


def call_seed(seed: int, *names: str | int) -> int:
    """A 31-bit seed for one request to a language model."""
    return stream_key(seed, *names) & 0x7FFFFFFF
