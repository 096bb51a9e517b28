"""Losses over a catalogue equal their definitions, values and gradients, however they are cut into chunks."""

import pytest
import torch
from torch.nn import functional

from recollect.errors import ConfigError, InputError, UnknownName
from recollect.recommenders import losses
from recollect.recommenders.configs import HSTUConfig, SASRecConfig
from recollect.recommenders.losses import cross_entropy, draw_negatives, gbce_beta, sampled_loss, starting_offset
from recollect.recommenders.sasrec import SASRecModule


def problem(n_positions=37, n_items=23, width=5, dtype=torch.double, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_positions, width, dtype=dtype, generator=generator, requires_grad=True)
    items = torch.randn(n_items, width, dtype=dtype, generator=generator, requires_grad=True)
    return hidden, items, torch.randint(n_items, (n_positions,), generator=generator)


@pytest.fixture(params=[16, 400, 2**20], ids=["smallest chunks", "several chunks", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SCORES", request.param)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.usefixtures("chunks")
def test_cross_entropy_and_its_gradients_equal_those_of_the_whole_score_matrix():
    hidden, items, targets = problem()
    ours, theirs = cross_entropy(hidden, items, targets), functional.cross_entropy(hidden @ items.T, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for found, expected in zip(gradients(3 * ours, hidden, items), gradients(3 * theirs, hidden, items), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("chunks")
def test_weighted_cross_entropy_is_the_weighted_mean():
    hidden, items, targets = problem()
    weights = torch.linspace(0, 2, len(targets), dtype=torch.double)
    each = functional.cross_entropy(hidden @ items.T, targets, reduction="none")
    expected = (each * weights).sum() / weights.sum()
    ours = cross_entropy(hidden, items, targets, weights)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(gradients(ours, hidden, items), gradients(expected, hidden, items), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_gradients_pass_the_finite_difference_check(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SCORES", 16)
    hidden, items, targets = problem(n_positions=20, n_items=7, width=3)
    negatives = draw_negatives(targets, 4, 7)
    assert torch.autograd.gradcheck(lambda a, b: cross_entropy(a, b, targets), (hidden, items))
    for kind in losses.SAMPLED_LOSSES:
        assert torch.autograd.gradcheck(
            lambda a, b, kind=kind: sampled_loss(kind, a, b, targets, negatives), (hidden, items)
        )


def test_a_wrong_gradient_would_be_found(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SCORES", 16)
    hidden, items, targets = problem(n_positions=20, n_items=7, width=3)
    forward = losses._CrossEntropy.backward
    monkeypatch.setattr(
        losses._CrossEntropy, "backward", staticmethod(lambda ctx, g: (forward(ctx, g)[0], None, None, None))
    )
    with pytest.raises(RuntimeError, match=r"Jacobian mismatch|not independent"):
        torch.autograd.gradcheck(lambda a, b: cross_entropy(a, b, targets), (hidden, items))


def test_cross_entropy_is_exact_where_the_targets_probability_underflows():
    hidden = torch.tensor([[200.0], [1.0]], requires_grad=True)
    items = torch.tensor([[1.0], [0.0]], requires_grad=True)
    targets = torch.tensor([1, 0])
    expected = functional.cross_entropy(hidden @ items.T, targets)
    torch.testing.assert_close(cross_entropy(hidden, items, targets), expected)
    assert expected > 100


@pytest.mark.parametrize("ratio", [0, 64], ids=["gathered", "scored whole"])
@pytest.mark.parametrize("kind", losses.SAMPLED_LOSSES)
@pytest.mark.usefixtures("chunks")
def test_sampled_losses_equal_their_formulas(kind, ratio, monkeypatch):
    monkeypatch.setattr(losses, "DENSE_RATIO", ratio)
    hidden, items, targets = problem()
    negatives = draw_negatives(targets, 6, len(items))
    scores = hidden @ items.T
    positive, negative = scores.gather(1, targets[:, None]), scores.gather(1, negatives)
    alpha = 6 / (len(items) - 1)
    beta = alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha)
    log_no = torch.log(1 - torch.sigmoid(negative)).sum(1)
    expected = {
        "bce": -(torch.sigmoid(positive).log().squeeze(1) + log_no) / 7,
        "gbce": -((torch.sigmoid(positive) ** beta).log().squeeze(1) + log_no) / 7,
        "bpr": -torch.sigmoid(positive - negative).log().mean(1),
        "softmax": -torch.log(positive.exp().squeeze(1) / (positive.exp().squeeze(1) + negative.exp().sum(1))),
    }[kind].mean()
    ours = sampled_loss(kind, hidden, items, targets, negatives, calibration=0.75)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    for found, wanted in zip(gradients(ours, hidden, items), gradients(expected, hidden, items), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ratio", [0, 64], ids=["gathered", "scored whole"])
@pytest.mark.usefixtures("chunks")
def test_an_offset_is_added_to_every_score_and_gets_its_gradient(ratio, monkeypatch):
    monkeypatch.setattr(losses, "DENSE_RATIO", ratio)
    hidden, items, targets = problem()
    negatives = draw_negatives(targets, 6, len(items))
    offset = torch.tensor([-0.7], dtype=hidden.dtype, requires_grad=True)
    scores = hidden @ items.T + offset
    positive, negative = scores.gather(1, targets[:, None]), scores.gather(1, negatives)
    expected = functional.binary_cross_entropy_with_logits(
        torch.cat([positive, negative], 1), torch.tensor([1.0] + [0.0] * 6, dtype=scores.dtype).expand(len(hidden), 7)
    )
    ours = sampled_loss("bce", hidden, items, targets, negatives, offset=offset)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    own, wanted = (gradients(value, hidden, items, offset) for value in (ours, expected))
    for found, true in zip(own, wanted, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-8, atol=1e-12)


def test_an_offset_starts_where_binary_losses_balance_and_exists_for_them_alone():
    # At -log(k/beta) a positive pulls as hard as its k negatives push, up to terms of that size squared.
    config = SASRecConfig(loss="gbce", negatives=256)
    start = torch.tensor(starting_offset(config, 3417), dtype=torch.float64)
    pull = gbce_beta(256, 3417, config.calibration) * torch.sigmoid(-start)
    assert float(pull / (256 * torch.sigmoid(start))) == pytest.approx(1.0, abs=0.01)
    assert starting_offset(SASRecConfig(loss="bce"), 100) == 0.0
    assert starting_offset(SASRecConfig(), 100) is None
    assert starting_offset(HSTUConfig(loss="sampled"), 100) is None
    assert dict(SASRecModule(SASRecConfig(), 5).named_parameters()).keys().isdisjoint({"offset"})


def test_gbce_beta_runs_from_one_to_the_sampling_rate():
    assert gbce_beta(256, 3417, 0.0) == pytest.approx(1.0)
    assert gbce_beta(256, 3417, 1.0) == pytest.approx(256 / 3416)
    with pytest.raises(ConfigError, match="calibration must be in"):
        gbce_beta(1, 10, 1.5)


def test_negatives_are_uniform_over_all_items_but_the_target():
    torch.manual_seed(0)
    targets = torch.tensor([0, 3, 6])
    drawn = draw_negatives(targets, 70_000, 7)
    for row, target in zip(drawn, targets, strict=True):
        counts = torch.bincount(row, minlength=7)
        assert counts[target] == 0
        others = counts[torch.arange(7) != target]
        assert (others - 70_000 / 6).abs().max() < 5 * (70_000 / 6) ** 0.5


def test_what_cannot_be_a_loss_is_refused():
    hidden, items, targets = problem()
    with pytest.raises(InputError, match="do not fit"):
        cross_entropy(hidden[:, :2], items, targets)
    with pytest.raises(InputError, match="targets must be"):
        cross_entropy(hidden, items, targets[:-1])
    with pytest.raises(InputError, match="at least one position"):
        cross_entropy(hidden[:0], items, targets[:0])
    with pytest.raises(InputError, match="negatives must be"):
        sampled_loss("bce", hidden, items, targets, targets[:, None][:-1])
    with pytest.raises(UnknownName, match="unknown sampled loss"):
        sampled_loss("hinge", hidden, items, targets, targets[:, None])
