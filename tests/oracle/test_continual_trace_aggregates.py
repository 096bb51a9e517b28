"""OP, BWT and its variants on the published matrices and by hand; the 15 evaluations; floors; deltas."""

import json

import numpy as np
import pytest
from scipy.stats import t

from recollect.continual.aggregates import (
    average_incremental,
    bwt,
    bwt_clipped_T,
    bwt_T,
    forgetting,
    forgetting_nonnegative,
    forward_transfer,
    matrix_csv,
    matrix_from_rows,
    matrix_rows,
    overall_performance,
    summarize,
)
from recollect.continual.evaluation_plan import Cell, evaluation_plan
from recollect.continual.general_ability import (
    continuations,
    general_ability_delta,
    item_prompt,
    score_general,
)
from recollect.continual.general_items import GENERAL_ITEMS
from recollect.continual.trace_intervals import (
    BIASED,
    RunScores,
    aggregate_intervals,
    difference_intervals,
    per_seed,
)


@pytest.fixture(scope="module")
def published(shared_data):
    path = shared_data / "trace" / "published" / "accuracy_matrices.json"
    return json.loads(path.read_text(encoding="utf-8"))["matrices"]


def matrix_of(case):
    by_task = np.array([[np.nan if cell is None else cell for cell in row] for row in case["R_task_by_round"]])
    return by_task.T


def test_op_and_bwt_equal_the_printed_values_of_all_published_matrices(published):
    assert len(published) == 17
    for case in published:
        result = summarize(matrix_of(case))
        assert result.op == pytest.approx(case["reported_op"], abs=0.0015), case["model"]
        assert result.bwt == pytest.approx(case["reported_bwt"], abs=0.0015), case["model"]


def test_every_variant_equals_its_recomputed_value(published):
    for case in published:
        result, expected = summarize(matrix_of(case)), case["computed"]
        assert result.bwt == pytest.approx(expected["bwt_T_minus_1"], abs=6e-5)
        assert result.bwt_T == pytest.approx(expected["bwt_T"], abs=6e-5)
        assert result.bwt_clipped_T == pytest.approx(expected["bwt_clipped_T"], abs=6e-5)
        assert result.forgetting_nonnegative == pytest.approx(expected["forgetting"], abs=6e-5)
        assert result.forgetting <= result.forgetting_nonnegative


def test_the_other_variants_do_not_reproduce_the_printed_bwt(published):
    matrices = np.stack([matrix_of(case) for case in published])
    printed = np.array([case["reported_bwt"] for case in published])
    assert (np.abs(bwt_T(matrices) - printed) > 0.0015).sum() >= 10
    assert (np.abs(bwt_clipped_T(matrices) - printed) > 0.0015).sum() >= 10
    assert (np.abs(bwt_T(matrices) - printed)).max() > 0.05


def test_published_loras_forget_and_replay_does_not(published):
    by_method = {}
    for case in published:
        by_method.setdefault(case["method"], []).append(summarize(matrix_of(case)).bwt)
    assert max(by_method["LoraSeqFT"]) < -0.08
    assert min(by_method["Replay"]) > 0


HAND = np.array([[0.5, 0.2, 0.1], [0.7, 0.6, 0.3], [0.3, 0.8, 0.9]])


def test_aggregates_by_hand():
    untouched = np.array([0.1, 0.1, 0.2])
    assert overall_performance(HAND) == pytest.approx(2.0 / 3)
    assert overall_performance(HAND, after=2) == pytest.approx(0.65)
    assert bwt(HAND) == pytest.approx((-0.2 + 0.2) / 2)
    assert bwt_T(HAND) == pytest.approx(0.0)
    assert bwt_clipped_T(HAND) == pytest.approx(-0.2 / 3)
    assert forgetting(HAND) == pytest.approx(((0.7 - 0.3) + (0.6 - 0.8)) / 2)
    assert forgetting_nonnegative(HAND) == pytest.approx((0.7 - 0.3) / 2)
    assert average_incremental(HAND) == pytest.approx((0.5 + 0.65 + 2 / 3) / 3)
    assert forward_transfer(HAND, untouched) == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)
    result = summarize(HAND, untouched, floors={"c": 0.8, "a": 0.0, "b": 0.5}, tasks=("a", "b", "c"))
    assert result.op_norm == pytest.approx((0.3 + 0.6 + 0.5) / 3)


