"""Worlds whose truth is known, and a model that reads its prompt: each part of the method earns what it should (8, 9).

The model counts which words of its taste stand in an item's title and description. Margins are about half of what was
measured, over several seeds.
"""

import re
from collections import deque

import numpy as np
import pytest
from support.agent_worlds import InProcess, data_block, play, polite_text, reader, tiny_dataset

from recollect.agents.groups import Group
from recollect.agents.memory import Memory
from recollect.data import HarborConfig, build_harbor

SEEDS = (0, 1, 2)
PLAIN = {"negatives": "uniform", "update_negative": False, "candidates": 5, "recall": False}


def right(event):
    probability = event["probability"]
    return 0.5 if probability == 0.5 else float(probability > 0.5)


# ---- memory per domain -------------------------------------------------------------------------------------------


def test_where_tastes_conflict_between_domains_dual_memory_beats_single_memory(tmp_path):
    """Everybody avoids in one domain what they love in the other. Measured gain over three seeds: 0.09-0.14."""
    config = HarborConfig(
        n_users=48, n_domains=2, items_per_domain=60, min_events=20, max_events=22, conflict_share=1.0, group_share=0.0,
        n_groups=48, shared_weight=3.0, domain_weight=0.0, quality_weight=0.0, shock_strength=0.0,
    )  # fmt: skip
    margins = []
    for seed in SEEDS:
        dataset = build_harbor(config, seed).dataset
        accuracy = {}
        for method in ("agentcf+dual", "agentcf"):
            played = play(
                dataset, tmp_path / f"{method}-{seed}", InProcess(reader()), method=method, fusion="none",
                interactions_per_user=8, held_out=3, **PLAIN,
            )  # fmt: skip
            accuracy[method] = np.mean([right(event) for event in played.of("choice") if event["part"] != "train"])
        margins.append(accuracy["agentcf+dual"] - accuracy["agentcf"])
        assert accuracy["agentcf+dual"] > 0.6
    assert np.mean(margins) > 0.08


def test_where_tastes_are_shared_by_all_domains_fusion_lifts_domains_of_few_interactions(tmp_path):
    """One or two earlier interactions in the domain. Measured gain over no fusion: 0.04-0.07, 220 decisions a seed."""
    config = HarborConfig(
        n_users=40, n_domains=4, items_per_domain=40, min_events=12, max_events=14, conflict_share=0.0, group_share=0.0,
        n_groups=40, shared_weight=3.0, domain_weight=0.0, quality_weight=0.0, shock_strength=0.0,
    )  # fmt: skip
    gains = []
    for seed in SEEDS:
        dataset = build_harbor(config, seed).dataset
        log, accuracy = dataset.interactions, {}
        for fusion in ("two_step", "none"):
            played = play(
                dataset, tmp_path / f"{fusion}-{seed}", InProcess(reader()), method="agentcf+dual", fusion=fusion,
                interactions_per_user=20, held_out=2, **PLAIN,
            )  # fmt: skip
            cold = []
            for event in played.of("choice"):
                step = played.plan.steps[event["step"]]
                row = step.index if step.kind in ("train", "learn") else int(played.plan.test.row[step.index])
                earlier = (log.user[:row] == log.user[row]) & (log.domain[:row] == log.domain[row])
                if 1 <= earlier.sum() <= 2:
                    cold.append(right(event))
            accuracy[fusion] = np.mean(cold)
            assert len(cold) > 150
        gains.append(accuracy["two_step"] - accuracy["none"])
    assert np.mean(gains) > 0.02


# ---- groups ------------------------------------------------------------------------------------------------------


def reciprocal_rank(scores, target):
    scores = np.asarray(scores)
    above, level = int(np.sum(scores > scores[target])), int(np.sum(scores == scores[target]))
    return float(np.mean([1 / rank for rank in range(above + 1, above + level + 1)]))


def shocked_world(strength, seed):
    """Nobody has a taste; in domain d, four items become popular in group d alone."""
    config = HarborConfig(
        n_users=40, n_domains=2, items_per_domain=40, min_events=10, max_events=12, n_groups=2, conflict_share=0.0,
        shared_weight=0.0, domain_weight=0.0, quality_weight=0.0, shock_strength=strength, shock_items=4,
        shocks_per_group=1, shock_days=90,
    )  # fmt: skip
    return build_harbor(config, seed)


