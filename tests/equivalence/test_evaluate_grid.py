"""A grid of options gives what its points give alone, is chosen from on validation only, and survives a kill."""

import json

import numpy as np
import pytest
from support.recommender_worlds import random_log

import recollect
from recollect.errors import ResumeRefused

GRID = {"ease": {"regularization": [1.0, 30.0, 3000.0]}, "itemknn": {"neighbours": [2, 5, 20]}}
MODELS = ("pop", "ease", "itemknn")


@pytest.fixture(scope="module")
def log():
    return random_log(n_users=60, n_items=30, length=14)


@pytest.fixture(scope="module")
def tuned(log, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid") / "run"
    return out, recollect.evaluate(log, models=MODELS, grid=GRID, out=out)


def numbers(report):
    """What two runs of the same options share."""
    points = {
        label: [{key: value for key, value in point.items() if key != "seconds"} for point in row["points"]]
        for label, row in report.sections["tuning"].items()
    }
    return report.sections["models"], points, report.sections["baseline"]


def results_of(out, label):
    """{value of the one varied option: path of its result.json}."""
    option = next(iter(GRID[label]))
    paths = sorted((out / "rows" / label).glob("point-*/once/result.json"))
    return {json.loads(path.read_text())["entry"]["options"][option]: path for path in paths}


def test_every_point_is_what_its_options_give_alone(log, tuned, tmp_path):
    _, report = tuned
    for label, options in GRID.items():
        ((option, values),) = options.items()
        row = report.sections["tuning"][label]
        assert row["budget"] == len(values) == len(row["points"])
        for value, point in zip(values, row["points"], strict=True):
            assert point["options"] == {option: value}
            alone = recollect.evaluate(
                log, models=(label,), model_options={label: {option: value}}, out=tmp_path / f"{label}-{value}"
            )
            found = alone.sections["models"][label]["ndcg@10"]
            assert point["test"]["value"] == pytest.approx(found["value"], abs=1e-12)
            assert point["validation"] == alone.sections["rows"][label]["validation"]["ndcg@10"]


def test_the_row_is_the_point_best_on_validation_and_the_median_is_over_all(tuned):
    _, report = tuned
    for label, row in report.sections["tuning"].items():
        (chosen,) = [point for point in row["points"] if point["chosen"]]
        assert chosen["validation"] == max(point["validation"] for point in row["points"])
        assert report.sections["models"][label]["ndcg@10"]["value"] == pytest.approx(chosen["test"]["value"], abs=1e-12)
        assert row["test_chosen"] == chosen["test"]["value"]
        assert row["test_median"] == np.median([point["test"]["value"] for point in row["points"]])
        assert report.sections["rows"][label]["options"].items() >= chosen["options"].items()
    assert "pop" not in report.sections["tuning"]
    assert report.protocol["tuning"] == (
        "points of a grid (ease 3, itemknn 3), the best by validation ndcg@10 with seed 0"
    )


def test_a_point_worst_on_the_test_is_taken_when_validation_prefers_it(log, tmp_path):
    out, options = tmp_path / "run", {"models": ("pop", "ease"), "grid": {"ease": GRID["ease"]}}
    before = recollect.evaluate(log, out=out, **options).sections["tuning"]["ease"]["points"]
    worst = min(before, key=lambda point: point["test"]["value"])
    best = max(point["test"]["value"] for point in before)
    assert worst["test"]["value"] < best
    for value, path in results_of(out, "ease").items():
        result = json.loads(path.read_text())
        result["validation"]["ndcg@10"] = 0.9 if value == worst["options"]["regularization"] else 0.1
        path.write_text(json.dumps(result))
    report = recollect.evaluate(log, out=out, resume=True, **options)
    row = report.sections["tuning"]["ease"]
    assert row["chosen"] == worst["options"]
    assert report.sections["models"]["ease"]["ndcg@10"]["value"] == pytest.approx(worst["test"]["value"], abs=1e-12)
    (summary,) = [panel for panel in report.sections["panels"] if panel["title"] == "Tuning"]
    assert [cell["value"] for cell in summary["rows"][0][3:]] == [0.9, row["test_chosen"], row["test_median"]]
    assert best not in (row["test_chosen"], row["test_median"])


def test_the_page_shows_every_point_best_on_validation_first(tuned):
    out, report = tuned
    page = (out / "report.html").read_text()
    for label, row in report.sections["tuning"].items():
        (panel,) = [panel for panel in report.sections["panels"] if panel["title"] == f"Every point of {label}"]
        assert panel["title"] in page
        validation = [cells[1]["value"] for cells in panel["rows"]]
        assert validation == sorted((point["validation"] for point in row["points"]), reverse=True)
        assert [cells[-1] for cells in panel["rows"]] == ["yes", "", ""]
        assert {cells[0] for cells in panel["rows"]} == {str(value) for value in next(iter(GRID[label].values()))}


def test_finished_points_are_kept_after_a_kill_and_further_ones_may_be_added(log, tuned, tmp_path, monkeypatch):
    _, whole = tuned
    from recollect.recommenders import evaluate as recipe

    run_unit, done = recipe.run_unit, []

    def killed_after_four(unit, *arguments):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(unit.title)
        run_unit(unit, *arguments)

    monkeypatch.setattr(recipe, "run_unit", killed_after_four)
    with pytest.raises(KeyboardInterrupt):
        recollect.evaluate(log, models=MODELS, grid=GRID, out=tmp_path / "run")
    again = []
    monkeypatch.setattr(recipe, "run_unit", lambda unit, *rest: (again.append(unit.title), run_unit(unit, *rest)))
    resumed = recollect.evaluate(log, models=MODELS, grid=GRID, out=tmp_path / "run", resume=True)
    assert not set(again) & set(done)
    assert len(again) + len(done) == 7
    assert numbers(resumed) == numbers(whole)
    again.clear()
    wider = {
        "ease": {"regularization": [*GRID["ease"]["regularization"], 300.0]},
        "itemknn": {"neighbours": [2, 5, 9, 20]},
    }
    report = recollect.evaluate(log, models=MODELS, grid=wider, out=tmp_path / "run", resume=True)
    assert again == ["ease (regularization=300.0)", "itemknn (neighbours=9)"]
    assert {row["budget"] for row in report.sections["tuning"].values()} == {4}
    with pytest.raises(ResumeRefused, match="has mask 'history', not 'none'"):
        recollect.evaluate(log, models=MODELS, grid=GRID, mask="none", out=tmp_path / "run", resume=True)


def test_only_the_chosen_point_is_fitted_with_the_other_seeds(log, tmp_path):
    options = {"sasrec": {"epochs": 2, "max_length": 10, "batch_size": 16}}
    grid = {"sasrec": [{"hidden": 8, "dropout": [0.1, 0.5]}, {"hidden": 4}]}
    report = recollect.evaluate(
        log, models=("pop", "sasrec"), model_options=options, grid=grid, seed=3, seeds=2, out=tmp_path / "run"
    )
    row = report.sections["tuning"]["sasrec"]
    assert [point["options"] for point in row["points"]] == [
        {"hidden": 8, "dropout": 0.1},
        {"hidden": 8, "dropout": 0.5},
        {"hidden": 4},
    ]
    assert len(list((tmp_path / "run/rows/sasrec").glob("point-*/seed-3/result.json"))) == 3
    (second,) = (tmp_path / "run/rows/sasrec").glob("point-*/seed-4/result.json")
    assert json.loads(second.read_text())["entry"]["options"].items() >= {**options["sasrec"], **row["chosen"]}.items()
    found = report.sections["models"]["sasrec"]["ndcg@10"]
    assert found["per_seed"][0] == pytest.approx(row["test_chosen"], abs=1e-12)
    assert len(found["per_seed"]) == 2
    assert report.sections["rows"]["sasrec"]["seeds"] == [3, 4]


def test_the_plan_counts_points_and_what_follows_the_choice(log, tmp_path):
    plan = recollect.evaluate(
        log,
        models=("pop", "markov", "sasrec"),
        grid={"sasrec": {"hidden": [8, 16], "dropout": [0.1, 0.2]}},
        seeds=3,
        tie_shuffles=2,
        dry_run=True,
        out=tmp_path / "run",
    )
    # pop and markov once and in two orders each, 4 points, 2 further seeds and 2 orders of the chosen one
    assert plan.ledger["rows_to_run"] == 2 * 3 + 4 + 2 + 2
    assert not (tmp_path / "run").exists()


def test_unequal_budgets_are_allowed_when_asked_for_and_said(log, tmp_path):
    report = recollect.evaluate(
        log, models=("ease", "itemknn"), grid={"ease": GRID["ease"]}, unequal_budgets=True, out=tmp_path / "run"
    )
    assert any("tuning budgets differ (ease 3, itemknn 1)" in warning for warning in report.warnings)
    assert list(report.sections["tuning"]) == ["ease"]
    saved = next((tmp_path / "run/rows/ease").glob("point-*/once/model"))
    mixed = recollect.evaluate(
        log, models=("ease", f"path:{saved}"), grid={"ease": GRID["ease"]}, out=tmp_path / "saved"
    )
    assert any("how much a saved model was tuned is not known" in warning for warning in mixed.warnings)
    assert not any("tuning budgets differ" in warning for warning in mixed.warnings)
