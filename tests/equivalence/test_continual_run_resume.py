"""A continual run that is interrupted anywhere and resumed ends with the bytes of an uninterrupted one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.continual_worlds import SMALL, TASKS, StopAfter, Stopped, write_byte_decoder, write_rows, write_stream

from recollect.continual.learner import best_precision, usual_batch
from recollect.continual.methods.state_file import read_state
from recollect.continual.run import continual
from recollect.errors import ResumeRefused
from recollect.progress import SilentProgress

REPOSITORY = Path(__file__).resolve().parents[2]
GROWING = "mh-moe-replay"  # two phases a task, experts that grow, a memory
KILLED = """
import json, os, signal, sys
from recollect.continual.run import continual
from recollect.progress import SilentProgress

class Dying(SilentProgress):
    name, steps = "", 0
    def stage(self, name, total=None):
        self.learning = self.name.endswith("learning NumGLUE-ds") if name.startswith("epoch") else False
        self.name = name
    def advance(self, steps=1, note=""):
        self.steps += self.learning
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGKILL)

data, options = json.loads(sys.argv[1])
continual(data, progress=Dying(), **options)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    write_stream(folder / "trace", n_train=8, n_test=3)
    write_byte_decoder(folder / "bytes")
    return folder


def options(world, out, method, **more):
    named = {"tasks": ",".join(TASKS), "backbone": str(world / "bytes"), "out": str(out), "method": method}
    return {**SMALL, **named, **more}


def results(out):
    """Everything that must be equal: answers, scores, states; without the clock."""
    found = {}
    for path in sorted((out / "methods").rglob("*")):
        key = str(path.relative_to(out))
        if path.suffix == ".jsonl":
            found[key] = path.read_bytes()
        elif path.name == "method_state.safetensors":
            state = read_state(path.parent)  # the file's header has no fixed order
            found[key] = {name: tensor.numpy().tobytes() for name, tensor in state.tensors.items()}, state.values
        elif path.suffix == ".json":
            values = json.loads(path.read_text())
            for clock in ("seconds", "peak_mb"):
                values.pop(clock, None)
            for phase in values.get("phases", {}).values():
                phase.pop("samples_per_second")
            found[key] = json.dumps(values, sort_keys=True)
    report = json.loads((out / "report.json").read_text())
    found["matrix"] = {name: one["accuracy_matrix"] for name, one in report["methods"].items()}
    return found


@pytest.fixture(scope="module")
def uninterrupted(world):
    outs = {}
    for method in ("seq-lora", GROWING):
        outs[method] = world / f"whole-{method}"
        continual(world / "trace", **options(world, outs[method], method))
    return outs


@pytest.mark.parametrize(
    ("where", "steps"),
    [
        ("learning FOMC", 3),  # in the replay that follows the second task's own training
        ("after task 2: answering FOMC", 1),  # an evaluation half done
    ],
)
def test_a_run_stopped_anywhere_and_resumed_repeats_the_uninterrupted_one(world, uninterrupted, tmp_path, where, steps):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        continual(world / "trace", progress=StopAfter(where, steps), **options(world, out, GROWING))
    assert not (out / "report.json").exists()
    continual(world / "trace", **options(world, out, GROWING, resume=True))
    assert results(out) == results(uninterrupted[GROWING])


def test_kill_9_in_the_middle_of_task_three_and_resume_give_the_same_matrix_bit_for_bit(world, uninterrupted, tmp_path):
    out = tmp_path / "run"
    asked = json.dumps([str(world / "trace"), options(world, out, "seq-lora")])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, asked],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    seed = out / "methods" / "seq-lora" / "seed-0"
    assert (seed / "round-3" / "training" / "train" / "checkpoint.safetensors").is_file()
    assert not (seed / "round-3" / "result.json").exists()
    continual(world / "trace", **options(world, out, "seq-lora", resume=True))
    assert results(out) == results(uninterrupted["seq-lora"])
    assert not (seed / "round-3" / "training").exists()


