"""`recollect continual --benchmark domains` as a user types it: files, report, page, plan, periods, resume, errors."""

import json

import pytest
from support.continual_worlds import write_byte_decoder
from support.domain_worlds import SMALL_DOMAINS, make_log, random_log, titles_of, walks, written

from recollect.cli.main import main
from recollect.errors import ConfigError, DataError, InputError, UnknownName


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    write_byte_decoder(folder / "bytes")
    written(walks((1, 3), n_users=6), folder / "walks")
    return folder


def words(world, data, *more):
    """A command on a small log; a flag in `more` stands in the place of the usual one."""
    flags = {"--backbone": world / "bytes"}
    flags |= {f"--{name.replace('_', '-')}": value for name, value in SMALL_DOMAINS.items() if value is not None}
    flags["--keep-layers"] = 2
    usual = [str(text) for flag, value in flags.items() if flag not in more for text in (flag, value)]
    return ["continual", str(data), *usual, *map(str, more)]


@pytest.fixture(scope="module")
def finished(world):
    out = world / "run"
    more = (
        "--tasks",
        "films,books",
        "--train-examples",
        12,
        "--test-examples",
        10,
        "--method",
        "seq-lora,mh-moe-replay",
    )
    assert main(words(world, "harbor", *more, "--untouched", "--out", out, "--json")) == 0
    return out


