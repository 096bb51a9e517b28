"""Language-model agents that simulate the users of a recommender, validated against real logs.

Everything the command line does is one call here: `recollect.simulate(...)`, `recollect.load_dataset(...)`,
`recollect.open_backbone(...)`. Names are resolved on first use, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recollect.agents.simulate import simulate
    from recollect.backbones.resolve import open_backbone, open_embedder
    from recollect.data import describe, fetch, import_dataset, load_dataset
    from recollect.errors import RecollectError
    from recollect.recommenders.evaluate import evaluate
    from recollect.recommenders.prompt_rank import prompt_rank
    from recollect.tokenize.bench import tokenize_bench
    from recollect.types import Catalog, Dataset, Interactions, Ranker, Report, Split, Users

__version__ = "0.1.0"

_HOME = {
    "evaluate": "recollect.recommenders.evaluate",
    "prompt_rank": "recollect.recommenders.prompt_rank",
    "simulate": "recollect.agents.simulate",
    "tokenize_bench": "recollect.tokenize.bench",
    "open_backbone": "recollect.backbones.resolve",
    "open_embedder": "recollect.backbones.resolve",
    "describe": "recollect.data",
    "fetch": "recollect.data",
    "import_dataset": "recollect.data",
    "load_dataset": "recollect.data",
    "RecollectError": "recollect.errors",
    "Catalog": "recollect.types",
    "Dataset": "recollect.types",
    "Interactions": "recollect.types",
    "Ranker": "recollect.types",
    "Report": "recollect.types",
    "Split": "recollect.types",
    "Users": "recollect.types",
}

__all__ = [
    "Catalog",
    "Dataset",
    "Interactions",
    "Ranker",
    "RecollectError",
    "Report",
    "Split",
    "Users",
    "__version__",
    "describe",
    "evaluate",
    "fetch",
    "import_dataset",
    "load_dataset",
    "open_backbone",
    "open_embedder",
    "prompt_rank",
    "simulate",
    "tokenize_bench",
]


def __getattr__(name: str) -> Any:
    if name in ("continual", "distill", "tokenize"):  # callable packages, which hide their function
        return importlib.import_module(f"recollect.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'recollect' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
