"""SD-LoRA-MoE: experts outside of the common directions, re-alignment and absorption that keep the mean update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recollect.continual.adapters.attach import adapters, attach, routing_loss
from recollect.continual.adapters.config import SDLoraMoEConfig
from recollect.continual.adapters.growth import grow, train_new_experts
from recollect.continual.adapters.saving import from_pretrained, save_pretrained
from recollect.continual.adapters.sd_lora_moe import SDLoraMoELinear, absorb_shared
from recollect.continual.spectral.projector import SpectralProjector
from recollect.errors import ConfigError
from tests.support.tiny_decoder import write_tiny_decoder

OUT, IN = 40, 64


def make(heads: int = 1, **options: Any) -> SDLoraMoELinear:
    """A double-precision layer; the router and the experts are as they are born."""
    values = {"experts": 3, "rank": 2, "common_rank": 3, "common_rank_max": 12, "absorb_rank": 2, "balance": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Linear(IN, OUT, bias=False)
    return SDLoraMoELinear(base, SDLoraMoEConfig(heads=heads, **(values | options))).double()


def train(layer: SDLoraMoELinear, steps: int, seed: int = 0, rate: float = 1e-2) -> Tensor:
    """Steps towards a random linear map, around which the projector is called; (H, E) mean gates of its tokens."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(IN, OUT, generator=generator, dtype=torch.float64) / IN**0.5
    optimizer = torch.optim.Adam([weight for weight in layer.parameters() if weight.requires_grad], lr=rate)
    SpectralProjector(layer).attach(optimizer)
    layer.train()
    gates = []
    for _ in range(steps):
        x = torch.randn(32, IN, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (layer(x) - layer.base(x) - x @ target).square().mean().backward()
        optimizer.step()
        gates.append(layer.last_routing.gates().detach().double())
    return torch.cat(gates).mean(0)


def mean_update(layer: SDLoraMoELinear) -> Tensor:
    """Common, frozen and gate-weighted mean of the experts: (d_out, d_in)."""
    experts = layer.expert_updates() * layer.gate_means()[..., None, None]
    return layer.common_update() + torch.cat(list(experts.sum(1)), dim=1)


@pytest.mark.parametrize("heads", [1, 4])
def test_experts_count_with_the_mean_of_their_gates_over_the_tokens_of_the_task(heads: int) -> None:
    layer = make(heads)
    first = train(layer, 10)
    torch.testing.assert_close(layer.gate_means().double(), first, atol=1e-6, rtol=0)
    assert float((first - 1 / 3).abs().max()) > 0.02  # uneven, so equal shares would be told apart
    second = train(layer, 30, seed=1)
    torch.testing.assert_close(layer.gate_means().double(), (first + 3 * second) / 4, atol=1e-6, rtol=0)


@pytest.mark.parametrize("heads", [1, 4])
def test_fresh_layer_is_the_frozen_linear(heads: int) -> None:
    layer, x = make(heads), torch.randn(5, 7, IN, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("heads", [1, 4])
def test_forward_is_the_formula(heads: int) -> None:
    layer = make(heads)
    train(layer, 20)
    layer.refresh()
    layer.eval()
    x = torch.randn(9, IN, dtype=torch.float64)
    y = layer(x)
    gates = layer.last_routing.gates().double()
    slices = x.view(9, heads, -1)
    routed = torch.einsum("nhe,heoi,nhi->no", gates, layer.expert_updates(), slices)
    torch.testing.assert_close(y, layer.base(x) + x @ layer.common_update().T + routed)


@pytest.mark.parametrize("heads", [1, 4])
def test_experts_ignore_common_inputs_and_never_write_common_outputs(heads: int) -> None:
    layer = make(heads)
    train(layer, 16)
    assert int(layer.steps) == 16  # just refreshed
    updates = layer.expert_updates()
    for expert in updates.flatten(0, 1):
        assert float(expert.norm()) > 1e-3
        assert float((layer.bank.left.T @ expert).abs().max()) < 1e-8
    for head in range(heads):
        common = layer.common_A.detach().view(3, heads, -1)[:, head]  # (k, d_in / H)
        assert float((updates[head] @ common.T).abs().max()) < 1e-8


def test_there_is_no_output_basis_before_the_common_adapter_has_written() -> None:
    layer = make()
    assert not layer.bank.left.any()
    assert int(torch.linalg.matrix_rank(layer.bank.right[0])) == 3


@pytest.mark.parametrize("heads", [1, 4])
def test_gradients_of_experts_lie_outside_of_the_common_directions(heads: int) -> None:
    layer = make(heads)
    train(layer, 20)
    layer.refresh()
    x = torch.randn(30, IN, dtype=torch.float64)
    layer.zero_grad()
    layer(x).square().sum().backward()
    down, up = layer.bank.lora_A[0].grad, layer.bank.lora_B[0].grad
    assert float(up.abs().max()) > 1e-3
    torch.testing.assert_close(layer.bank.off_right(down), down)
    torch.testing.assert_close(layer.bank.off_left(up), up)
    assert float(layer.common_A.grad.abs().max()) > 1e-3


def test_stored_experts_stay_in_the_complement_under_adam() -> None:
    layer = make()
    train(layer, 37)
    assert max(layer.leak()) <= 1e-6


def test_refresh_keeps_the_mean_update() -> None:
    layer = make()
    for steps in (10, 13, 7):
        train(layer, steps)
        layer.bank.settle()
        before, old_basis = mean_update(layer), layer.bank.right.clone()
        layer.refresh()
        torch.testing.assert_close(mean_update(layer), before, atol=1e-9, rtol=1e-7)
        assert not torch.allclose(layer.bank.right, old_basis)


def test_absorbing_keeps_the_mean_update_and_starts_a_new_common_adapter() -> None:
    layer = make()
    train(layer, 40)
    layer.refresh()
    means = layer.gate_means()
    before = mean_update(layer)
    done = layer.absorb()
    assert (done.frozen_rank, done.froze_common, done.directions) == (5, True, 2)
    assert done.kept == pytest.approx(1.0, abs=1e-8)
    assert 0 < done.shared_energy <= 1
    assert not layer.common_B.any()
    layer.bank.gate_sum.copy_(means)  # the counts of the finished task, forgotten by `absorb`
    layer.bank.token_count.fill_(1.0)
    torch.testing.assert_close(mean_update(layer), before, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(layer.frozen_A @ layer.frozen_A.T, torch.eye(5).double(), atol=1e-8, rtol=0)
    assert max(layer.leak()) <= 1e-6


def test_absorbed_directions_are_the_strongest_the_experts_share() -> None:
    layer = make(common_rank_max=5, absorb_rank=1)  # no room to freeze the adapter: only directions move
    shared = torch.randn(OUT, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.bank.lora_B[0].copy_(0.01 * torch.randn(1, 3, 2, OUT, dtype=torch.float64))
        layer.bank.lora_B[0][:, :, 0] += shared.T
        layer.bank.lora_A[0][:, :, 0] = layer.bank.lora_A[0][:, :1, 0].clone()
    done = layer.absorb()
    assert (done.froze_common, done.directions) == (False, 1)
    column = layer.frozen_B[0] / layer.frozen_B[0].norm()
    assert abs(float(column @ shared[:, 0] / shared.norm())) > 0.99
    assert done.shared_energy > 0.99


@pytest.mark.parametrize("heads", [1, 4])
def test_frozen_pair_survives_later_tasks_bit_for_bit_and_the_cap_holds(heads: int) -> None:
    layer = make(heads)
    frozen: list[tuple[Tensor, Tensor]] = []
    for task in range(4):
        train(layer, 20, seed=task)
        done = layer.absorb()
        assert layer.frozen_A.shape[0] + len(layer.common_A) <= 12
        for rows, columns in frozen:
            assert torch.equal(layer.frozen_A[: len(rows)], rows)
            assert torch.equal(layer.frozen_B[: len(columns)], columns)
        frozen.append((layer.frozen_A.clone(), layer.frozen_B.clone()))
    assert done.frozen_rank == 9
    assert not done.froze_common


def test_later_training_stays_outside_of_the_frozen_pair() -> None:
    layer = make()
    train(layer, 30)
    layer.absorb()
    frozen = layer.common_update()
    train(layer, 30, seed=1)
    added = (layer.scaling * layer.common_B.T @ layer.common_A).detach()
    assert float(added.norm()) > 1e-3
    inputs, outputs = layer.frozen_A, torch.linalg.qr(layer.frozen_B.T).Q
    assert float((added @ inputs.T).abs().max()) < 1e-8
    assert float((outputs.T @ added).abs().max()) < 1e-2 * float(added.norm())
    torch.testing.assert_close(layer.common_update() - added, frozen)


def test_several_heads_report_what_the_frozen_pair_could_not_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(heads=4)
    means = train(layer, 40)
    layer.refresh()
    monkeypatch.setattr(layer, "refresh", lambda: None)  # of several heads a second one moves a little again

    def experts() -> Tensor:
        return torch.cat(list((layer.expert_updates() * means[..., None, None]).sum(1)), dim=1)

    before, common = experts(), layer.common_update()
    done = layer.absorb()
    lost = before - experts()
    missing = lost - (layer.common_update() - common)
    assert done.kept == pytest.approx(1 - float(missing.square().sum() / lost.square().sum()), abs=1e-6)
    assert 0.01 < done.kept < 0.99


def decoder(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(write_tiny_decoder(folder))


def sd_config(**options: Any) -> SDLoraMoEConfig:
    values = {"experts": 3, "rank": 2, "common_rank": 2, "common_rank_max": 7, "absorb_rank": 1, "refresh_every": 2}
    return SDLoraMoEConfig(**(values | options))


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"heads": 2, "placement": "block_shared"}, {"gate": "dense"}])
def test_decoder_trains_absorbs_and_comes_back_from_disk(options: dict[str, Any], tmp_path: Path) -> None:
    tokens = torch.arange(18).reshape(2, 9) % 9
    model = decoder(tmp_path / "base")
    bare = model(tokens).logits
    attach(model, sd_config(**options))
    assert torch.equal(model(tokens).logits, bare)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    SpectralProjector(model).attach(optimizer)
    model.train()
    losses = []
    for _ in range(7):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss + routing_loss(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    done = absorb_shared(model)
    assert set(done) == set(adapters(model))
    model.eval()
    with torch.no_grad():
        expected = model(tokens).logits
    save_pretrained(model, tmp_path / "adapter")
    loaded = from_pretrained(decoder(tmp_path / "base"), tmp_path / "adapter")
    loaded.eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected)


def test_growing_keeps_old_experts_as_they_act(tmp_path: Path) -> None:
    model = attach(decoder(tmp_path), sd_config(placement="per_linear"))
    layers = list(adapters(model).values())
    with torch.no_grad():
        for layer in layers:
            layer.bank.lora_B[0].normal_(generator=torch.Generator().manual_seed(1))
            layer.common_B.normal_(generator=torch.Generator().manual_seed(2))
            layer.refresh()
    grow(model, 2)
    optimizer = torch.optim.AdamW(train_new_experts(model), lr=1e-2)
    before = [layer.expert_updates()[:, :3] for layer in layers]
    SpectralProjector(model).attach(optimizer)
    tokens = torch.arange(18).reshape(2, 9) % 9
    model.train()
    for _ in range(5):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    for layer, old in zip(layers, before, strict=True):
        layer.refresh()  # the common adapter has moved, and with it the basis
        assert torch.equal(layer.expert_updates()[:, :3], old)
        assert layer.expert_updates().shape[1] == 5
        bank = layer.bank  # the new experts stay outside of it; old ones cannot without acting otherwise
        assert (bank.lora_A[-1] - bank.off_right(bank.lora_A[-1])).norm() < 1e-4 * bank.lora_A[-1].norm()
        assert (bank.lora_B[-1] - bank.off_left(bank.lora_B[-1])).norm() < 1e-4 * bank.lora_B[-1].norm()


def test_misuse_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="common_rank_max must be below 16"):
        make(heads=4, common_rank_max=16)
    with pytest.raises(ConfigError, match="placement must not be 'parallel_ffn'"):
        sd_config(placement="parallel_ffn")
    with pytest.raises(ConfigError, match="no SD-LoRA-MoE adapters"):
        absorb_shared(decoder(tmp_path))
