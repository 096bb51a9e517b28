"""`recollect evaluate` as a user types it, on a small csv log: plan, run, resume, page, errors."""

import json
import subprocess
import sys

import pytest
from support.recommender_worlds import random_log

from recollect.cli.main import main


def recollect(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", "recollect", *words], capture_output=True, text=True, cwd=cwd, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a raw csv data set `shop` and a file of options."""
    folder = tmp_path_factory.mktemp("evaluate")
    log = random_log(n_users=50, n_items=24, length=10).interactions
    raw = folder / "shop"
    raw.mkdir()
    lines = [f"u{user},i{item},{time}" for user, item, time in zip(log.user, log.item, log.time, strict=True)]
    (raw / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(lines) + "\n")
    (raw / "items.csv").write_text("item_id,title\n" + "".join(f"i{item},thing {item}\n" for item in range(24)))
    (folder / "rows.yaml").write_text(
        "models: [pop, markov, sasrec, narrow]\n"
        "sasrec: {epochs: 3, hidden: 16, max_length: 8}\n"
        "narrow: {model: ease, regularization: 3.0}\n"
    )
    return folder


@pytest.fixture(scope="module")
def finished(world):
    done = recollect("evaluate", "shop", "--config", "rows.yaml", "--seeds", "2", cwd=world)
    assert done.returncode == 0, done.stderr
    return world / "runs" / "evaluate-shop-1", done


def test_a_run_says_where_it_writes_and_leaves_the_promised_files(finished):
    out, done = finished
    assert "recollect: writing to runs/evaluate-shop-1" in done.stderr
    names = {file.name for file in out.iterdir()}
    assert {"run.json", "report.json", "report.html", "tables.csv", "rows"} <= names
    run = json.loads((out / "run.json").read_text())
    assert (run["command"], run["seed"], run["options"]["seeds"]) == ("evaluate", 0, 2)
    assert run["models"]["narrow"] == {"model": "ease", "options": {"regularization": 3.0, "precision": "float64"}}
    report = json.loads((out / "report.json").read_text())
    assert report["kind"] == "evaluate"
    assert set(report["models"]) == {"pop", "markov", "sasrec", "narrow"}
    for table in report["models"].values():
        for metric in ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@10", "mrr", "coverage@10", "gini@10"):
            assert {"value", "ci95", "n", "per_seed"} <= set(table[metric])
        assert "tail_share@10:items20" in table
    assert len(report["models"]["sasrec"]["ndcg@10"]["per_seed"]) == 2
    assert {"fingerprint", "split", "mask", "tie", "candidates", "history", "ks"} <= set(report["protocol"])
    assert "Accuracy on the test cases" in done.stdout
    assert "has the highest NDCG@10" in done.stdout


def test_the_page_shows_tables_plots_and_the_protocol(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    for title in (
        "Recommenders on held-out events",
        "Accuracy on the test cases",
        "same users",
        "What is recommended",
        "Validation by epoch",
        "Leak check",
        "Protocol",
    ):
        assert title in page, title
    assert page.count("<svg") >= 4
    assert "<script" not in page


def test_resume_keeps_finished_rows_and_adds_new_ones(finished, world):
    out, _ = finished
    rows = {path: path.read_bytes() for path in out.glob("rows/*/*/result.json")}
    before = json.loads((out / "report.json").read_text())["models"]
    assert len(rows) == 5
    words = ("--config", "rows.yaml", "--seeds", "2", "--resume", "--out", "runs/evaluate-shop-1")
    refused = recollect("evaluate", "shop", *words[:-3], "--out", "runs/evaluate-shop-1", cwd=world)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    done = recollect("evaluate", "shop", "--models", "pop,markov,sasrec,narrow,itemknn", *words, "--json", cwd=world)
    assert done.returncode == 0, done.stderr
    assert all(path.read_bytes() == content for path, content in rows.items())
    after = json.loads(done.stdout)["models"]
    assert set(after) == {*before, "itemknn"}
    assert all(after[name] == before[name] for name in before)
    assert "epoch" not in done.stderr


def test_the_page_can_be_drawn_again_from_the_stored_results(finished, world):
    out, _ = finished
    page, table = (out / "report.html").read_bytes(), (out / "tables.csv").read_bytes()
    (out / "report.html").unlink()
    (out / "tables.csv").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_bytes() == page
    assert (out / "tables.csv").read_bytes() == table
    assert b"sasrec,ndcg@10," in table


def test_dry_run_prints_the_plan_and_writes_nothing(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", str(world / "shop"), "--models", "pop,ease,sasrec", "--seeds", "3", "--dry-run", "--json"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["kind"], plan["ledger"]["rows_to_run"], plan["ledger"]["test_cases"]) == ("evaluate-plan", 5, 50)
    assert list(tmp_path.iterdir()) == []


def test_print_config_gives_a_file_that_says_the_same(world, capsys, tmp_path):
    assert main(["evaluate", "--config", str(world / "rows.yaml"), "--k", "5,10", "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert main(["evaluate", "--config", str(tmp_path / "again.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--models", "pop,nonsense"), "unknown model 'nonsense'"),
        (("--k", "ten"), "--k must be a whole number, got 'ten'"),
        (("--protocol", "gts", "--quantile", "2"), "quantile must lie between 0 and 1"),
        (("--resume",), "--resume needs --out DIR"),
        (("--core", "500"), "leaves nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(world, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(world / "shop"), *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if message in line]
    assert len(lines) == 1
    assert list(tmp_path.glob("runs/*/rows")) == []


def test_help_lists_the_models_without_loading_torch(capsys):
    assert main(["evaluate", "--help"]) == 0
    text = capsys.readouterr().out
    for name in (
        "pop",
        "markov",
        "ease",
        "itemknn",
        "bpr",
        "sasrec",
        "gru4rec",
        "bert4rec",
        "lrurec",
        "hstu",
        "minilm",
    ):
        assert name in text
    heavy = "{'torch', 'scipy', 'pyarrow', 'pandas'}"
    code = (
        "import sys; from recollect.cli.main import main; main(['evaluate', '--help']); "
        f"assert not {heavy} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_torchrun_trains_with_two_processes_and_writes_one_run(world):
    words = ["-m", "recollect", "evaluate", "shop", "--config", "rows.yaml", "--models", "pop,sasrec,narrow", "--refit"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=world, timeout=280, check=False)
    assert "name it by --out DIR" in refused.stderr
    done = subprocess.run(
        [*command, "--out", "two"], capture_output=True, text=True, cwd=world, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Accuracy on the test cases") == 1
    assert set(json.loads((world / "two/report.json").read_text())["models"]) == {"pop", "sasrec", "narrow"}
