"""Memory of a process that is measured."""

from __future__ import annotations

import resource


def peak_mb() -> float:
    """Highest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
