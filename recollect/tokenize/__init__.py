"""Semantic IDs: item embeddings to tuples of small integers, their quality, collisions, tries and uses.

The package is callable: `recollect.tokenize(...)` is `recollect.tokenize.run.tokenize(...)`, which the name of the
package would hide otherwise. Public names are resolved on first use, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recollect.tokenize.item_features import ctr_fields
    from recollect.types import Report

_HOME = {"ctr_fields": "recollect.tokenize.item_features"}

__all__ = ["ctr_fields"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'recollect.tokenize' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


class _CallableModule(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Report:
        from recollect.tokenize.run import tokenize

        return tokenize(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
