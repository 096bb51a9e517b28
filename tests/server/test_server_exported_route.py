"""A real vLLM server answers with an exported route as the routed adapters do in process.

Head-wise experts (MH-MoE) stand on the embedded model; two of their routes leave as PEFT LoRA folders that the server
loads with --enable-lora. *followed*: a route that every token takes by itself (renormalised top-1 weights, tied
routers), compared with the adapters as they are. *chosen*: another one, compared with the adapters under
`forced_route`. The test starts its own server with `.ci/vllm_server.sh`; needed is the virtual environment of one:
VLLM_ENV, or RECOLLECT_VLLM_STATE of a server that installed it.
"""

import os
import socket
import subprocess
from pathlib import Path

import httpx
import pytest
import torch

from recollect.continual.adapters.attach import adapters_disabled, attach, routers
from recollect.continual.adapters.config import MHMoEConfig
from recollect.continual.adapters.export import chosen_route, export_route, forced_route

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).resolve().parents[2]
NAME = "base"
FOLLOWED, CHOSEN = [0, 0, 0, 0], [2, 0, 3, 1]
TEXTS = (
    "The committee decided to raise interest rates because",
    "def add(a, b):\n    return",
    "Question: what is 12 + 30? Answer:",
    "Der Bundesrat hat am Mittwoch entschieden, dass",
    "She opened the old book and found",
    "A: against. B: for. C: neutral. The stance of this text is",
    "The capital of France is",
    "Once upon a time, in a small village near the sea, there lived",
)
TOLERANCE = 0.01  # nats; float32 on both sides


def _environment() -> str:
    found = os.environ.get("VLLM_ENV") or str(Path(os.environ.get("RECOLLECT_VLLM_STATE", "/nowhere")) / "env")
    if not (Path(found) / "bin" / "python").is_file():
        pytest.skip("no vLLM environment; set VLLM_ENV (.ci/vllm_server.sh makes one)")
    return found


@pytest.fixture(scope="module")
def model(smollm2_dir):
    """The embedded model with experts that matter: every B is drawn, and the routers tie."""
    from transformers import AutoModelForCausalLM

    _environment()
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    attach(model, MHMoEConfig(heads=4, experts=4, rank=4, alpha=4.0, gate="topk_renorm"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        for router in routers(model).values():
            router.rows[0].zero_()  # ties: every token takes the first expert of each slice
    return model


@pytest.fixture(scope="module")
def prompts(smollm2_dir) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def url(tmp_path_factory, model, smollm2_dir):
    routes = tmp_path_factory.mktemp("routes")
    for name, experts in (("followed", FOLLOWED), ("chosen", CHOSEN)):
        export_route(model, chosen_route(model, experts), routes / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    state = tmp_path_factory.mktemp("vllm-state")
    script = str(REPOSITORY / ".ci" / "vllm_server.sh")
    served = " ".join(f"{name}={routes / name}" for name in ("followed", "chosen"))
    environment = os.environ | {
        "VLLM_ENV": _environment(),
        "VLLM_ARGS": f"--enforce-eager --enable-lora --max-lora-rank 16 --max-loras 2 --lora-modules {served}",
    }
    start = ["bash", script, "start", str(state), str(smollm2_dir), str(port), NAME]
    subprocess.run(start, env=environment, check=True, timeout=1000)
    yield f"http://127.0.0.1:{port}/v1"
    subprocess.run(["bash", script, "stop", str(state)], env=environment, check=False, timeout=60)


def served(url: str, name: str, prompt: list[int]) -> dict[int, float]:
    """The server's 20 likeliest next tokens with their log-probabilities."""
    body = {
        "model": name,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": 20,
        "return_tokens_as_token_ids": True,
    }
    reply = httpx.post(f"{url}/completions", json=body, timeout=300)
    assert reply.status_code == 200, reply.text[:500]
    found = reply.json()["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(token.removeprefix("token_id:")): value for token, value in found.items()}


@torch.no_grad()
def in_process(model, prompt: list[int]) -> torch.Tensor:
    """(V,) log-probabilities of the next token."""
    return model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)


def largest_difference(found: dict[int, float], expected: torch.Tensor) -> float:
    assert len(found) >= 20
    assert max(found, key=found.get) == int(expected.argmax())
    return max(abs(value - float(expected[token])) for token, value in found.items())


def test_the_server_knows_the_routes_by_their_names(url):
    known = {one["id"] for one in httpx.get(f"{url}/models", timeout=60).json()["data"]}
    assert known == {NAME, "followed", "chosen"}


def test_a_route_that_tokens_follow_is_served_as_the_adapters_answer(url, model, prompts):
    differences = []
    for prompt in prompts:
        expected = in_process(model, prompt)
        for router in routers(model).values():
            assert bool((router.last_routing.indices == 0).all())  # the tokens do follow it
        differences.append(largest_difference(served(url, "followed", prompt), expected))
    print(f"followed: largest difference {max(differences):.2e} nat over {len(prompts)} prompts")  # noqa: T201
    assert max(differences) < TOLERANCE


def test_another_route_is_served_as_the_adapters_answer_when_sent_over_it(url, model, prompts):
    differences, apart = [], []
    for prompt in prompts:
        with forced_route(model, chosen_route(model, CHOSEN)):
            expected = in_process(model, prompt)
        found = served(url, "chosen", prompt)
        differences.append(largest_difference(found, expected))
        by_itself = in_process(model, prompt)
        apart.append(max(abs(value - float(by_itself[token])) for token, value in found.items()))
    print(f"chosen: largest difference {max(differences):.2e} nat over {len(prompts)} prompts")  # noqa: T201
    assert max(differences) < TOLERANCE
    assert min(apart) > 10 * TOLERANCE  # the two routes answer differently


def test_without_a_route_the_server_answers_as_the_bare_model(url, model, prompts):
    for prompt in prompts[:3]:
        with adapters_disabled(model):
            expected = in_process(model, prompt)
        found = served(url, NAME, prompt)
        assert largest_difference(found, expected) < TOLERANCE
        routed = in_process(model, prompt)
        assert max(abs(value - float(routed[token])) for token, value in found.items()) > 10 * TOLERANCE