def test_op_norm_is_zero_for_the_floors_themselves_and_one_for_perfection():
    floors = np.array([0.3, 0.5, 0.37])
    assert summarize(np.tile(floors, (3, 1)), floors=floors).op_norm == pytest.approx(0.0, abs=1e-15)
    assert summarize(np.ones((3, 3)), floors=floors).op_norm == 1.0


def test_a_frozen_model_has_a_bwt_of_exactly_zero_and_the_zero_shot_op():
    scores = np.array([0.31, 0.52, 0.29, 0.385])
    result = summarize(np.tile(scores, (4, 1)), untouched=scores)
    assert result.bwt == result.bwt_T == result.bwt_clipped_T == result.forgetting == result.fwt == 0.0
    assert result.op == scores.mean()


def test_cheap_cells_give_op_and_bwt_alone():
    cheap = np.full((3, 3), np.nan)
    for cell in evaluation_plan(3):
        cheap[cell.round - 1, cell.task] = HAND[cell.round - 1, cell.task]
    result = summarize(cheap, untouched=np.array([0.1, 0.1, 0.2]))
    assert (result.op, result.bwt) == (summarize(HAND).op, summarize(HAND).bwt)
    assert result.forgetting is result.average_incremental is result.fwt is None


def test_one_task_has_no_backward_transfer():
    result = summarize(np.array([[0.4]]), untouched=np.array([0.1]))
    assert result.op == 0.4
    assert result.bwt is result.bwt_T is result.forgetting is result.fwt is None


def test_eight_tasks_need_15_evaluations_instead_of_36_or_64():
    assert [len(evaluation_plan(8, kind)) for kind in ("cheap", "triangle", "square")] == [15, 36, 64]
    assert len(evaluation_plan(8, "cheap", untouched=True)) == 23
    assert evaluation_plan(2, untouched=True) == (Cell(0, 0), Cell(0, 1), Cell(1, 0), Cell(2, 0), Cell(2, 1))
    rounds = [cell.round for cell in evaluation_plan(8, "square", untouched=True)]
    assert rounds == sorted(rounds)


def test_matrices_survive_json_and_are_written_as_tables():
    cheap = np.array([[0.5, np.nan], [0.25, 0.75]])
    assert matrix_rows(cheap) == [[0.5, None], [0.25, 0.75]]
    assert np.array_equal(matrix_from_rows(json.loads(json.dumps(matrix_rows(cheap)))), cheap, equal_nan=True)
    assert matrix_csv(cheap, ("FOMC", "Py150")) == "after,FOMC,Py150\nFOMC,0.5,\nPy150,0.25,0.75\n"


def run_of(matrix, sizes, seed, shift=0.0):
    """0/1 scores whose means are near the matrix."""
    generator = np.random.Generator(np.random.Philox(seed))
    hardness = [generator.random(size) for size in sizes]
    cells = {
        Cell(after + 1, task): (hardness[task] < matrix[after, task] + shift).astype(float)
        for after in range(len(matrix))
        for task in range(len(matrix))
    }
    return RunScores(("a", "b", "c"), cells)


def test_intervals_hold_the_value_and_shrink_with_examples():
    small = [run_of(HAND, (50, 50, 50), 1)]
    large = [run_of(HAND, (5000, 5000, 5000), 1)]
    for name in ("op", "bwt", "bwt_T"):
        one = aggregate_intervals(small, seed=3)[name]
        other = aggregate_intervals(large, seed=3)[name]
        assert one.low <= one.value <= one.high
        assert (one.high - one.low) > 5 * (other.high - other.low) > 0
        assert one.value == pytest.approx(np.mean(per_seed(small)[name]))


def test_the_interval_of_op_is_the_normal_one_of_stratified_means():
    run = run_of(HAND, (300, 100, 200), 5)
    variance = sum(run.cells[Cell(3, task)].var() / len(run.cells[Cell(3, task)]) for task in range(3)) / 9
    interval = aggregate_intervals([run], seed=0, n=4000)["op"]
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * np.sqrt(variance), rel=0.05)
    assert interval.n == 600


