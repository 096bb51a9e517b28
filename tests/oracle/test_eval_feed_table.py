"""The table of a page-by-page run, against direct computation on a planted run.

The released run whose numbers the specification prints is not among the available data; of its digits only the rating
distances, which follow from its printed shares, are checked.
"""

import numpy as np
import pytest

from recollect.errors import InputError
from recollect.eval.distances import shares
from recollect.eval.feed_table import FeedTable, feed_quantities, slot_curve_gap
from recollect.rng import stream

REAL = np.array([0.056, 0.108, 0.261, 0.349, 0.226])
WATCHED_BY_SLOT = np.array([0.9, 0.5, 0.4, 0.2])


def planted_run(n_agents: int = 300, slot_bias: bool = True, seed: int = 0) -> FeedTable:
    """Agents see 1 to 5 pages of 4 items; the more active stay longer; conformists rate near the catalogue mean."""
    generator = stream(seed, "run")
    activity, conformity = generator.integers(3, size=n_agents), generator.integers(3, size=n_agents)
    pages = np.clip(activity + generator.integers(1, 4, size=n_agents), 1, 5)
    agent = np.repeat(np.arange(n_agents), 4 * pages)
    place = np.concatenate([np.arange(4 * page) for page in pages])
    slot = place % 4 + 1
    positive = generator.random(len(agent)) < 0.42
    base = WATCHED_BY_SLOT[slot - 1] if slot_bias else np.full(len(agent), 0.45)
    watched = generator.random(len(agent)) < np.clip(base + np.where(positive, 0.06, -0.04), 0, 1)
    aligned = generator.random(len(agent)) < np.where(positive, 0.71, 0.61)
    mean = 3.0 + generator.random(len(agent))
    rating = np.clip(np.round(mean + (0.2 + 0.4 * conformity[agent]) * generator.normal(size=len(agent))), 1, 5)
    return FeedTable(
        agent=agent,
        activity=activity[agent],
        conformity=conformity[agent],
        diversity=np.zeros(len(agent), dtype=int),
        page=place // 4 + 1,
        slot=slot,
        catalogue_mean=mean,
        positive=positive,
        aligned=aligned,
        watched=watched,
        rating=np.where(watched, rating, np.nan),
    )


@pytest.fixture(scope="module")
def table() -> FeedTable:
    return planted_run()


@pytest.fixture(scope="module")
def quantities(table) -> dict:
    return feed_quantities(table, REAL, possible_slots=20, resamples=300)


def test_curves_equal_direct_means(table, quantities):
    for name, values, by in (
        ("watched_by_slot", table.watched, table.slot),
        ("aligned_by_slot", table.aligned, table.slot),
        ("positive_by_slot", table.positive, table.slot),
        ("watched_by_activity", table.watched, table.activity),
    ):
        assert quantities[name]["levels"] == np.unique(by).tolist()
        for level, entry in zip(quantities[name]["levels"], quantities[name]["entries"], strict=True):
            assert entry["value"] == pytest.approx(values[by == level].mean()), (name, level)
            assert entry["n"] == (by == level).sum()


def test_discrimination_equals_direct_rates(table, quantities):
    for name in ("aligned", "watched"):
        answers = getattr(table, name)
        hit, false = answers[table.positive].mean(), answers[~table.positive].mean()
        assert quantities[name]["given_positive"]["value"] == pytest.approx(hit)
        assert quantities[name]["given_other"]["value"] == pytest.approx(false)
        assert quantities[name]["balanced_accuracy"]["value"] == pytest.approx(0.5 * (hit + 1 - false))
        low, high = quantities[name]["balanced_accuracy"]["ci95"]
        assert low < quantities[name]["balanced_accuracy"]["value"] < high


def test_ratings_and_their_distances_equal_direct_computation(table, quantities):
    from scipy.stats import wasserstein_distance

    given = table.rating[~np.isnan(table.rating)]
    share = np.array([(given == star).mean() for star in range(1, 6)])
    np.testing.assert_allclose(quantities["rating_shares"], share)
    assert quantities["mean_rating"]["value"] == pytest.approx(given.mean())
    stars = np.arange(1, 6)
    expected = {"tv": np.abs(share - REAL).sum() / 2, "w1": wasserstein_distance(stars, stars, share, REAL)}
    for name, value in expected.items():
        assert quantities["rating_distance"][name]["value"] == pytest.approx(value, abs=1e-9)


def test_printed_rating_distances_follow_from_the_printed_shares():
    """The one row of the published run that its printed shares determine: TV .404, JS .177 bit, W1 .624."""
    from recollect.eval.distances import jensen_shannon_bits, total_variation, wasserstein1_of_shares

    simulated = shares(np.array([0, 0, 0.079, 0.753, 0.168]))
    assert total_variation(simulated, REAL) == pytest.approx(0.404, abs=1.1e-3)
    assert jensen_shannon_bits(simulated, REAL) == pytest.approx(0.177, abs=1.1e-3)
    assert wasserstein1_of_shares(simulated, REAL, np.arange(1.0, 6.0)) == pytest.approx(0.624, abs=1.1e-3)


def test_exit_pages_rise_with_activity_and_gaps_with_conformity_as_planted(table, quantities):
    pages = [entry["value"] for entry in quantities["exit_page_by_activity"]["entries"]]
    assert pages == sorted(pages)
    gaps = [entry["value"] for entry in quantities["rating_gap_by_conformity"]["entries"]]
    assert gaps == sorted(gaps)
    last = [table.page[table.agent == agent].max() for agent in np.unique(table.agent)]
    assert quantities["exit_page"]["value"] == pytest.approx(np.mean(last))
    assert quantities["exit_page"]["n"] == quantities["n_agents"] == 300


def test_denominators_are_named(table, quantities):
    assert quantities["watched_per_exposure"]["value"] == pytest.approx(table.watched.mean())
    assert quantities["watched_per_possible_slot"]["value"] == pytest.approx(table.watched.sum() / (300 * 20))


def test_areas_under_the_curve_equal_scikit_learn(table, quantities):
    from sklearn.metrics import roc_auc_score

    assert quantities["slot_auc"]["value"] == pytest.approx(roc_auc_score(table.positive, -table.slot))
    assert quantities["catalogue_mean_auc"]["value"] == pytest.approx(
        roc_auc_score(table.positive, table.catalogue_mean)
    )


def test_slot_curve_gap_is_large_with_a_planted_bias_and_near_zero_without(table):
    biased, fair = slot_curve_gap(table), slot_curve_gap(planted_run(slot_bias=False))
    assert biased.low > 0.5
    assert fair.value < 0.1


def test_ratings_outside_the_scale_and_ragged_columns_are_refused(table):
    columns = {name: getattr(table, name) for name in table.__dataclass_fields__}
    with pytest.raises(InputError, match="ratings must be 1, 2, 3, 4 or 5"):
        FeedTable(**{**columns, "rating": np.full(len(table), 7.0)})
    with pytest.raises(InputError, match="one common length"):
        FeedTable(**{**columns, "slot": table.slot[:-1]})
