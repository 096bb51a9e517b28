"""A small simulation on a real vLLM server: the whole recipe, journaled, replayed without the server."""

import os

import pytest

import recollect

pytestmark = pytest.mark.server


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
