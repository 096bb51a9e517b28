"""Every backbone of the package passes the battery that users can run on theirs."""

import dataclasses

import pytest

from recollect.backbones.conformance import ConformanceError, check_backbone
from recollect.backbones.protocol import Chosen
from recollect.backbones.scripted import ScriptedBackbone
from recollect.backbones.transformers_engine import TransformersBackbone


def test_scripted_backbone_conforms():
    check_backbone(ScriptedBackbone())


def test_scripted_backbone_with_delays_conforms():
    backbone = ScriptedBackbone(latency=0.002, concurrency=4)
    check_backbone(backbone)
    assert 1 < backbone.max_in_flight <= 4
    backbone.close()


def test_transformers_backbone_in_float32_conforms(smollm2_dir):
    check_backbone(TransformersBackbone(smollm2_dir, dtype="float32"), tolerance=1e-3)


def test_batch_invariant_transformers_backbone_conforms_without_tolerance(smollm2_dir):
    check_backbone(TransformersBackbone(smollm2_dir, dtype="bfloat16", batch_invariant=True))


class _Reversed(ScriptedBackbone):
    def choose(self, choices):
        return super().choose(choices)[::-1]


class _Unnormalised(ScriptedBackbone):
    def choose(self, choices):
        answers = super().choose(choices)
        return [Chosen(tuple(p - 1 for p in answer.log_probs), answer.prompt_tokens) for answer in answers]


class _Wordy(ScriptedBackbone):
    def generate(self, requests):
        return [dataclasses.replace(answer, completion_tokens=999) for answer in super().generate(requests)]


@pytest.mark.parametrize("broken", [_Reversed, _Unnormalised, _Wordy])
def test_the_battery_fails_on_planted_faults(broken):
    with pytest.raises(ConformanceError, match="broken rule"):
        check_backbone(broken())
