"""`recollect continual` as a user types it: files, report, page, plan, resume, errors."""

import json

import pytest
from support.continual_worlds import SMALL, TASKS, write_byte_decoder, write_rows, write_stream
from support.run_folders import contents

import recollect
from recollect.cli.main import main
from recollect.continual.methods.registry import METHODS
from recollect.continual.trace_tasks import STANDARD_ORDER


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continual")
    write_stream(folder / "trace")
    write_byte_decoder(folder / "bytes")
    return folder


def words(world, *more):
    """A command on the small stream; a flag in `more` stands in the place of the usual one."""
    flags = {"--tasks": ",".join(TASKS), "--backbone": world / "bytes"}
    flags |= {f"--{name.replace('_', '-')}": value for name, value in SMALL.items()}
    usual = [str(text) for flag, value in flags.items() if flag not in more for text in (flag, value)]
    return ["continual", str(world / "trace"), "--benchmark", "trace", *usual, *map(str, more)]


@pytest.fixture(scope="module")
def finished(world):
    out = world / "run"
    code = main(words(world, "--method", "seq-lora,mh-moe", "--untouched", "--ability", "--out", out, "--json"))
    assert code == 0
    return out


def test_a_run_leaves_the_promised_files_and_keys(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["kind"] == "continual"
    for name in ("op", "bwt", "forgetting", "op_norm"):
        assert isinstance(report[name], float)
        assert report[name] == report["metrics"][name]["value"]
    assert [[value is None for value in row] for row in report["accuracy_matrix"]] == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    assert report["tasks"] == list(TASKS)
    assert set(report["baselines"]) == {"mh-moe", "no model (floors)"}
    assert set(report["floors"]) == set(TASKS)
    assert {row["against"] for row in report["differences"]} == {"mh-moe"}
    run = json.loads((finished / "run.json").read_text())
    assert run["command"] == "continual"
    assert run["options"]["learning_rate"] == SMALL["learning_rate"]
    for method in ("seq-lora", "mh-moe"):
        seed = finished / "methods" / method / "seed-0"
        assert (seed / "round-3" / "method_state.safetensors").is_file()
        assert {path.name for path in (seed / "cells").glob("3-*")} == {
            f"3-{task}.{kind}" for task in TASKS for kind in ("json", "jsonl")
        }
        lines = (seed / "matrix.csv").read_text().splitlines()
        assert lines[0] == ",".join(["after", *TASKS])
        assert [float(text) for text in lines[-1].split(",")[1:]] == report["methods"][method]["accuracy_matrix"][-1]
        ability = report["methods"][method]["seeds"][0]["ability"]
        assert ability["before"]["n"] == ability["after"]["n"] == 40


def test_the_page_shows_matrix_map_floors_facts_curves_and_sizes(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    titles = (
        "Scores after every task: mh-moe",
        "The same as a map: seq-lora",
        "Scores at the end",
        "Every aggregate",
        "Tasks: seq-lora",
        "What the files hold",
        "Training loss",
        "Size and cost",
        "General questions",
        "seq-lora minus each other method, paired",
    )
    for title in titles:
        assert title in page
    assert page.count("<svg") >= 5


def test_the_report_is_rebuilt_from_its_file_alone(finished, capsys):
    before = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_bytes() == before
    assert "OP" in capsys.readouterr().out


def test_the_json_on_stdout_is_the_stored_report(world, finished, capsys):
    again = words(world, "--method", "seq-lora,mh-moe", "--untouched", "--ability", "--out", finished, "--resume")
    assert main([*again, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((finished / "report.json").read_text())


def test_a_dry_run_counts_and_writes_nothing(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(words(world, "--method", "seq-lora,joint", "--dry-run", "--out", out, "--json")) == 0
    plan = json.loads(capsys.readouterr().out)["ledger"]
    assert plan["rows_per_sequence"] == 36
    assert plan["optimiser_steps_per_sequence"] == 9
    assert plan["evaluations"] == 6 + 3
    assert plan["answers"] == 5 * 9
    assert 36 * 20 < plan["training_tokens_per_sequence"] < 36 * 200
    assert not out.exists()


def test_help_names_every_method_and_an_example(capsys):
    assert main(["continual", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in METHODS)
    assert "recollect continual data/trace --benchmark trace --method mh-moe" in text


def test_a_file_holds_options_and_sections_of_methods(world, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("method: [ewc, mh-moe]\nmh-moe: {heads: 2, rank: 4}\newc: {strength: 3}\nseeds: 2\n")
    assert main(words(world, "--config", path, "--print-config")) == 0
    shown = capsys.readouterr().out
    assert "strength: 3" in shown
    assert "seeds: 2" in shown
    code = main(words(world, "--config", path, "--set", "mh-moe.heads=5", "--out", tmp_path / "run"))
    assert code == 2
    assert "heads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "lora"), "unknown method 'lora'"),
        (("--tasks", "FOMC,Lima"), "Lima is a replay buffer"),
        (("--resume",), "--resume needs --out DIR"),
        (("--epochs", "0"), "epochs must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(world, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert main(words(world, *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not list(tmp_path.glob("runs/*/methods"))


@pytest.mark.parametrize("how", ["--overwrite", "--resume"])
def test_what_is_refused_leaves_a_finished_run_as_it_is(world, finished, tmp_path, capsys, how):
    before = contents(finished)
    bad = ("--method", "seq-lora,mh-moe", "--set", "mh-moe.heads=7", "--out", finished, how)
    assert main(words(world, "--untouched", "--ability", *bad)) == 2
    assert "width 32, which 7 heads do not divide" in capsys.readouterr().err
    assert contents(finished) == before
    other = tmp_path / "tokens"
    other.mkdir()
    (other / "run.json").write_text('{"command": "tokenize"}')
    assert main(words(world, "--out", other, how)) == 2
    assert "holds a run of 'tokenize'" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["run.json"]


def test_resume_names_the_option_of_a_method_that_differs_before_it_writes(world, finished, capsys):
    before = contents(finished)
    more = ("--method", "ewc,mh-moe", "--set", "mh-moe.rank=3", "--untouched", "--ability")
    assert main(words(world, *more, "--out", finished, "--resume")) == 2
    assert "was made with adapter.rank 8, not 3" in capsys.readouterr().err
    assert contents(finished) == before


def test_a_dry_run_refuses_what_the_run_would(world, capsys):
    assert main(words(world, "--method", "mh-moe", "--set", "mh-moe.heads=7", "--dry-run")) == 2
    assert "7 heads do not divide" in capsys.readouterr().err


def test_a_refused_run_leaves_no_folder_and_a_folder_that_cannot_be_says_so(world, tmp_path, capsys):
    assert main(words(world, "--method", "mh-moe", "--set", "mh-moe.heads=7", "--out", tmp_path / "run")) == 2
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    assert main(words(world, "--out", tmp_path / "file" / "run")) == 2
    assert "cannot be made: Not a directory; choose another folder" in capsys.readouterr().err


def test_test_prompts_that_are_asked_in_part_are_counted_and_warned_of(world, tmp_path):
    write_stream(tmp_path / "trace")
    rows = json.loads((tmp_path / "trace" / "FOMC" / "test.json").read_text())
    for row in rows[:2]:
        row["prompt"] = row["prompt"].replace("q2-", "and then " * 40 + "q2-")
    write_rows(tmp_path / "trace" / "FOMC" / "test.json", rows)
    command = words(world, "--out", tmp_path / "run")
    command[1] = str(tmp_path / "trace")
    assert main(command) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    shortened = {name: facts["test"]["shortened_prompts"] for name, facts in report["task_facts"].items()}
    assert shortened == {name: 2 * (name == "FOMC") for name in TASKS}
    assert "test prompts longer than --max-prompt 200 were shortened: FOMC 2 of 5" in report["warnings"]


def test_the_package_can_be_called_and_every_task_is_the_default():
    from recollect.continual.run_config import ContinualConfig

    assert callable(recollect.continual)
    assert ContinualConfig().tasks == STANDARD_ORDER
