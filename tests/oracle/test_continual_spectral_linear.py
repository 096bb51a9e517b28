"""The spectrally decoupled layer against its definition: spec sd_moe oracles 1 to 7 (numbers in the names)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from recollect.continual.spectral.linear import SpectralDecoupledLinear
from recollect.continual.spectral.projections import (
    Basis,
    common_part,
    leading_basis,
    random_basis,
    refreshed_basis,
    split_experts,
    unique_part,
)
from recollect.continual.spectral.projector import SpectralProjector

N_EXPERTS, OUT, IN, RANK, TOKENS, TOP_K = 5, 24, 32, 4, 40, 2


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def routed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, n), two distinct experts per token (N, 2), gates (N, 2)."""
    generator = torch.Generator().manual_seed(seed)
    selected = torch.rand(TOKENS, N_EXPERTS, generator=generator).topk(TOP_K).indices
    return normal(TOKENS, IN, seed=seed), selected, torch.rand(TOKENS, TOP_K, generator=generator).double()


def dense_mixture(x: Tensor, experts: Tensor, selected: Tensor, gates: Tensor) -> Tensor:
    """sum_e g_e W_e x, token by token."""
    return torch.einsum("ns,nsmi,ni->nm", gates, experts[selected], x)


def layer(**options: object) -> SpectralDecoupledLinear:
    made = {"dtype": torch.float64, "refresh_every": 0} | options
    return SpectralDecoupledLinear(N_EXPERTS, OUT, IN, made.pop("common_rank", RANK), **made)  # type: ignore[arg-type]


def basis_of(rank: int = RANK) -> Basis:
    drawn = random_basis(OUT, IN, rank, torch.Generator().manual_seed(3))
    return Basis(*(torch.linalg.qr(side.double()).Q for side in drawn))


# 1. Identities


def test_parts_sum_to_the_gradient_and_are_orthogonal() -> None:
    gradient, basis = normal(OUT, IN), basis_of()
    common, unique = common_part(gradient, basis), unique_part(gradient, basis)
    torch.testing.assert_close(common + unique, gradient, atol=1e-10, rtol=0)
    assert abs(float((common * unique).sum())) < 1e-10
    assert float((basis.left.T @ unique).abs().max()) < 1e-10
    assert float((unique @ basis.right).abs().max()) < 1e-10


def test_common_part_equals_its_formula_and_has_rank_twice_k() -> None:
    gradient, basis = normal(OUT, IN), basis_of()
    left, right = basis.left @ basis.left.T, basis.right @ basis.right.T
    expected = left @ gradient + (torch.eye(OUT).double() - left) @ gradient @ right
    torch.testing.assert_close(common_part(gradient, basis), expected, atol=1e-12, rtol=0)
    assert int(torch.linalg.matrix_rank(common_part(gradient, basis))) == 2 * RANK
    assert not torch.allclose(left @ gradient @ right, expected)  # the one-term "rank k" reading is another matrix


def test_a_stack_is_projected_matrix_by_matrix() -> None:
    stack, basis = normal(3, OUT, IN), basis_of()
    for part in (common_part, unique_part):
        torch.testing.assert_close(part(stack, basis), torch.stack([part(one, basis) for one in stack]))


@pytest.mark.parametrize("shape", [(40, 48), (160, 100)])
def test_refreshed_basis_spans_the_leading_singular_vectors(shape: tuple[int, int]) -> None:
    strong = normal(shape[0], RANK, seed=1) @ normal(RANK, shape[1], seed=2)
    matrix = strong + 0.01 * normal(*shape)
    start = Basis(
        *(torch.linalg.qr(normal(side, RANK, seed=9)).Q for side in shape)  # unrelated to the matrix
    )
    found, exact = refreshed_basis(matrix, start, iterations=4), leading_basis(matrix, RANK)
    for ours, theirs in zip(found, exact, strict=True):
        cosines = torch.linalg.svdvals(ours.T @ theirs)
        assert float(cosines.min()) > 1 - 1e-8
        torch.testing.assert_close(ours.T @ ours, torch.eye(RANK).double(), atol=1e-10, rtol=0)


# 2. Conversion


