"""Logs in, splits out: readers, the dataset folder, filters, splits, leak checks, the bundled world.

Names are resolved on first use, so importing this package loads neither Arrow nor a reader.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recollect.data.description import describe
    from recollect.data.filters import deduplicate, drop_consecutive_repeats, k_core, min_counts, subset
    from recollect.data.fingerprints import fingerprint, text_fingerprint
    from recollect.data.folder import read_folder, write_folder
    from recollect.data.harbor import HarborConfig, Truth, World, build_harbor, world_of
    from recollect.data.published import agentcf_candidates
    from recollect.data.readers import KINDS, detect_kind, read_kind
    from recollect.data.registry import fetch, import_dataset, load_dataset, registered
    from recollect.data.splits import (
        LeakReport,
        global_temporal,
        history_bounds,
        leak_check,
        leave_one_out,
        refit_mask,
        tie_shuffle,
        tied_event_share,
        tied_target_share,
        user_starts,
    )

_HOME = {
    "describe": "description",
    "deduplicate": "filters",
    "drop_consecutive_repeats": "filters",
    "k_core": "filters",
    "min_counts": "filters",
    "subset": "filters",
    "fingerprint": "fingerprints",
    "text_fingerprint": "fingerprints",
    "read_folder": "folder",
    "write_folder": "folder",
    "HarborConfig": "harbor",
    "Truth": "harbor",
    "World": "harbor",
    "build_harbor": "harbor",
    "world_of": "harbor",
    "agentcf_candidates": "published",
    "KINDS": "readers",
    "detect_kind": "readers",
    "read_kind": "readers",
    "fetch": "registry",
    "import_dataset": "registry",
    "load_dataset": "registry",
    "registered": "registry",
    "LeakReport": "splits",
    "global_temporal": "splits",
    "history_bounds": "splits",
    "leak_check": "splits",
    "leave_one_out": "splits",
    "refit_mask": "splits",
    "tie_shuffle": "splits",
    "tied_event_share": "splits",
    "tied_target_share": "splits",
    "user_starts": "splits",
}

__all__ = [
    "KINDS",
    "HarborConfig",
    "LeakReport",
    "Truth",
    "World",
    "agentcf_candidates",
    "build_harbor",
    "deduplicate",
    "describe",
    "detect_kind",
    "drop_consecutive_repeats",
    "fetch",
    "fingerprint",
    "global_temporal",
    "history_bounds",
    "import_dataset",
    "k_core",
    "leak_check",
    "leave_one_out",
    "load_dataset",
    "min_counts",
    "read_folder",
    "read_kind",
    "refit_mask",
    "registered",
    "subset",
    "text_fingerprint",
    "tie_shuffle",
    "tied_event_share",
    "tied_target_share",
    "user_starts",
    "world_of",
    "write_folder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
