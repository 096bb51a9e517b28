"""What agents are told never comes from later, from other domains or from the answer (oracles 3, 4 and 6)."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agent_worlds import data_block, play, prompt_text, reader, seen, user_turn, with_log

from recollect.agents.agentcf import AgentCF
from recollect.agents.observed import observe
from recollect.agents.ranking import rank_slate
from recollect.backbones.protocol import Chosen, Scoring
from recollect.backbones.scripted import ScriptedBackbone
from recollect.data import HarborConfig, build_harbor
from recollect.eval.agreement import pairwise_choice

SMALL = HarborConfig(
    n_users=10, n_domains=3, items_per_domain=40, min_events=9, max_events=12, shock_items=3, conflict_share=0.4
)


@pytest.fixture(scope="module")
def world():
    return build_harbor(SMALL, seed=1).dataset


def parrot(request):
    """Copies every title it reads as bought into whatever it writes, and the whole taste into items."""
    block = data_block(request)
    bought = "; ".join(re.findall(r"Bought: (.*)", block))
    held = "; ".join(re.findall(r"(?:Notes[^:]*|Hints[^:]*|Summary so far|Shopper's taste|Taste): (.*)", block))
    match request.site:
        case "reflect_items":
            return json.dumps({"negative": "Nothing to say of it.", "positive": f"{held}"[:600] or "?"})
        case "tags":
            return json.dumps([word[:40] for word in held.split("; ")][:6] or ["nothing"])
    return "; ".join(part for part in (bought, held) if part) or "nothing"


def times_of_steps(played, dataset):
    """Step number -> the moment at which it acts; a rebuild acts just before the training step that follows it."""
    log, end = dataset.interactions, int(dataset.interactions.time.max()) + 1
    times, following = {}, end
    for step in reversed(played.plan.steps):
        if step.kind == "train":
            following = int(log.time[step.index])
        if step.kind in ("train", "learn"):
            times[step.number] = int(log.time[step.index])
        elif step.kind == "rebuild":
            times[step.number] = following
        else:
            slates = played.plan.calibration if step.kind == "calibrate" else played.plan.test
            times[step.number] = int(slates.time[step.index])
    return times


def clean(dataset):
    """{item: title} of titles that are part of no other title."""
    titles = [str(title) for title in dataset.catalog.titles]
    return {at: title for at, title in enumerate(titles) if sum(title in other for other in titles) == 1}


def future_titles(played, dataset, kinds):
    """(step, title) of every title in a prompt that is no candidate and has no event before the step's moment."""
    log = dataset.interactions
    first = np.full(dataset.n_items, np.iinfo(np.int64).max)
    np.minimum.at(first, log.item, log.time)
    moments, titles = times_of_steps(played, dataset), clean(dataset)
    ids = {str(name): at for at, name in enumerate(dataset.catalog.item_ids)}
    candidates = {}
    for event in played.events:
        if event["kind"] == "choice" or event["part"] != "train":  # what a rehearsal scores is shown to no model
            candidates.setdefault(event["step"], set()).update(ids[name] for name in event["items"])
    found, looked_at = [], 0
    for number, call in played.prompts:
        if played.kind_of(number) not in kinds:
            continue
        looked_at += 1
        text = prompt_text(call) + "\n".join(getattr(call, "continuations", ()))
        shown = {item for item, title in titles.items() if title in text}
        found += [
            (number, titles[item]) for item in shown - candidates.get(number, set()) if first[item] >= moments[number]
        ]
    assert looked_at
    return found


@pytest.mark.parametrize("method", ["agentcf++", "agentcf++-no-group", "agentcf+shared"])
def test_no_prompt_shows_a_title_that_nobody_has_taken_yet(world, tmp_path, method):
    played = play(world, tmp_path, reader(), one_by_one=True, method=method, interactions_per_user=5, held_out=2)
    assert future_titles(played, world, {"train", "learn", "calibrate", "test", "rebuild"}) == []
    lines = [call for _, call in played.prompts if "Fellow fans of" in user_turn(call)]
    assert lines, "the world is too small: no group memory was ever shown"