def test_a_run_on_two_domains_leaves_the_promised_files_and_keys(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["kind"] == "continual"
    assert report["tasks"] == ["films", "books"]
    for name in ("op", "bwt", "forgetting", "op_norm"):
        assert isinstance(report[name], float)
    assert [[value is None for value in row] for row in report["accuracy_matrix"]] == [[False, True], [False, False]]
    assert report["protocol"]["candidates"] == "full ranking of the task's catalogue, target never masked"
    for name, floor in report["floors"].items():
        plain = {"popularity", "Markov chain", "text similarity"}
        assert plain < {floor["predictor"], *floor["others"]}
        assert floor["value"] == max(floor["value"], *(floor["others"].get(one, 0.0) for one in plain))
        assert "popularity, all training rows" in floor["others"]
        assert report["task_facts"][name]["cases_used"] == 10
        assert report["training_rows"][name]["rows"] == 12
    lines = (finished / "methods" / "seq-lora" / "seed-0" / "cells" / "2-films.jsonl").read_text().splitlines()
    assert len(lines) == 10
    for line in map(json.loads, lines):
        listed = line["prediction"].split("\n")
        assert len(set(listed)) == 10
        assert set(line["scores"]) == {"ndcg@10", "hr@10", "mrr", "ndcg@10_unmasked", "hr@10_unmasked"}
        assert line["scores"]["hr@10"] == float(line["reference"] in listed)
    facts = json.loads((finished / "methods" / "seq-lora" / "seed-0" / "cells" / "2-films.json").read_text())
    assert facts["primary"] == "ndcg@10"
    assert facts["settings"]["candidates"].startswith("all 1")


def test_the_page_shows_floors_beside_scores_and_is_rebuilt_from_its_file(finished, capsys):
    page = (finished / "report.html").read_bytes()
    for title in (
        b"Scores after every task: mh-moe-replay",
        b"Tasks: seq-lora",
        b"What the tasks hold",
        b"text similarity",
        b"no model (floors)",
        b"nats per predicted item",
    ):
        assert title in page
    (finished / "report.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_bytes() == page
    assert "no model (floors)" in capsys.readouterr().out


def test_a_finished_run_is_only_read_again(world, finished, capsys):
    again = ("--tasks", "films,books", "--train-examples", 12, "--test-examples", 10, "--untouched", "--resume")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("cells/*")}
    asked = words(world, "harbor", *again, "--method", "seq-lora,mh-moe-replay", "--out", finished, "--json")
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((finished / "report.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("cells/*")} == before
    assert main([*asked, "--learning-rate", "0.5"]) == 2
    assert "has learning_rate 0.02, not 0.5" in capsys.readouterr().err


def test_quarters_of_a_log_are_tasks_and_a_plan_writes_nothing(world, tmp_path, capsys):
    log = written(random_log(2, n_users=8, n_events=200), tmp_path / "log")
    out = tmp_path / "run"
    assert main(words(world, log, "--period", "quarter", "--dry-run", "--out", out, "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["protocol"]["tasks"] == ["2023-q4", "2024-q1", "2024-q2"]
    assert plan["ledger"]["evaluations"] == 6
    assert not out.exists()
    chosen = ("--period", "quarter", "--tasks", "2024-q1,2024-q2", "--holdout", "time", "--evaluation", "cheap")
    assert main(words(world, log, *chosen, "--out", out, "--json")) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["tasks"] == ["2024-q1", "2024-q2"]
    assert report["protocol"]["tasks_are"] == "periods of the log (quarter)"
    assert "0.9 quantile" in report["protocol"]["holdout"]
    assert all(facts["later_training"] == 0 for facts in report["task_facts"].values())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tasks", "a,z"), "unknown domain of 'walks' 'z'; known: a, b"),
        (("--tasks", "a,a"), "task 'a' is given twice"),
        (("--period", "week"), "period must be month, quarter or a number of slices from 2 to 100, got 'week'"),
        (("--period", "1"), "period must be month, quarter or a number of slices from 2 to 100, got '1'"),
        (("--epochs", "none"), "epochs none is TRACE's own number"),
        (("--temperature", "0.5"), "temperature is an option of --benchmark trace, not of domains"),
        (("--ability",), "ability is an option of --benchmark trace"),
        (("--keep-layers", "7"), "keep_layers must be in 1..2 for bytes, got 7"),
        (("--max-history", "600"), "max_history 600 and the instruction of"),
        (("--max-history", "0"), "max_history must be at least 1, got 0"),
        (
            ("--benchmark", "trace", "--period", "month", "--keep-layers", "8", "--max-history", "50"),
            "period is an option of --benchmark domains, not of trace",
        ),
        (("--holdout", "first"), "holdout must be one of last, time, got 'first'"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(world, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert main(words(world, world / "walks", *more)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/methods"))


def bad_log(kind, folder):
    """A log that cannot be a stream."""
    user, item, time = [0, 0, 0, 1, 1, 1], [0, 1, 2, 2, 1, 0], [1, 2, 3, 1, 2, 3]
    if kind == "position":
        return written(random_log(1, clock="position"), folder)
    if kind == "one domain":
        return written(make_log(user, item, time, titles=titles_of(3)), folder)
    if kind == "no text":
        named = {"titles": ["", "", ""], "domain": [0, 0, 0], "domains": ("only",)}
        return written(make_log(user, item, time, **named), folder)
    lonely = make_log(
        [0, 0, 0, 1], [0, 1, 2, 3], [1, 2, 3, 4], titles=titles_of(4), domain=[0, 0, 0, 1], domains=("a", "b")
    )
    return written(lonely, folder)


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("position", {"period": "month"}, ConfigError, "'small' has no clock .* cannot be cut into periods"),
        ("position", {"holdout": "time"}, ConfigError, "'small' has no clock .* use holdout last"),
        ("one domain", {}, ConfigError, r"has one domain only \('things'\).* cut it in time with --period"),
        ("no text", {"tasks": "only"}, InputError, "has no title, category or text of any item"),
        ("lonely", {}, DataError, "task 'b' of 'small' has no training rows .* leave it out with --tasks"),
        ("missing", {}, UnknownName, "nowhere"),
    ],
)
def test_a_log_that_is_no_stream_is_refused_by_name(world, tmp_path, kind, options, error, message):
    from recollect.continual.run import continual

    data = tmp_path / "nowhere" if kind == "missing" else bad_log(kind, tmp_path / "log")
    with pytest.raises(error, match=message):
        continual(data, **{**SMALL_DOMAINS, **options}, backbone=str(world / "bytes"), out=tmp_path / "run")
    assert not (tmp_path / "run" / "methods").exists()


def test_hostile_titles_do_not_reach_the_page_and_are_read_as_letters(world, tmp_path):
    from recollect.continual.run import continual

    dataset = walks((1, 1), n_users=6)
    for number in range(3):
        dataset.catalog.titles[number] = "<script>alert(1)</script></s>\u202e{{ 7 * 7 }}\x1b[31m"
    out = tmp_path / "run"
    data = written(dataset, tmp_path / "log")
    continual(data, **SMALL_DOMAINS, backbone=str(world / "bytes"), out=out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "\x1b" not in page