def test_paired_differences_are_tighter_than_differences_of_intervals():
    first, second = [run_of(HAND, (200, 200, 200), 7, 0.05)], [run_of(HAND, (200, 200, 200), 7)]
    paired = difference_intervals(first, second, seed=0)["op"]
    alone = aggregate_intervals(first, seed=0)["op"], aggregate_intervals(second, seed=0)["op"]
    assert paired.low > 0
    assert paired.value == pytest.approx(alone[0].value - alone[1].value)
    assert (paired.high - paired.low) < (alone[0].high - alone[0].low)
    same = difference_intervals(first, first, seed=0)["op"]
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_repeated_examples_of_one_cluster_add_no_certainty():
    run = run_of(HAND, (60, 60, 60), 11)
    repeated = RunScores(run.tasks, {cell: np.repeat(values, 20) for cell, values in run.cells.items()})
    clusters = {name: np.repeat(np.arange(60), 20) for name in run.tasks}
    once = aggregate_intervals([run], seed=0)["op"]
    clustered = aggregate_intervals([repeated], clusters=clusters, seed=0)["op"]
    naive = aggregate_intervals([repeated], seed=0)["op"]
    assert clustered.high - clustered.low == pytest.approx(once.high - once.low, rel=0.1)
    assert naive.high - naive.low < (once.high - once.low) / 3


def test_training_seeds_widen_the_interval_when_they_disagree():
    agreeing = [run_of(HAND, (400, 400, 400), 13) for _ in range(4)]
    disagreeing = [run_of(HAND, (400, 400, 400), 13, shift) for shift in (-0.2, 0.1, -0.1, 0.09)]
    narrow, wide = (aggregate_intervals(runs, seed=0)["op"] for runs in (agreeing, disagreeing))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    assert len(per_seed(disagreeing)["op"]) == 4


def test_three_seeds_on_certain_examples_have_the_interval_of_students_t_and_not_their_range():
    finals = (0.40, 0.45, 0.53)
    runs = []
    for final in finals:  # every example of a task scores alike: the seeds alone differ
        matrix = np.array([[0.5, 0.0, 0.0], [0.5, 0.6, 0.0], [final, 0.6, 0.7]])
        cells = {Cell(after + 1, task): np.full(40, matrix[after, task]) for after in range(3) for task in range(3)}
        runs.append(RunScores(("a", "b", "c"), cells))
    found = aggregate_intervals(runs, seed=0)
    values = np.array(per_seed(runs)["bwt"])
    half = t.ppf(0.975, 2) * values.std(ddof=1) / np.sqrt(3)
    assert found["bwt"].low == pytest.approx(values.mean() - half)
    assert found["bwt"].high == pytest.approx(values.mean() + half)
    assert found["bwt"].low < values.min()
    assert found["bwt"].high > values.max()
    alone = aggregate_intervals(runs[:1], seed=0)["bwt"]  # one seed says nothing of others
    assert alone.low == alone.high == pytest.approx(values[0])


def test_intervals_of_three_seeds_hold_the_truth_where_the_range_of_the_seeds_does_not():
    generator = np.random.Generator(np.random.Philox(3))
    held, in_range, n_worlds = 0, 0, 300
    for _ in range(n_worlds):
        runs = []
        for shift in generator.normal(0, 0.1, 3):
            cells = {
                Cell(1, 0): np.clip(0.5 + generator.normal(0, 0.1, 60), 0, 1),
                Cell(2, 0): np.clip(0.5 + shift + generator.normal(0, 0.1, 60), 0, 1),
                Cell(2, 1): np.full(60, 0.5),
            }
            runs.append(RunScores(("a", "b"), cells))
        interval, values = aggregate_intervals(runs, seed=0, n=200)["bwt"], per_seed(runs)["bwt"]
        held += interval.low <= 0 <= interval.high
        in_range += min(values) <= 0 <= max(values)
    assert held / n_worlds > 0.92
    assert in_range / n_worlds < 0.82


