"""The LLM recommender: what it reads, what its scores may depend on, what its files hold."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from support.tiny_decoder import patterned_log, write_tiny_decoder

from recollect.data.examples import training_sequences
from recollect.data.splits import leave_one_out
from recollect.errors import ConfigError, InputError, ModelFileError, ResumeRefused
from recollect.io import read_json
from recollect.recommenders.llm_batches import (
    LlmBatch,
    LlmTrainingBatches,
    left_padded,
    prefixes_of,
    reading_batches,
    windows_of,
)
from recollect.recommenders.llm_module import load_trunk, semantic_head
from recollect.recommenders.llm_sequential import LlmConfig, LlmSequential
from recollect.rng import stream

LOG = patterned_log()
EMBEDDING = stream(0, "item vectors").normal(size=(LOG.n_items, 8)).astype(np.float32)
HISTORIES = [np.array(items) for items in ([3], [1, 4, 7, 10, 13], [2, 2], [5, 9, 1, 0, 4, 8, 20, 21])]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_tiny_decoder(tmp_path_factory.mktemp("decoder"))


def built(decoder, dataset=LOG, embedding=EMBEDDING, **options) -> LlmSequential:
    config = LlmConfig(**{"base": str(decoder), "keep_layers": 2, "precision": "fp32", "max_length": 8} | options)
    model = LlmSequential(config).build(dataset, embedding)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # adapters start at zero: give them an effect
        for name, tensor in model.module.named_parameters():
            if "lora_B" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize("supervision", ["last", "dense"])
def test_scores_depend_on_no_other_case_no_padding_and_no_order(decoder, supervision):
    model = built(decoder, supervision=supervision)
    together = model.score(HISTORIES)
    assert together.shape == (4, LOG.n_items)
    assert together.dtype == np.float32
    alone = np.concatenate([model.score([history]) for history in HISTORIES])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_allclose(together[::-1], model.score(HISTORIES[::-1]), atol=1e-4)
    items, real = left_padded([*HISTORIES, np.arange(8)])
    wide = LlmBatch(
        torch.cat([torch.zeros(5, 7, dtype=torch.int64), items], 1),
        torch.cat([torch.zeros(5, 7, dtype=torch.bool), real], 1),
        None,
        None,
        None,
    )
    with torch.no_grad():
        np.testing.assert_allclose(together, model.module.logits(wide)[:4].numpy(), atol=1e-4)


@pytest.mark.parametrize("supervision", ["last", "dense"])
def test_sharing_the_instruction_equals_reading_it_with_every_row(decoder, supervision):
    model = built(decoder, supervision=supervision)
    module = model.module
    history = torch.from_numpy(HISTORIES[1])[None]
    parts = [module.instruction[None], module.item_inputs(history)]
    if supervision == "last":
        parts.append(module.marker[None])
    with torch.no_grad():
        plain = module.decoder(inputs_embeds=torch.cat(parts, 1), use_cache=False).last_hidden_state[0, -1]
    np.testing.assert_allclose(model.user_states(HISTORIES[1:2])[0].numpy(), plain.numpy(), atol=1e-4)


def test_a_dense_pass_gives_every_prefix_the_state_it_has_alone(decoder):
    model = built(decoder)
    history = HISTORIES[3]
    items, real = left_padded([HISTORIES[1], history])
    batch = LlmBatch(items, real, torch.arange(8, 16), None, None)
    with torch.no_grad():
        dense = model.module.states(batch).numpy()
    prefixes = model.user_states([history[:length] for length in range(1, 9)]).numpy()
    np.testing.assert_allclose(dense, prefixes, atol=1e-4)


def test_an_empty_history_is_answered_from_the_instruction(decoder):
    for supervision in ("last", "dense"):
        model = built(decoder, supervision=supervision)
        empty = np.array([], dtype=np.int64)
        mixed = model.score([HISTORIES[1], empty])
        assert np.isfinite(mixed).all()
        np.testing.assert_allclose(mixed[1:], model.score([empty]), atol=1e-4)


def test_gradients_reach_the_adapters_through_the_shared_instruction(decoder):
    model = built(decoder)
    batch = LlmTrainingBatches(training_sequences(LOG), supervision="dense", max_length=8, batch_size=4, seed=0)(0)[0]
    model.module.logits(batch).logsumexp(1).mean().backward()
    trained = {name for name, tensor in model.module.named_parameters() if tensor.grad is not None}
    assert {name.partition(".")[0] for name in trained} == {"trunk", "project_in", "head"}
    assert all("lora_" in name for name in trained if name.startswith("trunk"))
    assert model.module.embedding.grad is None


def test_keeping_blocks_is_the_whole_decoder_stopped_early(decoder):
    from transformers import AutoModel

    whole = AutoModel.from_pretrained(decoder).eval()
    whole.layers = whole.layers[:2]
    cut, kept = load_trunk(decoder, 2)
    inputs = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(inputs_embeds=inputs, use_cache=False).last_hidden_state
        found = cut(inputs_embeds=inputs, use_cache=False).last_hidden_state
    assert kept == 2
    assert len(cut.layers) == 2
    torch.testing.assert_close(found, expected)
    with pytest.raises(ConfigError, match=r"keep_layers must be in 1\.\.3"):
        load_trunk(decoder, 4)


def test_permuted_item_ids_permute_the_scores(decoder):
    order = stream(1, "permutation").permutation(LOG.n_items)  # new id -> old id
    new_of = np.argsort(order)
    model, permuted = built(decoder), built(decoder, embedding=EMBEDDING[order])
    with torch.no_grad():
        permuted.module.project_in.weight.copy_(model.module.project_in.weight)
        permuted.module.head.weight.copy_(model.module.head.weight[torch.from_numpy(order)])
    expected = model.score(HISTORIES)[:, order]
    np.testing.assert_allclose(permuted.score([new_of[history] for history in HISTORIES]), expected, atol=1e-5)


def test_the_columns_are_the_items_and_candidates_pick_among_them(decoder):
    model = built(decoder)
    candidates = np.array([[0, 5], [29, 1], [3, 3], [7, 2]])
    expected = np.take_along_axis(model.score(HISTORIES), candidates, 1)
    np.testing.assert_array_equal(model.score(HISTORIES, candidates), expected)
    with pytest.raises(InputError, match="holds item 30"):
        model.score([np.array([1, 30])])


def test_item_vectors_enter_at_the_size_of_words(decoder):
    model = built(decoder, embedding=EMBEDDING * 1e-3)
    words = model.module.decoder.get_input_embeddings().weight
    size = model.module.item_inputs(torch.arange(LOG.n_items)).detach().square().mean().sqrt()
    assert float(size) == pytest.approx(float(words.square().mean().sqrt()), rel=1e-3)


def test_the_semantic_output_layer_follows_text_similarity():
    text = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    head = semantic_head(text, 512, torch.Generator().manual_seed(1))
    centred = text - text.mean(0)
    found, expected = (x @ x.T for x in (head, centred))
    assert float(torch.corrcoef(torch.stack([found.ravel(), expected.ravel()]))[0, 1]) > 0.9


@pytest.mark.parametrize("supervision", ["last", "dense"])
def test_every_sample_is_read_once_with_its_own_prefix(supervision):
    sequences = training_sequences(patterned_log(length=14, seed=3))
    wanted = stream(5, "wanted").random(len(sequences.items)) < 0.6
    wanted[sequences.starts[:-1]] = False
    seen = []
    for batch in reading_batches(sequences, wanted, supervision=supervision, max_length=6, batch_size=5):
        seen.append(batch.position)
        cells = batch.items.ravel()[batch.flat] if batch.flat is not None else batch.items[:, -1]
        np.testing.assert_array_equal(cells.numpy(), sequences.items[batch.position - 1])
        np.testing.assert_array_equal(batch.targets.numpy(), sequences.items[batch.position])
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.flatnonzero(wanted))


@pytest.mark.parametrize("supervision", ["last", "dense"])
def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own(supervision):
    sequences = training_sequences(patterned_log(length=14, seed=3))
    batches = LlmTrainingBatches(sequences, supervision=supervision, max_length=6, batch_size=5, seed=0)
    orders = [
        np.concatenate([batch.position for batch in (batches(epoch)[i] for i in range(len(batches(epoch))))])
        for epoch in (0, 1)
    ]
    everything = np.setdiff1d(np.arange(len(sequences.items)), sequences.starts[:-1])
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), everything)
    assert not np.array_equal(*orders)


def test_overlapping_windows_show_at_least_half_a_window():
    sequences = training_sequences(patterned_log(length=30, seed=4))
    windows = windows_of(sequences, 8, 4)
    for begin, scored, end in zip(*windows, strict=True):
        start = sequences.starts[np.searchsorted(sequences.starts, begin, side="right") - 1]
        assert end - begin <= 8
        assert scored - begin >= 4 or begin == start
    assert len(prefixes_of(sequences, 8).end) == int((windows.end - windows.scored).sum())


def test_fitting_learns_the_pattern_and_a_saved_model_scores_identically(decoder, tmp_path):
    split = leave_one_out(LOG)
    config = LlmConfig(base=str(decoder), keep_layers=1, precision="fp32", epochs=4, learning_rate=1e-2, batch_size=8)
    model = LlmSequential(config, item_embedding=EMBEDDING).fit(LOG, split)
    losses = [row["loss"] for row in model.result.history]
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "model")
    adapter = read_json(tmp_path / "model" / "adapter" / "adapter_config.json")
    assert adapter["peft_type"] == "LORA"
    assert adapter["base_model_name_or_path"] == str(decoder)
    loaded = LlmSequential.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(loaded.score(HISTORIES), model.score(HISTORIES))
    again = LlmSequential(config, item_embedding=EMBEDDING).fit(LOG, split)
    np.testing.assert_array_equal(again.score(HISTORIES), model.score(HISTORIES))


def test_a_checkpoint_of_another_log_or_other_item_vectors_is_refused(decoder, tmp_path):
    config = LlmConfig(base=str(decoder), keep_layers=1, precision="fp32", epochs=1, batch_size=8)
    LlmSequential(config, item_embedding=EMBEDDING).fit(LOG, leave_one_out(LOG), folder=tmp_path)
    with pytest.raises(ResumeRefused, match="frozen_inputs"):
        LlmSequential(config, item_embedding=EMBEDDING + 1).fit(LOG, leave_one_out(LOG), folder=tmp_path)
    with pytest.raises(ResumeRefused, match="rows"):
        LlmSequential(config, item_embedding=EMBEDDING).fit(LOG, folder=tmp_path)


def test_an_adapter_of_another_base_is_refused(decoder, tmp_path):
    built(decoder).save_pretrained(tmp_path / "model")
    other = write_tiny_decoder(tmp_path / "other", seed=7)
    with pytest.raises(ModelFileError, match="was trained on the base"):
        LlmSequential.from_pretrained(tmp_path / "model", base=str(other))
    built(other).save_pretrained(tmp_path / "second")
    shutil.copytree(tmp_path / "second" / "adapter", tmp_path / "model" / "adapter", dirs_exist_ok=True)
    with pytest.raises(ModelFileError, match=r"adapter of .* where a LoRA adapter of"):
        LlmSequential.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ModelFileError, match="is missing or is not what"):
        LlmSequential.from_pretrained(tmp_path / "model")


def test_wrong_layers_and_item_vectors_are_named(decoder):
    with pytest.raises(ConfigError, match=r"linear layers are: .*gate_proj"):
        built(decoder, lora_targets=("c_attn",))
    with pytest.raises(InputError, match="has 30 items"):
        LlmSequential(LlmConfig(base=str(decoder))).build(LOG, EMBEDDING[:-1])
    with pytest.raises(InputError, match="not fitted"):
        LlmSequential(LlmConfig(base=str(decoder))).score(HISTORIES)


def test_the_embedded_model_reads_item_vectors(smollm2_dir, tmp_path):
    model = LlmSequential(LlmConfig(keep_layers=1, precision="fp32")).build(LOG, EMBEDDING)
    assert len(model.module.decoder.layers) == 1
    together = model.score(HISTORIES)
    np.testing.assert_allclose(together, np.concatenate([model.score([one]) for one in HISTORIES]), atol=1e-4)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["base"]["name"] == "smollm2"
