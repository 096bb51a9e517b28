"""The bundled world keeps its promises: known choice probabilities, visible shocks, visible conflicts."""

import numpy as np
import pytest

from recollect.data import (
    HarborConfig,
    build_harbor,
    describe,
    fingerprint,
    k_core,
    load_dataset,
    read_folder,
    world_of,
    write_folder,
)
from recollect.errors import ConfigError, DataError


def events_with_sets(world):
    """(user, chosen, items still free in its domain, time) of every event."""
    log, truth = world.dataset.interactions, world.truth
    taken = {user: set() for user in range(world.dataset.n_users)}
    for user, item, time in zip(log.user, log.item, log.time, strict=True):
        block = np.flatnonzero(truth.item_domain == truth.item_domain[item])
        free = np.array([other for other in block if other not in taken[user]])
        yield int(user), int(item), free, int(time)
        taken[user].add(int(item))


def shock_rates(world):
    """Share of in-window, in-domain events that go to shocked items: (members, others)."""
    log, truth = world.dataset.interactions, world.truth
    hits, totals = np.zeros(2), np.zeros(2)
    for shock in truth.shocks:
        window = (log.time >= shock.start) & (log.time < shock.end) & (truth.item_domain[log.item] == shock.domain)
        member = truth.group[log.user] == shock.group
        hit = np.isin(log.item, shock.items)
        for side, mask in enumerate((window & member, window & ~member)):
            hits[side] += (mask & hit).sum()
            totals[side] += mask.sum()
    return hits / totals, totals


def test_equal_arguments_give_equal_worlds_and_seeds_differ():
    first, second, other = build_harbor(seed=3), build_harbor(seed=3), build_harbor(seed=4)
    assert fingerprint(first.dataset) == fingerprint(second.dataset) != fingerprint(other.dataset)
    assert (first.dataset.interactions.rating == second.dataset.interactions.rating).all()
    assert first.dataset.catalog.titles.tolist() == second.dataset.catalog.titles.tolist()
    assert fingerprint(load_dataset("harbor", seed=3)) == fingerprint(first.dataset)


def test_default_world_has_the_promised_shape():
    dataset = load_dataset("harbor")
    facts = describe(dataset)
    assert facts["counts"]["users"] == 120
    assert dataset.domains == ("books", "films", "games", "kitchenware")
    assert facts["per_user"]["minimum"] >= 24
    assert facts["per_user"]["maximum"] <= 30
    assert facts["ties"] == {"events": 0.0, "last_pair": 0.0}
    assert all(facts["ratings"][star] > 0 for star in "12345")
    assert len(set(dataset.catalog.titles)) == dataset.n_items
    log = dataset.interactions
    assert len(np.unique(log.user * dataset.n_items + log.item)) == len(log)
    assert (np.lexsort((log.row, log.time, log.user)) == np.arange(len(log))).all()
    assert facts["warnings"] == []


@pytest.mark.parametrize("seed", range(3))
def test_choice_frequencies_agree_with_the_probabilities_of_the_truth(seed):
    world = build_harbor(HarborConfig(n_users=150), seed=seed)
    hit, expected, variance, surprise, entropy, spread = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for user, chosen, free, time in events_with_sets(world):
        p = world.truth.choice_probabilities(user, free, time)
        assert abs(p.sum() - 1) < 1e-12
        best = p.max()
        hit += free[np.argmax(p)] == chosen
        expected += best
        variance += best * (1 - best)
        log_p = np.log(p)
        mean = -(p * log_p).sum()
        surprise += -log_p[free == chosen][0]
        entropy += mean
        spread += (p * (log_p + mean) ** 2).sum()
    assert abs(hit - expected) < 4 * np.sqrt(variance)
    assert abs(surprise - entropy) < 4 * np.sqrt(spread)


def test_choices_of_shocked_items_agree_with_the_truth_and_not_with_a_world_without_shocks():
    world = build_harbor(seed=0)
    calm = build_harbor(HarborConfig(shock_strength=0.0), seed=0).truth
    distance = []
    for truth in (world.truth, calm):
        hits, expected, variance = 0, 0.0, 0.0
        for user, chosen, free, time in events_with_sets(world):
            shocked = world.truth.shocked(user, time)
            p = truth.choice_probabilities(user, free, time)[shocked[free]].sum()
            hits += shocked[chosen]
            expected += p
            variance += p * (1 - p)
        distance.append(abs(hits - expected) / np.sqrt(variance))
    assert distance[0] < 4
    assert distance[1] > 10