def test_aggregates_with_a_maximum_have_a_value_and_no_interval():
    runs = [run_of(HAND, (50, 50, 50), seed) for seed in (1, 2)]
    for found in (aggregate_intervals(runs, seed=0), difference_intervals(runs, runs[::-1], seed=0)):
        for name in BIASED:
            assert np.isfinite(found[name].value)
            assert np.isnan([found[name].low, found[name].high]).all()
    still = np.tile([0.5, 0.5, 0.5], (3, 1))  # nothing is forgotten, answers flip at random
    values = []
    for seed in range(40):
        generator = np.random.Generator(np.random.Philox(seed))
        cells = {
            Cell(after + 1, task): (generator.random(50) < still[after, task]).astype(float)
            for after in range(3)
            for task in range(3)
        }
        values.append({name: each[0] for name, each in per_seed([RunScores(("a", "b", "c"), cells)]).items()})
    assert np.mean([one["forgetting"] for one in values]) > 0.01  # the bias the report speaks of
    assert abs(np.mean([one["bwt"] for one in values])) < 0.03


def test_clusters_that_reach_over_tasks_move_together():
    generator = np.random.Generator(np.random.Philox(5))
    skill = (generator.random(200) < 0.5).astype(float)  # a user is right in every task or in none
    cells = {Cell(after, task): skill for after in (1, 2, 3) for task in range(3)}
    run = RunScores(("a", "b", "c"), cells)
    users = dict.fromkeys(run.tasks, np.arange(200))
    together = aggregate_intervals([run], clusters=users, across_tasks=True, seed=0)["op"]
    apart = aggregate_intervals([run], clusters=users, seed=0)["op"]
    assert together.high - together.low == pytest.approx(np.sqrt(3) * (apart.high - apart.low), rel=0.1)
    assert (together.high - together.low) / 2 == pytest.approx(1.97 * np.sqrt(skill.var() / 200), rel=0.05)
    few = {"a": np.arange(200), "b": np.arange(200), "c": np.arange(2)}  # draws without a user of c keep c's mean
    small = {cell: values[:2] if cell.task == 2 else values for cell, values in cells.items()}
    found = aggregate_intervals([RunScores(run.tasks, small)], clusters=few, across_tasks=True, seed=0)["op"]
    assert np.isfinite([found.low, found.high]).all()


def test_what_was_not_evaluated_has_no_interval():
    run = run_of(HAND, (50, 50, 50), 1)
    cheap = RunScores(run.tasks, {cell: run.cells[cell] for cell in evaluation_plan(3)})
    intervals = aggregate_intervals([cheap], seed=0)
    assert np.isfinite(intervals["bwt"].low)
    assert np.isnan([intervals["forgetting"].value, intervals["forgetting"].low, intervals["fwt"].high]).all()


def test_general_ability_delta_is_the_mean_change():
    before = {"MMLU": 0.46, "GSM8K": 0.26, "BBH": 0.40}
    after = {"BBH": 0.43, "MMLU": 0.44, "GSM8K": 0.02}
    assert general_ability_delta(before, after) == pytest.approx((-0.02 - 0.24 + 0.03) / 3)


def test_general_items_are_balanced_and_chance_gets_a_quarter():
    assert len(GENERAL_ITEMS) == 40
    assert np.bincount([item.correct for item in GENERAL_ITEMS]).tolist() == [10, 10, 10, 10]
    assert all(len(set(item.options)) == 4 for item in GENERAL_ITEMS)
    assert len({item_prompt(item) for item in GENERAL_ITEMS}) == 40
    for choose in (max, min):  # length gives little away
        by_length = [item.options.index(choose(item.options, key=len)) == item.correct for item in GENERAL_ITEMS]
        assert np.mean(by_length) <= 0.3
    assert score_general(lambda prompt, options: [0.0] * 4).correct.mean() == 0.25


def test_general_scores_of_a_model_that_knows_and_of_one_that_errs():
    answers = {item_prompt(item): continuations(item)[item.correct] for item in GENERAL_ITEMS}
    knows = score_general(lambda prompt, options: [-1.0 if option == answers[prompt] else -5.0 for option in options])
    errs = score_general(lambda prompt, options: [-5.0 if option == answers[prompt] else -1.0 for option in options])
    assert knows.correct.mean() == 1.0
    assert errs.correct.mean() == 0.0
    assert (knows.margin > 0).all()
    assert (errs.margin < 0).all()
    assert set(knows.by_skill()) == {"arithmetic", "common sense", "reading"}
    assert general_ability_delta(knows.by_skill(), errs.by_skill()) == -1.0
    assert knows.to_json()["n"] == 40
