"""What a server is asked for is the prefix tree: fields, schema and the search over exact scores."""

import json
import re

import numpy as np
import pytest
import torch
from support.scripted_decoder import HashDecoder

from recollect.backbones.protocol import Message, Request, Scoring
from recollect.backbones.scripted import ScriptedBackbone
from recollect.backbones.wire import chat_body
from recollect.errors import InputError, MalformedOutput
from recollect.rng import call_seed, stream
from recollect.tokenize.constrained import beam_search, ranked_items
from recollect.tokenize.served_ids import id_schema, listed_ids, read_answer, score_beams, vllm_fields
from recollect.tokenize.text_form import codes_of, texts_of
from recollect.tokenize.trie import PrefixTrie
from recollect.tokenize.vocabulary import SemanticVocabulary
from recollect.types import SemanticIDs

SIZES = (6, 5, 7)
CHATS = [(Message("user", f"What does user {n} watch next?"),) for n in range(3)]


def catalogue(n_items: int = 60) -> SemanticIDs:
    draw = stream(0, "served catalogue")
    codes = np.stack([draw.integers(size, size=n_items) for size in SIZES], axis=1).astype(np.int32)
    return SemanticIDs(np.array([f"i{n}" for n in range(n_items)], dtype=object), codes, SIZES)


def additive_scores(decoder: HashDecoder, vocabulary: SemanticVocabulary):
    """Scores of texts under `HashDecoder`, so that both searches ask the same model."""

    def score(scoring: Scoring) -> list[float]:
        request = int(scoring.messages[0].content.split()[3])
        found = []
        for text in scoring.continuations:
            written: tuple[int, ...] = (request,)
            total = 0.0
            for level, code in enumerate(codes_of(text)):
                logits = decoder.logits(written).astype(np.float64)
                token = int(vocabulary.token_ids[level][code])
                total += logits[token] - np.log(np.exp(logits).sum())
                written = (*written, token)
            found.append(total)
        return found

    return score


@pytest.mark.parametrize("n_beams", [1, 5, 200])
def test_the_search_over_scores_is_the_search_over_logits(n_beams):
    ids = catalogue()
    trie = PrefixTrie(ids.codes, SIZES)
    vocabulary = SemanticVocabulary.consecutive(SIZES, first=1, end_token=0)
    decoder = HashDecoder(3, sum(SIZES) + 1)
    backbone = ScriptedBackbone(score=additive_scores(decoder, vocabulary))
    served = score_beams(backbone, CHATS, trie, n_beams)
    inside = beam_search(decoder, trie, vocabulary, n_beams)
    assert torch.equal(served.leaves, inside.leaves)
    assert torch.equal(served.codes, inside.codes)
    assert torch.allclose(served.scores, inside.scores, atol=1e-4)
    assert torch.equal(ranked_items(served, trie, 10)[0], ranked_items(inside, trie, 10)[0])
    assert backbone.calls["score"] == 3 * 3


def test_short_ids_are_refused_by_the_search_over_scores():
    trie = PrefixTrie(np.array([[0, -1], [1, 0]]), (2, 2))
    with pytest.raises(InputError, match="one length"):
        score_beams(ScriptedBackbone(), CHATS, trie, 2)
    with pytest.raises(InputError, match="at least 1"):
        score_beams(ScriptedBackbone(), CHATS, PrefixTrie(np.array([[0, 0]]), (2, 2)), 0)


def test_the_schema_names_every_id_once_and_goes_out_as_any_schema_does():
    ids = catalogue()
    request = Request(CHATS[0], schema=id_schema(ids))
    body = chat_body("model", request, is_vllm=True)
    enum = body["response_format"]["json_schema"]["schema"]["properties"]["item"]["enum"]
    assert enum == listed_ids(ids)
    assert sorted(enum) == sorted(set(texts_of(ids.codes)))
    assert [codes_of(text) for text in enum] == sorted(set(map(tuple, ids.codes.tolist())))


