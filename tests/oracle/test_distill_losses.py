"""Distillation losses and weights against closed forms, scipy and themselves computed another way."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from torch.nn import functional

from recollect.distill.blockwise import blockwise_distillation_loss
from recollect.distill.factors import Factors
from recollect.distill.losses import (
    distillation_kl,
    distillation_loss,
    label_smoothing_loss,
    mutual_learning_losses,
    top_k_of,
    top_k_rest_kl,
)
from recollect.distill.weights import sample_weights, true_item_rank, true_item_rank_in_blocks
from recollect.errors import ConfigError, InputError


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- weights (oracle 1) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("llm_rank", "crm_rank", "when_llm_learns", "when_crm_learns"),
    [
        (1, 1, 1.0, 1.0),
        (3, 2, 1.5, 0.5),
        (2, 3, 0.5, 1.5),
        (7, 5, 1.4, 0.6),
        (10, 5, 2.0, 0.0),
        (5, 10, 0.0, 2.0),
        (100, 1, 2.0, 0.0),
    ],
)
def test_weights_are_those_of_the_worked_examples(llm_rank, crm_rank, when_llm_learns, when_crm_learns):
    llm, crm = torch.tensor([float(llm_rank)]), torch.tensor([float(crm_rank)])
    assert sample_weights(llm, crm).item() == pytest.approx(when_llm_learns, abs=1e-6)
    assert sample_weights(crm, llm).item() == pytest.approx(when_crm_learns, abs=1e-6)


def test_weights_match_the_two_branches_of_the_paper_with_zero_based_ranks():
    rank = torch.arange(1.0, 9.0, dtype=torch.float64)
    student, teacher = (ranks.flatten() for ranks in torch.meshgrid(rank, rank, indexing="ij"))
    found = sample_weights(student, teacher, rank_base=0)
    for s, t, weight in zip((student - 1).tolist(), (teacher - 1).tolist(), found.tolist(), strict=True):
        expected = 1 + (s - t) / max(t, 1) if s > t else 1 - (t - s) / max(s, 1)
        assert weight == pytest.approx(min(max(expected, 0), 2), abs=1e-12)


def test_ranks_count_ties_half_and_equal_the_average_rank_of_scipy():
    from scipy.stats import rankdata

    logits = torch.tensor(np.random.default_rng(0).integers(0, 4, (50, 12)), dtype=torch.float32)
    target = torch.from_numpy(np.random.default_rng(1).integers(0, 12, 50))
    expected = [rankdata(-row)[item] for row, item in zip(logits.numpy(), target.numpy(), strict=True)]
    np.testing.assert_allclose(true_item_rank(logits, target).numpy(), expected)
    for max_elements in (1, 7, 30, 10_000):
        np.testing.assert_allclose(
            true_item_rank_in_blocks(logits, target, max_elements=max_elements).numpy(), expected
        )


def test_ranks_of_factored_logits_equal_those_of_the_logits():
    factors = Factors(normal(0, 20, 6), normal(1, 33, 6), normal(2, 33))
    target = torch.arange(20)
    expected = true_item_rank(factors.state @ factors.items.T + factors.bias, target)
    assert torch.equal(true_item_rank_in_blocks(factors, target, max_elements=40), expected)


def test_a_nan_never_improves_a_rank_and_is_refused_on_the_true_item():
    logits = torch.tensor([[1.0, float("nan"), 0.0]])
    assert true_item_rank(logits, torch.tensor([0])).item() == 2
    assert true_item_rank_in_blocks(logits, torch.tensor([0])).item() == 2
    for rank in (true_item_rank, true_item_rank_in_blocks):
        with pytest.raises(InputError, match="true item of sample 0"):
            rank(logits, torch.tensor([1]))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_weights_refuse_ranks_that_are_not_one_based(bad):
    with pytest.raises(InputError, match="1-based"):
        sample_weights(torch.tensor([bad]), torch.tensor([1.0]))


# ---- KL (oracles 2 to 5) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_gradient_is_the_closed_form_in_double_precision(temperature):
    student, teacher = normal(0, 8, 30).requires_grad_(), normal(1, 8, 30).requires_grad_()
    target, weight, strength = torch.arange(8), torch.linspace(0, 2, 8, dtype=torch.float64), 0.7
    loss = distillation_loss(student, target, teacher, weight, temperature=temperature, strength=strength)
    (loss * 8).backward()
    softened = (student / temperature).softmax(1) - (teacher / temperature).softmax(1)
    expected = weight[:, None] * strength * temperature**2 * softened / temperature
    expected = expected + student.softmax(1) - functional.one_hot(target, 30)
    assert (student.grad - expected).abs().max() < 1e-12
    assert teacher.grad is None


def test_no_gradient_reaches_any_parameter_of_the_teacher():
    teacher = torch.nn.Linear(5, 9)
    student = torch.nn.Linear(5, 9)
    states, target = normal(0, 4, 5, dtype=torch.float32), torch.arange(4)
    distillation_loss(student(states), target, teacher(states), torch.ones(4), temperature=2.0, strength=1.0).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in student.parameters())
    student_factors = Factors(states, student.weight, student.bias)
    blockwise_distillation_loss(
        student_factors,
        target,
        Factors(states, teacher.weight, teacher.bias),
        torch.ones(4),
        temperature=2.0,
        strength=1.0,
    ).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_high_temperature_gives_half_the_variance_of_the_difference():
    student, teacher = normal(0, 6, 12_000), normal(1, 6, 12_000)
    found = 1000.0**2 * distillation_kl(student, teacher, 1000.0)
    half_variance = 0.5 * (teacher - student).var(1, unbiased=False)
    assert ((found - half_variance) / half_variance).abs().max() < 5e-5


def test_a_constant_added_to_either_side_changes_nothing():
    student, teacher = normal(0, 6, 40), normal(1, 6, 40)
    before = distillation_kl(student, teacher, 2.0)
    torch.testing.assert_close(distillation_kl(student + 7, teacher - 3, 2.0), before, rtol=1e-12, atol=1e-12)


def test_identical_models_have_no_divergence_and_no_gradient():
    student = normal(0, 6, 40).requires_grad_()
    kl = distillation_kl(student, student.detach(), 2.0)
    kl.sum().backward()
    assert kl.abs().max() < 1e-14
    assert student.grad.abs().max() < 1e-15


@pytest.mark.parametrize("silenced_by", ["strength", "weight"])
def test_without_trust_training_is_plain_cross_entropy_bit_for_bit(silenced_by):
    def trained(plain: bool) -> torch.Tensor:
        model = torch.nn.Linear(16, 50)
        with torch.no_grad():
            model.weight.copy_(normal(0, 50, 16))
            model.bias.zero_()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        strength, weight = (0.0, torch.ones(32)) if silenced_by == "strength" else (0.5, torch.zeros(32))
        for step in range(20):
            logits = model(normal(step + 1, 32, 16, dtype=torch.float32))
            target = torch.arange(32)
            if plain:
                loss = functional.cross_entropy(logits, target)
            else:
                teacher = normal(100 + step, 32, 50, dtype=torch.float32)
                loss = distillation_loss(logits, target, teacher, weight, temperature=2.0, strength=strength)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.weight.detach()

    assert torch.equal(trained(plain=True), trained(plain=False))


def test_a_teacher_certain_of_the_label_teaches_like_the_label():
    student = normal(0, 6, 40).requires_grad_()
    target = torch.arange(6)
    of_label = torch.autograd.grad(functional.cross_entropy(student, target, reduction="sum"), student)[0]
    certain = functional.one_hot(target, 40).double() * 60
    of_teacher = torch.autograd.grad(distillation_kl(student, certain, 1.0).sum(), student)[0]
    torch.testing.assert_close(of_teacher, of_label, rtol=0, atol=1e-12)


def test_the_direction_is_teacher_to_student():
    teacher, student = np.array([0.5, 0.5, 1e-30]), np.full(3, 1 / 3)
    found = distillation_kl(
        torch.from_numpy(np.log(student))[None], torch.from_numpy(np.log(teacher))[None], 1.0
    ).item()
    reversed_roles = distillation_kl(
        torch.from_numpy(np.log(teacher))[None], torch.from_numpy(np.log(student))[None], 1.0
    ).item()
    assert found == pytest.approx(rel_entr(teacher, student).sum(), abs=1e-12)
    assert reversed_roles == pytest.approx(rel_entr(student, teacher).sum(), rel=1e-12)
    assert abs(found - reversed_roles) > 1


def test_an_item_both_exclude_has_no_part_in_value_or_gradient():
    student, teacher = normal(0, 4, 10), normal(1, 4, 10)
    pad = torch.full((4, 1), -torch.inf, dtype=torch.float64)
    padded = torch.cat([student, pad], 1).requires_grad_()
    kl = distillation_kl(padded, torch.cat([teacher, pad], 1), 2.0)
    torch.testing.assert_close(kl, distillation_kl(student, teacher, 2.0))
    kl.sum().backward()
    assert padded.grad[:, -1].eq(0).all()
    assert padded.grad.isfinite().all()


def test_half_precision_logits_are_compared_in_single_precision():
    student, teacher = normal(0, 4, 2000).bfloat16(), normal(1, 4, 2000).bfloat16()
    found = distillation_kl(student, teacher, 2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distillation_kl(student.float(), teacher.float(), 2.0))


def test_the_wrong_vocabulary_batch_or_temperature_is_refused():
    with pytest.raises(InputError, match="same samples over the same items"):
        distillation_kl(normal(0, 2, 5), normal(0, 2, 6), 1.0)
    with pytest.raises(ConfigError, match="temperature"):
        distillation_kl(normal(0, 2, 5), normal(0, 2, 5), 0.0)
    with pytest.raises(InputError, match="one per sample"):
        distillation_loss(
            normal(0, 2, 5), torch.arange(2), normal(0, 2, 5), torch.ones(2, 1), temperature=1.0, strength=1.0
        )


# ---- top K and blocks (oracle 6) ----------------------------------------------------------------------------------


def test_top_k_lists_never_exceed_the_full_divergence_and_reach_it():
    student, teacher = normal(0, 12, 40) * 2, normal(1, 12, 40) * 2
    full = distillation_kl(student, teacher, 2.0)
    found = torch.stack([top_k_rest_kl(student, top_k_of(teacher, k, 2.0), 2.0) for k in range(1, 41)])
    assert (found.diff(dim=0) >= -1e-12).all()
    assert (found <= full + 1e-12).all()
    torch.testing.assert_close(found[-2], full, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[-1], full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 39, 40])
def test_top_k_gradient_is_that_of_the_merged_distribution(k):
    student, teacher = normal(0, 3, 40).requires_grad_(), normal(1, 3, 40)
    assert torch.autograd.gradcheck(lambda z: top_k_rest_kl(z, top_k_of(teacher, k, 2.0), 2.0), student)


@pytest.mark.parametrize(
    ("max_elements", "strength"), [(1, 0.5), (50, 0.0), (50, 0.5), (700, 8.0), (1 << 20, 0.0), (1 << 20, 8.0)]
)
def test_blockwise_loss_equals_the_whole_one_with_its_gradients(max_elements, strength):
    state, items, bias = (x.requires_grad_() for x in (normal(0, 12, 8), normal(1, 70, 8), normal(2, 70)))
    teacher = Factors(normal(3, 12, 20), normal(4, 70, 20) * 0.5)
    target, weight = torch.arange(12) * 5, torch.linspace(0, 2, 12, dtype=torch.float64)
    options = {"temperature": 2.0, "strength": strength}
    whole = distillation_loss(state @ items.T + bias, target, teacher.state @ teacher.items.T, weight, **options)
    expected = torch.autograd.grad(whole * 3, (state, items, bias))
    for given in (teacher, teacher.state @ teacher.items.T):
        found = blockwise_distillation_loss(
            Factors(state, items, bias), target, given, weight, max_elements=max_elements, **options
        )
        assert abs(found - whole).item() < 1e-12
        for one, other in zip(torch.autograd.grad(found * 3, (state, items, bias)), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_blockwise_loss_in_single_precision_is_within_a_millionth():
    def parts(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return tuple(
            x.to(dtype)
            for x in (normal(0, 64, 64), normal(1, 3000, 64) * 0.3, normal(2, 64, 96), normal(3, 3000, 96) * 0.3)
        )

    target, weight = torch.arange(64), torch.linspace(0, 2, 64)
    losses, gradients = [], []
    for is_blockwise in (False, True):
        state, items, of_teacher, head = parts(torch.float32)
        state.requires_grad_()
        items.requires_grad_()
        if is_blockwise:
            loss = blockwise_distillation_loss(
                Factors(state, items), target, Factors(of_teacher, head), weight,
                temperature=2.0, strength=0.5, max_elements=20_000,
            )  # fmt: skip
        else:
            loss = distillation_loss(
                state @ items.T, target, of_teacher @ head.T, weight, temperature=2.0, strength=0.5
            )
        loss.backward()
        losses.append(loss.item())
        gradients.append((state.grad, items.grad))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() < 1e-6


def test_blockwise_loss_treats_excluded_items_like_the_whole_one():
    teacher, student = normal(1, 6, 20), normal(0, 6, 20)
    teacher[:, 7:12] = -torch.inf
    identity = torch.eye(20, dtype=torch.float64)
    options = {"temperature": 2.0, "strength": 1.0}
    expected = distillation_loss(student, torch.arange(6), teacher, torch.ones(6), **options)
    found = blockwise_distillation_loss(
        Factors(student, identity), torch.arange(6), teacher, torch.ones(6), max_elements=5, **options
    )
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


def test_blockwise_loss_refuses_a_target_that_is_no_item():
    factors = Factors(normal(0, 2, 3), normal(1, 5, 3))
    with pytest.raises(InputError, match=r"0\.\.4"):
        blockwise_distillation_loss(
            factors, torch.tensor([0, 5]), factors, torch.ones(2), temperature=1.0, strength=1.0
        )


# ---- planted mistakes ---------------------------------------------------------------------------------------------


def test_the_named_mistakes_would_be_seen():
    """Reversed direction, missing T^2, 0-based ranks and sum for mean all change what the tests above compare."""
    student, teacher = normal(0, 8, 30), normal(1, 8, 30)
    forward, backward = distillation_kl(student, teacher, 2.0), distillation_kl(teacher, student, 2.0)
    assert (forward - backward).abs().min() > 1e-3
    options = {"temperature": 2.0, "strength": 1.0}
    target, weight = torch.arange(8), torch.ones(8)
    with_square = distillation_loss(student, target, teacher, weight, **options)
    without = distillation_loss(student, target, teacher, weight, t_squared=False, **options)
    assert with_square - functional.cross_entropy(student, target) == pytest.approx(
        4 * (without - functional.cross_entropy(student, target)).item(), rel=1e-9
    )
    low, high = torch.tensor([3.0]), torch.tensor([2.0])
    assert sample_weights(low, high, rank_base=0).item() != sample_weights(low, high).item()


# ---- controls -----------------------------------------------------------------------------------------------------


def test_mutual_learning_gives_each_model_the_other_as_frozen_teacher():
    first, second, target = normal(0, 5, 9).requires_grad_(), normal(1, 5, 9).requires_grad_(), torch.arange(5)
    of_first, of_second = mutual_learning_losses(first, second, target, temperature=2.0, strength=0.5)
    of_first.backward()
    assert second.grad is None
    expected = distillation_loss(second, target, first, torch.ones(5), temperature=2.0, strength=0.5)
    assert of_second.item() == expected.item()


def test_label_smoothing_is_a_uniform_teacher_at_temperature_one():
    student, target = normal(0, 5, 9), torch.arange(5)
    uniform = distillation_loss(
        student, target, torch.zeros(5, 9, dtype=torch.float64), torch.ones(5), temperature=1.0, strength=0.3
    )
    assert label_smoothing_loss(student, target, 0.3).item() == pytest.approx(uniform.item(), abs=1e-6)