@pytest.mark.parametrize("realign", ["absorb_mean", "keep"])
@pytest.mark.parametrize("forward_common", ["shared", "merged"])
def test_lossless_conversion_keeps_every_expert(realign: str, forward_common: str) -> None:
    experts = normal(N_EXPERTS, OUT, IN, dtype=torch.float32) / IN**0.5
    split = SpectralDecoupledLinear.from_experts(experts, RANK, realign=realign, forward_common=forward_common)
    torch.testing.assert_close(split.merge(), experts, atol=1e-5, rtol=0)
    x = normal(TOKENS, IN, dtype=torch.float32)
    for expert in range(N_EXPERTS):
        chosen = torch.full((TOKENS, 1), expert)
        torch.testing.assert_close(split(x, chosen, torch.ones(TOKENS, 1)), x @ experts[expert].T, atol=1e-5, rtol=0)


def test_identical_experts_have_nothing_to_drop() -> None:
    one = normal(OUT, IN)
    split = split_experts(one.expand(N_EXPERTS, -1, -1), RANK)
    torch.testing.assert_close(split.unique, unique_part(one, split.basis).expand(N_EXPERTS, -1, -1))
    assert float((split.dropped_left @ split.dropped_right).abs().max()) < 1e-12
    torch.testing.assert_close(split.common + split.unique[0], one)


def test_dropped_part_is_what_the_spec_names() -> None:
    experts = normal(N_EXPERTS, OUT, IN)
    split = split_experts(experts, RANK)
    dropped = split.dropped_left @ split.dropped_right
    torch.testing.assert_close(dropped, common_part(experts - experts.mean(0), split.basis))
    lossy = SpectralDecoupledLinear.from_experts(experts, RANK, lossless=False)
    torch.testing.assert_close(lossy.merge(), experts - dropped)


def test_usage_moves_the_mean_towards_the_used_expert() -> None:
    experts = normal(N_EXPERTS, OUT, IN)
    only_second = torch.tensor([0.0, 7.0, 0.0, 0.0, 0.0])
    split = split_experts(experts, RANK, only_second)
    torch.testing.assert_close(split.common, common_part(experts[1], leading_basis(experts[1], RANK)))


def test_initial_weights_have_the_energy_of_an_ordinary_linear() -> None:
    layers = [SpectralDecoupledLinear(4, 12, 16, 3, seed=seed) for seed in range(60)]
    energy = torch.stack([made.merge().square().sum((1, 2)).mean() for made in layers]).mean()
    assert float(energy) == pytest.approx(12 * 16 / (3 * 16), rel=0.03)  # Var U(-1/sqrt n, 1/sqrt n) = 1 / (3 n)
    assert max(layers[0].leak()) < 1e-6


# 3. Forward sharing


@pytest.mark.parametrize("forward_common", ["shared", "merged"])
@pytest.mark.parametrize("residual_rank", [0, 3])
def test_forward_equals_the_dense_formula(forward_common: str, residual_rank: int) -> None:
    made = layer(forward_common=forward_common, residual_rank=residual_rank)
    for factor in (made.residual_left, made.residual_right):
        if factor is not None:
            factor.copy_(normal(*factor.shape, seed=5))
    x, selected, gates = routed()
    torch.testing.assert_close(made(x, selected, gates), dense_mixture(x, made.merge(), selected, gates))


def test_common_product_is_computed_once_per_token() -> None:
    made = layer(forward_common="shared", dtype=torch.float32)
    x, selected, gates = routed()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(x.float(), selected, gates.float())
    flops = counter.get_flop_counts()["Global"]
    assert flops[torch.ops.aten.mm] == 2 * TOKENS * OUT * IN  # not TOP_K times that


# 4. Gradients


@pytest.mark.parametrize("forward_common", ["shared", "merged"])
@pytest.mark.parametrize("project", ["grad", "both"])
def test_gradients_are_the_parts_of_the_unshared_model_s(forward_common: str, project: str) -> None:
    made = layer(forward_common=forward_common, project=project)
    x, selected, gates = routed()
    target = normal(TOKENS, OUT, seed=8)
    reference = made.merge().requires_grad_()
    (dense_mixture(x, reference, selected, gates) - target).square().mean().backward()
    (made(x, selected, gates) - target).square().mean().backward()
    assert reference.grad is not None
    torch.testing.assert_close(made.common.grad, common_part(reference.grad, made.basis).sum(0))
    torch.testing.assert_close(made.unique.grad, unique_part(reference.grad, made.basis))


