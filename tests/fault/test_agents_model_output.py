"""Models that answer rubbish, too much, or not at all: recorded, counted, without effect on memories."""

import json

import pytest
from support.agent_worlds import InProcess, data_block, no_report, play, polite_text, reader

from recollect.agents.memory import WORD_LIMITS, Memory
from recollect.agents.observed import observe
from recollect.agents.simulate import replay, simulate
from recollect.backbones.scripted import ScriptedBackbone
from recollect.data import HarborConfig, build_harbor
from recollect.errors import ContextTooLong, TooManyFailures

SMALL = HarborConfig(n_users=6, n_domains=2, items_per_domain=24, min_events=7, max_events=8, shock_items=2)
WRITTEN = {"writer": "llm", "decision": "generate", "interactions_per_user": 2, "held_out": 1, "recall": False}
JSON_SITES = ("choice_explain", "reflect_items", "tags")
RUBBISH = {
    "words": "As an assistant I would rather not.",
    "empty": "",
    "half": '{"choice": "A", "explanation": "becau',
    "other-names": '{"pick": "A", "why": "x", "good": "a", "bad": "b"}',
    "wrong-types": '{"choice": 1, "explanation": [], "negative": {}, "positive": null}',
    "no-option": '{"choice": "C", "explanation": "neither", "negative": "", "positive": ""}',
    "numbers": "[1, 2, 3]",
    "deep": "[" * 50 + "]" * 50,
    "nan": '{"choice": NaN, "explanation": Infinity}',
    "twice": '{"choice": "A", "choice": "B", "explanation": "x"}',
}


@pytest.fixture(scope="module")
def world():
    return build_harbor(SMALL, seed=5).dataset


def spoiled(answer, sites=JSON_SITES, name="spoiled"):
    def generate(request):
        return answer if request.site in sites else polite_text(request)

    return reader(generate=generate, name=f"{name}-{'-'.join(sites)}")


def memories(event):
    return Memory.load(event["after"]) if event["after"] else None


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_unusable_answers_are_recorded_as_such_and_change_no_memory(world, tmp_path, rubbish):
    played = play(world, tmp_path, spoiled(RUBBISH[rubbish]), one_by_one=True, max_failed=1.0, **WRITTEN)
    choices, items = played.of("choice", "train"), [e for e in played.of("item") if e["prompt_hash"]]
    assert choices
    assert items
    for event in choices:
        assert event["ok"] is False
        assert event["decision"] is None
        assert event["probability"] is None
        assert event["fault"]
    for event in items:
        assert event["ok"] is False
    for event in played.of("item"):
        assert memories(event).updates == 0
    if rubbish != "empty":
        groups = played.of("group")
        assert all(event["ok"] is False for event in groups[1:])
        assert all(event["after"] == "[]" for event in groups)
    assert all(event["ok"] for event in played.of("private"))
    # Nothing was chosen, so nothing counts as an answer of an agent.
    users = {str(name): at for at, name in enumerate(world.users.user_ids)}
    observed = observe(played.events, played.plan, users)
    assert len(observed.training) == 0
    assert observed.failed["choice"] == len(played.of("choice", "train") + played.of("choice", "learn"))


def test_an_unusable_answer_is_asked_again_twice_and_every_attempt_is_paid_for_in_the_event(world, tmp_path):
    played = play(world, tmp_path, spoiled("no"), one_by_one=True, max_failed=1.0, **WRITTEN)
    first = played.of("choice", "train")[0]
    asked = [call for number, call in played.prompts if number == first["step"] and call.site == "choice_explain"]
    assert len(asked) == 3
    assert asked[-1].temperature == 0.0
    assert "could not be used" in asked[1].messages[-1].content
    assert first["tokens_in"] == sum(sum(len(message.content.split()) for message in call.messages) for call in asked)


def test_empty_texts_leave_memories_as_they_were(world, tmp_path):
    sites = ("reflect_user", "fuse", "fuse_extract")
    played = play(world, tmp_path, spoiled("  \n ", sites), one_by_one=True, max_failed=1.0, **WRITTEN)
    for kind in ("private", "fuse"):
        assert played.of(kind)
        for event in played.of(kind):
            assert event["ok"] is False
            assert event["fault"] == "empty text"
            assert memories(event) == Memory()
    assert all(event["ok"] for event in played.of("choice", "train"))


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_run_fails_when_more_steps_than_allowed_had_unusable_output(world, tmp_path, concurrent):
    bad = spoiled("no", ("reflect_items",))
    backbone = bad if concurrent else InProcess(bad)
    with pytest.raises(TooManyFailures) as caught, no_report():
        simulate(world, backbone=backbone, embedder=bad, out=str(tmp_path / "out"), max_failed=0.1, **WRITTEN)
    message = str(caught.value)
    assert "max-failed 0.1" in message
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    failed = {event["step"] for event in events if not event["ok"]}
    steps = 1 + max(event["step"] for event in events)
    assert f"{len(failed)} of {steps} steps" in message
    with no_report():
        report = simulate(
            world, backbone=backbone, embedder=bad, out=str(tmp_path / "allowed"), max_failed=1.0, **WRITTEN
        )
    assert report.kind == "simulate"


