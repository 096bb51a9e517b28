"""Every method: its state is complete, survives a file, and a killed task is repeated bit for bit."""

from __future__ import annotations

import pytest
import torch

from recollect.continual.methods.driving import learn_task
from recollect.continual.methods.objective import model_inputs
from recollect.continual.methods.registry import METHODS
from recollect.continual.methods.state_file import read_state, write_state
from tests.support.adapter_worlds import tiny_decoder
from tests.support.method_worlds import LOOP, rows, same, small_method, tiny_task, weights


def prepared(name):
    method = small_method(name)
    return method, method.prepare(tiny_decoder(num_hidden_layers=1))


@pytest.mark.parametrize("name", list(METHODS))
def test_a_reloaded_method_goes_on_as_the_one_that_never_stopped(name, tmp_path):
    method, model = prepared(name)
    for index in range(2):
        learn_task(method, model, tiny_task(index), LOOP)
    write_state(method.state(model), tmp_path)

    again, other = prepared(name)
    again.load_state(other, read_state(tmp_path))
    assert again.finished == 2
    assert same(weights(model), weights(other))
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


@pytest.mark.parametrize("name", ["ewc", "ewc-online", "a-gem", "lwf", "inflora", "replay", "mh-moe-replay", "sd-moe"])
def test_a_task_killed_between_two_steps_is_repeated_bit_for_bit(name, tmp_path, monkeypatch):
    values = {"fisher": "trace_online"} if name == "ewc-online" else None
    registered = name.removesuffix("-online")
    task = tiny_task(1, epochs=2, steps=3)

    def fresh():
        method = small_method(registered, values, adapter={"dropout": 0.2})
        return method, method.prepare(tiny_decoder(num_hidden_layers=1))

    method, model = fresh()
    learn_task(method, model, tiny_task(0), LOOP)
    start = method.state(model)
    results = []
    for killed_after in (None, 4):
        method, model = fresh()
        method.load_state(model, start)
        folder = tmp_path / str(killed_after)
        if killed_after is not None:
            whole, steps = method.after_step, []

            def dying(model, optimizer, whole=whole, steps=steps):
                whole(model, optimizer)
                steps.append(1)
                if len(steps) > 4:
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
