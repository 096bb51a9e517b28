"""Spectral layers in the training loop: the hooks are called, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recollect.continual.adapters.config import SDLoraMoEConfig
from recollect.continual.adapters.sd_lora_moe import SDLoraMoELinear
from recollect.continual.spectral.linear import SpectralDecoupledLinear
from recollect.continual.spectral.projector import SpectralProjector
from recollect.loop import LoopConfig, train

Cells = tuple[Tensor, Tensor, Tensor]


def make(kind: str) -> nn.Module:
    if kind == "lora":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base = nn.Linear(16, 12, bias=False)
        config = SDLoraMoEConfig(
            experts=3, rank=2, common_rank=2, common_rank_max=6, absorb_rank=1, refresh_every=3, balance=0.0
        )
        return SDLoraMoELinear(base, config)
    return SpectralDecoupledLinear(3, 12, 16, 2, refresh_every=3, realign=kind)  # type: ignore[arg-type]


def batches(epoch: int) -> list[Cells]:
    generator = torch.Generator().manual_seed(epoch)
    return [
        (
            torch.randn(8, 16, generator=generator),
            torch.randint(3, (8, 1), generator=generator),
            torch.randn(8, 12, generator=generator),
        )
        for _ in range(5)
    ]


class Killed(Exception):
    """The process dies here."""


def run(module: nn.Module, folder: Path, die_at: int | None = None) -> None:
    projector = SpectralProjector(module)
    seen = 0

    def loss(batch: Cells) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == die_at:
            raise Killed
        x, selected, y = batch
        output = module(x) if isinstance(module, SDLoraMoELinear) else module(x, selected, torch.ones(len(x), 1))
        return (output - y).square().mean()

    train(
        module,
        batches=batches,
        loss=loss,
        config=LoopConfig(epochs=2, learning_rate=1e-2, weight_decay=0.01, patience=None),
        folder=folder,
        checkpoint_every=1,
        before_step=projector.before_step,
        after_step=projector.after_step,
    )


@pytest.mark.parametrize("kind", ["absorb_mean", "keep", "lora"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    whole, killed = make(kind), make(kind)
    run(whole, tmp_path / "whole")
    with pytest.raises(Killed):
        run(killed, tmp_path / "killed", die_at=8)
    resumed = make(kind)
    run(resumed, tmp_path / "killed")
    expected = whole.state_dict()
    assert int(expected["steps"]) == 10
    assert resumed.state_dict().keys() == expected.keys()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_loop_calls_the_hooks_around_every_step(tmp_path: Path) -> None:
    module = make("absorb_mean")
    run(module, tmp_path)
    assert isinstance(module, SpectralDecoupledLinear)
    assert max(module.leak()) <= 1e-6
