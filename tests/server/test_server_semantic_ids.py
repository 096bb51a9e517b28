"""A real vLLM server whose model has the tokens of semantic IDs answers with items alone.

The test serves a decoder of random weights (so nothing but the constraint makes an answer legal) with the embedded
model's tokenizer, extended. It starts its own server with `.ci/vllm_server.sh`; needed is the virtual environment of
one: VLLM_ENV, or RECOLLECT_VLLM_STATE of a server that installed it.
"""

import os
import socket
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from recollect.backbones.protocol import Message, Request
from recollect.backbones.server import ServerBackbone
from recollect.errors import InputError
from recollect.rng import stream
from recollect.tokenize.constrained import beam_search, decoder_of
from recollect.tokenize.served_ids import id_schema, read_answer, score_beams, vllm_fields
from recollect.tokenize.text_form import codes_of, find_ids
from recollect.tokenize.trie import PrefixTrie
from recollect.tokenize.vocabulary import SemanticVocabulary, add_to
from recollect.types import SemanticIDs

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = (32, 32, 32)
NAME = "semantic-ids"
CHATS = [(Message("user", f"I liked film {n}. What next?"),) for n in range(4)]


def _environment() -> str:
    found = os.environ.get("VLLM_ENV") or str(Path(os.environ.get("RECOLLECT_VLLM_STATE", "/nowhere")) / "env")
    if not (Path(found) / "bin" / "python").is_file():
        pytest.skip("no vLLM environment; set VLLM_ENV (.ci/vllm_server.sh makes one)")
    return found


@pytest.fixture(scope="module")
def ids() -> SemanticIDs:
    codes = stream(0, "served ids").integers(32, size=(400, 3)).astype(np.int32)
    return SemanticIDs(np.array([f"i{n}" for n in range(400)], dtype=object), codes, SIZES)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, smollm2_dir, ids) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    _environment()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    draw = stream(0, "served books")
    add_to(tokenizer, model, ids, [draw.standard_normal((32, 16)).astype(np.float32) for _ in SIZES])
    folder = tmp_path_factory.mktemp("served-model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory, model_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    state = tmp_path_factory.mktemp("vllm-state")
    script = str(REPOSITORY / ".ci" / "vllm_server.sh")
    environment = os.environ | {"VLLM_ENV": _environment()}
    subprocess.run(
        ["bash", script, "start", str(state), str(model_folder), str(port), NAME],
        env=environment,
        check=True,
        timeout=800,
    )
    yield f"http://127.0.0.1:{port}/v1"
    subprocess.run(["bash", script, "stop", str(state)], env=environment, check=False, timeout=60)


@pytest.fixture(scope="module")
def vocabulary(model_folder) -> SemanticVocabulary:
    from transformers import AutoTokenizer

    return SemanticVocabulary.of(AutoTokenizer.from_pretrained(model_folder), SIZES)


def answers(url: str, fields: dict, n: int = 64) -> list[dict]:
    """`n` answers sampled at a temperature that makes the model's own wishes count for little."""
    body = {
        "model": NAME,
        "messages": [{"role": role, "content": content} for role, content in CHATS[0]],
        "n": n,
        "temperature": 2.0,
        "seed": 5,
        "logprobs": True,
    }
    reply = httpx.post(f"{url}/chat/completions", json=body | fields, timeout=300)
    assert reply.status_code == 200, reply.text[:500]
    return reply.json()["choices"]


def test_sampled_answers_are_items_written_in_one_token_per_code(url, ids, vocabulary):
    legal = set(map(tuple, ids.codes.tolist()))
    found = answers(url, vllm_fields(ids, vocabulary))
    assert len(found) == 64
    codes = [codes_of(choice["message"]["content"]) for choice in found]
    assert set(codes) <= legal
    assert len(set(codes)) > 16
    for choice in found:
        tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
        assert "".join(tokens[:3]) == choice["message"]["content"]
        assert choice["finish_reason"] == "stop"


def test_without_the_vocabulary_the_text_is_an_items_all_the_same(url, ids):
    legal = set(map(tuple, ids.codes.tolist()))
    found = answers(url, vllm_fields(ids), n=32)
    whole = [choice["message"]["content"] for choice in found if choice["finish_reason"] == "stop"]
    assert whole
    assert {codes_of(text) for text in whole} <= legal


def test_without_the_fields_the_model_says_something_else(url):
    for choice in answers(url, {"max_tokens": 4}, n=16):
        with pytest.raises(InputError):
            codes_of(choice["message"]["content"])


def test_a_request_with_the_schema_names_an_item(url, ids):
    legal = set(map(tuple, ids.codes.tolist()))
    schema = id_schema(ids)
    with ServerBackbone(url, concurrency=8) as backbone:
        requests = [Request(chat, 200, 1.0, schema=schema, seed=seed) for seed in range(4) for chat in CHATS]
        found = backbone.generate(requests)
    # vLLM lets blanks stand between the parts of a JSON text, and random weights may write nothing else to the end
    complete = [codes for answer in found if '>"' in answer.text for codes in find_ids(answer.text)]
    assert complete
    assert set(complete) <= legal
    whole = {read_answer(answer.text) for answer in found if answer.finish_reason == "stop"}
    assert whole <= legal


def test_beams_over_the_servers_scores_are_those_of_the_same_weights_in_process(url, ids, vocabulary, model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trie = PrefixTrie(ids.codes, SIZES)
    with ServerBackbone(url, concurrency=8) as backbone:
        served = score_beams(backbone, CHATS, trie, 10)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    for request, chat in enumerate(CHATS):
        messages = [{"role": role, "content": content} for role, content in chat]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inside = beam_search(decoder_of(model, prompt["input_ids"]), trie, vocabulary, 10)
        assert torch.allclose(served.scores[request], inside.scores[0], atol=0.01)
        gaps = inside.scores[0].diff().abs() > 0.02
        is_clear = torch.cat([torch.tensor([True]), gaps]) & torch.cat([gaps, torch.tensor([False])])
        assert torch.equal(served.leaves[request][is_clear], inside.leaves[0][is_clear])
