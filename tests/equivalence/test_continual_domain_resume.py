"""A stream of domains that is stopped anywhere and resumed ends with the bytes of an uninterrupted run."""

import json

import pytest
from support.continual_worlds import StopAfter, Stopped, write_byte_decoder
from support.domain_worlds import SMALL_DOMAINS, walks, written

from recollect.continual.methods.state_file import read_state
from recollect.continual.run import continual

METHOD = "mh-moe-replay"  # two phases a task, experts that grow, a memory


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    write_byte_decoder(folder / "bytes")
    written(walks((1, 3), n_users=8, length=5), folder / "walks")
    return folder


def run(world, out, **more):
    options = {**SMALL_DOMAINS, "method": METHOD, "backbone": str(world / "bytes"), "out": str(out)}
    return continual(world / "walks", **{**options, **more})


def results(out):
    """Lists, scores and states; without the clock."""
    found = {}
    for path in sorted((out / "methods").rglob("cells/*.jsonl")):
        found[path.name] = path.read_bytes()
    for path in sorted((out / "methods").rglob("method_state.safetensors")):
        state = read_state(path.parent)  # the file's header has no fixed order
        tensors = {name: tensor.numpy().tobytes() for name, tensor in state.tensors.items()}
        found[path.parent.name] = tensors, state.values
    found["matrix"] = json.loads((out / "report.json").read_text())["accuracy_matrix"]
    return found


@pytest.fixture(scope="module")
def uninterrupted(world):
    run(world, world / "whole")
    return results(world / "whole")


@pytest.mark.parametrize(
    ("where", "steps"),
    [
        ("learning b", 3),  # in the middle of the second task
        ("after task 2: answering a", 1),  # an exam half done
    ],
)
def test_a_stopped_and_resumed_run_repeats_the_uninterrupted_one(world, uninterrupted, tmp_path, where, steps):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        run(world, out, progress=StopAfter(where, steps))
    assert not (out / "report.json").exists()
    run(world, out, resume=True)
    assert results(out) == uninterrupted
    assert len(uninterrupted) == 3 + 2 + 1
