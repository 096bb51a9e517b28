"""SAPT: attention over tasks, frozen blocks, the same weights in training and testing, attention that is kept."""

from __future__ import annotations

import pytest
import torch

from recollect.continual.adapters.attach import adapters, attach, detach
from recollect.continual.adapters.config import PlainLoraConfig, SAPTAdapterConfig
from recollect.continual.choice_likelihood import continuation_log_likelihoods
from recollect.continual.methods.banks import banks
from recollect.continual.methods.driving import learn_task
from recollect.continual.methods.objective import answer_loss, model_inputs
from recollect.continual.methods.sapt import attention_of, prompt_mask
from recollect.errors import ConfigError, InputError
from tests.support.adapter_worlds import randomize, tiny_decoder, tokens
from tests.support.method_worlds import LOOP, rows, same, small_method, tiny_task


def learned(n_tasks, values=None, after=None):
    method = small_method("sapt", values, adapter={"query_width": 8})
    model = method.prepare(tiny_decoder(num_hidden_layers=1))
    for index in range(n_tasks):
        learn_task(method, model, tiny_task(index), LOOP)
        if after is not None:
            after(index, model)
    return method, model


def test_weights_are_a_distribution_over_the_tasks_learnt():
    _, model = learned(3)
    model(**model_inputs(rows(0, 0)))
    found = attention_of(model)()
    assert found.shape == (3, 3)
    assert (found > 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(3))


def test_one_task_is_plain_lora_bit_for_bit():
    _, model = learned(1)
    plain = small_method("seq-lora")
    other = plain.prepare(tiny_decoder(num_hidden_layers=1))
    learn_task(plain, other, tiny_task(0), LOOP)
    for name, bank in banks(model).items():
        assert same(dict(bank.state_dict()), dict(banks(other)[name].state_dict()))
    inputs = model_inputs(rows(0, 5))
    assert torch.equal(model(**inputs).logits, other(**inputs).logits)


def test_earlier_blocks_and_keys_are_bit_identical_after_later_tasks():
    kept: list = []

    def note(index, model):
        attention = attention_of(model)
        kept.append(
            {f"{name}/{part}": tensor.clone() for name, bank in banks(model).items()
             for part, tensor in bank.state_dict().items()}
            | {f"key/{number}": key.detach().clone() for number, key in enumerate(attention.keys)}
        )  # fmt: skip

    _, model = learned(3, after=note)
    for index in (0, 1):
        assert same(kept[index], {name: kept[2][name] for name in kept[index]})
    assert any(bank.lora_B[2].abs().max() > 0 for bank in banks(model).values())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trained if "keys" in name or "lora" in name} == {"2"}


def test_output_is_the_attention_weighted_sum_of_the_blocks():
    _, model = learned(2)
    randomize(model)
    inputs = model_inputs(rows(0, 0))
    name = "model.layers.0.mlp.gate_proj"
    module, seen = adapters(model)[name], {}
    module.register_forward_hook(lambda own, args, output: seen.update(x=args[0], y=output))
    with torch.no_grad():
        model(**inputs)
    weights, x = attention_of(model)(), seen["x"]
    blocks = [x @ module.bank.lora_A[i][0, 0].t() @ module.bank.lora_B[i][0, 0] for i in range(2)]
    expected = module.base(x) + module.scaling * torch.einsum("bi,ibto->bto", weights, torch.stack(blocks))
    assert (weights[0] - weights[1]).abs().max() > 1e-4
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-5)


def test_weights_in_training_are_those_of_the_prompt_alone():
    method, model = learned(2)
    batch = rows(1, 3)
    method.before_task(tiny_task(1), model)
    method.loss(model, batch)
    trained = attention_of(model)().detach()
    for row in range(3):
        mask = prompt_mask(model, batch)[row].bool()
        prompt = batch["input_ids"][row][mask][None]
        model(input_ids=prompt)
        torch.testing.assert_close(attention_of(model)()[0], trained[row])
    model(**model_inputs(batch))  # the answer read as a part of the prompt gives others
    assert (attention_of(model)().detach() - trained).abs().max() > 1e-4


def test_options_are_scored_with_the_weights_of_their_question():
    _, model = learned(2)
    randomize(model)
    words = PlainWords()
    question, options = "a b c d", ("e", "f g h i j k")
    model(input_ids=torch.tensor([words.encode_prompt(question)]))
    expected = attention_of(model)()[0].detach()
    continuation_log_likelihoods(model, words, question, options)
    for found in attention_of(model)():
        torch.testing.assert_close(found, expected)
    assert (expected - expected.mean()).abs().max() > 1e-4


class PlainWords:
    """A token per letter."""

    pad_id = 0

    def encode_prompt(self, text):
        return [ord(letter) - 96 for letter in text.replace(" ", "")]

    encode_answer = encode_prompt


