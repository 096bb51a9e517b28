"""A run that is killed, starved of disk, raced or interrupted ends as if nothing had happened, and pays once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BATCH_SIZE, CONCURRENCY = 4, 8


def harness(mode: str, folder: Path, hash_seed: int = 0, **options) -> dict:
    words = [f"{name}={value}" for name, value in options.items()]
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "support.journal_child", mode, str(folder), *words],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_undisturbed(found: dict) -> None:
    assert found["same_events"]
    assert found["same_calls"]
    assert found["same_digest"]
    assert found["problems"] == []
    assert found["recorded_paid_again"] == 0
    assert found["requests"] == found["paid"] - found["twice"]


@pytest.mark.parametrize(("model", "in_flight", "delay"), [("batch", BATCH_SIZE, 0.015), ("served", CONCURRENCY, 0.03)])
def test_sixty_kills_at_random_instants_change_nothing(tmp_path, model, in_flight, delay):
    found = harness("kill", tmp_path, agents=40, steps=800, kills=60, longest=0.1, delay=delay, model=model, seed=1)
    assert found["stopped"] >= 60
    assert set(found["codes"]) <= {"-9", "0"}
    assert_undisturbed(found)
    assert found["twice"] <= found["stopped"] * in_flight


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("model", "in_flight", "delay"), [("batch", BATCH_SIZE, 0.025), ("served", CONCURRENCY, 0.03)])
def test_a_thousand_kills_of_two_hundred_agents_change_nothing(tmp_path, model, in_flight, delay):
    found = harness(
        "kill", tmp_path, agents=200, steps=10_000, kills=1000, longest=0.25, delay=delay, model=model, seed=2
    )
    assert found["stopped"] >= 1000
    assert_undisturbed(found)
    assert found["twice"] <= found["stopped"] * in_flight


@pytest.mark.parametrize("model", ["batch", "served"])
def test_a_kill_at_every_boundary_of_every_write_changes_nothing(tmp_path, model):
    found = harness("boundaries", tmp_path, agents=6, steps=14, barrier_every=6, model=model)
    assert found["wrong"] == []
    # A server's answers arrive in other groups each time, so its last few boundaries may not be there to be killed at.
    assert found["n_killed"] >= (found["n"] if model == "batch" else 0.8 * found["n"])
    assert found["recorded_paid_again"] == 0
    assert found["most_twice"] <= (BATCH_SIZE if model == "batch" else CONCURRENCY) + 3  # three texts in one embedding
    writes = {
        f"{write}:{place}"
        for write in ("commit", "embeddings", "record")
        for place in ("begin", "written", "committed")
    }
    export = {"export:begin", "export:written", "export:done", "fsync:before", "fsync:after"}
    export |= {"replace:before", "replace:after"}
    assert set(found["names"]) <= writes | export
    if model == "batch":
        assert set(found["names"]) == writes | export


@pytest.mark.parametrize("model", ["batch", "served"])
def test_a_full_disk_refuses_with_74_and_the_run_goes_on_when_there_is_space(tmp_path, model):
    found = harness("full", tmp_path, agents=12, steps=100, model=model)
    assert set(found["codes"][:-1]) == {74}
    assert len(found["codes"]) > 10
    assert found["codes"][-1] == 0
    assert_undisturbed(found)


def test_of_two_processes_on_one_run_exactly_one_writes_and_the_other_names_it(tmp_path):
    assert harness("race", tmp_path, kills=100) == {"one wrote, the other named it": 100}


@pytest.mark.parametrize(("model", "name"), [("batch", "SIGINT"), ("served", "SIGTERM"), ("served", "SIGINT")])
def test_an_interrupted_run_ends_with_130_and_goes_on(tmp_path, model, name):
    found = harness(
        "signal", tmp_path, agents=20, steps=400, kills=12, longest=0.15, delay=0.01, model=model, signal=name
    )
    # -15: the signal came while the interpreter was still starting, before anybody could handle it.
    assert set(found["codes"]) <= {"130", "0", "-15"}
    assert found["codes"]["130"] > 3
    assert_undisturbed(found)


def test_hash_seeds_of_the_interpreter_do_not_reach_the_log(tmp_path):
    logs = {
        harness("play", tmp_path / f"{hash_seed}", hash_seed, agents=10, steps=80, model="served")["events"]
        for hash_seed in (0, 1, 4242)
    }
    assert len(logs) == 1