def test_autograd_alone_would_send_every_gradient_to_both() -> None:
    """The mistake the projection is there for; it must not pass for the split."""
    made = layer(project="update")
    x, selected, gates = routed()
    reference = made.merge().requires_grad_()
    dense_mixture(x, reference, selected, gates).square().sum().backward()
    made(x, selected, gates).square().sum().backward()
    assert reference.grad is not None
    torch.testing.assert_close(made.common.grad, reference.grad.sum(0))
    torch.testing.assert_close(made.unique.grad, reference.grad)
    assert not torch.allclose(made.unique.grad, unique_part(reference.grad, made.basis))


@pytest.mark.parametrize("forward_common", ["shared", "merged"])
def test_bfloat16_layer_trains_and_keeps_the_complement_to_its_rounding(forward_common: str) -> None:
    made = layer(dtype=torch.bfloat16, forward_common=forward_common, refresh_every=4)
    trained(made, torch.optim.AdamW(made.parameters(), lr=1e-2), 6)
    assert max(made.leak()) < 5e-3
    assert made.merge().isfinite().all()


def test_usage_mean_weighs_each_expert_s_gradient_by_its_share_of_tokens() -> None:
    made = layer(project="grad", common_reduce="usage_mean")
    x, selected, gates = routed()
    reference = made.merge().requires_grad_()
    dense_mixture(x, reference, selected, gates).square().sum().backward()
    made(x, selected, gates).square().sum().backward()
    share = torch.bincount(selected.flatten(), minlength=N_EXPERTS) / selected.numel()
    assert reference.grad is not None
    expected = (common_part(reference.grad, made.basis) * share[:, None, None]).sum(0)
    torch.testing.assert_close(made.common.grad, expected)


def test_inputs_and_gates_get_the_unshared_model_s_gradients() -> None:
    for forward_common in ("shared", "merged"):
        made = layer(forward_common=forward_common)
        gradients = []
        for shared in (True, False):
            x, selected, gates = routed()
            x.requires_grad_()
            gates.requires_grad_()
            mixed = made(x, selected, gates) if shared else dense_mixture(x, made.merge(), selected, gates)
            mixed.square().sum().backward()
            gradients.append((x.grad, gates.grad))
        torch.testing.assert_close(gradients[0], gradients[1])


# 5. Leak


