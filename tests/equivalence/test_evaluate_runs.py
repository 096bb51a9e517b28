"""The same evaluation by other ways gives the same numbers: resumed, extended, reordered, in other batches, by hand."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.recommender_worlds import random_log

import recollect
import recollect.recommenders.evaluate
from recollect.data import leave_one_out, refit_mask
from recollect.errors import ResumeRefused
from recollect.eval.metrics import ndcg
from recollect.eval.ranking import evaluate_ranker
from recollect.recommenders import evaluate_runs
from recollect.recommenders.ease import Ease, EaseConfig
from recollect.recommenders.markov import Markov
from recollect.recommenders.models import load_recommender

CLOSED = ("pop", "markov", "ease", "itemknn")


@pytest.fixture(scope="module")
def log():
    return random_log(n_users=60, n_items=30, length=14)


@pytest.fixture(scope="module")
def finished(log, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "run"
    return out, recollect.evaluate(log, models=CLOSED, out=out)


def without_times(value):
    """A report or result without wall times, which no two runs share."""
    if isinstance(value, dict):
        clocks = ("seconds", "test_cases_per_s", "train_samples_per_s", "ledger", "panels", "run", "training")
        return {key: without_times(item) for key, item in value.items() if key not in clocks}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_numbers_are_those_of_the_core_evaluator(log, finished):
    _, report = finished
    dataset = recollect.data.k_core(log, 5)
    split = leave_one_out(dataset)
    table = evaluate_ranker(Markov().fit(dataset, split), dataset, split)
    found = report.sections["models"]["markov"]
    for metric in ("hr@1", "hr@5", "ndcg@10", "ndcg@20", "mrr"):
        assert found[metric]["value"] == pytest.approx(table.mean(metric), abs=1e-12)
        assert found[metric]["per_seed"] == pytest.approx([found[metric]["value"]], abs=1e-12)
    entry = table.aggregate(["ndcg@10"])["ndcg@10"]
    assert found["ndcg@10"]["ci95"] == pytest.approx(entry["ci95"], abs=1e-12)
    assert found["ndcg@10"]["n"] == len(split.test_row)


def test_stored_cases_let_an_outsider_recompute_the_metrics(log, finished):
    out, report = finished
    table = pq.read_table(out / "rows/ease/once/cases.parquet").to_pydict()
    hits = [target[0] in items[:10] for target, items in zip(table["targets"], table["items"], strict=True)]
    assert np.mean(hits) == pytest.approx(report.sections["models"]["ease"]["hr@10"]["value"], abs=1e-12)
    ranks = np.array(
        [
            items.index(t[0]) if t[0] in items else 10**6
            for t, items in zip(table["targets"], table["items"], strict=True)
        ]
    )
    none = np.zeros_like(ranks)
    assert ndcg(ranks, none, 10) == pytest.approx(np.array(table["ndcg@10"]), abs=1e-12)
    assert set(table["user_id"]) <= set(log.users.user_ids)


def test_a_run_that_lost_rows_is_completed_without_touching_the_others(log, finished, tmp_path):
    out, report = finished
    again = tmp_path / "run"
    shutil.copytree(out, again)
    shutil.rmtree(again / "rows/ease")
    (again / "rows/itemknn/once/result.json").unlink()  # killed between the table and the result
    kept = (again / "rows/markov/once/result.json").read_bytes()
    resumed = recollect.evaluate(log, models=CLOSED, out=again, resume=True)
    assert (again / "rows/markov/once/result.json").read_bytes() == kept
    assert without_times(resumed.to_json()) == without_times(report.to_json())


def test_finished_rows_are_never_computed_again(log, finished, monkeypatch, tmp_path):
    out, report = finished
    again = tmp_path / "run"
    shutil.copytree(out, again)

    def refuse(*_, **__):
        raise AssertionError("a finished row was run again")

    monkeypatch.setattr("recollect.recommenders.evaluate.run_unit", refuse)
    resumed = recollect.evaluate(log, models=CLOSED, out=again, resume=True)
    assert without_times(resumed.to_json()) == without_times(report.to_json())
    fewer = recollect.evaluate(log, models=("ease", "pop"), out=again, resume=True)
    assert list(fewer.sections["models"]) == ["ease", "pop"]


def test_order_of_models_and_batch_size_change_no_number(log, finished, tmp_path):
    _, report = finished
    other = recollect.evaluate(log, models=CLOSED[::-1], out=tmp_path / "run", batch_size=7)
    for label, table in other.sections["models"].items():
        for metric, found in table.items():
            expected = report.sections["models"][label][metric]
            assert found["value"] == pytest.approx(expected["value"], rel=1e-6, abs=1e-9), (label, metric)
    assert other.sections["baseline"] == report.sections["baseline"]


def test_a_saved_model_gives_its_row_again(log, finished, tmp_path):
    out, report = finished
    label = f"path:{out / 'rows/ease/once/model'}"
    again = recollect.evaluate(log, models=("pop", label), out=tmp_path / "run")
    assert again.sections["models"][label]["ndcg@10"] == report.sections["models"]["ease"]["ndcg@10"]
    assert any("may have seen the test" in warning for warning in again.warnings)
    assert again.sections["rows"][label]["leak"]["leaking_cases"] is None
    assert json.loads((tmp_path / "run/rows/pop/once/result.json").read_text())["protocol"]["trained_on"] == "train"
    (held,) = (tmp_path / "run/rows").glob("saved-*/once/result.json")
    assert json.loads(held.read_text())["protocol"]["trained_on"] == "unknown"
    assert isinstance(load_recommender(out / "rows/ease/once/model"), Ease)


def test_a_saved_model_that_was_replaced_is_not_taken_for_its_finished_row(log, tmp_path):
    dataset = recollect.data.k_core(log, 5)
    Ease().fit(dataset, leave_one_out(dataset)).save_pretrained(tmp_path / "model")
    models = ("pop", f"path:{tmp_path / 'model'}")
    recollect.evaluate(log, models=models, out=tmp_path / "run")
    Ease(EaseConfig(regularization=9.0)).fit(dataset, leave_one_out(dataset)).save_pretrained(tmp_path / "model")
    with pytest.raises(ResumeRefused, match="was made with"):
        recollect.evaluate(log, models=models, out=tmp_path / "run", resume=True)


def test_seeds_are_averaged_and_a_trained_row_reproduces(log, tmp_path):
    options = {"sasrec": {"epochs": 2, "hidden": 8, "max_length": 10, "batch_size": 16}}
    two = recollect.evaluate(log, models=("pop", "sasrec"), model_options=options, seeds=2, seed=3, out=tmp_path / "a")
    found = two.sections["models"]["sasrec"]["ndcg@10"]
    assert found["value"] == pytest.approx(np.mean(found["per_seed"]), abs=1e-12)
    assert two.sections["rows"]["sasrec"]["seeds"] == [3, 4]
    assert two.sections["rows"]["pop"]["seeds"] == []
    one = recollect.evaluate(log, models=("sasrec",), model_options=options, seed=4, out=tmp_path / "b")
    assert one.sections["models"]["sasrec"]["ndcg@10"]["value"] == found["per_seed"][1]
    stored = load_recommender(tmp_path / "b/rows/sasrec/seed-4/model")
    dataset = recollect.data.k_core(log, 5)
    table = evaluate_ranker(stored, dataset, leave_one_out(dataset))
    assert table.mean("ndcg@10") == pytest.approx(found["per_seed"][1], abs=1e-9)
    extended = recollect.evaluate(
        log, models=("pop", "sasrec"), model_options=options, seed=3, seeds=3, resume=True, out=tmp_path / "a"
    )
    assert extended.sections["models"]["sasrec"]["ndcg@10"]["per_seed"][:2] == found["per_seed"]
    with pytest.raises(ResumeRefused, match="was made with"):
        recollect.evaluate(
            log, models=("sasrec",), model_options={"sasrec": {"epochs": 3}}, seed=3, resume=True, out=tmp_path / "a"
        )


def test_a_trained_row_that_was_killed_goes_on_from_its_checkpoint(log, tmp_path, monkeypatch):
    options = {"sasrec": {"epochs": 3, "hidden": 8, "max_length": 10, "batch_size": 16}}
    whole = recollect.evaluate(log, models=("sasrec",), model_options=options, out=tmp_path / "whole")

    class Stop:
        """A progress that interrupts the run when the last epoch begins."""

        def stage(self, name, total=None):
            if name.startswith("epoch 3"):
                raise KeyboardInterrupt

        def advance(self, steps=1, note=""):
            pass

        def close(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        recollect.evaluate(log, models=("sasrec",), model_options=options, out=tmp_path / "killed", progress=Stop())
    held = tmp_path / "killed/rows/sasrec/seed-0"
    assert (held / "training/checkpoint.safetensors").is_file()
    resumed = recollect.evaluate(log, models=("sasrec",), model_options=options, out=tmp_path / "killed", resume=True)
    assert without_times(resumed.to_json()) == without_times(whole.to_json())
    assert not (held / "training").exists()
    curve = (held / "metrics.jsonl").read_text()
    assert [json.loads(line)["epoch"] for line in curve.splitlines()] == [1, 2, 3]


def test_refit_uses_validation_events_and_keeps_the_epochs_found(log, tmp_path):
    report = recollect.evaluate(log, models=("markov",), refit=True, out=tmp_path / "a")
    dataset = recollect.data.k_core(log, 5)
    split = leave_one_out(dataset)
    rows = refit_mask(dataset, split)
    table = evaluate_ranker(Markov().fit(dataset, rows=rows), dataset, split, rows=rows)
    assert report.sections["models"]["markov"]["ndcg@10"]["value"] == pytest.approx(table.mean("ndcg@10"), abs=1e-12)
    assert report.sections["rows"]["markov"]["fitted_on"] == "train+val"
    assert any("refitted" in warning for warning in report.warnings)
    options = {"sasrec": {"epochs": 3, "hidden": 8, "max_length": 10, "batch_size": 16}}
    trained = recollect.evaluate(log, models=("sasrec",), model_options=options, refit=True, out=tmp_path / "b")
    best = trained.sections["rows"]["sasrec"]["best_epochs"]
    config = json.loads((tmp_path / "b/rows/sasrec/seed-0/model/config.json").read_text())
    assert config["options"]["epochs"] == max(1, best[0])
    assert config["options"]["patience"] is None


def test_the_baseline_is_chosen_on_validation(log, finished):
    _, report = finished
    rows = report.sections["rows"]
    strong = {name: rows[name]["validation"]["ndcg@10"] for name in ("pop", "markov")}
    assert report.sections["baseline"] == max(strong, key=strong.get)
    assert {row["model"] for row in report.sections["differences"]} == set(CLOSED) - {report.sections["baseline"]}


def test_the_page_says_which_rows_count_as_baselines_and_how_one_was_chosen(log, finished, tmp_path):
    _, report = finished
    chosen = report.sections["baseline"]
    why = "the best by validation ndcg@10 of the rows that count as baselines here (pop, markov)"
    assert report.protocol["compared_with"] == f"{chosen}, {why}"
    assert why in report.sections["panels"][0]["text"]
    # A row that is no baseline is none even where it is better on validation.
    sections = {"again": {"model": "pop"}}
    weak = recollect.evaluate(log, models=("pop", "again", "ease"), model_options=sections, out=tmp_path / "weak")
    validation = {name: row["validation"]["ndcg@10"] for name, row in weak.sections["rows"].items()}
    assert validation["ease"] > validation["pop"]
    assert weak.sections["panels"][0]["text"].endswith(
        "All rows are compared with pop: the best by validation ndcg@10 of the rows that count as baselines here "
        "(pop, again)."
    )
    one = recollect.evaluate(log, models=("markov", "itemknn"), out=tmp_path / "one")
    assert one.protocol["compared_with"] == "markov, the only row of this table that counts as a baseline"
    none = recollect.evaluate(log, models=("ease", "itemknn"), out=tmp_path / "none")
    assert (
        "of all rows, as none of the baselines pop, markov, sasrec is in this table" in none.protocol["compared_with"]
    )


def test_text_rows_come_with_the_other_mask_and_both_intervals(log, minilm_dir, tmp_path):
    report = recollect.evaluate(log, models=("pop", "minilm"), out=tmp_path / "run")
    found = report.sections["rows"]["minilm"]["other_mask"]
    other = recollect.evaluate(log, models=("minilm",), mask="none", out=tmp_path / "none")
    for mask, table, value in (("history", report, found["own"]), ("none", other, found["other"])):
        assert table.protocol["mask"] == mask
        expected = table.sections["models"]["minilm"]["ndcg@10"]
        assert [value["value"], *value["ci95"]] == pytest.approx([expected["value"], *expected["ci95"]], abs=1e-12)
        assert value["n"] == expected["n"]
    assert found["mask"] == "none"
    assert report.sections["rows"]["pop"]["other_mask"] is None


def test_shuffles_of_ties_are_runs_of_their_own(tmp_path):
    tied = random_log(n_users=60, n_items=30, length=14)
    log = tied.interactions
    dataset = type(tied)(
        tied.name,
        type(log)(log.user, log.item, (log.time + 40 * log.user) // 250, row=log.row),
        tied.catalog,
        tied.users,
        tied.domains,
        dict(tied.meta),
    )
    report = recollect.evaluate(dataset, models=("pop", "markov"), tie_shuffles=2, out=tmp_path / "run")
    found = report.sections["tie_orders"]["markov"]["ndcg@10"]
    assert found["file_order"] == pytest.approx(report.sections["models"]["markov"]["ndcg@10"]["value"], abs=1e-12)
    assert len(set(found["per_shuffle"])) == 2
    assert found["value"] == pytest.approx(np.mean(found["per_shuffle"]))
    assert {unit.name for unit in (tmp_path / "run/rows/markov").iterdir()} == {
        "once",
        "once-shuffle-1",
        "once-shuffle-2",
    }
    assert any("is arbitrary" in warning for warning in report.warnings)
    assert 0.2 < report.protocol["tied_target_share"] < 0.8


def test_units_of_a_run_are_one_per_seed_and_once_for_deterministic_models():
    config = recollect.recommenders.evaluate.EvaluateConfig(models=("pop", "sasrec"), seeds=3, seed=5, tie_shuffles=1)
    units = evaluate_runs.make_units(evaluate_runs.make_entries(config.models, {}), config)
    assert [unit.folder for unit in units] == [
        "rows/pop/once",
        "rows/sasrec/seed-5",
        "rows/sasrec/seed-6",
        "rows/sasrec/seed-7",
        "rows/pop/once-shuffle-1",
        "rows/sasrec/seed-5-shuffle-1",
    ]