def test_answers_are_read_and_rubbish_is_named():
    assert read_answer('{"item": "<a_1><b_0>"}') == (1, 0)
    assert read_answer(" <a_1><b_0>\n") == (1, 0)
    for text in (
        "",
        "[]",
        '{"item": 3}',
        '{"item": "a film"}',
        '{"item": "<a_1><b',
        "<a_1> I think",
        '{"other": "<a_1>"}',
    ):
        with pytest.raises(MalformedOutput, match="not a semantic ID"):
            read_answer(text)


def test_vllm_fields_confine_text_and_tokens():
    ids = catalogue()
    plain = vllm_fields(ids)
    assert plain["structured_outputs"] == {"choice": listed_ids(ids)}
    assert "allowed_token_ids" not in plain
    vocabulary = SemanticVocabulary.consecutive(SIZES, first=10, end_token=3)
    fields = vllm_fields(ids, vocabulary)
    used = {int(vocabulary.token_ids[level][code]) for row in ids.codes.tolist() for level, code in enumerate(row)}
    assert fields["allowed_token_ids"] == sorted(used | {3})
    assert fields["max_tokens"] == 4
    json.dumps(fields)


@pytest.mark.parametrize("sizes", [SIZES[:-1], (*SIZES[:-1], 1), (*SIZES, 2)])
def test_a_vocabulary_of_other_levels_is_refused(sizes):
    message = rf"tokens for codebooks {re.escape(str(sizes))}, the IDs are of codebooks {re.escape(str(SIZES))}"
    with pytest.raises(InputError, match=message):
        vllm_fields(catalogue(), SemanticVocabulary.consecutive(sizes, first=10, end_token=3))


def test_catalogues_too_large_to_send_are_refused_with_the_way_out():
    codes = np.stack(np.unravel_index(np.arange(5_001), (20, 20, 20)), axis=1)
    ids = SemanticIDs(np.array([str(n) for n in range(5_001)], dtype=object), codes, (20, 20, 20))
    for ask in (listed_ids, id_schema, vllm_fields):
        with pytest.raises(InputError, match=r"at most 5000.*score_beams"):
            ask(ids)
    many = np.stack([np.arange(1_100), np.arange(1_100)], axis=1)
    ids = SemanticIDs(np.array([str(n) for n in range(1_100)], dtype=object), many, (1_100, 1_100))
    with pytest.raises(InputError, match="2201 tokens are in use where a request may allow 1024"):
        vllm_fields(ids, SemanticVocabulary.consecutive((1_100, 1_100), 1, 0))


@pytest.fixture(scope="module")
def backbone(smollm2_dir):
    from recollect.backbones.transformers_engine import TransformersBackbone

    with_weights = TransformersBackbone(smollm2_dir, dtype="float32")
    yield with_weights
    with_weights.close()


def test_the_embedded_model_answers_with_items_alone(backbone):
    ids = catalogue(8)
    requests = [
        Request(chat, 60, 1.0, schema=id_schema(ids), seed=call_seed(0, "served", n))
        for n, chat in enumerate(CHATS[:1])
    ]
    legal = set(map(tuple, ids.codes.tolist()))
    for answer in backbone.generate(requests):
        assert answer.finish_reason == "stop"
        assert read_answer(answer.text) in legal


def test_the_embedded_models_beams_are_its_exact_scores(backbone):
    ids = catalogue(4)
    trie = PrefixTrie(ids.codes, SIZES)
    beams = score_beams(backbone, CHATS[:1], trie, trie.n_ids)
    texts = texts_of(beams.codes[0].numpy()).tolist()
    exact = backbone.score([Scoring(CHATS[0], tuple(texts))])[0].log_probs
    assert beams.scores[0].numpy() == pytest.approx(exact, abs=1e-3)
    assert list(exact) == sorted(exact, reverse=True)
