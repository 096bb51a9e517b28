"""A killed training run, resumed, ends with the very weights of the uninterrupted one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.loop_world import CONFIG, Problem
from support.neural_worlds import small_model
from support.recommender_worlds import random_log

from recollect.checkpoints import CHECKPOINT_FILE
from recollect.data.splits import leave_one_out
from recollect.errors import InputError, ResumeRefused
from recollect.rng import call_seed
from recollect.tracking import Tracker

TESTS = Path(__file__).resolve().parent.parent


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class _Stop(Exception):
    pass


class _Interrupted(Problem):
    def __init__(self, stop_at):
        super().__init__()
        self.stop_at = stop_at

    def loss(self, rows):
        if self.losses_taken == self.stop_at:
            raise _Stop
        return super().loss(rows)


@pytest.fixture(scope="module")
def whole():
    problem = Problem()
    result = problem.run()
    return problem.weights(), result


@pytest.mark.parametrize("stop_at", [1, 6, 7, 10, 20, 27])
def test_a_run_resumed_after_any_step_ends_with_the_same_weights(stop_at, whole, tmp_path):
    weights, result = whole
    with pytest.raises(_Stop):
        _Interrupted(stop_at).run(folder=tmp_path, checkpoint_every=3, tracker=Tracker(tmp_path))
    resumed = Problem()
    again = resumed.run(folder=tmp_path, checkpoint_every=3, tracker=Tracker(tmp_path))
    assert_same(resumed.weights(), weights)
    assert again.history == result.history
    assert (again.best_epoch, again.best_validation, again.steps) == (
        result.best_epoch,
        result.best_validation,
        result.steps,
    )
    checkpoint = max(stop_at // 3 * 3, stop_at // 7 * 7)  # every 3 steps, and at the end of each epoch of 7
    assert resumed.losses_taken == 28 - checkpoint
    assert [row["step"] for row in Tracker(tmp_path).rows()] == [7, 14, 21, 28]


def test_a_process_killed_twice_and_resumed_ends_with_the_same_weights(whole, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    for kill_at in (11, 6):
        child = [sys.executable, "-m", "support.loop_world", str(tmp_path), str(kill_at)]
        done = subprocess.run(child, env=environment, capture_output=True, timeout=240)
        assert done.returncode == -9, done.stderr.decode()
    resumed = Problem()
    resumed.run(folder=tmp_path, checkpoint_every=3, tracker=Tracker(tmp_path))
    assert 0 < resumed.losses_taken < 28
    assert_same(resumed.weights(), whole[0])


def test_a_finished_run_is_only_loaded(whole, tmp_path):
    Problem().run(folder=tmp_path)
    loaded = Problem()
    result = loaded.run(folder=tmp_path)
    assert loaded.losses_taken == 0
    assert_same(loaded.weights(), whole[0])
    assert result.best_validation == whole[1].best_validation


def test_other_step_seeds_would_be_noticed(whole, monkeypatch):
    monkeypatch.setattr("recollect.loop.call_seed", lambda seed, *names: call_seed(seed, *names) + 1)
    changed = Problem()
    changed.run()
    assert not torch.equal(changed.weights()["0.weight"], whole[0]["0.weight"])


def test_a_checkpoint_of_other_options_or_another_module_is_refused(tmp_path):
    Problem().run(folder=tmp_path)
    with pytest.raises(ResumeRefused, match=r"learning_rate=0.01, not 0.5"):
        Problem().run(config=replace(CONFIG, learning_rate=0.5), folder=tmp_path)
    other = Problem()
    other.module = torch.nn.Linear(5, 1)
    with pytest.raises(ResumeRefused, match="another model"):
        other.run(folder=tmp_path)


@pytest.mark.parametrize("content", [b"", b"not tensors at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_is_no_checkpoint_is_named(content, tmp_path):
    (tmp_path / CHECKPOINT_FILE).write_bytes(content)
    with pytest.raises(InputError, match=f"{CHECKPOINT_FILE} is not a checkpoint"):
        Problem().run(folder=tmp_path)


def test_a_resumed_fit_of_a_model_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    dataset = random_log(30, 20, length=8)
    split = leave_one_out(dataset)
    whole = small_model("sasrec-bce", batch_size=8).fit(dataset, split)
    stopped = small_model("sasrec-bce", batch_size=8)
    original, count = stopped.module_class.training_loss, [0]

    def loss(self, batch):
        count[0] += 1
        if count[0] == 7:
            raise _Stop
        return original(self, batch)

    monkeypatch.setattr(stopped.module_class, "training_loss", loss)
    with pytest.raises(_Stop):
        stopped.fit(dataset, split, folder=tmp_path, checkpoint_every=1)
    resumed = small_model("sasrec-bce", batch_size=8).fit(dataset, split, folder=tmp_path, checkpoint_every=1)
    assert count[0] == 7 + 2  # batches 7 and 8 of 2 epochs with 4
    assert_same(resumed.module.state_dict(), whole.module.state_dict())


@pytest.mark.parametrize(
    ("variant", "options", "other_rows", "message"),
    [
        ("sasrec", {"loss": "bce"}, False, r"loss='ce', not 'bce'"),
        ("sasrec", {"dropout": 0.1}, False, r"dropout=0.3, not 0.1"),
        ("sasrec", {}, True, r"rows="),
    ],
)
def test_a_fit_of_other_options_or_rows_is_refused(variant, options, other_rows, message, tmp_path):
    dataset = random_log(12, 10, length=6)
    rows = leave_one_out(dataset).train
    small_model(variant, epochs=1).fit(dataset, rows=rows, folder=tmp_path)
    with pytest.raises(ResumeRefused, match=message):
        small_model(variant, epochs=1, **options).fit(
            dataset, rows=np.ones_like(rows) if other_rows else rows, folder=tmp_path
        )


def test_a_tracker_forgets_what_came_after_the_checkpoint(tmp_path):
    tracker = Tracker(tmp_path)
    assert tracker.rows() == []
    tracker.rewind(0)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 4, "lo')  # torn by a kill
    tracker.rewind(2)
    tracker.log(3, {"loss": 0.5})
    assert tracker.rows() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.5}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        tracker.log(4, {"loss": float("nan")})
