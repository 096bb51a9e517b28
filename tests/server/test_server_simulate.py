"""A small simulation on a real vLLM server: the whole recipe, journaled, replayed without the server."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from support.killed_runs import REPOSITORY, Child

import recollect

pytestmark = [pytest.mark.server, pytest.mark.timeout(2400)]


@pytest.fixture
def backbone() -> str:
    url = os.environ.get("RECOLLECT_VLLM_URL")
    if not url:
        pytest.skip("RECOLLECT_VLLM_URL is not set; start a server with .ci/vllm_server.sh")
    return f"openai:{url}"


def test_a_simulation_on_a_server_finishes_and_replays_without_it(backbone, minilm_dir, tmp_path):
    out = tmp_path / "run"
    report = recollect.simulate(
        "harbor", users=4, interactions_per_user=2, held_out=1, backbone=backbone, concurrency=16, out=out
    )
    assert report.ledger["requests"] > 0
    assert report.ledger["failures"] == 0
    assert 0.0 <= report.metrics["choice/accuracy"]["value"] <= 1.0
    assert (out / "events.jsonl").stat().st_size > 0
    assert (out / "report.html").is_file()
    replayed = recollect.simulate(replay=str(out))
    assert replayed.metrics["ranking/mrr"] == report.metrics["ranking/mrr"]


def test_a_simulation_whose_server_is_killed_and_comes_back_ends_as_an_undisturbed_one(backbone, minilm_dir, tmp_path):
    state = os.environ.get("RECOLLECT_VLLM_STATE")
    if not state:
        pytest.skip("RECOLLECT_VLLM_STATE is not set, so the server cannot be killed")
    model, port, name = (Path(state) / "started").read_text().split("\n")[:3]
    # One call at a time: a floating-point server computes the last bits of an answer together with its company.
    arguments = ("--users", "4", "--interactions-per-user", "4", "--held-out", "1", "--backbone", backbone)
    undisturbed, disturbed = (
        Child(tmp_path / folder, (*arguments, "--concurrency", "1")) for folder in ("undisturbed", "disturbed")
    )
    undisturbed.finish()
    running = disturbed.start()
    disturbed.wait_for_calls(10, running)
    os.killpg(int((Path(state) / "pid").read_text()), signal.SIGKILL)
    before = len(disturbed.recorded())
    subprocess.run([str(REPOSITORY / ".ci" / "vllm_server.sh"), "start", state, model, port, name], check=True)
    running.wait(timeout=1500)
    if running.returncode != 0:
        assert running.returncode == 75, "a server that stayed away leaves a run that --resume finishes"
        disturbed.finish()
    assert before < len(undisturbed.recorded()), "the server was killed in the middle of the run"
    assert disturbed.events() == undisturbed.events()
    assert sorted(disturbed.recorded()) == sorted(undisturbed.recorded())
    assert disturbed.sent_twice() <= 1
