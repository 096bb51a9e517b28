"""Every method: its state and its adapters survive a file whole, and a killed task is repeated bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

from recollect.continual.adapters.attach import attached
from recollect.continual.adapters.saving import from_pretrained, save_pretrained
from recollect.continual.methods.driving import learn_task
from recollect.continual.methods.objective import model_inputs
from recollect.continual.methods.registry import METHODS
from recollect.continual.methods.state_file import read_state, write_state
from tests.support.adapter_worlds import tiny_decoder
from tests.support.method_worlds import LOOP, rows, same, small_method, tiny_task, weights
from tests.support.training_steps import flags, logits, step

GROWN = {"sd-moe, grown": "sd-moe"}


def prepared(name):
    adapter = {"grow": 1, "router_replay": 0.5} if name in GROWN else None
    method = small_method(GROWN.get(name, name), adapter=adapter)
    return method, method.prepare(tiny_decoder(num_hidden_layers=1))


@pytest.mark.parametrize("name", [*METHODS, *GROWN])
def test_a_reloaded_method_goes_on_as_the_one_that_never_stopped(name, tmp_path):
    method, model = prepared(name)
    for index in range(2):
        learn_task(method, model, tiny_task(index), LOOP)
    write_state(method.state(model), tmp_path)

    again, other = prepared(name)
    again.load_state(other, read_state(tmp_path))
    assert again.finished == 2
    assert same(weights(model), weights(other))
    assert flags(model) == flags(other)
    if attached(model) is not None:
        folder = save_pretrained(model, tmp_path / "adapters")
        alone = from_pretrained(tiny_decoder(num_hidden_layers=1), folder)
        assert torch.equal(logits(model), logits(alone))
        assert flags(model) == flags(alone)
        kept = copy.deepcopy(model)
        step(kept)
        step(alone)
        assert same(weights(kept), weights(alone))
    inputs = model_inputs(rows(1, 0))
    assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    first, second = method.state(model), again.state(other)
    assert first.values == second.values
    assert same(first.tensors, second.tensors)

    learn_task(method, model, tiny_task(2), LOOP)
    learn_task(again, other, tiny_task(2), LOOP)
    assert same(weights(model), weights(other))
    assert same(method.state(model).tensors, again.state(other).tensors)


class Killed(Exception):
    pass


KILLED = ["ewc", "ewc-online", "a-gem", "lwf", "inflora", "sapt", "replay", "mh-moe-replay", "sd-moe", "sd-moe, grown"]


@pytest.mark.parametrize("name", KILLED)
def test_a_task_killed_between_two_steps_is_repeated_bit_for_bit(name, tmp_path, monkeypatch):
    values = {"fisher": "trace_online"} if name == "ewc-online" else None
    registered = GROWN.get(name, name).removesuffix("-online")
    grown = {"grow": 1, "router_replay": 0.5} if name in GROWN else {}
    last = 6 if name in GROWN else 4  # 6 = in the phase after what it does between two phases
    task = tiny_task(1, epochs=2, steps=3)

    def fresh():
        method = small_method(registered, values, adapter={"dropout": 0.2} | grown)
        return method, method.prepare(tiny_decoder(num_hidden_layers=1))

    method, model = fresh()
    learn_task(method, model, tiny_task(0), LOOP)
    start = method.state(model)
    results = []
    for killed_after in (None, last):
        method, model = fresh()
        method.load_state(model, start)
        folder = tmp_path / str(killed_after)
        if killed_after is not None:
            whole, steps = method.after_step, []

            def dying(model, optimizer, whole=whole, steps=steps):
                whole(model, optimizer)
                steps.append(1)
                if len(steps) > last:
                    raise Killed

            monkeypatch.setattr(method, "after_step", dying)
            with pytest.raises(Killed):
                learn_task(method, model, task, LOOP, folder=folder, checkpoint_every=1)
            method, model = fresh()
            method.load_state(model, start)
        learn_task(method, model, task, LOOP, folder=folder, checkpoint_every=1)
        results.append(method.state(model).tensors)
    assert same(*results)


def test_hooks_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for name in ("ewc", "inflora", "mh-moe-gated", "a-gem"):
        method, model = prepared(name)
        for index in range(2):
            learn_task(method, model, tiny_task(index), LOOP)
    assert torch.equal(before, torch.get_rng_state())
