"""SeqLoRA: the same adapters trained on one task after the other, with nothing against forgetting.

Given all tasks at once it is the joint bound.
"""

from __future__ import annotations

from recollect.continual.methods.protocol import ContinualMethod


class SeqLora(ContinualMethod):
    """Sequential training of one LoRA pair per linear."""

    name = "seq-lora"
