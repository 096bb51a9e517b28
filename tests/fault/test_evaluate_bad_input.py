"""What an evaluation refuses, each with one line that names the thing, the value and what to do."""

import json

import numpy as np
import pytest
from support.recommender_worlds import random_log, small_log

import recollect
from recollect.errors import (
    ConfigError,
    DataError,
    InputError,
    JournalLocked,
    ModelFileError,
    ResumeRefused,
    UnknownName,
)
from recollect.journal.lock import WriterLock
from recollect.recommenders.markov import Markov
from recollect.recommenders.models import MODELS, load_recommender, model_spec


@pytest.fixture(scope="module")
def log():
    return random_log()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"models": ("pop", "sasrek")}, UnknownName, "unknown model 'sasrek'; known: bert4rec, .*path:DIR"),
        ({"models": ()}, ConfigError, "models is empty"),
        ({"models": ("pop", "pop")}, ConfigError, "'pop' more than once"),
        ({"models": ("path:nowhere",)}, ConfigError, "nowhere holds no saved model"),
        ({"k": ()}, ConfigError, "cut-offs of at least 1"),
        ({"k": (0, 5)}, ConfigError, "cut-offs of at least 1"),
        ({"seeds": 0}, ConfigError, "seeds must be at least 1, got 0"),
        ({"core": -1}, ConfigError, "core must be at least 0"),
        ({"quantile": 1.0}, ConfigError, "quantile must lie between 0 and 1"),
        ({"mask": "everything"}, ConfigError, "'mask' .* one of history, none, train, got 'everything'"),
        ({"protocol": "random"}, ConfigError, "one of loo, gts"),
        ({"resume": True, "overwrite": True}, ConfigError, "exclude each other"),
        ({"nonsense": 1}, ConfigError, "unknown key 'nonsense' .* known: attributes, batch_size"),
    ],
)
def test_illegal_options(log, options, kind, message, tmp_path):
    with pytest.raises(kind, match=message) as refused:
        recollect.evaluate(log, **{"models": ("pop",), "out": str(tmp_path / "run"), **options})
    assert refused.value.exit_code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("models", "sections", "message"),
    [
        (("ease",), {"ease": {"lambda": 3}}, "unknown key 'lambda' in the options of 'ease'; known: precision"),
        (("ease",), {"ease": {"regularization": 0.0}}, "regularization must be a positive number"),
        (("pop",), {"ease": {"regularization": 3.0}}, "options are given for 'ease', which --models does not name"),
        (("wide",), {"wide": {"hidden": 3}}, "unknown model 'wide'"),
        (("wide",), {"wide": {"model": "sasrecc"}}, "unknown model 'sasrecc'"),
        (("pop",), {"pop": {"model": "ease"}}, "has the name of a model"),
        (("../up",), {"../up": {"model": "ease"}}, "must be named by letters"),
        (("sasrec",), {"sasrec": {"seed": 3}}, "use --seed and --seeds"),
        (("sasrec",), {"sasrec": {"hidden": 10, "heads": 3}}, "multiple of heads"),
    ],
)
def test_illegal_model_options(log, models, sections, message, tmp_path):
    with pytest.raises(InputError, match=message):
        recollect.evaluate(log, models=models, model_options=sections, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_users_with_too_short_a_history(tmp_path):
    short = small_log([[0, 1], [1, 0], [0, 1]], 2)
    with pytest.raises(InputError, match="no user of 'small' has 3 interactions, so nothing can be held out"):
        recollect.evaluate(short, models=("pop",), core=0, out=tmp_path / "run")
    with pytest.raises(DataError, match=r"k_core\(5\) leaves nothing of 'small'"):
        recollect.evaluate(short, models=("pop",), out=tmp_path / "run")
    mixed = small_log([[0, 1, 2, 0], [1, 0], [2, 1, 0]], 3)
    report = recollect.evaluate(mixed, models=("pop",), core=0, out=tmp_path / "run")
    assert any("1 users have fewer than 3 interactions" in warning for warning in report.warnings)
    assert report.protocol["n_cases"] == 2


def test_a_global_cut_needs_a_clock_and_users_on_both_sides(log, tmp_path):
    positions = type(log)(log.name, log.interactions, log.catalog, log.users, log.domains, {"clock": "position"})
    with pytest.raises(ConfigError, match="has no clock"):
        recollect.evaluate(positions, models=("pop",), protocol="gts", out=tmp_path / "run")
    with pytest.raises(ConfigError, match="has no clock"):
        recollect.evaluate(positions, models=("pop",), tie_shuffles=1, out=tmp_path / "run")
    apart = small_log([[0, 1, 2], [0, 1, 2], [2, 1, 0]], 3, times=[[0, 1, 2], [10, 11, 12], [90, 91, 92]], name="apart")
    with pytest.raises(InputError, match="nobody in 'apart' has interactions both before and after"):
        recollect.evaluate(apart, models=("pop",), protocol="gts", core=0, quantile=0.7, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_scores_stop_the_run_and_name_model_and_user(log, monkeypatch, tmp_path):
    def broken(self, histories, candidates=None):
        scores = np.zeros((len(histories), self.n_items), dtype=np.float32)
        scores[1, 3] = np.nan
        return scores

    monkeypatch.setattr(Markov, "score", broken)
    with pytest.raises(InputError, match=r"'markov' gave NaN scores.* \(user 'u1'\)"):
        recollect.evaluate(log, models=("pop", "markov"), out=tmp_path / "run")
    assert (tmp_path / "run/rows/pop/once/result.json").is_file()
    assert not (tmp_path / "run/rows/markov/once/result.json").exists()
    monkeypatch.undo()
    report = recollect.evaluate(log, models=("pop", "markov"), out=tmp_path / "run", resume=True)
    assert set(report.sections["models"]) == {"pop", "markov"}


def test_a_model_that_does_not_know_the_items(log, monkeypatch, tmp_path):
    fit = Markov.fit

    def smaller(self, *arguments, **options):
        fit(self, *arguments, **options)
        self.n_items = 5
        return self

    monkeypatch.setattr(Markov, "fit", smaller)
    with pytest.raises(InputError, match=r"which the model 'markov' does not know: it was fitted on items 0\.\.4"):
        recollect.evaluate(log, models=("markov",), out=tmp_path / "run")


def test_a_model_saved_on_other_data(log, tmp_path):
    other = random_log(seed=7)
    Markov().fit(other).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"was saved on other data .* fit it on this data"):
        recollect.evaluate(log, models=(f"path:{tmp_path / 'other'}",), out=tmp_path / "run")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/config.json").write_text(json.dumps({"kind": "oracle"}))
    with pytest.raises(ModelFileError, match="a model of kind 'oracle'; known: bert4rec"):
        load_recommender(tmp_path / "strange")
    with pytest.raises(ModelFileError, match="holds no model"):
        load_recommender(tmp_path / "nowhere")


def test_a_run_is_resumed_only_as_itself(log, tmp_path):
    out = tmp_path / "run"
    recollect.evaluate(log, models=("pop", "ease"), out=out)
    with pytest.raises(InputError, match="add --resume to continue it or --overwrite"):
        recollect.evaluate(log, models=("pop",), out=out)
    with pytest.raises(ResumeRefused, match="has mask 'history', not 'none'"):
        recollect.evaluate(log, models=("pop",), mask="none", out=out, resume=True)
    with pytest.raises(ResumeRefused, match="has data_fingerprint"):
        recollect.evaluate(random_log(seed=3), models=("pop",), out=out, resume=True)
    with pytest.raises(ResumeRefused, match=r"was made with .*250\.0.*use the same options or another --out"):
        recollect.evaluate(log, models=("ease",), model_options={"ease": {"regularization": 9.0}}, out=out, resume=True)
    report = recollect.evaluate(log, models=("pop",), mask="none", out=out, overwrite=True)
    assert report.protocol["mask"] == "none"
    assert not (out / "rows/ease").exists()
    (out / "run.json").write_text(json.dumps({"command": "simulate"}))
    with pytest.raises(ResumeRefused, match="holds a run of 'simulate'"):
        recollect.evaluate(log, models=("pop",), out=out, resume=True)


def test_two_processes_do_not_write_one_run(log, tmp_path):
    (tmp_path / "run").mkdir()
    lock = WriterLock(tmp_path / "run" / "run.json")
    try:
        with pytest.raises(JournalLocked, match="is being written by process"):
            recollect.evaluate(log, models=("pop",), out=tmp_path / "run", resume=True)
    finally:
        lock.release()


def test_a_torn_table_is_named(log, tmp_path):
    recollect.evaluate(log, models=("pop", "markov"), out=tmp_path / "run")
    (tmp_path / "run/rows/pop/once/cases.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"cases\.parquet cannot be read .* remove its folder and resume"):
        recollect.evaluate(log, models=("pop", "markov"), out=tmp_path / "run", resume=True)


def test_warnings_say_what_weakens_the_table(log, tmp_path):
    events = log.interactions
    staggered = type(events)(events.user, events.item, events.time + 500 * events.user, row=events.row)
    later = type(log)(log.name, staggered, log.catalog, log.users, log.domains, dict(log.meta))
    report = recollect.evaluate(later, models=("ease",), out=tmp_path / "run")
    assert any("no strong baseline in this table: pop, markov, sasrec missing" in text for text in report.warnings)
    assert any("fitted on later events; use --protocol gts" in text for text in report.warnings)
    gts = recollect.evaluate(log, models=("ease", "pop"), protocol="gts", core=0, out=tmp_path / "gts")
    assert not any("later events" in text for text in gts.warnings)
    leaks = [row["leak"]["leaking_cases"] for row in gts.sections["rows"].values()]
    assert leaks == [0, 0]
    assert any("not every strong baseline is in this table: markov, sasrec missing" in text for text in gts.warnings)


def test_training_without_a_validation_case_is_said(tmp_path):
    # Only user 2 has an event between the two cuts, and none before it: there are test cases and no validation case.
    times = [[1, 2, 3, 4, 5, 90, 91], [1, 2, 3, 4, 5, 6, 6], [40, 41]]
    log = small_log([[0, 1, 2, 3, 0, 1, 2], [1, 2, 3, 0, 1, 2, 3], [3, 2]], 4, times=times)
    options = {"sasrec": {"epochs": 2, "hidden": 8, "max_length": 10}}
    report = recollect.evaluate(
        log,
        models=("pop", "sasrec"),
        model_options=options,
        protocol="gts",
        core=0,
        quantile=0.85,
        out=tmp_path / "run",
    )
    assert report.sections["rows"]["sasrec"]["validation"] is None
    assert any("sasrec: there is no validation case, so training ran for all its epochs" in w for w in report.warnings)
    assert "there is no validation to choose by" in report.protocol["compared_with"]


def test_every_model_of_the_table_can_be_had_and_names_its_options():
    for name, spec in MODELS.items():
        options = spec.options({}, "no file")
        assert type(options) is spec.config_class
        model = model_spec(name).open(options, seed=3)
        assert callable(model.fit)
        if spec.is_trained:
            assert model.config.seed == 3
    assert MODELS["gsasrec"].options({}, "").loss == "gbce"