def test_a_writer_that_copies_titles_spreads_no_title_that_nobody_has_taken_yet(world, tmp_path):
    backbone = reader(generate=parrot, name="parrot")
    played = play(
        world, tmp_path, backbone, one_by_one=True, writer="llm", interactions_per_user=100, held_out=2, max_failed=1.0
    )
    assert future_titles(played, world, {"train", "rebuild"}) == []
    titles = set(clean(world).values())
    assert any(
        title in seen(call).fields.get("Your taste", "")
        for number, call in played.prompts
        if call.site == "choice" and played.kind_of(number) == "train"
        for title in titles
    ), "the parrot copied nothing: the test shows nothing"


def shuffled_after(dataset, moment, seed):
    """Every user's events from `moment` on change places among themselves: same items, same users, same times."""
    log = dataset.interactions
    order = np.arange(len(log))
    generator = np.random.default_rng(seed)
    for user in range(dataset.n_users):
        rows = np.flatnonzero((log.user == user) & (log.time >= moment))
        order[rows] = generator.permutation(rows)
    return with_log(dataset, item=log.item[order], domain=log.domain[order], rating=log.rating[order])


@pytest.mark.parametrize("method", ["agentcf++", "agentcf++-no-group", "agentcf"])
@pytest.mark.parametrize("interactions_per_user", [3, 100])
def test_prompts_of_training_do_not_change_with_later_events(world, tmp_path, method, interactions_per_user):
    options = {
        "one_by_one": True,
        "method": method,
        "interactions_per_user": interactions_per_user,
        "held_out": 2,
        "negatives": "uniform",
    }
    before = play(world, tmp_path / "as-it-was", reader(), **options)
    moments = times_of_steps(before, world)
    trained = sorted(moments[step.number] for step in before.plan.steps if step.kind == "train")
    compared = 0
    for number, share in enumerate((0.4, 0.8)):
        moment = trained[int(share * len(trained))]
        other = shuffled_after(world, moment, seed=number)
        assert not np.array_equal(other.interactions.item, world.interactions.item)
        after = play(other, tmp_path / f"shuffled-{number}", reader(), **options)
        assert [step.kind for step in after.plan.steps] == [step.kind for step in before.plan.steps]

        def asked(played, moment=moment):
            return [
                (number, call)
                for number, call in played.prompts
                if moments[number] < moment and played.kind_of(number) in ("train", "rebuild")
            ]

        assert asked(before)
        compared += len(asked(before))
        for (step, call), (other_step, other_call) in zip(asked(before), asked(after), strict=True):
            assert step == other_step
            assert prompt_text(call) == prompt_text(other_call), f"step {step} of {method} knows what comes later"
    assert compared > 50


