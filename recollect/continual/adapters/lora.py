"""Plain LoRA: one pair per linear, no router; what the sequential baseline trains through all tasks."""

from __future__ import annotations

from recollect.continual.adapters.wrapped import AdapterLinear


class PlainLoraLinear(AdapterLinear):
    """y = W0·x + s·B·A·x; equal to PEFT's LoRA layer for equal A, B, alpha and rank."""

    has_router = False
