"""Parameter budgets: what is trained, what a token uses, and which ranks make two methods comparable.

LoRAMoE with N experts of rank r: total N·r(d_in+d_out), activated (top-1) r(d_in+d_out), router N·d_in.  MH-MoE: total
H·E·r'(d_in/H+d_out), activated H·r'(d_in/H+d_out), routers E·d_in whatever H.  With E = N the rank
r' = r(d_in+d_out)/(d_in+H·d_out) matches total and activated at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from recollect.continual.adapters.attach import adapter_parameters, adapters, attached_config, routers
from recollect.continual.adapters.config import MHMoEConfig, MoELoraConfig, with_rank
from recollect.errors import ConfigError

LARGEST_MISMATCH = 0.05
ABSORBED = ("frozen_A", "frozen_B")  # buffers of a wrapped linear that a token uses like parameters


@dataclass(frozen=True)
class TrainableReport:
    """Parameters of a model with adapters.

    total: all.  trainable: those that require gradients.  base: the frozen model.  experts, router: of the adapters,
    frozen or not.  activated: of experts and other adapter parts a token uses in one pass, routers included.
    absorbed: of pairs made of what was trained (SD-LoRA-MoE's frozen pair, a buffer), part of total and activated.
    """

    total: int
    trainable: int
    base: int
    experts: int
    router: int
    activated: int
    absorbed: int = 0

    @property
    def trainable_share(self) -> float:
        """trainable / total."""
        return self.trainable / self.total


@dataclass(frozen=True)
class BudgetMatch:
    """Two methods of like budget.

    reference, matched: their options, with the ranks chosen.  total, activated: expert parameters (reference, matched).
    router: router parameters (reference, matched), not part of the match.
    """

    reference: MoELoraConfig
    matched: MHMoEConfig
    total: tuple[int, int]
    activated: tuple[int, int]
    router: tuple[int, int]

    @property
    def total_mismatch(self) -> float:
        """(matched − reference) / reference of the total."""
        return self.total[1] / self.total[0] - 1

    @property
    def activated_mismatch(self) -> float:
        """(matched − reference) / reference of what a token activates."""
        return self.activated[1] / self.activated[0] - 1


def bank_parameters(config: MoELoraConfig, d_in: int, d_out: int) -> tuple[int, int, int]:
    """Expert parameters in all, expert parameters a token activates, and router parameters of one wrapped linear."""
    expert = config.rank * (d_in // config.heads + d_out)
    router = 0 if config.kind == "lora" else config.experts * d_in
    return config.heads * config.experts * expert, config.heads * config.active_experts * expert, router


def match_budget(
    reference: MoELoraConfig,
    matched: MHMoEConfig,
    shapes: Sequence[tuple[int, int]],
    *,
    largest_rank: int | None = None,
) -> BudgetMatch:
    """Ranks at which `matched` has the expert parameters of `reference`, in total and activated.

    The rank of `matched` is the nearest integer; where that misses by more than 5 %, both ranks are raised, the
    reference's as little as possible (alpha grows with it, so that the scale of the update stays).

    Args:
        reference: e.g. a LoRAMoE; its rank is where the search starts.
        matched: options whose rank is to be found.
        shapes: (d_in, d_out) of every wrapped linear; one layer's suffice, for layers are alike.
        largest_rank: of the reference; default four times its rank.  Its own rank = do not raise it.

    Raises:
        ConfigError: no rank up to the largest matches within 5 %; the message has the best one found.
    """
    best: BudgetMatch | None = None
    for rank in range(reference.rank, (largest_rank or 4 * reference.rank) + 1):
        found = _nearest(with_rank(reference, rank), matched, shapes)
        if best is None or _worst(found) < _worst(best):
            best = found
        if _worst(found) <= LARGEST_MISMATCH:
            return found
    if best is None:
        raise ConfigError(f"largest_rank must be at least the rank {reference.rank}, got {largest_rank!r}")
    raise ConfigError(
        f"no rank matches within {LARGEST_MISMATCH:.0%}: nearest are ranks {best.reference.rank} and "
        f"{best.matched.rank} with {best.total_mismatch:+.1%} in total and {best.activated_mismatch:+.1%} activated; "
        "use the same experts and top_k for both, other heads, or a larger rank"
    )


def _nearest(reference: MoELoraConfig, matched: MHMoEConfig, shapes: Sequence[tuple[int, int]]) -> BudgetMatch:
    wanted = _sums(reference, shapes)
    unit = _sums(replace(matched, rank=1), shapes)
    chosen = with_rank(matched, max(1, round(wanted[0] / unit[0])))
    got = _sums(chosen, shapes)
    return BudgetMatch(reference, chosen, (wanted[0], got[0]), (wanted[1], got[1]), (wanted[2], got[2]))


def _sums(config: MoELoraConfig, shapes: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
    parts = [bank_parameters(config, d_in, d_out) for d_in, d_out in shapes]
    return sum(part[0] for part in parts), sum(part[1] for part in parts), sum(part[2] for part in parts)


def _worst(match: BudgetMatch) -> float:
    return max(abs(match.total_mismatch), abs(match.activated_mismatch))


def trainable_report(model: nn.Module) -> TrainableReport:
    """Count a model's parameters; see `TrainableReport`.

    Raises:
        InputError: the model has no adapters.
    """
    config = attached_config(model)
    own = adapter_parameters(model)
    router = sum(parameter.numel() for one in routers(model).values() for parameter in one.parameters())
    banks = [module.bank for module in adapters(model).values()]
    experts = sum(parameter.numel() for bank in banks for parameter in bank.parameters())
    used = 0
    for bank in banks:
        if config.gate == "dense" or config.kind == "lora":  # every expert counts
            used += sum(parameter.numel() for parameter in bank.parameters())
        else:
            used += bank.heads * config.top_k * bank.rank * (bank.in_features // bank.heads + bank.out_features)
    others = sum(parameter.numel() for parameter in own.values()) - router - experts  # always on, e.g. a common pair
    absorbed = sum(
        buffer.numel()
        for module in adapters(model).values()
        for name, buffer in module.named_buffers(recurse=False)
        if name in ABSORBED
    )
    total = sum(parameter.numel() for parameter in model.parameters()) + absorbed
    return TrainableReport(
        total=total,
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        base=total - router - experts - others - absorbed,
        experts=experts,
        router=router,
        activated=used + others + absorbed + router,
        absorbed=absorbed,
    )
