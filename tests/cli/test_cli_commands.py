"""The commands as a user types them, in a child process."""

import json
import subprocess
import sys

import pytest

from recollect.cli.main import COMMANDS
from recollect.types import Report

EVERY_COMMAND = [
    ["simulate"],
    ["data", "list"],
    ["data", "describe"],
    ["data", "import"],
    ["data", "fetch"],
    ["models", "list"],
    ["models", "pull"],
    ["models", "serve"],
    ["report"],
    ["doctor"],
]


def recollect(*words, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "recollect", *words], capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


@pytest.fixture
def stored(tmp_path):
    folder = tmp_path / "stored"
    report = Report(
        kind="simulate",
        protocol={"data": "harbor", "cases": 40},
        metrics={"ranking/mrr": {"value": 0.41, "ci95": [0.38, 0.44], "n": 40}},
        baselines={"random": {"ranking/mrr": {"value": 0.293, "ci95": [0.27, 0.31], "n": 40}}},
        warnings=["only 40 cases"],
    )
    report.save(folder)
    return folder


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_help_has_an_example_and_the_common_options(words):
    done = recollect(*words, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert f"  recollect {' '.join(words)}" in done.stdout.split("example")[1]
    for flag in ("--seed", "--out", "--json", "--overwrite", "--dry-run"):
        assert flag in done.stdout
    assert ("--resume" in done.stdout) == (words == ["simulate"])


def test_top_level_help_lists_every_command_and_the_exit_codes():
    text = recollect("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert "exit codes" in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "COMMAND"),
        (["simualte"], "'simualte'"),
        (["simulate", "--users", "many"], "'many'"),
        (["simulate", "--users", "0"], "users must be at least 1, got 0"),
        (["simulate", "--writer", "poet"], "'poet'"),
        (["simulate", "--seed", "-1"], "'-1'"),
        (["simulate", "--wat"], "--wat"),
        (["simulate", "--resume"], "--out DIR"),
        (["simulate", "--config", "absent.yaml"], "absent.yaml"),
        (["data"], "ACTION"),
        (["data", "import", "csv", "only-one"], "OUT"),
        (["models", "pull", "gpt-9"], "'gpt-9'"),
        (["models", "pull", "gpt-9", "--dry-run"], "'gpt-9'"),
        (["models", "serve", "smollm2", "--port", "99999"], "'99999'"),
        (["models", "serve", "smollm2", "--python", "/absent/python"], "/absent/python"),
        (["report", "absent"], "absent"),
        (["doctor", "absent"], "absent"),
        (["doctor", "--server", "ftp://x"], "'ftp://x'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, words, named):
    done = recollect(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("recollect: ")
    assert done.stderr.count("\n") == 1
    assert named in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_print_config_is_a_config_file(tmp_path):
    printed = recollect("simulate", "ml-1m", "--users", "7", "--method", "agentcf", "--print-config", cwd=tmp_path)
    assert printed.returncode == 0
    (tmp_path / "small.yaml").write_text(printed.stdout)
    again = recollect("simulate", "--config", "small.yaml", "--print-config", cwd=tmp_path)
    assert again.stdout == printed.stdout
    assert "data: ml-1m\nmethod: agentcf\nusers: 7\n" in printed.stdout


def test_report_is_drawn_again_byte_for_byte(stored):
    page = (stored / "report.html").read_bytes()
    (stored / "report.html").unlink()
    done = recollect("report", str(stored))
    assert done.returncode == 0
    assert (stored / "report.html").read_bytes() == page
    assert "ranking/mrr" in (stored / "tables.csv").read_text()
    assert "0.410" in done.stdout
    assert "only 40 cases" in done.stdout


def test_report_as_json_is_the_stored_report(stored):
    done = recollect("report", str(stored), "--json")
    assert json.loads(done.stdout) == json.loads((stored / "report.json").read_text())


def test_dry_run_of_report_writes_nothing(stored):
    (stored / "report.html").unlink()
    done = recollect("report", str(stored), "--dry-run")
    assert done.returncode == 0
    assert not (stored / "report.html").exists()


def test_out_holds_run_report_and_page_and_is_not_overwritten_unasked(tmp_path):
    first = recollect("doctor", "--skip-models", "--out", "checked", cwd=tmp_path)
    assert first.returncode == 0
    assert sorted(file.name for file in (tmp_path / "checked").iterdir()) == ["report.html", "report.json", "run.json"]
    run = json.loads((tmp_path / "checked" / "run.json").read_text())
    assert (run["command"], run["seed"], run["options"]["skip_models"]) == ("doctor", 0, True)
    second = recollect("doctor", "--skip-models", "--out", "checked", cwd=tmp_path)
    assert second.returncode == 2
    assert "--overwrite" in second.stderr
    assert recollect("doctor", "--skip-models", "--out", "checked", "--overwrite", cwd=tmp_path).returncode == 0


def test_models_list_names_the_embedded_models():
    models = json.loads(recollect("models", "list", "--json").stdout)["models"]
    assert {model["name"] for model in models} >= {"smollm2", "minilm"}


def test_serve_dry_run_prints_the_command_and_starts_nothing():
    done = recollect("models", "serve", "minilm", "--port", "8123", "--dry-run", "--json")
    words = json.loads(done.stdout)["command"]
    assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert words[words.index("--port") + 1] == "8123"
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[-2:] == ["--runner", "pooling"]


def test_serve_without_vllm_says_what_to_install(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: no site-packages, so no vllm
    python.chmod(0o755)
    done = recollect("models", "serve", "smollm2", "--python", str(python))
    assert done.returncode == 2
    assert 'pip install "recollect[vllm]"' in done.stderr
