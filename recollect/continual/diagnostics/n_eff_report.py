"""How many compositions the routes of every router collect, and how evenly they are used.

N_eff of a joint route (the experts of all slices together) and of a bank (one expert of one slice): a bank may collect
many full compositions that look alike inside its slice, by design.  A diagnostic, never a guarantee.
Source: moe_lora 5.1, 5.3; see `adapters.collision`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from recollect.continual.adapters.collision import LEAST_TOKENS, mean_n_eff, n_eff
from recollect.continual.diagnostics.watching import Choices

MEASURES = ("joint", "bank", "one_route", "routes_used", "route_entropy", "load_cv", "joint_share")


def neff_report(
    choices: Mapping[str, Choices], compositions: np.ndarray, *, least_tokens: int = LEAST_TOKENS
) -> list[dict[str, Any]]:
    """One entry per router.

    Args:
        choices: of n tokens, e.g. `watching.watch(...).choices`.
        compositions: (n,) int64, e.g. `OldExamples.compositions`.
        least_tokens: routes with fewer are left out of N_eff.

    Returns:
        Per router {"router", "layer", "tokens", "joint", "bank": token-weighted mean N_eff over routes with enough
        tokens (None where there are none or no composition occurs twice), "one_route": N_eff were there one route,
        "joint_share": share of the tokens in the routes counted, "routes_used": routes with a token, "route_entropy"
        (nats), "load_cv": standard deviation over mean of the experts' use, mean of slices, "is_dense"}.
    """
    found = []
    for name, one in choices.items():
        routes = one.routes()
        counts = np.bincount(routes)
        shares = counts / counts.sum()
        joint, joint_share = mean_n_eff(routes, compositions, least_tokens=least_tokens)
        banks = one.banks()
        repeated = np.repeat(compositions, banks.shape[1])
        bank, _ = mean_n_eff(banks.reshape(-1), repeated, least_tokens=least_tokens)
        found.append(
            {
                "router": name,
                "layer": layer_number(name),
                "tokens": len(routes),
                "joint": finite(joint),
                "bank": finite(bank),
                "one_route": finite(n_eff(np.bincount(compositions))),
                "joint_share": joint_share,
                "routes_used": len(counts),
                "route_entropy": float(-(shares * np.log(shares)).sum()),
                "load_cv": load_cv(one),
                "is_dense": one.is_dense,
            }
        )
    return found


def load_cv(choices: Choices) -> float:
    """Standard deviation over mean of how often each expert is used, averaged over slices; 0 = evenly."""
    n_slices = choices.winners.shape[1]
    used = np.bincount(choices.banks().reshape(-1), minlength=n_slices * choices.n_experts)
    table = used.reshape(n_slices, choices.n_experts)
    return float((table.std(axis=1) / table.mean(axis=1)).mean())


def layer_number(name: str) -> int:
    """The first number between dots in a module's name; 0 where there is none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else 0


def finite(value: float) -> float | None:
    """The number, or None where it is none."""
    return float(value) if math.isfinite(value) else None