def test_only_members_buy_shocked_items_more_in_the_window():
    (member, other), _ = shock_rates(build_harbor(seed=0))
    assert member > 0.35
    assert member > 4 * other


def test_the_last_weeks_see_a_shock_of_every_group_in_every_domain():
    world = build_harbor(seed=0)
    truth, config = world.truth, world.config
    last = world.dataset.interactions.time.max()
    for moment in (last, last - (config.shock_days - 1) * 86_400):
        live = {(shock.group, shock.domain) for shock in truth.shocks if shock.start <= moment < shock.end}
        assert live == {(group, domain) for group in range(config.n_groups) for domain in range(config.n_domains)}
    one_each = build_harbor(HarborConfig(shocks_per_group=1), seed=0).truth
    assert [shock.domain for shock in one_each.shocks] == [0, 1, 2, 3]
    assert {shock.end for shock in one_each.shocks} == {shock.end for shock in truth.shocks[-4:]}


def test_what_a_group_shares_are_two_themes_and_no_mood():
    truth = build_harbor(HarborConfig(group_share=1.0), seed=0).truth
    for group in range(4):
        themes = truth.theme_taste[truth.group == group]
        assert (themes == themes[0]).all()
        assert np.flatnonzero(themes[0] > 0).tolist() == [2 * group, 2 * group + 1]
        assert themes[0].mean() == pytest.approx(0.0)
        assert themes[0].std() == pytest.approx(1.0)
    moods = np.corrcoef(truth.mood_taste)
    together = (truth.group[:, None] == truth.group[None, :]) & ~np.eye(120, dtype=bool)
    assert abs(moods[together].mean() - moods[truth.group[:, None] != truth.group[None, :]].mean()) < 0.05


def test_without_strength_there_is_no_difference_between_members_and_others():
    rates, totals = shock_rates(build_harbor(HarborConfig(shock_strength=0.0, n_users=400), seed=0))
    pooled = (rates * totals).sum() / totals.sum()
    error = np.sqrt(pooled * (1 - pooled) * (1 / totals[0] + 1 / totals[1]))
    assert abs(rates[0] - rates[1]) < 4 * error


def test_the_effect_of_a_shock_grows_with_its_strength():
    gaps = []
    for strength in (0.0, 1.5, 3.0, 4.5):
        rates, _ = shock_rates(build_harbor(HarborConfig(shock_strength=strength, n_users=240), seed=1))
        gaps.append(rates[0] - rates[1])
    assert gaps == sorted(gaps)


def test_utility_rises_by_the_strength_for_members_inside_the_window_only():
    truth = build_harbor(seed=0).truth
    shock = truth.shocks[0]
    member = int(np.flatnonzero(truth.group == shock.group)[0])
    outsider = int(np.flatnonzero(truth.group != shock.group)[0])
    items = shock.items
    # a second before the window no other shock of this group holds these items
    before = truth.utilities(member, items, shock.start - 1)
    assert truth.utilities(member, items, shock.start) - before == pytest.approx(truth.config.shock_strength)
    assert truth.utilities(member, items, shock.end) == pytest.approx(before)
    assert not truth.shocked(outsider, shock.start)[items].all()


def test_conflicted_users_want_the_opposite_in_some_domains():
    world = build_harbor(HarborConfig(conflict_share=0.5, domain_weight=0.0), seed=0)
    truth = world.truth
    assert truth.conflicted.sum() == 60
    assert ((truth.sign < 0).sum(axis=1)[truth.conflicted] == 2).all()
    # same theme and mood in two domains: equal utility for the others, opposite for the conflicted pair
    key = truth.theme * 10 + truth.mood
    books, films = np.flatnonzero(truth.item_domain == 0), np.flatnonzero(truth.item_domain == 1)
    book = next(item for item in books if key[item] in key[films])
    film = films[np.flatnonzero(key[films] == key[book])[0]]
    taste = truth.tastes(np.arange(120), np.array([book, film]))
    product = truth.sign[:, 0] * truth.sign[:, 1]
    assert taste[:, 0] == pytest.approx(product * taste[:, 1])


