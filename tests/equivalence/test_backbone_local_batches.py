"""Batches, orders, sharing and company do not change answers."""

import numpy as np
import pytest

from recollect.backbones.protocol import Choice, Message, Request, Scoring
from recollect.backbones.transformers_engine import TransformersBackbone

TITLES = tuple(
    f"{adjective} {noun}" for adjective in ("The Last", "A Red") for noun in ("Sea", "Robot", "Dinner", "Spy", "Door")
)


def chat(text, system="You choose films."):
    return (Message("system", system), Message("user", text))


def two_orders(user):
    memory = f"I am viewer {user}. I like {'comedies' if user % 2 else 'horror'} and long evenings. " * 8
    return [
        Choice(chat(f"{memory}\nA: Mulan\nB: The Exorcist"), ("A", "B")),
        Choice(chat(f"{memory}\nA: The Exorcist\nB: Mulan"), ("A", "B")),
    ]


@pytest.fixture(scope="module")
def exact(smollm2_dir):
    return TransformersBackbone(smollm2_dir, dtype="float32")


@pytest.fixture(scope="module")
def half(smollm2_dir):
    return TransformersBackbone(smollm2_dir, dtype="bfloat16")


def test_the_order_of_a_batch_does_not_change_a_bit(half):
    calls = [call for user in range(4) for call in two_orders(user)]
    turned = [calls[i] for i in (5, 2, 7, 0, 1, 6, 3, 4)]
    answers = dict(zip(calls, half.choose(calls), strict=True))
    assert half.choose(turned) == [answers[call] for call in turned]
    requests = [Request(chat(f"Say {i}."), max_tokens=6, temperature=0.8, seed=i) for i in range(6)]
    assert half.generate(requests[::-1])[::-1] == half.generate(requests)


def test_company_changes_float32_scores_by_less_than_a_ten_thousandth(exact):
    calls = [call for user in range(3) for call in two_orders(user)]
    together = [answer.log_probs for answer in exact.choose(calls)]
    alone = [exact.choose([call])[0].log_probs for call in calls]
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_batch_invariant_answers_have_the_same_bits_in_any_company(smollm2_dir):
    backbone = TransformersBackbone(smollm2_dir, dtype="bfloat16", batch_invariant=True)
    calls = [call for user in range(2) for call in two_orders(user)]
    assert backbone.choose(calls) == [backbone.choose([call])[0] for call in calls]
    requests = [Request(chat(f"Say {i}." * (i + 1)), max_tokens=6, temperature=0.8, seed=i) for i in range(3)]
    assert backbone.generate(requests) == [backbone.generate([request])[0] for request in requests]


def test_a_shared_context_is_read_once(exact):
    context = chat("Which film is next? " + "I watch films every night. " * 20)
    before = exact.stats()
    answer = exact.score([Scoring(context, TITLES)])[0]
    after = exact.stats()
    computed = after["computed_tokens"] - before["computed_tokens"]
    n_context = answer.prompt_tokens - sum(answer.n_tokens)
    assert computed <= answer.prompt_tokens
    assert computed < (n_context * len(TITLES) + sum(answer.n_tokens)) / 5
    assert after["requested_tokens"] - before["requested_tokens"] == answer.prompt_tokens


def test_two_orders_of_one_question_share_the_memory(exact):
    calls = two_orders(0)
    before = exact.stats()["computed_tokens"]
    answers = exact.choose(calls)
    computed = exact.stats()["computed_tokens"] - before
    assert computed < 0.7 * sum(answer.prompt_tokens for answer in answers)


def test_token_counts_do_not_depend_on_the_batch(exact):
    calls = [call for user in range(2) for call in two_orders(user)]
    assert [a.prompt_tokens for a in exact.choose(calls)] == [exact.choose([c])[0].prompt_tokens for c in calls]


def test_a_sample_depends_on_its_own_seed_only(exact):
    ask = chat("Tell me a story.")
    by_seed = {s: exact.generate([Request(ask, max_tokens=8, temperature=1.0, seed=s)])[0] for s in (1, 2)}
    company = [Request(chat(f"Other {i}"), max_tokens=8, temperature=1.0, seed=1) for i in range(3)]
    mixed = exact.generate([*company, *(Request(ask, max_tokens=8, temperature=1.0, seed=s) for s in (2, 1))])
    assert mixed[3:] == [by_seed[2], by_seed[1]]
    assert by_seed[1].text != by_seed[2].text


def test_the_same_weights_and_settings_have_the_same_fingerprint(smollm2_dir, half, exact):
    assert TransformersBackbone(smollm2_dir, dtype="bfloat16").fingerprint == half.fingerprint != exact.fingerprint
