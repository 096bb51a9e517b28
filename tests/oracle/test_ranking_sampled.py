"""Sampled negatives: the closed form, its limits, the names, and what the correction can do."""

import math

import numpy as np
import pytest
from support.ranking_worlds import FixedScores, random_world

from recollect.data import global_temporal, leave_one_out
from recollect.errors import ConfigError, InputError
from recollect.eval.metrics import hit_rate
from recollect.eval.ranking import evaluate_ranker
from recollect.eval.sampled import corrected_values, draw_negatives, expected_sampled_metrics, sampled_columns
from recollect.rng import stream


def test_expected_values_are_the_measured_ones():
    found = expected_sampled_metrics(np.array([11, 101, 1001]), 12_101, 100, (10,))
    np.testing.assert_allclose(found["hr@10"], [1.000, 1.000, 0.6875], atol=5e-4)
    np.testing.assert_allclose(found["ndcg@10"], [0.97029, 0.76165, 0.22430], atol=5e-6)
    # The same from the definition, without the closed form of a library.
    rank, m, n = 101, 100, 12_101
    p = (rank - 1) / (n - 1)
    exact = sum(math.comb(m, x) * p**x * (1 - p) ** (m - x) / math.log2(x + 2) for x in range(10))
    assert found["ndcg@10"][1] == pytest.approx(exact, abs=1e-12)


def test_ten_thousand_samplings_converge_to_the_closed_form():
    n_items, m, draws = 500, 20, 10_000
    scores = np.arange(n_items)[::-1].astype(float)
    for rank in (3, 60, 300):
        others = np.delete(np.arange(n_items), rank - 1)
        generator = stream(rank, "samplings")
        above = np.array(
            [
                np.count_nonzero(scores[draw_negatives(others, None, m, generator, distinct=False)] > scores[rank - 1])
                for _ in range(draws)
            ]
        )
        expected = expected_sampled_metrics(np.array([rank]), n_items, m, (1, 5))
        for k in (1, 5):
            hits = (above < k).mean()
            sigma = np.sqrt(max(expected[f"hr@{k}"][0] * (1 - expected[f"hr@{k}"][0]), 1e-6) / draws)
            assert abs(hits - expected[f"hr@{k}"][0]) < 5 * sigma


@pytest.mark.parametrize("mask", ["none", "history"])
def test_every_other_item_as_negative_is_full_ranking(mask):
    world = random_world(11)
    split = leave_one_out(world)
    scores = stream(1, "full").integers(0, 7, size=(len(split.test_row), world.n_items)).astype(np.float32)
    options = {"mask": mask, "ks": (1, 10)}
    full = evaluate_ranker(FixedScores(scores), world, split, **options)
    m = world.n_items - 1
    sampled = sampled_columns(FixedScores(scores), world, split, n_negatives=m, distinct=True, **options)
    assert all(name.endswith(f"~uni{m}-distinct") for name in sampled)
    for name, column in sampled.items():
        np.testing.assert_array_equal(column, full.column(name.partition("~")[0]))


def test_sampled_columns_never_take_a_plain_name_and_flatter_the_model():
    world = random_world(12, n_items=90)
    split = leave_one_out(world)
    scores = stream(2, "flatter").normal(size=(len(split.test_row), world.n_items)).astype(np.float32)
    table = evaluate_ranker(FixedScores(scores), world, split, ks=(10,))
    for sampling in ("uni", "pop"):
        columns = sampled_columns(FixedScores(scores), world, split, n_negatives=20, sampling=sampling, ks=(10,))
        assert set(columns) == {f"{name}@10~{sampling}20" for name in ("hr", "ndcg", "mrr")} | {f"mrr~{sampling}20"}
        joined = table.with_columns(columns)
        assert joined.mean(f"hr@10~{sampling}20") > 2 * joined.mean("hr@10")
        again = sampled_columns(
            FixedScores(scores), world, split, n_negatives=20, sampling=sampling, ks=(10,), batch_size=3
        )
        np.testing.assert_array_equal(columns[f"hr@10~{sampling}20"], again[f"hr@10~{sampling}20"])


def test_popularity_sampling_draws_no_item_without_training_events():
    generator = stream(3, "weights")
    drawn = draw_negatives(np.arange(5), np.array([0, 1, 0, 3, 0]), 4000, generator, distinct=False)
    assert set(drawn.tolist()) == {1, 3}
    assert abs((drawn == 3).mean() - 0.75) < 0.03
    with pytest.raises(InputError, match="no negative can be drawn"):
        draw_negatives(np.arange(2), np.zeros(2), 3, generator, distinct=False)


def test_corrected_values_bring_the_sampled_mean_near_the_full_metric():
    n_items, m, k = 2_000, 100, 10
    generator = stream(4, "corrected")
    rank = np.minimum(generator.geometric(1 / 300, size=40_000), n_items)
    full = hit_rate(rank - 1, np.zeros_like(rank), k).mean()
    above = generator.binomial(m, (rank - 1) / (n_items - 1))
    naive = (above < k).mean()
    values = corrected_values(m, (np.arange(1, n_items + 1) <= k).astype(float), trade_off=0.01)
    corrected = values[above].mean()
    assert naive > 5 * full
    assert abs(corrected - full) < 0.15 * (naive - full)


def test_corrected_columns_are_named_so_and_only_for_uniform_replacement():
    world = random_world(13)
    split = leave_one_out(world)
    scores = stream(5, "corrected").normal(size=(len(split.test_row), world.n_items)).astype(np.float32)
    columns = sampled_columns(FixedScores(scores), world, split, n_negatives=20, corrected=True, ks=(5,))
    assert {"hr@5~uni20~corrected", "ndcg@5~uni20~corrected"} <= set(columns)
    with pytest.raises(ConfigError, match="only uniform sampling with replacement"):
        sampled_columns(FixedScores(scores), world, split, sampling="pop", corrected=True)
    with pytest.raises(InputError, match="one target per case"):
        sampled_columns(FixedScores(scores), world, global_temporal(world, 0.7, "all"))
    with pytest.raises(ConfigError, match="sampling must be one of uni, pop, got 'zipf'"):
        sampled_columns(FixedScores(scores), world, split, sampling="zipf")
