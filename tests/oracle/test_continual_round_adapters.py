"""The adapters a round leaves behind answer as the run did, without the run."""

from __future__ import annotations

import json

import pytest
import torch
from support.continual_worlds import SMALL, TASKS, write_byte_decoder, write_stream

from recollect.continual.adapters.saving import base_fingerprint, from_pretrained
from recollect.continual.examples import Lengths
from recollect.continual.learner import Generation, open_learner, open_tokens
from recollect.continual.run import continual
from recollect.continual.trace_data import load_trace
from recollect.io import read_json, sha256_file

METHODS = ("o-lora", "mh-moe-replay", "sd-moe", "moelora", "sapt", "osf")
FIRST = TASKS[:2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("round-adapters")
    write_stream(folder / "trace")
    write_byte_decoder(folder / "bytes")
    small = ["sd-moe.common_rank=2", "sd-moe.absorb_rank=1", "mh-moe-replay.heads=2"]
    options = {"tasks": FIRST, "backbone": str(folder / "bytes"), "method": METHODS, "set": tuple(small)}
    continual(folder / "trace", **{**SMALL, **options}, out=folder / "run")
    return folder


def bare(world):
    lengths = Lengths(200, 16)
    return open_learner(world / "bytes", open_tokens(world / "bytes", "none", lengths), lengths, "fp32")


@pytest.mark.parametrize("method", METHODS[:-1])
def test_loaded_adapters_answer_as_the_round_did(world, method):
    own = world / "run" / "methods" / method / "seed-0"
    for number, name in enumerate(FIRST, start=1):
        learner = bare(world)
        fingerprint = base_fingerprint(learner.model)
        folder = own / "adapter" / f"round-{number}"
        from_pretrained(learner.model, folder)
        one = load_trace(world / "trace", TASKS)[name]
        answers = learner.answers(one.task, one.test, Generation(4, max_new_tokens=3))
        lines = (own / "cells" / f"{number}-{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert answers == [json.loads(line)["prediction"] for line in lines]
        manifest = read_json(folder / "manifest.json")
        assert manifest["base"] == {"name": "bytes", "fingerprint": fingerprint}
        assert (manifest["round"], manifest["task"], manifest["seed"]) == (number, name, 0)
        assert manifest["method"]["method"] == method
        assert manifest["files"] == {
            file.name: sha256_file(file) for file in folder.iterdir() if file.name != "manifest.json"
        }
        assert "recollect_adapter.safetensors" in manifest["files"]


def test_pairs_of_both_tasks_load_in_peft_as_one(world):
    from peft import PeftModel

    folder = world / "run" / "methods" / "o-lora" / "seed-0" / "adapter" / "round-2"
    ours, theirs = bare(world).model, bare(world).model
    ids = torch.tensor([[5, 9, 40, 7, 100]])
    with torch.no_grad():
        untouched = ours(input_ids=ids).logits
        expected = from_pretrained(ours, folder).eval()(input_ids=ids).logits
        found = PeftModel.from_pretrained(theirs, folder).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - untouched).abs().max() > 1e-3
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 16


def test_a_method_without_adapters_leaves_no_folder(world):
    assert not (world / "run" / "methods" / "osf" / "seed-0" / "adapter").exists()
    routed = world / "run" / "methods" / "mh-moe-replay" / "seed-0" / "adapter" / "round-1"
    assert sorted(file.name for file in routed.iterdir()) == [
        "manifest.json", "recollect_adapter.json", "recollect_adapter.safetensors",
    ]  # fmt: skip