def gains(folder, strength, seed, groups):
    """MRR above chance of a model that follows fellow fans: (of members of the shocked group, of the others)."""
    world = shocked_world(strength, seed)
    belongs = world.truth.group

    def plant(agents):
        if groups == "true":
            agents.set_groups([Group(f"g{at}", (), tuple(np.flatnonzero(belongs == at).tolist())) for at in (0, 1)])
        elif groups == "one":
            agents.set_groups([Group("everybody", (), tuple(range(len(belongs))))])

    played = play(
        world.dataset, folder / f"{strength}-{seed}-{groups}", InProcess(reader(sharpness=0.0, fans_weight=5.0)),
        method="agentcf+dual", fusion="none", interactions_per_user=2, held_out=3, group_window=8, warm=plant,
        **{**PLAIN, "candidates": 10},
    )  # fmt: skip
    users = {str(name): at for at, name in enumerate(world.dataset.users.user_ids)}
    found = {True: [], False: []}
    for event in played.of("rank", "test"):
        inside = belongs[users[event["user"]]] == world.dataset.domains.index(event["domain"])
        found[bool(inside)].append(reciprocal_rank(event["evidence"]["lm_pmi"], event["target"]) - 0.292897)
    return float(np.mean(found[True])), float(np.mean(found[False]))


@pytest.fixture(scope="module")
def shocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shocks")
    return {
        (strength, groups): np.mean([gains(folder, strength, seed, groups) for seed in (0, 1)], axis=0)
        for strength, groups in ((0, "none"), (0, "true"), (3, "true"), (8, "true"), (8, "one"))
    }


def test_without_groups_a_model_without_taste_is_at_chance_exactly(shocks):
    assert shocks[0, "none"] == pytest.approx([0.0, 0.0], abs=1e-6)


def test_the_gain_of_group_memory_grows_with_the_strength_of_the_shock_from_nothing(shocks):
    """Measured of members: 0.00 at 0, 0.11 at 3, 0.24 at 8; standard error 0.025."""
    none, middle, strong = (shocks[strength, "true"][0] for strength in (0, 3, 8))
    assert abs(none) < 0.06
    assert none + 0.03 < middle < strong
    assert strong > 0.15


def test_users_outside_the_shocked_group_are_unaffected(shocks):
    for strength in (0, 3, 8):
        assert abs(shocks[strength, "true"][1]) < 0.07


def test_one_group_of_everybody_serves_members_worse_than_their_own(shocks):
    """Measured: 0.24 with true groups, 0.15 with one for all."""
    assert shocks[8, "one"][0] < shocks[8, "true"][0] - 0.03


# ---- no noise ----------------------------------------------------------------------------------------------------


THEMES = ("harbour", "comets", "glacier", "orchard", "viaduct", "badgers")


def loyal_world():
    """Everybody takes every item of one theme and none of another."""
    items = [
        (f"{theme}-{at}", f"{theme.title()} volume {at}", "books", (theme,), f"A book about {theme}.")
        for theme in THEMES
        for at in range(12)
    ]
    generator = np.random.default_rng(0)
    events = []
    for user in range(18):
        theme = THEMES[user % len(THEMES)]
        events += [
            (f"u{user:02d}", f"{theme}-{at}", 1000 * time + user) for time, at in enumerate(generator.permutation(12))
        ]
    return tiny_dataset(events, items)


def test_without_noise_every_decision_after_the_first_and_every_slate_is_right(tmp_path):
    played = play(
        loyal_world(), tmp_path, InProcess(reader()), interactions_per_user=20, held_out=2,
        **{**PLAIN, "candidates": 10, "matching": "uniform"},
    )  # fmt: skip
    met = set()
    for event in played.of("choice"):
        if event["user"] in met:
            assert event["probability"] > 0.99
        else:
            assert event["probability"] == 0.5, "an agent that knows nothing is undecided"
            met.add(event["user"])
    assert len(met) == 18
    for event in played.of("rank", "calibrate") + played.of("rank", "test"):
        assert int(np.argmax(event["evidence"]["lm_pmi"])) == event["target"]
        assert int(np.argmax(event["evidence"]["private_memory"])) == event["target"]


def test_the_less_noise_in_the_world_the_more_decisions_are_right(tmp_path):
    """Measured over three seeds: 0.76 at temperature 1, 0.84 at 0.05."""
    accuracy = {}
    for temperature in (1.0, 0.05):
        config = HarborConfig(
            n_users=16, n_domains=1, items_per_domain=60, min_events=18, max_events=18, conflict_share=0.0,
            group_share=0.0, n_groups=16, shared_weight=3.0, domain_weight=0.0, quality_weight=0.0, shock_strength=0.0,
            temperature=temperature,
        )  # fmt: skip
        rights = []
        for seed in SEEDS:
            played = play(
                build_harbor(config, seed).dataset, tmp_path / f"{temperature}-{seed}", InProcess(reader()),
                method="agentcf+dual", fusion="none", interactions_per_user=14, held_out=2, **PLAIN,
            )  # fmt: skip
            late = [event for event in played.of("choice", "train") if played.plan.steps[event["step"]].number > 60]
            rights += [right(event) for event in late]
        accuracy[temperature] = np.mean(rights)
    assert accuracy[0.05] > accuracy[1.0] + 0.03
    assert accuracy[0.05] > 0.72


