"""The training loop does what its options say, the same each time, and ends in an error where training fails."""

from dataclasses import replace

import pytest
import torch
from support.loop_world import CONFIG, Problem
from torch import nn

from recollect.checkpoints import Moments
from recollect.errors import ConfigError, InputError, TrainingDiverged
from recollect.loop import LoopConfig, learning_rate_factor, train
from recollect.progress import SilentProgress
from recollect.tracking import Tracker


def test_two_runs_are_equal_and_leave_the_global_generator_alone():
    torch.manual_seed(11)
    one, other = Problem(), Problem()
    state = torch.get_rng_state()
    first = one.run()
    torch.rand(5)
    torch.manual_seed(12)
    second = other.run()
    assert first.history == second.history
    for name, tensor in one.weights().items():
        assert torch.equal(tensor, other.weights()[name])
    torch.manual_seed(11)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_of_the_steps_matters():
    one, other = Problem(), Problem()
    one.run()
    other.run(config=replace(CONFIG, seed=4))
    assert not torch.equal(one.weights()["0.weight"], other.weights()["0.weight"])


class Straight:
    """Linear regression without randomness: a reference can be written in ten lines."""

    def __init__(self, n_batches=6):
        generator = torch.Generator().manual_seed(0)
        self.module = nn.Linear(4, 1, dtype=torch.double)
        with torch.no_grad():
            self.module.weight.fill_(0.1)
            self.module.bias.fill_(0.0)
        self.x = torch.randn(n_batches, 5, 4, dtype=torch.double, generator=generator)
        self.y = self.x.sum(2, keepdim=True)

    def batches(self, epoch):
        return [(self.x[index], self.y[index]) for index in range(len(self.x))]

    def loss(self, batch):
        return nn.functional.mse_loss(self.module(batch[0]), batch[1])