def test_written_memories_of_training_do_not_change_with_later_events(world, tmp_path):
    options = {"one_by_one": True, "writer": "llm", "interactions_per_user": 3, "held_out": 2, "max_failed": 1.0}
    backbone = reader(generate=parrot, name="parrot")
    before = play(world, tmp_path / "as-it-was", backbone, **options)
    moments = times_of_steps(before, world)
    trained = sorted(moments[step.number] for step in before.plan.steps if step.kind == "train")
    moment = trained[len(trained) // 2]
    after = play(shuffled_after(world, moment, seed=3), tmp_path / "shuffled", backbone, **options)

    def early(played):  # the slates of rehearsals are drawn like test slates, by popularity over the whole log
        return [
            event
            for event in played.events
            if moments[event["step"]] < moment and event["part"] == "train" and event["kind"] != "rank"
        ]

    assert early(before) == early(after)
    assert len(early(before)) > 20


# ---- isolation ---------------------------------------------------------------------------------------------------


def snapshot(agents):
    return {
        (owner, key): memory.dump()
        for owner in agents.memories.owners()
        for key, memory in agents.memories.of(owner, "").items()
    }


@pytest.mark.parametrize("writer", ["structured", "llm"])
@pytest.mark.parametrize("fusion", ["two_step", "one_call", "none"])
def test_a_training_step_changes_one_domain_of_one_user_and_its_two_items(world, tmp_path, writer, fusion):
    states, changes = {}, {}

    def before(agents, step):
        states["old"] = snapshot(agents)

    def after(agents, step):
        new = snapshot(agents)
        changes[step.number] = {name for name in new if states["old"].get(name) != new[name]}

    played = play(
        world,
        tmp_path,
        reader(),
        one_by_one=True,
        before_step=before,
        after_step=after,
        writer=writer,
        fusion=fusion,
        interactions_per_user=2,
        held_out=1,
    )
    log = world.interactions
    for step in played.plan.steps:
        if step.kind not in ("train", "learn"):
            assert changes[step.number] == set(), f"{step.kind} changed a memory"
            continue
        user = f"user:{world.users.user_ids[log.user[step.index]]}"
        domain = world.domains[log.domain[step.index]]
        items = {log.item[step.index], played.plan.negatives[step.index]}
        allowed = {(user, f"private:{domain}"), (user, f"fused:{domain}")}
        allowed |= {(f"item:{world.catalog.item_ids[item]}", "item") for item in items}
        assert changes[step.number] <= allowed
        assert (user, f"private:{domain}") in changes[step.number]
        if fusion == "none":
            assert (user, f"fused:{domain}") not in changes[step.number]


@pytest.mark.parametrize("writer", ["structured", "llm"])
@pytest.mark.parametrize("update_negative", [True, False])
def test_in_one_domain_dual_memory_without_fusion_is_base_agentcf_token_for_token(tmp_path, writer, update_negative):
    dataset = build_harbor(
        HarborConfig(n_users=6, n_domains=1, items_per_domain=30, min_events=7, max_events=9, shock_items=2), seed=2
    ).dataset
    options = {
        "one_by_one": True,
        "writer": writer,
        "fusion": "none",
        "negatives": "uniform",
        "update_negative": update_negative,
        "interactions_per_user": 3,
        "held_out": 1,
    }
    dual = play(dataset, tmp_path / "dual", reader(), method="agentcf+dual", **options)
    base = play(dataset, tmp_path / "base", reader(), method="agentcf", **options)
    assert len(dual.prompts) > 40
    assert [(number, prompt_text(call)) for number, call in dual.prompts] == [
        (number, prompt_text(call)) for number, call in base.prompts
    ]
    assert dual.prompts == base.prompts


def test_a_base_agent_reads_one_memory_and_no_group(world, tmp_path):
    played = play(world, tmp_path, reader(), one_by_one=True, method="agentcf", interactions_per_user=2, held_out=1)
    assert all("Fellow fans" not in user_turn(call) for _, call in played.prompts)
    assert all("as other shops tell it" not in user_turn(call) for _, call in played.prompts)
    assert {key for owner, key in snapshot(played.agents) if owner.startswith("user:")} == {"single"}


def test_with_the_official_codes_memory_a_training_decision_reads_the_fused_memory_alone(world, tmp_path):
    played = play(
        world, tmp_path, reader(), one_by_one=True, decision_memory="code", interactions_per_user=4, held_out=1
    )
    for number, call in played.prompts:
        if played.kind_of(number) in ("train", "learn") and call.site == "choice":
            assert set(seen(call).fields) <= {"Shop", "Your taste as other shops tell it"}
            assert seen(call).fans == ()
    ranked = [seen(call).fields for number, call in played.prompts if call.site == "rank"]
    assert any("Your taste" in fields for fields in ranked)


# ---- the answer --------------------------------------------------------------------------------------------------


def asked_by(agents: AgentCF, domain, memory, real, other):
    generator = agents.choose(domain, memory, real, other, ("somebody", 0))
    calls = next(generator)
    return generator, calls


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    return play(world, tmp_path_factory.mktemp("trained"), reader(), interactions_per_user=3, held_out=1)


def test_swapping_the_real_item_and_the_other_asks_the_same_questions(world, trained):
    agents = trained.agents
    for row, negative in list(trained.plan.negatives.items())[:20]:
        user, item = int(world.interactions.user[row]), int(world.interactions.item[row])
        domain = int(world.interactions.domain[row])
        memory = agents.read_memory(user, domain, 2**40, training=True)
        real, other = agents.shown(item), agents.shown(negative)
        _, calls = asked_by(agents, domain, memory, real, other)
        _, swapped = asked_by(agents, domain, memory, other, real)
        assert set(calls) == set(swapped)
        assert len(set(calls)) == 2


def test_nothing_in_a_slate_depends_on_which_candidate_is_real(world, trained):
    agents, slates = trained.agents, trained.plan.test
    for case in range(len(slates)):
        moved = slates.take(np.array([case]))
        object.__setattr__(moved, "target", (moved.target + 1) % moved.size)
        asked = []
        for given_slates, at in ((slates, case), (moved, 0)):
            generator = rank_slate(agents, 0, given_slates, at, "calibrate")
            asked.append(next(generator))
        assert asked[0] == asked[1]
        assert all(isinstance(call, Scoring) for call in asked[0])


finite = st.floats(-30, 30, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(first=finite, second=finite)
def test_the_two_orders_give_probabilities_that_sum_to_one(world, trained, first, second):
    agents = trained.agents
    a, b = agents.shown(0), agents.shown(1)
    memory = agents.read_memory(0, 0, 2**40, training=True)

    def decided(real, other):
        generator, calls = asked_by(agents, 0, memory, real, other)
        answers = []
        for call in calls:  # a model with a bias of its own for each order
            bias = first if seen(call).items[0][0] == a.title else second
            log_probs = np.array([bias, 0.0]) - np.logaddexp(bias, 0.0)
            answers.append(Chosen(tuple(log_probs.tolist()), 1))
        with pytest.raises(StopIteration) as stopped:
            generator.send(answers)
        return stopped.value.value

    p, q = decided(a, b), decided(b, a)
    assert p.probability + q.probability == pytest.approx(1.0, abs=1e-12)
    if p.probability != 0.5:
        assert p.right != q.right
    # The bias that does not depend on the order cancels: only the difference of the two counts.
    assert p.probability == pytest.approx(1 / (1 + np.exp(-(first - second) / 2)), abs=1e-9)


def test_a_model_that_always_says_the_first_gets_exactly_half(world, tmp_path):
    first = ScriptedBackbone(choose=lambda choice: [7.0] + [0.0] * (len(choice.options) - 1), name="first")
    played = play(world, tmp_path, first, interactions_per_user=3, held_out=2)
    users = {str(name): at for at, name in enumerate(world.users.user_ids)}
    observed = observe(played.events, played.plan, users)
    assert (observed.training == 0.5).all()
    second_log_odds, first_log_odds = observed.test.pair.T
    found = pairwise_choice(first_log_odds, second_log_odds, played.plan.test.user, seed=0, resamples=20)
    assert found["choice/accuracy"]["value"] == 0.5
    picked = [event["decision"] == event["items"][0] for event in played.of("choice", "train")]
    assert 0 < sum(picked) < len(picked), "undecided agents flip a coin, they do not favour a side"


def test_in_the_papers_order_the_negative_is_printed_first(world, tmp_path):
    first = ScriptedBackbone(choose=lambda choice: [7.0] + [0.0] * (len(choice.options) - 1), name="first")
    played = play(world, tmp_path, first, order="paper", interactions_per_user=3, held_out=1)
    assert all(event["decision"] == event["items"][1] for event in played.of("choice"))
    assert all(event["decision"] != event["items"][0] for event in played.of("choice"))
