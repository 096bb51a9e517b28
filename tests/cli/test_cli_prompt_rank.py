"""`recollect prompt-rank` as it is typed."""

import json
import subprocess
import sys

import pytest
from support.fair_worlds import follows_quota, long_tail_world, reader

from recollect.cli.main import main


def test_importing_the_command_loads_nothing_heavy():
    script = (
        "import sys; import recollect.cli.prompt_rank, recollect.recommenders.prompt_rank_config; "
        "from recollect.cli.main import build_parser; build_parser(['prompt-rank']); "
        "sys.exit(bool({'torch', 'transformers', 'matplotlib', 'jinja2', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_help_has_examples_and_every_option(capsys):
    assert main(["prompt-rank", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("examples:", "--preset", "--candidates", "--users", "--candidate-set", "--attributes", "--resume"):
        assert word in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["harbor", "--preset", "fair"], "unknown preset 'fair'"),
        (["harbor", "--backbone", "gpt"], "unknown model 'gpt'"),
        (["harbor", "--k", "30"], "number of candidates"),
        (["harbor", "--backend", "logits"], "label_logits"),
        (["harbor", "--generator", "best"], "unknown model 'best'"),
        (["harbor", "--resume"], "needs --out"),
    ],
)
def test_bad_options_exit_with_2_and_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["prompt-rank", *words]) == 2
    error = capsys.readouterr().err.strip().split("\n")
    assert message in error[-1]
    assert not list(tmp_path.rglob("journal.sqlite"))


@pytest.fixture
def scripted(monkeypatch):
    from recollect.recommenders import prompt_rank

    dataset = long_tail_world(n_users=24, n_items=60)
    monkeypatch.setattr(prompt_rank, "load_dataset", lambda name, seed: dataset)
    monkeypatch.setattr(prompt_rank, "open_backbone", lambda name, **_: reader(follows_quota, "rule"))
    return ["prompt-rank", "fair", "--core", "1", "--generator", "pop", "--resamples", "20", "--users", "12"]


def test_a_run_leaves_its_artefacts_and_prints_the_verdict(scripted, capsys, tmp_path):
    out = tmp_path / "run"
    assert main([*scripted, "--preset", "base,fairlrm", "--candidate-set", "mixed", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "Verdict of the shuffled-U control" in " ".join(captured.out.split())
    report = json.loads((out / "report.json").read_text())
    assert report["kind"] == "prompt-rank"
    assert {"base", "fairlrm", "shuffled-U", "pop", "markov"} <= set(report["models"])
    assert set(report["metrics"]["ndcg@10"]) == {"value", "ci95", "n"}
    assert report["protocol"]["fingerprint"]
    assert report["ledger"]["requests"] > 0
    assert json.loads((out / "run.json").read_text())["options"]["candidate_set"] == "mixed"
    assert "<svg" in (out / "report.html").read_text()
    assert main([*scripted, "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["report", str(out)]) == 0


def test_dry_run_and_printed_options_ask_nothing(scripted, capsys, tmp_path):
    assert main([*scripted, "--preset", "all", "--dry-run", "--out", str(tmp_path / "run")]) == 0
    assert "estimated" in capsys.readouterr().out.lower()
    assert not (tmp_path / "run").exists()
    assert main([*scripted, "--print-config"]) == 0
    assert "generator: pop" in capsys.readouterr().out