def trained(made: SpectralDecoupledLinear, optimizer: torch.optim.Optimizer, steps: int) -> None:
    SpectralProjector(made).attach(optimizer)
    target = normal(TOKENS, OUT, seed=8).to(made.unique.dtype)
    for step in range(steps):
        x, selected, gates = (
            value.to(made.unique.dtype) if value.is_floating_point() else value for value in routed(step)
        )
        optimizer.zero_grad()
        (made(x, selected, gates) - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("project", ["update", "grad", "both"])
def test_plain_sgd_keeps_the_complement_with_a_fixed_basis(project: str) -> None:
    made = layer(project=project, dtype=torch.float32)
    trained(made, torch.optim.SGD(made.parameters(), lr=0.05), 30)
    assert max(made.leak()) <= 1e-6


def test_adam_leaves_the_complement_unless_its_update_is_projected() -> None:
    leaks = {}
    for project in ("grad", "update", "both"):
        made = layer(project=project, dtype=torch.float32)
        trained(made, torch.optim.AdamW(made.parameters(), lr=1e-2, weight_decay=0.01), 30)
        leaks[project] = max(made.leak())
    assert leaks["grad"] > 1e-2
    assert leaks["update"] <= 1e-6
    assert leaks["both"] <= 1e-6


def test_sign_of_a_projected_gradient_leaves_the_complement() -> None:
    """The measured case of spec 3.4: 24 x 32, k = 4, 26 % of the norm of sign(G_u) lies in span(U)."""
    basis = basis_of()
    shares = []
    for seed in range(20):
        signs = unique_part(normal(OUT, IN, seed=seed), basis).sign()
        shares.append(float((basis.left.T @ signs).norm() / signs.norm()))
    assert sum(shares) / len(shares) == pytest.approx(0.26, abs=0.06)


# 6. Plain SGD equivalences


@pytest.mark.parametrize("project", ["update", "grad", "both"])
def test_rank_zero_is_an_ordinary_mixture_of_experts_step_for_step(project: str) -> None:
    made = layer(common_rank=0, project=project)
    plain = made.merge().requires_grad_()
    pair = [torch.optim.SGD(made.parameters(), lr=0.05), torch.optim.SGD([plain], lr=0.05)]
    SpectralProjector(made).attach(pair[0])
    for step in range(5):
        x, selected, gates = routed(step)
        for optimizer, output in zip(
            pair, (made(x, selected, gates), dense_mixture(x, plain, selected, gates)), strict=True
        ):
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(made.merge(), plain.detach())


@pytest.mark.parametrize("project", ["update", "grad", "both"])
def test_one_expert_is_an_ordinary_linear_step_for_step(project: str) -> None:
    made = SpectralDecoupledLinear(1, OUT, IN, RANK, project=project, refresh_every=0, dtype=torch.float64)
    plain = made.merge()[0].requires_grad_()
    pair = [torch.optim.SGD(made.parameters(), lr=0.05), torch.optim.SGD([plain], lr=0.05)]
    SpectralProjector(made).attach(pair[0])
    alone, one = torch.zeros(TOKENS, 1, dtype=torch.int64), torch.ones(TOKENS, 1).double()
    for step in range(5):
        x = normal(TOKENS, IN, seed=step)
        for optimizer, output in zip(pair, (made(x, alone, one), functional.linear(x, plain)), strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(made.merge()[0], plain.detach())


# 7. Refresh


def moved_layer(realign: str) -> SpectralDecoupledLinear:
    """A layer whose common matrix has turned away from its basis."""
    made = layer(realign=realign)
    with torch.no_grad():
        made.common.add_(normal(OUT, RANK, seed=1) @ normal(RANK, IN, seed=2))
    return made


def test_absorbing_the_mean_keeps_the_mean_expert_and_restores_the_complement() -> None:
    made = moved_layer("absorb_mean")
    before = made.merge()
    made.refresh()
    torch.testing.assert_close(made.merge().mean(0), before.mean(0), atol=1e-6, rtol=0)
    assert max(made.leak()) <= 1e-6
    assert not torch.allclose(made.merge(), before)


def test_keeping_the_remainder_keeps_every_expert() -> None:
    made = moved_layer("keep")
    for _ in range(3):
        before = made.merge()
        made.refresh()
        torch.testing.assert_close(made.merge(), before, atol=1e-6, rtol=0)
        assert max(made.leak()) <= 1e-6


def test_dropping_the_remainder_is_the_projection_alone() -> None:
    made = moved_layer("drop")
    common, unique = made.common.detach().clone(), made.unique.detach().clone()
    made.refresh()
    torch.testing.assert_close(made.merge(), common + unique_part(unique, made.basis))


def test_refresh_leaves_the_common_matrix_in_the_common_space() -> None:
    made = moved_layer("absorb_mean")
    made.refresh()
    assert float(unique_part(made.common.detach(), made.basis).abs().max()) < 1e-10
    assert int(torch.linalg.matrix_rank(made.common.detach())) <= 2 * RANK


def test_refresh_projects_the_first_moments_and_keeps_the_second() -> None:
    made = layer(refresh_every=4, project="both", dtype=torch.float32)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    trained(made, optimizer, 3)
    second = optimizer.state[made.unique]["exp_avg_sq"].clone()
    old = copy.deepcopy(made.basis)
    made.steps.fill_(3)
    made.before_step(optimizer)
    made.after_step(optimizer)
    assert not torch.allclose(old.left, made.left)
    moment = optimizer.state[made.unique]["exp_avg"]
    assert float((made.left.T @ moment).abs().max()) < 1e-6
    torch.testing.assert_close(optimizer.state[made.unique]["exp_avg_sq"], second)


def test_basis_is_refreshed_every_sixteenth_step_by_default() -> None:
    made = SpectralDecoupledLinear(N_EXPERTS, OUT, IN, RANK)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    start = made.left.clone()
    trained(made, optimizer, 15)
    assert torch.equal(made.left, start)
    trained_on = torch.optim.AdamW(made.parameters(), lr=1e-2)
    trained(made, trained_on, 1)
    assert not torch.equal(made.left, start)
    assert max(made.leak()) <= 1e-6
