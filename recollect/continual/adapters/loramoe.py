"""LoRAMoE (arXiv 2312.09979): y = W0·x + s·Σ_e p_e(x)·B_e·A_e·x, one router per wrapped linear.

The paper's gate is dense; `gate="topk_full", top_k=1` is the sparse form other studies compare with.  The localised
balancing constraint is `routing.localized_balancing_loss`, its coefficient `LoRAMoEConfig.lbc` (0, off, as in the
released script; 0.1 in the paper, as recalled).
"""

from __future__ import annotations

from recollect.continual.adapters.wrapped import AdapterLinear


class LoRAMoELinear(AdapterLinear):
    """A frozen linear with one bank of experts over its whole input."""
