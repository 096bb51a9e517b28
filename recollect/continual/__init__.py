"""Continual tuning of language models on a sequence of tasks: tasks, metrics, layers, methods and diagnostics.

The package is callable: `recollect.continual(...)` is `recollect.continual.run.continual(...)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recollect.types import Report


class _CallableModule(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Report:
        from recollect.continual.run import continual

        return continual(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