def plain_adamw(problem, config, epochs, bias_decay=None):
    decays = {"weight": config.weight_decay, "bias": config.weight_decay if bias_decay is None else bias_decay}
    optimizer = torch.optim.AdamW(
        [{"params": [getattr(problem.module, name)], "weight_decay": decay} for name, decay in decays.items()],
        lr=config.learning_rate,
        betas=config.betas,
    )
    for _ in range(epochs):
        batches = problem.batches(0)
        for first in range(0, len(batches), config.accumulation):
            window = batches[first : first + config.accumulation]
            optimizer.zero_grad()
            sum(problem.loss(batch) for batch in window).div(len(window)).backward()
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(problem.module.parameters(), config.clip_norm)
            optimizer.step()


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"accumulation": 2}, {"accumulation": 4}, {"clip_norm": 0.01}]
)
def test_the_loop_equals_plain_adamw(options):
    config = LoopConfig(epochs=3, learning_rate=0.05, **options)
    ours, theirs = Straight(), Straight()
    result = train(ours.module, batches=ours.batches, loss=ours.loss, config=config)
    plain_adamw(theirs, config, 3)
    torch.testing.assert_close(ours.module.weight, theirs.module.weight, rtol=1e-9, atol=1e-12)
    assert result.steps == 3 * -(-6 // config.accumulation)
    assert result.epochs == result.best_epoch == 3
    assert result.best_validation is None


def test_what_is_spared_does_not_decay():
    config = LoopConfig(epochs=3, learning_rate=0.05, weight_decay=0.5)
    ours, theirs, other = Straight(), Straight(), Straight()
    train(ours.module, batches=ours.batches, loss=ours.loss, config=config, undecayed=[ours.module.bias])
    plain_adamw(theirs, config, 3, bias_decay=0.0)
    plain_adamw(other, config, 3)
    torch.testing.assert_close(ours.module.bias, theirs.module.bias, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.module.weight, theirs.module.weight, rtol=1e-9, atol=1e-12)
    assert (ours.module.bias - other.module.bias).abs().max() > 1e-4


def test_accumulated_small_batches_equal_one_large_batch():
    small, large = Straight(), Straight()
    large.x, large.y = large.x.flatten(0, 1)[None], large.y.flatten(0, 1)[None]
    train(small.module, batches=small.batches, loss=small.loss, config=LoopConfig(epochs=5, accumulation=6))
    train(large.module, batches=large.batches, loss=large.loss, config=LoopConfig(epochs=5))
    torch.testing.assert_close(small.module.weight, large.module.weight, rtol=1e-9, atol=1e-12)


def test_training_ends_after_patience_and_keeps_the_best_weights():
    problem, values, seen = Straight(), iter([1.0, 3.0, 2.0, 3.0, 2.5, 9.0]), []

    def validate():
        assert not problem.module.training
        assert not torch.is_grad_enabled()
        seen.append(problem.module.weight.detach().clone())
        return next(values)

    config = LoopConfig(epochs=10, patience=3)
    result = train(problem.module, batches=problem.batches, loss=problem.loss, config=config, validate=validate)
    assert (result.epochs, result.best_epoch, result.best_validation) == (5, 2, 3.0)
    assert [row.get("validation") for row in result.history] == [1.0, 3.0, 2.0, 3.0, 2.5]
    assert torch.equal(problem.module.weight, seen[1])
    assert not problem.module.training


def test_validation_comes_every_few_epochs_and_at_the_end():
    problem, count = Straight(), []
    config = LoopConfig(epochs=5, validate_every=2, patience=None)
    result = train(
        problem.module,
        batches=problem.batches,
        loss=problem.loss,
        config=config,
        validate=lambda: count.append(0) or float(len(count)),
    )
    assert ["validation" in row for row in result.history] == [False, True, False, True, True]
    assert result.best_epoch == 5


def test_the_schedule_warms_up_and_follows_half_a_cosine():
    config = LoopConfig(warmup_steps=4, schedule="cosine")
    assert [learning_rate_factor(config, step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate_factor(config, 100, 0.5) == pytest.approx(0.5)
    assert learning_rate_factor(config, 100, 1.0) == pytest.approx(0.0)
    assert learning_rate_factor(LoopConfig(), 0, 0.9) == 1.0


def test_only_the_given_parameters_move():
    problem = Straight()
    bias = problem.module.bias.detach().clone()
    train(
        problem.module,
        batches=problem.batches,
        loss=problem.loss,
        config=LoopConfig(epochs=1),
        parameters=[problem.module.weight],
    )
    assert torch.equal(problem.module.bias, bias)
    assert not torch.equal(problem.module.weight, torch.full_like(problem.module.weight, 0.1))


def test_parameters_that_cannot_be_trained_are_refused():
    problem = Straight()
    for bad in ([], [nn.Parameter(torch.zeros(1))]):
        with pytest.raises(ConfigError, match="every parameter to train must belong"):
            train(
                problem.module, batches=problem.batches, loss=problem.loss, config=LoopConfig(epochs=1), parameters=bad
            )
    with pytest.raises(ConfigError, match="no batch to train on"):
        train(problem.module, batches=lambda epoch: [], loss=problem.loss, config=LoopConfig(epochs=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(value):
    problem = Straight()
    problem.y[3] = value
    with pytest.raises(TrainingDiverged, match=r"loss is (nan|inf) at step 4 \(epoch 1, batch 4 of 6\)"):
        train(problem.module, batches=problem.batches, loss=problem.loss, config=LoopConfig(epochs=2))


def test_a_validation_that_is_no_number_ends_the_run():
    problem = Straight()
    with pytest.raises(TrainingDiverged, match="validation after epoch 1 is nan"):
        train(
            problem.module,
            batches=problem.batches,
            loss=problem.loss,
            config=LoopConfig(epochs=2),
            validate=lambda: float("nan"),
        )


def test_progress_and_metrics_follow_the_run(tmp_path):
    class Counting(SilentProgress):
        def __init__(self):
            self.stages, self.steps = [], 0

        def stage(self, name, total=None):
            self.stages.append((name, total))

        def advance(self, steps=1, note=""):
            self.steps += steps

    problem, progress = Straight(), Counting()
    config = LoopConfig(epochs=2, accumulation=4)
    train(
        problem.module,
        batches=problem.batches,
        loss=problem.loss,
        config=config,
        progress=progress,
        tracker=Tracker(tmp_path),
    )
    assert progress.stages == [("epoch 1 of at most 2", 6), ("epoch 2 of at most 2", 6)]
    assert progress.steps == 12
    rows = Tracker(tmp_path).rows()
    assert [(row["step"], row["epoch"]) for row in rows] == [(2, 1), (4, 2)]
    assert rows[1]["loss"] < rows[0]["loss"]


def test_reduced_precision_leaves_the_setting_as_it_was():
    before = torch.backends.mkldnn.matmul.fp32_precision
    problem = Problem()
    result = problem.run(config=replace(CONFIG, precision="bf16"))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert all(tensor.dtype != torch.bfloat16 for tensor in problem.weights().values())
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number not below 0"),
        ({"weight_decay": -1.0}, "must not be negative"),
        ({"patience": 0}, "patience must be at least 1 or none"),
        ({"clip_norm": 0.0}, "clip_norm must be positive or none"),
        ({"schedule": "linear"}, "schedule must be"),
        ({"precision": "fp16"}, "precision must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
    ],
)
def test_illegal_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LoopConfig(**options)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_two_runs_with_one_optimiser_and_one_schedule_are_one_run_of_both(schedule, tmp_path):
    config = LoopConfig(epochs=4, learning_rate=0.05, schedule=schedule, warmup_steps=3)
    whole, parts, anew = Straight(), Straight(), Straight()
    train(whole.module, batches=whole.batches, loss=whole.loss, config=config)
    moments = Moments()
    for span in ((0.0, 0.5), (0.5, 1.0)):
        half = replace(config, epochs=2, schedule_span=span)
        train(parts.module, batches=parts.batches, loss=parts.loss, config=half, moments=moments)
        train(anew.module, batches=anew.batches, loss=anew.loss, config=half)
        moments.write(tmp_path / "moments")
        moments = Moments.read(tmp_path / "moments")
    assert torch.equal(whole.module.weight, parts.module.weight)
    assert torch.equal(whole.module.bias, parts.module.bias)
    assert not torch.equal(whole.module.weight, anew.module.weight)


def test_moments_of_another_shape_or_name_are_left_behind_and_a_torn_file_is_refused(tmp_path):
    problem, moments = Straight(), Moments()
    config = LoopConfig(epochs=1, learning_rate=0.05)
    train(problem.module, batches=problem.batches, loss=problem.loss, config=config, moments=moments)
    assert set(moments.tensors) == {"weight", "bias"}
    moments.tensors["weight"]["exp_avg"] = torch.zeros(1, 5, dtype=torch.double)
    moments.tensors["gone"] = moments.tensors.pop("bias")
    one, other = Straight(), Straight()
    train(one.module, batches=one.batches, loss=one.loss, config=config, moments=moments)
    train(other.module, batches=other.batches, loss=other.loss, config=config)
    assert torch.equal(one.module.weight, other.module.weight)
    assert set(moments.tensors) == {"weight", "bias"}
    (tmp_path / "moments").write_bytes(b"torn")
    with pytest.raises(InputError, match="start the run anew"):
        Moments.read(tmp_path / "moments")
    with pytest.raises(ConfigError, match="schedule_span"):
        LoopConfig(schedule_span=(0.5, 0.5))