def test_an_answer_is_generated_with_the_weights_of_its_prompt():
    _, model = learned(2)
    randomize(model)
    attention = attention_of(model)
    prompt = tokens(2, 5)
    generated = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    at_prompt = torch.cat([torch.ones_like(prompt), torch.zeros(2, 6, dtype=torch.long)], dim=1)
    with torch.no_grad(), attention.prompts(at_prompt):
        logits = model(input_ids=generated, use_cache=False).logits
    assert torch.equal(logits[:, 4:-1].argmax(-1), generated[:, 5:])


def test_padding_changes_no_weight():
    _, model = learned(2)
    prompt = tokens(1, 5)
    model(input_ids=prompt)
    alone = attention_of(model)().detach()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    model(input_ids=padded, attention_mask=(padded != 0).long())
    torch.testing.assert_close(attention_of(model)(), alone)


def test_kept_attention_costs_exactly_nothing_at_the_first_step_of_a_task():
    method, model = learned(2)
    method.before_task(tiny_task(2), model)
    loss = method.attention_loss(model)
    attention = attention_of(model)
    gradients = torch.autograd.grad(loss, [attention.query, attention.keys[2]])
    assert loss.item() == 0.0
    assert not any(bool(gradient.any()) for gradient in gradients)
    batch = rows(2, 0)
    with attention.prompts(prompt_mask(model, batch)):
        assert torch.equal(method.loss(model, batch), answer_loss(model, batch))
    attention.query.data += 0.1 * torch.randn(attention.query.shape, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.kl_div(
        attention.logits(method.pseudo).log_softmax(-1), method.kept.softmax(-1), reduction="batchmean"
    )
    assert expected > 0.01
    torch.testing.assert_close(method.attention_loss(model), expected)


def test_the_term_holds_the_attention_of_old_prompts_where_training_would_move_it():
    moved = {}
    for strength in (0.0, 30.0):
        method, model = learned(2, {"attention": strength})
        learn_task(method, model, tiny_task(2, epochs=8, steps=3), LOOP)
        # the pseudo-samples and the start of task 2 once more, from the same statistics
        again, start = learned(2, {"attention": strength})
        again.before_task(tiny_task(2), start)
        after = attention_of(model).logits(again.pseudo).softmax(-1)
        moved[strength] = (after - again.kept.softmax(-1)).abs().sum(1).mean().item()
    assert moved[0.0] > 0.01
    assert moved[30.0] < 0.3 * moved[0.0]


def test_a_new_key_is_looked_at_by_its_own_tasks_prompts():
    method, model = learned(2)
    method.before_task(tiny_task(2), model)
    attention = attention_of(model)
    own = rows(2, 7)
    own_share = attention.logits(attention.pooled(own["input_ids"], prompt_mask(model, own))).softmax(-1)[:, 2].mean()
    old_share = method.kept.softmax(-1)[:, 2].mean()
    assert own_share > 2 * old_share


def test_pseudo_samples_have_the_moments_of_the_old_prompts():
    method, model = learned(1, {"pseudo_samples": 4000})
    method.before_task(tiny_task(1), model)
    pooled = torch.cat(
        [
            attention_of(model).pooled(rows(0, number)["input_ids"], prompt_mask(model, rows(0, number)))
            for number in (0, 1)
        ]
    )
    deviation = pooled.std(0, correction=0)
    assert ((method.pseudo.mean(0) - pooled.mean(0)).abs() < 5 * deviation / 4000**0.5 + 1e-6).all()
    torch.testing.assert_close(method.pseudo.std(0), deviation, rtol=0.1, atol=1e-4)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="needs adapters 'sapt', got 'lora'"):
        type(small_method("sapt"))(small_method("sapt").options, PlainLoraConfig())
    with pytest.raises(ConfigError, match=r"SAPT has no routers: balance must be 0\.0, got 0\.1"):
        SAPTAdapterConfig(balance=0.1)
    with pytest.raises(ConfigError, match="experts 1"):
        SAPTAdapterConfig(experts=2)
    with pytest.raises(ConfigError, match="pseudo_samples must be at least 1, got 0"):
        small_method("sapt", {"pseudo_samples": 0})
    method, model = learned(1)
    batch = rows(0, 0)
    with pytest.raises(InputError, match="a row has none"):
        method.loss(model, {**batch, "labels": batch["input_ids"]})
    linear = adapters(attach(tiny_decoder(), SAPTAdapterConfig()))["model.layers.0.mlp.up_proj"]
    with pytest.raises(InputError, match="no prompt was read"):
        linear(torch.zeros(1, 2, 32))


def test_taking_the_adapters_off_leaves_the_bare_model():
    model = tiny_decoder()
    before = [name for name, _ in model.named_modules()]
    logits = model(input_ids=tokens()).logits
    randomize(attach(model, SAPTAdapterConfig()))
    assert not torch.equal(model(input_ids=tokens()).logits, logits)
    detach(model)
    assert [name for name, _ in model.named_modules()] == before
    assert torch.equal(model(input_ids=tokens()).logits, logits)


def test_a_model_without_input_embedding_is_refused_and_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match="Sequential has no input embedding"):
        attach(model, SAPTAdapterConfig(target_modules=("0",)))
    assert [name for name, _ in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
