"""Every way of scoring on a server gives the model's exact log-probabilities; what cannot be exact is refused."""

import math

import numpy as np
import pytest
from support.fake_server import FakeModel, MemoryServer, log_prob, token_id

from recollect.backbones.protocol import Choice, Message, Request, Scoring
from recollect.backbones.scoring import MAX_WANTED, plan_next_token
from recollect.backbones.server import ServerBackbone
from recollect.errors import BackboneConfigError, BackboneError, ConfigError, ContextTooLong

CHAT = (Message("system", "You pick films."), Message("user", "Which one, A or B?"))
TEXTS = ("A", "The Exorcist", "The Big Sleep", "Mulan " * 20)


def backbone(**switches) -> ServerBackbone:
    return ServerBackbone("http://one", transport=MemoryServer(FakeModel(**switches), delay=0.0))


def exact(text: str) -> tuple[float, int]:
    model = FakeModel()
    tokens = [token_id(word) for word in model.chat_tokens([message._asdict() for message in CHAT])]
    total = 0.0
    words = model.tokens_of(text)
    for word in words:
        total += log_prob(tokens, token_id(word))
        tokens.append(token_id(word))
    return total, len(words)


@pytest.mark.parametrize(
    "switches",
    [{}, {"next_token": False}, {"next_token": False, "prompt_log_probs": False}, {"adapters": ("lora",)}],
    ids=["next-token", "prompt_logprobs", "echo", "adapters"],
)
def test_score_is_exact_by_every_way(switches):
    with backbone(**switches) as server:
        scored = server.score([Scoring(CHAT, TEXTS)])[0]
    expected = [exact(text) for text in TEXTS]
    np.testing.assert_allclose(scored.log_probs, [value for value, _ in expected], rtol=0, atol=1e-9)
    assert scored.n_tokens == tuple(n for _, n in expected)
    n_context = len(FakeModel().chat_tokens([message._asdict() for message in CHAT]))
    assert scored.prompt_tokens == n_context + sum(scored.n_tokens)


@pytest.mark.parametrize("options", [("A", "B"), ("Mulan", "The Exorcist", "The Big Sleep")])
def test_choose_is_the_renormalised_score_of_the_options(options):
    with backbone() as server:
        chosen = server.choose([Choice(CHAT, options)])[0]
    sums = np.array([exact(option)[0] for option in options])
    np.testing.assert_allclose(chosen.log_probs, sums - np.log(np.exp(sums).sum()), rtol=0, atol=1e-9)
    assert math.isclose(sum(map(math.exp, chosen.log_probs)), 1.0, abs_tol=1e-12)


def test_single_token_choice_takes_one_generation_request():
    transport = MemoryServer(FakeModel(), delay=0.0)
    with ServerBackbone("http://one", transport=transport) as server:
        server.choose([Choice(CHAT, ("A", "B"))])
        before = len(transport.log)
        server.choose([Choice((*CHAT[:1], Message("user", "Another question")), ("A", "B"))])
        paths = [path for _, _, path in transport.log[before:]]
    assert paths == ["/tokenize", "/v1/completions"]


def test_adapters_are_never_scored_through_prompt_log_probs():
    transport = MemoryServer(FakeModel(adapters=("lora",), next_token=False), delay=0.0)
    with (
        ServerBackbone("http://one", "lora", transport=transport) as server,
        pytest.raises(BackboneError, match="no log-probabilities of chosen tokens"),
    ):
        server.score([Scoring(CHAT, ("A",))])


def test_without_tokenize_labels_among_the_top_tokens_are_exact_and_others_are_refused():
    with backbone(tokenizes=False) as server:
        chosen = server.choose([Choice(CHAT, ("A", "B"))])[0]
        sums = np.array([exact(option)[0] for option in ("A", "B")])
        np.testing.assert_allclose(chosen.log_probs, sums - np.log(np.exp(sums).sum()), rtol=0, atol=1e-9)
        with pytest.raises(BackboneError, match="option 'The Exorcist' is not among"):
            server.choose([Choice(CHAT, ("A", "The Exorcist"))])
        with pytest.raises(BackboneError, match="has no /tokenize"):
            server.score([Scoring(CHAT, ("A",))])


def test_next_token_plans_respect_the_bound_on_wanted_tokens():
    plans = plan_next_token([[first, 1, 2] for first in range(1000, 1300)])
    assert all(len(plan.wanted) <= MAX_WANTED for plan in plans)
    covered = {(prefix, token) for plan in plans for prefix in plan.prefixes for token in plan.wanted}
    for first in range(1000, 1300):
        assert {((), first), ((first,), 1), ((first, 1), 2)} <= covered


def test_embeddings_are_unit_rows_in_order():
    texts = [f"text {i}" for i in range(150)]
    with backbone() as server:
        rows = server.embed(texts)
        np.testing.assert_array_equal(rows[140:], server.embed(texts[140:]))
        assert server.embed([]).shape[0] == 0
    assert rows.shape == (150, 8)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)


def test_fingerprint_ignores_the_address_and_sees_the_version():
    def fingerprint(url: str, **switches) -> str:
        transport = MemoryServer(FakeModel(**switches), delay=0.0)
        with ServerBackbone(url, transport=transport) as server:
            return server.fingerprint

    assert fingerprint("http://one") == fingerprint("https://two:8000/v1/")
    assert fingerprint("http://one") != fingerprint("http://one", version="0.0.2")
    assert fingerprint("http://one") != fingerprint("http://one", name="other")


def test_control_tokens_hold_the_fixed_list_and_the_served_template():
    with backbone() as server:
        assert {"<|im_start|>", "<|eot_id|>", "[INST]", "<start_of_turn>"} <= set(server.control_tokens)


def test_a_server_that_ignores_schemas_is_found_out_before_any_answer_is_used():
    with backbone(obeys_schema=False) as server:
        with pytest.raises(BackboneConfigError, match="ignores or refuses response_format"):
            server.generate([Request(CHAT, schema='{"type":"object","required":["x"]}')])
        assert server.generate([Request(CHAT)])[0].text
    with backbone() as server:
        assert '"x"' in server.generate([Request(CHAT, schema='{"type":"object","required":["x"]}')])[0].text


@pytest.mark.parametrize(
    ("url", "model", "error", "words"),
    [
        ("ftp://host", None, ConfigError, "must begin with http"),
        ("127.0.0.1:8000", None, ConfigError, "http"),
        ("http://user:secret@host", None, ConfigError, "api_key"),
        ("http://one", "other", BackboneConfigError, "'other' is not served by http://one/v1; it serves: toy"),
    ],
)
def test_wrong_addresses_and_names_are_refused_with_what_to_do(url, model, error, words):
    with pytest.raises(error, match=words) as caught:  # noqa: SIM117
        with ServerBackbone(url, model, transport=MemoryServer(FakeModel(), delay=0.0)) as server:
            _ = server.fingerprint
    assert "secret" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_too_long_prompts_are_named_as_such_and_not_retried():
    with backbone() as server:
        with pytest.raises(ContextTooLong, match="maximum context length"):
            server.generate([Request((Message("user", "word " * 600),))])
        assert server.stats()["retries"] == 0


def test_closed_backbones_refuse_and_close_twice_quietly():
    server = backbone()
    server.close()
    with pytest.raises(BackboneError, match="closed"):
        server.generate([Request(CHAT)])
    server = backbone()
    server.generate([Request(CHAT)])
    server.close()
    server.close()
    with pytest.raises(BackboneError, match="closed"):
        server.generate([Request(CHAT)])