# ---- propagation -------------------------------------------------------------------------------------------------

MARKER = "zeppelinry"


def neighbours_world():
    """A chain of 16 users who share items with their neighbours alone, and a second one without any link to it."""
    items, events = [], []
    for chain, domain in (("a", "books"), ("b", "films")):
        items += [(f"{chain}{at}", f"{chain}-title {at}", domain, (f"kind {at % 4}",), None) for at in range(40)]
        for user in range(16):
            generator = np.random.default_rng(user)
            for time, step in enumerate(generator.permutation(6)):
                events.append((f"{chain}{user:02d}", f"{chain}{2 * user + step}", 1000 * time + user))
    return tiny_dataset(events, items)


def gossip(request):
    """Keeps the marker in notes with some luck when it stands there or with the bought item; passes it to items."""
    block = data_block(request)
    told = "\n".join(re.findall(r"(?:Notes on the shopper|Bought|Shopper's taste): (.*)", block))
    lucky = sum(map(ord, block)) % 10 < 8
    if request.site == "reflect_user":
        return f"You like {MARKER}." if MARKER in told and lucky else "You like quiet things."
    if request.site == "reflect_items":
        word = MARKER if MARKER in told and lucky else "quiet things"
        return f'{{"negative": "Avoided.", "positive": "Suits users who like {word}."}}'
    return polite_text(request)


def hops_from(dataset, start):
    """Users at each distance (one hop: an item in common)."""
    log = dataset.interactions
    distance, queue = {start: 0}, deque([start])
    while queue:
        user = queue.popleft()
        for other in np.unique(log.user[np.isin(log.item, log.item[log.user == user])]).tolist():
            if other not in distance:
                distance[other] = distance[user] + 1
                queue.append(other)
    return distance


def test_a_preference_spreads_less_the_farther_and_never_to_users_without_a_link(tmp_path):
    dataset = neighbours_world()
    names = [str(name) for name in dataset.users.user_ids]
    held = {}
    for seeded in range(3, 13):

        def plant(agents, seeded=seeded):
            agents.memories.put(f"user:a{seeded:02d}", "private:books", Memory(f"You like {MARKER}.", {}, 1))

        played = play(
            dataset, tmp_path / str(seeded), InProcess(reader(generate=gossip, name="gossip")), writer="llm",
            method="agentcf+dual", fusion="none", interactions_per_user=10, held_out=1, max_failed=1.0, warm=plant,
            **{**PLAIN, "candidates": 4, "matching": "uniform"},
        )  # fmt: skip
        distance = hops_from(dataset, names.index(f"a{seeded:02d}"))
        holders = {
            event["owner"] for event in played.events if event.get("owner", "").startswith("user:")
            and MARKER in event["after"]
        }  # fmt: skip
        for at, name in enumerate(names):
            if at not in distance:
                assert f"user:{name}" not in holders
                assert name.startswith("b")
            elif distance[at]:
                held.setdefault(distance[at], []).append(f"user:{name}" in holders)
    shares = [float(np.mean(held[hops])) for hops in (1, 2, 3)]
    assert shares[0] > 0, "nothing spread: the test shows nothing"
    assert shares == sorted(shares, reverse=True)
    assert shares[2] < shares[0]


def test_the_structured_writer_tells_items_of_a_preference_but_no_other_user(tmp_path):
    """Its private memories learn from what items are, not from what is said of their buyers."""
    dataset = neighbours_world()

    def plant(agents):
        agents.memories.put("user:a05", "private:books", Memory(f"Likes {MARKER}.", {MARKER: 5.0}, 1))

    played = play(
        dataset, tmp_path, reader(), interactions_per_user=10, held_out=1, warm=plant, method="agentcf+dual",
        fusion="none", **{**PLAIN, "candidates": 4, "matching": "uniform"},
    )  # fmt: skip
    holders = {event["owner"] for event in played.events if event.get("owner") and MARKER in event["after"]}
    assert {owner for owner in holders if owner.startswith("user:")} == {"user:a05"}
    mine = {name for event in played.events if event["user"] == "a05" for name in event["items"]}
    told = {owner for owner in holders if owner.startswith("item:")}
    assert told
    assert told <= {f"item:{name}" for name in mine}
