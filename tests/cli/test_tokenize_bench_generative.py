"""`recollect tokenize-bench --generative`: HR and NDCG beside their references, added to a run, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from support.token_worlds import themed_log, themed_vectors, write_shop

from recollect.cli.main import main

WORDS = (
    *("tokenize-bench", "shop", "--vectors", "vectors.npy", "--item-ids", "ids.txt", "--core", "0", "--levels", "2"),
    *("--codebook-size", "4", "--methods", "random,rq-kmeans", "--seeds", "1", "--resamples", "100"),
    *("--probe-epochs", "1", "--probe-cases", "200"),
)
GENERATIVE = ("--generative", "--generative-epochs", "2", "--generative-history", "5", "--beams", "12")

CHILD = textwrap.dedent("""
    import os, signal, sys

    import recollect
    from recollect.progress import SilentProgress


    class Deadly(SilentProgress):
        generators, name = 0, ""

        def stage(self, name, total=None):
            self.generators += name.startswith("generator on")
            if self.generators == 2 and name.startswith("epoch 2"):
                os.kill(os.getpid(), signal.SIGKILL)


    options = dict(vectors="vectors.npy", item_ids="ids.txt", core=0, levels=2, codebook_size=4, seeds=1, resamples=100)
    options |= dict(methods=("random", "rq-kmeans"), probe_epochs=1, probe_cases=200)
    options |= dict(generative=True, generative_epochs=2, generative_history=5, beams=12, out="killed")
    recollect.tokenize_bench("shop", progress=Deadly(), **options)
""")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a log, vectors of its items, and `run`: first compared without generators, then with them."""
    folder = tmp_path_factory.mktemp("bench")
    write_shop(folder / "shop", themed_log(n_users=120, length=8))
    np.save(folder / "vectors.npy", themed_vectors())
    (folder / "ids.txt").write_text("".join(f"i{item}\n" for item in range(60)))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert main([*WORDS, "--out", "run"]) == 0
        before = {path: path.stat().st_mtime_ns for path in (folder / "run").glob("*/*/*/result.json")}
        assert main([*WORDS, *GENERATIVE, "--out", "run", "--resume"]) == 0
    return folder, before, json.loads((folder / "run" / "report.json").read_text())


def test_generators_are_added_to_a_finished_run_without_fitting_it_again(world):
    folder, before, _ = world
    assert len(before) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    found = sorted(str(path.relative_to(folder / "run")) for path in folder.glob("run/*/*/*/generative.json"))
    assert found == [
        "floors/item-id/seed-0/generative.json",
        "rows/random/seed-0/generative.json",
        "rows/rq-kmeans/seed-0/generative.json",
    ]
    assert not list(folder.glob("run/*/*/*/generator"))


def test_hit_rate_and_ndcg_stand_beside_popularity_markov_and_item_ids(world):
    _, _, report = world
    tables = {**report["models"], **report["floors"]}
    metrics = [f"generative/{metric}@10{mask}" for metric in ("hr", "ndcg") for mask in ("", "_unmasked")]
    for label in ("random", "rq-kmeans", "popularity", "markov", "item-id"):
        for metric in metrics:
            entry = tables[label][metric]
            assert 0 <= entry["ci95"][0] <= entry["value"] <= entry["ci95"][1] <= 1, (label, metric)
            assert entry["n"] == 120
    assert "generative/ndcg@10" not in tables["no-item"]
    assert tables["popularity"]["downstream/auc"]["value"] == pytest.approx(0.5, abs=0.1)
    found = {row["model"]: row for row in report["differences"] if row["metric"] == "generative/ndcg@10"}
    assert set(found) == {"random", "popularity", "markov", "item-id"}
    for label, row in found.items():
        gap = tables[label][metrics[2]]["value"] - tables["rq-kmeans"][metrics[2]]["value"]
        assert row["value"] == pytest.approx(gap, abs=1e-9)
        assert 0 < row["p_holm"] <= 1
    assert set(report["generative"]) == {"random", "rq-kmeans", "item-id"}
    assert report["generative"]["item-id"]["extra_digits"] == [1]
    assert report["generative"]["rq-kmeans"]["extra_digits"][0] > 1
    assert not any("was not measured" in warning for warning in report["warnings"])


def test_the_page_has_the_table_and_the_differences(world):
    folder, _, _ = world
    page = (folder / "run" / "report.html").read_text()
    for title in (
        "Codes written by a small generator",
        "NDCG@10 of the generator, history masked",
        "Paired differences from rq-kmeans, NDCG@10 of the generator",
        "Paired differences from rq-kmeans, AUC of the click model",
        "the null: codes without content",
        "what followed the last item in training",
    ):
        assert title in page, title
    assert "rq-kmeans,generative/ndcg@10," in (folder / "run" / "tables.csv").read_text()


@pytest.mark.slow
def test_a_run_killed_inside_a_generator_keeps_finished_cells_and_ends_with_the_same_numbers(world, monkeypatch):
    folder, _, report = world
    monkeypatch.chdir(folder)
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    cells = {path: path.stat().st_mtime_ns for path in folder.glob("killed/*/*/*/*.json")}
    names = sorted(str(path.relative_to(folder / "killed" / "rows")) for path in cells)
    assert names == [
        "random/seed-0/generative.json",
        "random/seed-0/result.json",
        "rq-kmeans/seed-0/result.json",
    ]
    assert (folder / "killed/rows/rq-kmeans/seed-0/generator/checkpoint.safetensors").is_file()
    assert main([*WORDS, *GENERATIVE, "--out", "killed", "--resume"]) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in cells.items())
    for place in ("rows/random", "rows/rq-kmeans", "floors/item-id"):
        name = f"{place}/seed-0/generative.safetensors"
        assert (folder / "killed" / name).read_bytes() == (folder / "run" / name).read_bytes(), name
    after = json.loads((folder / "killed" / "report.json").read_text())
    assert [row for row in after["differences"] if "generative" in row["metric"]] == [
        row for row in report["differences"] if "generative" in row["metric"]
    ]


def test_a_generator_of_other_options_is_refused_and_bad_options_are_named(world, monkeypatch, capsys):
    folder, _, _ = world
    monkeypatch.chdir(folder)
    more = [*WORDS, *GENERATIVE, "--out", "run", "--resume"]
    assert main([*more, "--beams", "15"]) == 2
    assert "was made with another beams" in capsys.readouterr().err
    assert main([*more, "--beams", "5"]) == 2
    assert "beams must be at least 10, got 5" in capsys.readouterr().err
    assert main([*WORDS, *GENERATIVE, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["ledger"]["generators"], plan["ledger"]["rows_to_run"]) == (3, 4)


def test_without_a_log_there_is_a_warning_and_no_generator(world, monkeypatch, capsys):
    folder, _, _ = world
    monkeypatch.chdir(folder)
    words = ["tokenize-bench", "vectors.npy", *WORDS[8:16], "--generative", "--out", "file", "--json"]
    assert main([word for word in words if word]) == 0
    report = json.loads(capsys.readouterr().out)
    assert any("so the generator was left out" in warning for warning in report["warnings"])
    assert report["generative"] == {}
