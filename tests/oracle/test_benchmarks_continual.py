"""Sequences kept from several run folders are compared as the report of one run compares them."""

import json
import sys
from pathlib import Path

import pytest
from support.continual_worlds import SMALL, TASKS, write_byte_decoder, write_stream

from recollect.continual.run import continual

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
METHODS = ("mh-moe", "seq-lora")
METRICS = ("op", "bwt", "op_norm")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import continual as script  # benchmarks/continual.py

    yield script
    for name in set(sys.modules) - before:
        module_file = getattr(sys.modules[name], "__file__", None)
        if module_file and Path(module_file).parent == BENCHMARKS:
            del sys.modules[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A report of two methods, its folder, and a folder for each method alone; two seeds."""
    folder = tmp_path_factory.mktemp("kept")
    write_stream(folder / "trace", n_train=24, n_test=8)
    options = {**SMALL, "tasks": TASKS, "backbone": str(write_byte_decoder(folder / "bytes")), "seeds": 2}
    together = continual(folder / "trace", method=METHODS, out=folder / "both", **options)
    for method in METHODS:
        continual(folder / "trace", method=method, out=folder / method, **options)
    return together, folder


def rows_of(script, kept, out):
    script.compare(script.read_kept(kept), ["seq-lora"], ("mh-moe", "seq-lora"), out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {(row["name"], row["method"], row["metric"]): row for row in rows}


def test_sequences_of_two_folders_give_the_report_of_one_run(script, runs, tmp_path):
    report, folder = runs
    kept = tmp_path / "kept.jsonl"
    for method in METHODS:
        script.keep(folder / method, kept)
    rows = rows_of(script, kept, tmp_path / "rows.jsonl")
    assert any(rows["all methods", method, "op"]["value"] > 0 for method in METHODS)
    for method in METHODS:
        for metric in METRICS:
            found = report.sections["methods"][method]["aggregates"][metric]
            row = rows["all methods", method, metric]
            assert [row["value"], row["low"], row["high"]] == pytest.approx([found["value"], *found["ci95"]], rel=1e-4)
    for name, round_of in (("when learnt", lambda task: task), ("at the end", lambda task: len(TASKS) - 1)):
        for number, task in enumerate(TASKS):
            matrix = report.sections["methods"]["mh-moe"]["accuracy_matrix"]
            assert rows[name, "mh-moe", task]["value"] == pytest.approx(matrix[round_of(number)][number], abs=1e-4)
    for found in report.sections["differences"]:
        if found["metric"] in METRICS:
            row = rows["minus seq-lora", "mh-moe", found["metric"]]
            assert [row["value"], row["low"], row["high"]] == pytest.approx([found["value"], *found["ci95"]], rel=1e-4)
    half = rows["all methods", "mh-moe", "bwt"]["value"] - rows["all methods", "seq-lora", "bwt"]["value"] / 2
    assert rows["minus half of seq-lora", "mh-moe", "bwt"]["value"] == pytest.approx(half, abs=1e-5)


def test_a_sequence_is_kept_once_and_without_text(script, runs, tmp_path):
    _, folder = runs
    kept = tmp_path / "kept.jsonl"
    script.keep(folder / "both", kept)
    script.keep(folder / "both", kept)
    script.keep(folder / "mh-moe", kept)
    lines = script.read_kept(kept)
    assert sorted((line["method"], line["seed"]) for line in lines) == sorted((m, s) for m in METHODS for s in (0, 1))
    prompt = json.loads((folder / "trace" / "FOMC" / "test.json").read_text())[0]["prompt"]
    assert prompt not in kept.read_text()


def test_sequences_with_other_options_are_not_pooled(script, runs, tmp_path):
    _, folder = runs
    kept = tmp_path / "kept.jsonl"
    script.keep(folder / "both", kept)
    lines = script.read_kept(kept)
    other = [{**line, "identity": {**line["identity"], "learning_rate": 0.5}} for line in lines]
    groups = script.grouped([*lines, *other])
    assert [len(group.lines) for group in groups] == [4, 4]


def test_one_method_with_two_sets_of_options_is_two(script, runs, tmp_path):
    _, folder = runs
    kept = tmp_path / "kept.jsonl"
    script.keep(folder / "mh-moe", kept)
    lines = script.read_kept(kept)
    other = [{**line, "about": {**line["about"], "adapter": {"rank": 99}}, "seed": 7} for line in lines[:1]]
    (group,) = script.grouped([*lines, *other])
    assert {method: sorted(runs) for method, runs in group.runs.items()} == {"mh-moe": [0, 1], "mh-moe (2)": [7]}
