"""What users of continual methods can get wrong, and what they are told."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from recollect.continual.methods.registry import METHODS, method_spec
from recollect.continual.methods.state_file import STATE_FILE, read_state, write_state
from recollect.errors import ConfigError, InputError, ResumeRefused, UnknownName
from tests.support.adapter_worlds import tiny_decoder
from tests.support.method_worlds import rows, small_method


def test_an_unknown_method_is_named_with_the_known_ones():
    with pytest.raises(UnknownName, match=r"'gpm'.*mh-moe-replay"):
        method_spec("gpm")


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("ewc", {"strength": -1.0}, "strength.*-1.0"),
        ("ewc", {"fisher": "exact"}, "exact"),
        ("ewc", {"decay": 2.0}, "decay.*2.0"),
        ("gem", {"samples": 0}, "samples.*0"),
        ("lwf", {"temperature": 0.0}, "temperature.*0.0"),
        ("replay", {"ratio": 0.0}, "ratio.*0.0"),
        ("replay", {"mode": "before"}, "before"),
        ("inflora", {"energy": 1.5}, "energy.*1.5"),
        ("o-lora", {"orthogonality": float("nan")}, "orthogonality.*nan"),
        ("mh-moe", {"replay_epochs": 0}, "replay_epochs.*0"),
        ("seq-lora", {"lambda": 1.0}, "lambda"),
    ],
)
def test_an_illegal_option_is_refused_with_its_value(name, values, said):
    with pytest.raises(ConfigError, match=said):
        method_spec(name).options(values, "the test")


@pytest.mark.parametrize("name", ["o-lora", "inflora"])
def test_methods_of_pairs_refuse_routed_experts(name):
    experts = method_spec("mh-moe").adapter_options({}, "the test")
    with pytest.raises(ConfigError, match="plain LoRA adapters, got 'mh_moe'"):
        method_spec(name).open(None, experts)


def test_the_state_of_another_method_or_of_other_adapters_is_refused():
    method = small_method("ewc")
    state = method.state(method.prepare(tiny_decoder(num_hidden_layers=1)))
    other = small_method("lwf")
    with pytest.raises(ResumeRefused, match="method 'ewc', not 'lwf'"):
        other.load_state(other.prepare(tiny_decoder(num_hidden_layers=1)), state)
    wider = small_method("ewc", adapter={"rank": 3})
    with pytest.raises(ResumeRefused, match="adapter"):
        wider.load_state(wider.prepare(tiny_decoder(num_hidden_layers=1)), state)


def test_a_missing_or_torn_state_file_is_named(tmp_path):
    with pytest.raises(InputError, match=STATE_FILE):
        read_state(tmp_path)
    method = small_method("seq-lora")
    path = write_state(method.state(method.prepare(tiny_decoder(num_hidden_layers=1))), tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="not the state of a method"):
        read_state(tmp_path)


@pytest.mark.parametrize("name", ["per-task", "moelora"])
def test_methods_that_need_the_task_must_be_told(name):
    method = small_method(name)
    with pytest.raises(InputError, match="told which"):
        method.select(method.prepare(tiny_decoder(num_hidden_layers=1)), None)


def test_a_batch_without_answers_is_refused():
    method = small_method("seq-lora")
    model = method.prepare(tiny_decoder(num_hidden_layers=1))
    batch = rows(0, 0)
    batch["labels"].fill_(-100)
    with pytest.raises(InputError, match="supervised"):
        method.loss(model, batch)


def test_every_method_opens_with_its_defaults_and_is_described():
    for name, spec in METHODS.items():
        assert spec.name == name
        assert spec.summary
        assert spec.open().config == spec.options({}, "defaults")


def test_the_table_of_methods_is_torch_free():
    code = "import sys, recollect.continual.methods.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert torch is not None