def test_few_failures_are_tolerated_and_reported(tmp_path):
    world = build_harbor(HarborConfig(n_users=12, n_domains=2, items_per_domain=30, min_events=8, max_events=9), 5)
    unlucky = {"user": ""}

    def generate(request):
        if request.site == "reflect_items" and not unlucky["user"]:
            unlucky["user"] = data_block(request)
        if request.site == "reflect_items" and unlucky["user"] in data_block(request):
            return "no"
        return polite_text(request)

    backbone = reader(generate=generate, name="unlucky-once")
    report = simulate(
        world.dataset, backbone=InProcess(backbone), embedder=backbone, out=str(tmp_path / "out"), max_failed=0.05,
        **{**WRITTEN, "batch_size": 1},
    )  # fmt: skip
    assert any("unusable model output" in warning and "item: 1" in warning for warning in report.warnings)


def forgetful(world):
    """A model whose context is too short for every decision that shows one certain item."""
    polite = reader()
    victim = str(world.catalog.titles[world.interactions.item[3]])

    def choose(choice):
        if choice.site == "choice" and victim in data_block(choice):
            raise ContextTooLong("the prompt has 9000 tokens, the model takes 8192")
        return polite._choose(choice)

    return ScriptedBackbone(polite_text, choose, polite._score, name="short-context")


FOUR = {"interactions_per_user": 4, "held_out": 1, "max_failed": 1.0, "recall": False}


def test_a_prompt_that_is_too_long_for_the_model_costs_its_step_alone(world, tmp_path):
    logs = []
    for name, given in (("server", forgetful(world)), ("in-process", InProcess(forgetful(world)))):
        played = play(world, tmp_path / name, given, **FOUR)
        logs.append(played.log)
        failed = [event for event in played.events if not event["ok"]]
        assert failed
        assert all(event["fault"].startswith("ContextTooLong: the prompt has 9000") for event in failed)
        for event in failed:
            assert event["decision"] is None
            assert [other for other in played.events if other["step"] == event["step"]] == [event]
        assert any(event["ok"] for event in played.of("choice", "train"))
        assert any(event["ok"] for event in played.of("choice", "test"))
        assert played.ledger["failures"] >= len(failed)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_run_with_refused_prompts_replays_equal(world, tmp_path, concurrent):
    backbone = forgetful(world)
    given = backbone if concurrent else InProcess(backbone)
    report = simulate(world, backbone=given, embedder=backbone, out=str(tmp_path / "out"), **FOUR)
    assert any("unusable model output" in warning for warning in report.warnings)
    assert replay(tmp_path / "out", dataset=world).metrics == report.metrics


def test_a_run_with_malformed_answers_replays_equal(world, tmp_path):
    backbone = spoiled("no", ("reflect_items",))
    options = {**WRITTEN, "max_failed": 1.0}
    report = simulate(world, backbone=backbone, embedder=backbone, out=str(tmp_path / "out"), **options)
    assert replay(tmp_path / "out", dataset=world).metrics == report.metrics


# ---- word limits -------------------------------------------------------------------------------------------------


LONG = " ".join(f"You like unforgettable thing{number}, gracefully." for number in range(300))
ENDLESS = "supercalifragilistic " * 700


@pytest.mark.parametrize("text", [LONG, ENDLESS, "word" * 3000], ids=["sentences", "one-sentence", "one-word"])
def test_memories_stay_within_their_word_limits_after_every_write_and_no_word_is_cut(world, tmp_path, text):
    def generate(request):
        if request.site == "reflect_items":
            return json.dumps({"negative": text[:590], "positive": text[:590]})
        return polite_text(request) if request.site in JSON_SITES else text

    backbone = reader(generate=generate, name="talkative")
    seen = []

    def after(agents, step):
        for owner in agents.memories.owners():
            for key, memory in agents.memories.of(owner, "").items():
                limit = WORD_LIMITS[key.split(":")[0]]
                words = memory.text.split()
                seen.append(len(words))
                assert len(words) <= limit, f"{key} of {owner} has {len(words)} words"
                whole = {word.strip(".,") for word in text.split()} | {word.strip(".,") for word in text[:590].split()}
                if owner.startswith("user:"):
                    assert {word.strip(".,") for word in words} <= whole, "a word was cut"

    played = play(world, tmp_path, backbone, one_by_one=True, after_step=after, max_failed=1.0, **WRITTEN)
    assert seen
    assert played.of("private")[0]["ok"]
    if text == LONG:
        for event in played.of("private"):
            written = memories(event).text
            assert written.endswith("."), "whole sentences are kept"
            assert len(written.split()) > 0.5 * WORD_LIMITS["private"]


