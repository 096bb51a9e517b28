"""Known answers of whole continual runs: order of questions, frozen models, oracle tasks, budgets, aggregates."""

import dataclasses
import json

import numpy as np
import pytest
from support.continual_worlds import SMALL, TASKS, task_rows, write_byte_decoder, write_rows, write_stream

from recollect.continual.aggregates import matrix_from_rows, summarize
from recollect.continual.cells import read_cell
from recollect.continual.evaluation_plan import Cell
from recollect.continual.examples import Lengths
from recollect.continual.learner import Generation, open_learner, open_tokens
from recollect.continual.report_panels import adapter_sizes
from recollect.continual.run import continual
from recollect.continual.trace_data import load_trace
from recollect.continual.trace_scores import score_task

EVERYTHING = {"evaluation": "square", "untouched": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    write_stream(folder / "trace")
    write_byte_decoder(folder / "bytes")
    return folder


def run(world, out, method, **more):
    named = {"tasks": TASKS, "backbone": str(world / "bytes"), "out": out, "method": method}
    return continual(world / "trace", **{**SMALL, **named, **more})


@pytest.fixture(scope="module")
def learner(world):
    lengths = Lengths(200, 16)
    return open_learner(world / "bytes", open_tokens(world / "bytes", "none", lengths), lengths, "fp32")


def test_permuting_the_questions_permutes_the_answers_and_leaves_the_scores(world, learner):
    one = load_trace(world / "trace", TASKS)["FOMC"]
    how = Generation(batch_size=2, max_new_tokens=5)
    answers = learner.answers(one.task, one.test, how)
    assert len(set(answers)) > 1
    order = np.random.default_rng(0).permutation(len(one.test))
    mixed = [one.test[at] for at in order]
    again = learner.answers(one.task, mixed, how)
    assert again == [answers[at] for at in order]
    assert score_task(one.task, mixed, again).value == score_task(one.task, one.test, answers).value


def test_a_question_is_answered_alone_as_in_a_batch_of_longer_ones(world, learner):
    one = load_trace(world / "trace", TASKS)["NumGLUE-cm"]
    longer = dataclasses.replace(
        one, test=tuple(row._replace(prompt=row.prompt.replace("q2", "q2" * at)) for at, row in enumerate(one.test, 1))
    )
    together = learner.answers(one.task, longer.test, Generation(batch_size=5, max_new_tokens=5))
    alone = learner.answers(one.task, longer.test, Generation(batch_size=1, max_new_tokens=5))
    assert together == alone


def test_sampled_answers_repeat_with_their_seed_and_leave_the_global_generator_alone(world, learner):
    import torch

    one = load_trace(world / "trace", TASKS)["FOMC"]
    before = torch.random.get_rng_state()
    hot = Generation(temperature=2.0, seed=3, max_new_tokens=5)
    assert learner.answers(one.task, one.test, hot) == learner.answers(one.task, one.test, hot)
    other = dataclasses.replace(hot, seed=4)
    assert learner.answers(one.task, one.test, other) != learner.answers(one.task, one.test, hot)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_with_a_learning_rate_of_zero_nothing_is_forgotten_or_learnt(world, tmp_path):
    method = "mh-moe-replay"
    report = run(world, tmp_path, method, learning_rate=0.0, **EVERYTHING)
    one = report.sections["methods"][method]
    assert all(row == one["untouched"] for row in one["accuracy_matrix"])
    assert report.sections["bwt"] == 0.0
    assert report.sections["op"] == pytest.approx(np.mean(one["untouched"]), abs=1e-15)
    cells = tmp_path / "methods" / method / "seed-0" / "cells"
    for task in TASKS:
        assert (cells / f"3-{task}.jsonl").read_bytes() == (cells / f"0-{task}.jsonl").read_bytes()


def test_separate_adapters_per_task_forget_nothing_by_construction(world, tmp_path):
    report = run(world, tmp_path, "per-task")
    matrix = matrix_from_rows(report.sections["accuracy_matrix"])
    assert report.sections["bwt"] == 0.0
    assert np.array_equal(matrix[-1], matrix.diagonal())
    one = report.sections["methods"]["per-task"]
    held = one["seeds"][0]["rounds"][-1]["parameters"]  # of the copy in the model
    size, copies = adapter_sizes(one), len(TASKS)
    assert size["own"] == copies * (held["total"] - held["base"]) == copies * held["experts"]
    assert size["total"] == held["base"] + size["own"]
    assert size["activated"] == held["activated"]
    cost = next(panel for panel in report.sections["panels"] if panel["title"] == "Size and cost")
    assert cost["rows"][0][1] == size["own"]


def test_the_report_is_what_its_stored_answers_give(world, tmp_path):
    report = run(world, tmp_path, "seq-lora", seeds=2, evaluation="triangle")
    one = report.sections["methods"]["seq-lora"]
    floors = [floor["value"] for floor in report.sections["floors"].values()]
    found = [summarize(matrix_from_rows(seed["accuracy_matrix"]), floors=np.array(floors)) for seed in one["seeds"]]
    for name in ("op", "bwt", "forgetting", "op_norm"):
        values = [getattr(each, name) for each in found]
        assert one["per_seed"][name] == pytest.approx(values, abs=1e-12)
        assert report.sections[name] == report.metrics[name]["value"] == pytest.approx(np.mean(values), abs=1e-12)
    data = load_trace(world / "trace", TASKS)
    for at, (name, task) in enumerate(data.items()):
        folder = tmp_path / "methods" / "seq-lora" / "seed-1" / "cells"
        lines = [json.loads(line) for line in (folder / f"3-{name}.jsonl").read_text().splitlines()]
        assert [line["reference"] for line in lines] == [record.answer for record in task.test]
        assert [line["prompt_hash"] for line in lines] == [record.prompt_hash for record in task.test]
        scores = score_task(task.task, task.test, [line["prediction"] for line in lines])
        assert one["seeds"][1]["accuracy_matrix"][2][at] == pytest.approx(scores.value, abs=1e-12)
        assert np.array_equal(read_cell(folder, Cell(3, at), name).primary, scores.items[scores.primary])


def test_joint_training_beats_sequential_training_where_the_second_task_overwrites_the_first(world, tmp_path):
    for name, answer in (("FOMC", "A"), ("NumGLUE-ds", "1")):
        for number, (split, n) in enumerate((("train", 12), ("eval", 2), ("test", 6))):
            rows = [{**row, "answer": answer} for row in task_rows(name, n, number)]
            write_rows(tmp_path / "trace" / name / f"{split}.json", rows)
    options = {**SMALL, "epochs": 8, "learning_rate": 0.01, "checkpoint_every": 100}
    report = continual(
        tmp_path / "trace",
        **options,
        method="seq-lora,joint,per-task",
        tasks="FOMC,NumGLUE-ds",
        backbone=str(world / "bytes"),
        out=tmp_path / "run",
    )
    found = report.sections["methods"]
    assert found["joint"]["aggregates"]["op"]["value"] == found["per-task"]["aggregates"]["op"]["value"] == 1.0
    assert found["joint"]["accuracy_matrix"] == [[None, None], [1.0, 1.0]]
    assert found["joint"]["aggregates"]["bwt"]["value"] is None
    assert found["seq-lora"]["accuracy_matrix"] == [[1.0, None], [0.0, 1.0]]
    assert report.sections["bwt"] == -1.0
    assert report.sections["forgetting"] == 1.0
    assert report.sections["op_norm"] is None  # one answer to everything needs no model
    assert any("no model is needed for FOMC, NumGLUE-ds" in warning for warning in report.warnings)


def test_the_cheap_plan_gives_op_and_bwt_of_the_triangle(world, tmp_path):
    cheap = run(world, tmp_path / "cheap", "seq-lora", evaluation="cheap")
    whole = run(world, tmp_path / "whole", "seq-lora", evaluation="triangle")
    assert cheap.sections["op"] == whole.sections["op"]
    assert cheap.sections["bwt"] == whole.sections["bwt"]
    assert cheap.sections["forgetting"] is None
    assert cheap.sections["accuracy_matrix"][1][0] is None


def test_matched_budgets_differ_by_at_most_five_percent_in_total_and_per_token(world, tmp_path):
    report = run(
        world,
        tmp_path,
        "loramoe,mh-moe",
        match_budget=True,
        set="mh-moe.heads=2,loramoe.rank=6",
        tasks="FOMC",
    )
    sizes = [one["seeds"][0]["rounds"][-1]["parameters"] for one in report.sections["methods"].values()]
    routed = [(size["experts"], size["activated"] - size["router"]) for size in sizes]
    assert routed[1][0] == pytest.approx(routed[0][0], rel=0.05)
    assert routed[1][1] == pytest.approx(routed[0][1], rel=0.05)
    assert report.sections["methods"]["mh-moe"]["adapter"]["rank"] != 8


def test_a_heat_map_writes_every_value_and_leaves_cells_without_one_empty():
    from recollect.errors import InputError
    from recollect.eval.panels import panel_views

    panel = {
        "kind": "heat",
        "title": "m",
        "rows": ["r1", "r2"],
        "columns": ["a", "b"],
        "values": [[0.25, None], [1, 0]],
    }
    [view] = panel_views([panel])
    assert [text in view["svg"] for text in ("0.25", "1.00", "0.00", "0.50")] == [True, True, True, False]
    assert view["data"] == [["r1", "0.250", "–"], ["r2", "1", "0"]]
    assert panel_views([panel]) == [view]
    with pytest.raises(InputError, match="malformed"):
        panel_views([{**panel, "values": [[0.25, None]]}])
