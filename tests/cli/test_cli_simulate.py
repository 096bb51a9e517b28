"""`recollect simulate` as a user types it: plan, small run, page, resume, replay."""

import json
import subprocess
import sys

import pytest

SMALL = ("harbor", "--users", "3", "--interactions-per-user", "1", "--held-out", "1")


def recollect(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", "recollect", *words], capture_output=True, text=True, cwd=cwd, timeout=280, check=False
    )


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    done = recollect("simulate", *SMALL, "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ledger"]["users"] == 3
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, smollm2_dir, minilm_dir):
    folder = tmp_path_factory.mktemp("simulate")
    done = recollect("simulate", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_says_where_it_writes_and_leaves_the_promised_files(finished):
    folder, done = finished
    out = folder / "runs" / "simulate-harbor-1"
    assert "recollect: writing to runs/simulate-harbor-1" in done.stderr
    assert {"run.json", "report.json", "report.html", "events.jsonl"} <= {file.name for file in out.iterdir()}
    run = json.loads((out / "run.json").read_text())
    assert (run["command"], run["options"]["users"], run["seed"]) == ("simulate", 3, 0)
    report = json.loads((out / "report.json").read_text())
    assert {"ranking/mrr", "ranking/ndcg@10", "ranking/hr@1", "choice/accuracy"} <= set(report["metrics"])
    assert {"random", "popularity", "tfidf-history"} <= set(report["baselines"])
    page = (out / "report.html").read_text()
    assert "Agreement with the real log" in page
    assert "How these numbers were made" in page


def test_the_folder_is_not_overwritten_unasked_and_resume_needs_equal_options(finished):
    folder, _ = finished
    again = recollect("simulate", *SMALL, "--out", "runs/simulate-harbor-1", cwd=folder)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    other = recollect("simulate", *SMALL, "--writer", "llm", "--resume", "--out", "runs/simulate-harbor-1", cwd=folder)
    assert other.returncode == 2


def test_resume_of_a_finished_run_changes_no_event(finished):
    folder, _ = finished
    events = folder / "runs" / "simulate-harbor-1" / "events.jsonl"
    before = events.read_bytes()
    done = recollect("simulate", *SMALL, "--resume", "--out", "runs/simulate-harbor-1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert events.read_bytes() == before


def test_replay_needs_no_model_and_gives_the_same_metrics(finished):
    folder, _ = finished
    out = folder / "runs" / "simulate-harbor-1"
    done = recollect("simulate", "--replay", "runs/simulate-harbor-1", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"] == json.loads((out / "report.json").read_text())["metrics"]