def test_structured_memories_stay_within_their_word_limits(world, tmp_path):
    def after(agents, step):
        for owner in agents.memories.owners():
            for key, memory in agents.memories.of(owner, "").items():
                assert len(memory.text.split()) <= WORD_LIMITS[key.split(":")[0]]

    play(world, tmp_path, reader(), one_by_one=True, after_step=after, interactions_per_user=5, held_out=1)


# ---- cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fusion", "calls"), [("two_step", 5), ("one_call", 4), ("none", 3)])
def test_a_training_step_of_a_writing_model_costs_exactly_the_calls_of_the_method(world, tmp_path, fusion, calls):
    played = play(
        world,
        tmp_path,
        reader(),
        one_by_one=True,
        fusion=fusion,
        order="paper",
        max_failed=1.0,
        **WRITTEN,
    )
    trained = [step for step in played.plan.steps if step.kind in ("train", "learn")]
    asked = {step.number: [call.site for number, call in played.prompts if number == step.number] for step in trained}
    assert {len(sites) for sites in asked.values()} == {calls}
    expected = {
        "two_step": ["choice_explain", "reflect_user", "fuse_extract", "fuse", "reflect_items"],
        "one_call": ["choice_explain", "reflect_user", "fuse_one_call", "reflect_items"],
        "none": ["choice_explain", "reflect_user", "reflect_items"],
    }[fusion]
    assert all(sites == expected for sites in asked.values())


def test_with_a_single_domain_nothing_is_extracted_from_others_and_a_step_costs_four_calls(tmp_path):
    config = HarborConfig(n_users=4, n_domains=1, items_per_domain=30, min_events=6, max_events=7, shock_items=2)
    one = build_harbor(config, seed=4).dataset
    played = play(one, tmp_path, reader(), one_by_one=True, order="paper", max_failed=1.0, **WRITTEN)
    trained = [step for step in played.plan.steps if step.kind in ("train", "learn")]
    for step in trained:
        asked = [call.site for number, call in played.prompts if number == step.number]
        assert asked == ["choice_explain", "reflect_user", "fuse", "reflect_items"]
    assert len(played.of("fuse_extract")) == len(trained)
    assert {event["prompt_hash"] for event in played.of("fuse_extract")} == {""}


def test_fused_memory_exists_only_for_domains_that_the_user_learned_in(world, tmp_path):
    """The specification's isolation rule: a step in one domain writes that domain's memories and no other's."""
    played = play(world, tmp_path, reader(), one_by_one=True, interactions_per_user=2, held_out=1)
    learned = {(event["user"], event["domain"]) for event in played.of("private")}
    fused = {(event["user"], event["key"].removeprefix("fused:")) for event in played.of("fuse")}
    assert fused == learned


@pytest.mark.parametrize(("order", "calls"), [("both", 2), ("paper", 1)])
def test_a_training_step_of_the_structured_writer_costs_its_decision_alone(world, tmp_path, order, calls):
    played = play(world, tmp_path, reader(), one_by_one=True, order=order, interactions_per_user=3, held_out=1)
    for step in played.plan.steps:
        asked = [call.site for number, call in played.prompts if number == step.number]
        if step.kind in ("train", "learn"):
            assert asked == ["choice"] * calls
        elif step.kind == "rebuild":
            assert asked == []


@pytest.mark.parametrize("options", [{}, WRITTEN, {**WRITTEN, "fusion": "one_call"}], ids=["structured", "two", "one"])
def test_tokens_in_the_events_sum_to_the_ledger(world, tmp_path, options):
    options = {"interactions_per_user": 2, "held_out": 1, **options}
    played = play(world, tmp_path, reader(), one_by_one=True, max_failed=1.0, **options)
    # Equal calls are paid once: the neutral reader of a domain, and what two steps ask word for word.
    from recollect.backbones.protocol import answer_tokens, call_key

    distinct = {call_key("x", call): call for _, call in played.prompts}
    assert played.ledger["requests"] == len(distinct)
    assert played.ledger["cached"] == len(played.prompts) - len(distinct)
    answers = {}
    for key, call in distinct.items():
        kind = type(call).__name__
        ask = {"Request": reader().generate, "Choice": reader().choose, "Scoring": reader().score}[kind]
        answers[key] = answer_tokens(ask([call])[0])
    asked = [answers[call_key("x", call)] for _, call in played.prompts]
    assert sum(event["tokens_in"] for event in played.events) == sum(prompt for prompt, _ in asked)
    assert sum(event["tokens_out"] for event in played.events) == sum(completion for _, completion in asked)
    assert played.ledger["prompt_tokens"] == sum(prompt for prompt, _ in answers.values())
    assert played.ledger["completion_tokens"] == sum(completion for _, completion in answers.values())