def test_conflict_is_visible_in_what_people_take():
    """Correlation of a user's theme counts between two domains: positive for consistent users, negative else."""
    world = build_harbor(HarborConfig(n_users=300, conflict_share=0.5, shock_strength=0.0), seed=0)
    truth, log = world.truth, world.dataset.interactions
    counts = np.zeros((300, 4, 8))
    np.add.at(counts, (log.user, truth.item_domain[log.item], truth.theme[log.item]), 1)
    same, opposite = [], []
    for user in range(300):
        for first in range(4):
            for second in range(first + 1, 4):
                a, b = counts[user, first], counts[user, second]
                if a.std() and b.std():
                    pair = same if truth.sign[user, first] == truth.sign[user, second] else opposite
                    pair.append(np.corrcoef(a, b)[0, 1])
    assert np.mean(same) > 0.2
    assert np.mean(opposite) < 0.0


def test_members_of_a_group_are_more_alike_than_strangers():
    truth = build_harbor(seed=0).truth
    similarity = np.corrcoef(truth.theme_taste)
    together = truth.group[:, None] == truth.group[None, :]
    off = ~np.eye(120, dtype=bool)
    assert similarity[together & off].mean() > similarity[~together].mean() + 0.3


def test_every_attribute_that_moves_a_choice_is_said_in_words():
    from recollect.data.harbor_words import DOMAINS, MOODS, THEME_NOUNS, THEMES

    world = build_harbor(seed=0)
    catalog, truth = world.dataset.catalog, world.truth
    for number in range(len(catalog)):
        kind = DOMAINS[truth.item_domain[number]].kinds[truth.kind[number]]
        theme, mood = THEMES[truth.theme[number]], MOODS[truth.mood[number]]
        assert {kind, theme, mood} <= set(catalog.categories[number])
        assert kind in catalog.titles[number]
        assert mood in catalog.titles[number]
        assert any(noun in catalog.titles[number] for noun in THEME_NOUNS[truth.theme[number]])
        assert all(word in catalog.texts[number] for word in (kind, theme, mood))


def test_ratings_follow_taste():
    world = build_harbor(seed=0)
    log = world.dataset.interactions
    taste = world.truth.tastes(np.arange(120), np.arange(world.dataset.n_items))[log.user, log.item]
    means = [taste[log.rating == star].mean() for star in (1, 2, 3, 4, 5)]
    assert means == sorted(means)


def test_the_truth_survives_filters_and_a_folder(tmp_path):
    world = build_harbor(seed=5)
    log = world.dataset.interactions
    stored = read_folder(write_folder(world.dataset, tmp_path / "harbor"))
    core = k_core(stored, 6)
    assert core.n_items < world.dataset.n_items
    for dataset in (stored, core):
        again = world_of(dataset)
        assert again.config == world.config
        assert again.dataset is dataset
        time = int(log.time[7])
        items = np.arange(dataset.n_items)
        original = [int(np.flatnonzero(world.dataset.catalog.item_ids == name)[0]) for name in dataset.catalog.item_ids]
        person = int(np.flatnonzero(world.dataset.users.user_ids == dataset.users.user_ids[2])[0])
        assert again.truth.utilities(2, items, time) == pytest.approx(world.truth.utilities(person, original, time))


def test_a_log_that_is_not_synthetic_has_no_world(tmp_path):
    from dataclasses import replace

    dataset = build_harbor(seed=0).dataset
    assert world_of(replace(dataset, meta={"clock": "unix"})) is None
    wrong = {**dataset.meta, "world": {**dataset.meta["world"], "version": "0"}}
    with pytest.raises(DataError, match="version"):
        world_of(replace(dataset, meta=wrong))


@pytest.mark.parametrize(
    "options",
    [
        {"n_users": 0},
        {"n_domains": 5},
        {"min_events": 31},
        {"max_events": 151},
        {"conflict_share": 1.5},
        {"shock_strength": float("nan")},
        {"temperature": 0.0},
        {"shock_items": 151},
        {"shock_days": 181},
    ],
)
def test_illegal_worlds_are_refused(options):
    with pytest.raises(ConfigError):
        HarborConfig(**options)
