"""Known truth: factors in slices of their own are found by head-wise routing and mixed up by flat routing."""

from __future__ import annotations

import numpy as np
import pytest
from support.factor_toy import FLAT, HEADWISE, Outcome, play


def _means(outcomes: list[Outcome]) -> dict[str, float]:
    names = ("task_a", "joint_n_eff", "old_rise", "new")
    return {name: float(np.mean([getattr(outcome, name) for outcome in outcomes])) for name in names}


def _check_recovery(flat: dict[str, float], headwise: dict[str, float]) -> None:
    assert headwise["task_a"] < 0.1
    assert flat["task_a"] > 0.2
    assert flat["joint_n_eff"] > 5 * headwise["joint_n_eff"]


def _check_gating(flat: dict, flat_gated: dict, headwise: dict, headwise_gated: dict) -> None:
    assert headwise_gated["old_rise"] < 0.25 * headwise["old_rise"]
    assert headwise_gated["new"] < 0.05
    assert flat_gated["new"] > 2 * flat["new"]


def test_headwise_routing_recovers_the_factors_and_gating_then_protects_them() -> None:
    flat, headwise = ([play(config, seed) for seed in range(2)] for config in (FLAT, HEADWISE))
    gated = [play(config, 0, gated=True) for config in (FLAT, HEADWISE)]
    assert {outcome.parameters for outcome in (*flat, *headwise, *gated)} == {3_328}
    _check_recovery(_means(flat), _means(headwise))
    _check_gating(_means(flat[:1]), _means(gated[:1]), _means(headwise[:1]), _means(gated[1:]))


@pytest.mark.slow
def test_headwise_routing_recovers_the_factors_over_five_worlds() -> None:
    flat, flat_gated, headwise, headwise_gated = (
        _means([play(config, seed, gated=gated) for seed in range(5)])
        for config in (FLAT, HEADWISE)
        for gated in (False, True)
    )
    _check_recovery(flat, headwise)
    _check_gating(flat, flat_gated, headwise, headwise_gated)
    assert headwise["old_rise"] < flat["old_rise"]
