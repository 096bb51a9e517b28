"""LLMD4Rec and its baselines: a language-model recommender and a conventional one teach each other.

The package is callable: `recollect.distill(...)` is `recollect.distill.loop.distill(...)`, which the name of the
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
        from recollect.distill.loop import distill

        return distill(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
