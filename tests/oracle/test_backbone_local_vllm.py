"""vLLM and transformers agree on the same weights. Needs vLLM (its own environment) and minutes; else skipped."""

import numpy as np
import pytest

from recollect.backbones.conformance import check_backbone
from recollect.backbones.protocol import Choice, Message, Request
from recollect.backbones.resolve import open_backbone
from recollect.errors import MissingExtra

TITLES = [
    "Mulan",
    "The Exorcist",
    "Heat",
    "Amélie",
    "Alien",
    "Toy Story",
    "Casablanca",
    "Psycho",
    "Fargo",
    "Babe",
    "Speed",
]


def test_without_vllm_the_error_names_the_extra(smollm2_dir, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(MissingExtra, match=r"recollect\[vllm\]"):
        open_backbone("vllm:smollm2")


@pytest.mark.slow
def test_vllm_agrees_with_transformers_on_fifty_choices(smollm2_dir):
    """Equal in float32; in bfloat16 each engine is up to 0.2 nat from that truth, so only the means are close."""
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    from recollect.backbones.transformers_engine import TransformersBackbone
    from recollect.backbones.vllm_engine import VLLMBackbone

    choices = []
    for i, liked in enumerate(TITLES):
        for j in range(1, 6):
            one, other = TITLES[(i + j) % len(TITLES)], TITLES[(i + 2 * j + 1) % len(TITLES)]
            if one != other:
                ask = f"I enjoyed {liked}. Which film should I watch next, {one} or {other}? Answer with the title."
                choices.append(Choice((Message("user", ask),), (one, other)))
    assert len(choices) >= 50
    truth = log_probs_of(TransformersBackbone(smollm2_dir, dtype="float32").choose(choices))
    backbone = VLLMBackbone(smollm2_dir, max_model_len=2048, dtype="float32")
    try:
        np.testing.assert_allclose(log_probs_of(backbone.choose(choices)), truth, atol=2e-3)
        check_backbone(backbone, tolerance=1e-3, embeds=False)
        schema = '{"type":"object","properties":{"liked":{"type":"boolean"}},"required":["liked"]}'
        answer = backbone.generate([Request(choices[0].messages, max_tokens=30, schema=schema + " ")])[0]
        assert answer.text.replace(" ", "").startswith(('{"liked":true', '{"liked":false'))
    finally:
        backbone.close()
    backbone = VLLMBackbone(smollm2_dir, max_model_len=2048, dtype="bfloat16")
    try:
        seen = log_probs_of(backbone.choose(choices))
    finally:
        backbone.close()
    ours = log_probs_of(TransformersBackbone(smollm2_dir, dtype="bfloat16").choose(choices))
    clear = np.abs(truth[:, 0] - truth[:, 1]) > 0.5
    assert clear.mean() > 0.5
    for engine in (seen, ours):
        assert np.abs(engine - truth).mean() < 0.1
        assert (engine.argmax(1) == truth.argmax(1))[clear].all()


def log_probs_of(answers):
    """(B, 2) float64."""
    return np.array([answer.log_probs for answer in answers])
