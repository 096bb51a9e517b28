"""Semantic IDs: item embeddings to tuples of small integers, their quality, collisions, tries and uses.

The package is callable: `recollect.tokenize(...)` is `recollect.tokenize.run.tokenize(...)`, which the name of the
package would hide otherwise.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recollect.types import Report


class _CallableModule(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Report:
        from recollect.tokenize.run import tokenize

        return tokenize(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