def test_sequential_lora_goes_through_all_tasks_with_one_optimiser_unless_told_otherwise(
    world, uninterrupted, tmp_path
):
    seed = uninterrupted["seq-lora"] / "methods" / "seq-lora" / "seed-0"
    kept = [(seed / f"round-{stage}" / "optimizer.safetensors").is_file() for stage in range(1, len(TASKS) + 1)]
    assert kept == [True] * (len(TASKS) - 1) + [False]
    continual(world / "trace", **options(world, tmp_path / "run", "seq-lora", set=("seq-lora.reset_optimizer=true",)))
    anew = tmp_path / "run" / "methods" / "seq-lora" / "seed-0"
    first, second = (
        [read_state(folder / f"round-{stage}").tensors for folder in (seed, anew)] for stage in (1, len(TASKS))
    )
    assert all(torch.equal(tensor, first[1][name]) for name, tensor in first[0].items())
    assert any(not torch.equal(tensor, second[1][name]) for name, tensor in second[0].items())
    assert not list(anew.rglob("optimizer.safetensors"))


def test_a_finished_run_is_not_computed_again_and_takes_further_methods_and_seeds(world, uninterrupted, tmp_path):
    class Nothing(SilentProgress):
        def stage(self, name, total=None):
            assert "learning" not in name
            assert "answering" not in name

    out = uninterrupted["seq-lora"]
    before = results(out)
    continual(world / "trace", progress=Nothing(), **options(world, out, "seq-lora", resume=True))
    report = continual(world / "trace", **options(world, out, "lwf,seq-lora", resume=True, seeds=2))
    after = results(out)
    assert all(after[key] == before[key] for key in before if key != "matrix")
    one = report.sections["methods"]["seq-lora"]
    assert [seed["seed"] for seed in one["seeds"]] == [0, 1]
    assert one["seeds"][0]["accuracy_matrix"] == before["matrix"]["seq-lora"]


def test_replay_joins_a_finished_run_and_its_instructions_are_the_replays_own(world, tmp_path):
    shutil.copytree(world / "trace", tmp_path / "trace")
    asked = {"general_examples": 2}

    def go(method, **more):
        return continual(tmp_path / "trace", **options(world, tmp_path / "run", method, **asked, **more))

    alone = go("seq-lora")
    both = go("seq-lora,replay", resume=True)
    assert list(both.sections["methods"]) == ["seq-lora", "replay"]
    one = both.sections["methods"]["seq-lora"]
    assert one["accuracy_matrix"] == alone.sections["methods"]["seq-lora"]["accuracy_matrix"]
    others = [{"prompt": f"Sing {number}.", "answer": f"{number}"} for number in range(3)]
    write_rows(tmp_path / "trace" / "Lima" / "train.json", others)
    go("seq-lora", resume=True)
    with pytest.raises(ResumeRefused, match="general_rows"):
        go("seq-lora,replay", resume=True)


def test_what_auto_means_is_in_the_report_and_a_run_continues_with_the_same_only(world, tmp_path):
    free = {"precision": "auto", "eval_batch": None, "train_examples": 4, "test_examples": 1, "tasks": "FOMC"}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    used = best_precision("auto", device)
    report = continual(world / "trace", **options(world, tmp_path, "seq-lora", **free))
    assert (report.protocol["arithmetic"], report.protocol["answers_at_a_time"]) == (used, usual_batch())
    named = {**free, "precision": used, "eval_batch": usual_batch()}
    continual(world / "trace", **options(world, tmp_path, "seq-lora", resume=True, **named))
    other = {"fp32": "bf16", "bf16": "fp32"}[used]
    with pytest.raises(ResumeRefused, match="precision"):
        continual(world / "trace", **options(world, tmp_path, "seq-lora", resume=True, **{**named, "precision": other}))
    with pytest.raises(ResumeRefused, match="eval_batch"):
        continual(world / "trace", **options(world, tmp_path, "seq-lora", resume=True, **{**named, "eval_batch": 3}))
