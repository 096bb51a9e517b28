"""What a comparison calls best and what it warns of, on made tables."""

import numpy as np
import pytest

from recollect.tokenize.bench_checks import check_unit
from recollect.tokenize.bench_panels import AUC, NDCG, RELATIVE, VALID_AUC, VALID_NDCG, headline, judging_metric
from recollect.tokenize.bench_report import bounds_of, over_seeds, row_details, user_differences
from recollect.tokenize.bench_units import Unit
from recollect.tokenize.bench_warnings import click_model_warnings, few_items, unequal_starts
from recollect.tokenize.methods import make_entries
from recollect.tokenize.protocol import Encoding
from recollect.tokenize.run_config import BenchConfig
from recollect.types import Report

CONFIG = BenchConfig(resamples=300)


def value(number):
    return {"value": number, "ci95": [number - 0.1, number + 0.1]}


def report_of(models, differences=()):
    sections = {"models": models, "against": "rq-kmeans", "differences": list(differences)}
    return Report("tokenize-bench", {}, {}, sections=sections)


def row(**values):
    return {"starts": 3, "sizes": [8, 8], "best_epochs": [1.5], "validations": [24], **values}


def test_best_is_best_on_validation_and_not_on_test():
    models = {
        "rq-kmeans": {VALID_AUC: value(0.6), AUC: value(0.9), RELATIVE: value(0.1)},
        "opq": {VALID_AUC: value(0.7), AUC: value(0.5), RELATIVE: value(0.2)},
    }
    gap = {"model": "opq", "metric": AUC, **value(-0.4), "p_holm": 0.3}
    text = headline(report_of(models, [gap]), CONFIG)["text"]
    assert text.startswith("opq has the best AUC of the click model on validation (0.7000); on test it is 0.5000")
    assert "which chance alone could explain (p 0.3000, Holm)" in text
    assert judging_metric(models) == (VALID_AUC, AUC, 1.0)
    assert judging_metric({"opq": {VALID_NDCG: value(0.1), RELATIVE: value(0.2)}}) == (VALID_NDCG, NDCG, 1.0)


def test_an_interval_that_is_not_adjusted_is_no_verdict():
    models = {"rq-kmeans": {RELATIVE: value(0.5)}, "rq-gmm": {RELATIVE: value(0.2)}}
    gap = {"model": "rq-gmm", "metric": RELATIVE, **value(-0.3), "p_holm": None}
    text = headline(report_of(models, [gap]), CONFIG)["text"]
    assert "rq-gmm has the least relative squared error of the fitted items" in text
    assert "\N{MINUS SIGN}0.3000 [\N{MINUS SIGN}0.4000, \N{MINUS SIGN}0.2000]" in text
    assert "chance" not in text
    assert "fitted and cold items" in headline(report_of(models), BenchConfig(hold_out_cold=True))["text"]


def test_p_values_follow_from_seeds_as_well_as_users():
    """Over 2,000 users every seed's difference is sure; that they disagree by sign is what decides."""
    noise = np.random.default_rng(0).normal(0, 0.01, (3, 2000))
    base = [np.zeros(2000)] * 3
    apart = [noise[seed] + gap for seed, gap in enumerate((0.05, -0.02, 0.03))]
    alike = [noise[seed] + gap for seed, gap in enumerate((0.031, 0.03, 0.029))]
    pseudo = {"rq-kmeans": {AUC: base}, "apart": {AUC: apart}, "alike": {AUC: alike}}
    found = {entry["model"]: entry for entry in user_differences(pseudo, CONFIG, AUC)}
    assert found["apart"]["p_holm"] > 0.3
    assert found["apart"]["ci95"][0] < 0 < found["apart"]["ci95"][1]
    assert found["alike"]["p_holm"] < 0.01
    assert found["alike"]["p_holm"] == pytest.approx(min(1, 2 * found["alike"]["p_value"]))


def test_intervals_over_seeds_stay_where_the_metric_does():
    assert over_seeds([0.99, 0.9], bounds_of("unique_rate"))["ci95"][1] == 1.0
    assert over_seeds([0.01, 0.1], bounds_of("collision_rate"))["ci95"][0] == 0.0
    assert over_seeds([0.01, 0.1], bounds_of("reconstruction/relative_mse"))["ci95"][0] == 0.0
    assert over_seeds([5.0, 1.0], bounds_of("max_group"))["ci95"][1] > 5
    assert over_seeds([0.9, 0.1], bounds_of("reconstruction/cosine"))["ci95"] == [-1.0, 1.0]
    assert over_seeds([0.1, -0.2])["ci95"][0] < -1


def test_rows_say_of_how_many_starts_they_are_and_differences_are_warned_of():
    entries = make_entries(["random", "rq-kmeans", "rq-vae", "rq-gmm:restarts=1"], {}, levels=2, codebook_size=8)
    rows = {}
    for entry in entries:
        unit = Unit(entry.label, entry, 0)
        rows[entry.label] = row_details(entry.label, [unit], {unit.folder: {"sizes": [8, 8], "warnings": []}})
    assert [made["starts"] for made in rows.values()] == [None, 3, 1, 1]
    (warning,) = unequal_starts(rows)
    assert "rq-kmeans 3, rq-vae 1, rq-gmm:restarts=1 1" in warning
    assert unequal_starts({"a": row(), "b": row(), "random": row(starts=None)}) == []


def test_codebooks_too_large_for_the_items_are_named():
    models = {"rq-kmeans": {RELATIVE: value(0.1)}, "fsq": {RELATIVE: value(0.1)}, "prq-kmeans": {}}
    rows = {"rq-kmeans": row(sizes=[8, 30]), "fsq": row(), "prq-kmeans": row(sizes=[30, 30])}
    (warning,) = few_items(100, models, rows)
    assert "100 items for the codebooks of rq-kmeans (30): under 4 items a code" in warning
    assert few_items(120, models, rows) == []


def test_click_models_that_were_best_at_the_end_or_validated_otherwise_are_named():
    late = {"a": row(best_epochs=[5.75, 6.0]), "b": row(best_epochs=[5.75, 1.0])}
    (warning,) = click_model_warnings(late, BenchConfig(probe_epochs=6))
    assert "the click model of a was best at the end of its 6 epochs" in warning
    mixed = {"a": row(), "b": row(validations=[6])}
    assert "validated at other intervals" in click_model_warnings(mixed, CONFIG)[0]


def test_errors_of_other_items_or_weights_than_the_fit_s_may_grow_with_depth():
    from recollect.errors import BaselineFailed

    (entry,) = make_entries(["rq-kmeans"], {}, levels=2, codebook_size=2)
    vectors, codes = np.arange(6.0).reshape(3, 2), np.array([[0, 0], [0, 1], [1, 0]])
    grows = {"reconstruction/relative_mse/level_0": 0.5, "reconstruction/relative_mse/level_1": 0.6}
    tokenizer = entry.spec.open(entry.options, seed=0)
    tokenizer.codebook_sizes = entry.codebook_sizes
    check_unit(entry, tokenizer, vectors, Encoding(codes), codes, grows, is_fitted_on_all=False)
    with pytest.raises(BaselineFailed, match="at level 2"):
        check_unit(entry, tokenizer, vectors, Encoding(codes), codes, grows, is_fitted_on_all=True)
