"""Rows joined without padding and answers that leave the batch give the numbers of padded rows and of `generate`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.method_worlds import small_method, tiny_task
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from recollect.continual import greedy
from recollect.continual.diagnostics.watching import watch
from recollect.continual.examples import Example
from recollect.continual.greedy import greedy_answers
from recollect.continual.joined_rows import are_joined, is_rounded, prepare_for_cpu
from recollect.continual.methods.objective import answer_loss, supervised_logits
from recollect.errors import InputError

END, WIDTH = 5, 48
LENGTHS = (30, 17, 5, 41, 9)


def decoder(**more) -> LlamaForCausalLM:
    """A fresh random decoder with grouped keys; its configuration is its own."""
    shape = {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, **more)).eval().requires_grad_(False)
    model.generation_config = GenerationConfig()
    return model


def with_adapters(name: str, scale: float = 0.15):
    """A method on a decoder, every matrix random, so that adapters and routers count."""
    model, method = decoder(), small_method(name, adapter={"dropout": 0.0})
    method.prepare(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model, method


def padded_batch():
    generator = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), WIDTH)
    ids, mask, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    labels = torch.full(shape, -100)
    for row, length in enumerate(LENGTHS):
        ids[row, -length:] = torch.randint(6, 97, (length,), generator=generator)
        mask[row, -length:] = 1
        positions[row, -length:] = torch.arange(length)
        answer = 3 if row else length  # of one row every token is supervised but the first, which nothing predicts
        labels[row, -answer:] = ids[row, -answer:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}


def gradients(model, method, batch):
    model.zero_grad()
    value = method.loss(model, batch)
    value.backward()
    return value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["seq-lora", "loramoe", "mh-moe", "sd-moe", "mixlora"])
def test_joined_rows_have_the_logits_loss_and_gradients_of_padded_rows(name):
    model, method = with_adapters(name)
    batch = padded_batch()
    logits, tokens = supervised_logits(model, batch)
    loss, wanted = gradients(model, method, batch)
    assert not are_joined(model)

    prepare_for_cpu(model, "fp32")
    assert are_joined(model)
    joined, same_tokens = supervised_logits(model, batch)
    joined_loss, found = gradients(model, method, batch)

    assert torch.equal(tokens, same_tokens)
    torch.testing.assert_close(joined, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(joined_loss, loss, rtol=1e-5, atol=1e-5)
    assert wanted.keys() == found.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["seq-lora", "mh-moe"])
def test_greedy_answers_are_those_of_generate_whatever_leaves_the_batch_when(name, monkeypatch):
    monkeypatch.setattr(greedy, "READ_TOKENS", 50)  # several passes over the prompts
    monkeypatch.setattr(greedy, "SPARE", 4)  # the cache grows
    model, _ = with_adapters(name)
    batch, ceiling = padded_batch(), 40
    how = GenerationConfig(max_new_tokens=ceiling, do_sample=False, eos_token_id=END, pad_token_id=0)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    wanted = [row[WIDTH:] for row in model.generate(**inputs, generation_config=how).tolist()]
    wanted = [row[: row.index(END) + 1] if END in row else row for row in wanted]

    prepare_for_cpu(model, "fp32")
    prompts = [row[-length:].tolist() for row, length in zip(batch["input_ids"], LENGTHS, strict=True)]
    found = greedy_answers(model, prompts, ceiling, END)

    assert found == wanted
    assert found == [greedy_answers(model, [prompt], ceiling, END)[0] for prompt in prompts]


def test_answers_of_unequal_length_end_where_alone_they_end(monkeypatch):
    model, _ = with_adapters("seq-lora")
    prepare_for_cpu(model, "fp32")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(6, 97, (length,), generator=generator).tolist() for length in (12, 9, 7, 4, 3, 2)]
    free = greedy_answers(model, prompts, 12, end_id=-1)
    end = free[1][3]  # a token that some of the answers do reach, at different places
    cut = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len({len(row) for row in cut}) > 1
    assert greedy_answers(model, prompts, 12, end) == cut


@pytest.mark.parametrize("name", ["seq-lora", "mh-moe"])
def test_rounded_weights_leave_adapters_and_vocabulary_exact_and_logits_close(name):
    model, method = with_adapters(name, scale=0.02)
    batch = padded_batch()
    exact = supervised_logits(model, batch)[0]
    prepare_for_cpu(model, "bf16")
    rounded = supervised_logits(model, batch)[0]

    assert is_rounded(model)
    assert rounded.dtype == torch.float32
    assert model.get_output_embeddings().weight.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert (rounded - exact).norm() < 0.02 * exact.norm()
    _, found = gradients(model, method, batch)
    assert found
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
def test_the_teacher_of_lwf_is_the_student_bit_for_bit_at_a_tasks_first_step(arithmetic):
    model, method = decoder(), small_method("lwf", adapter={"dropout": 0.3})
    method.prepare(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    prepare_for_cpu(model, arithmetic)
    assert are_joined(model)
    assert is_rounded(model) == (arithmetic == "bf16")
    method.before_task(tiny_task(1), model)
    model.train()
    batch, parameters = padded_batch(), [p for p in model.parameters() if p.requires_grad]
    values, slopes = [], []
    for weigh in (answer_loss, method.loss):
        torch.manual_seed(5)
        values.append(weigh(model, batch))
        slopes.append(torch.autograd.grad(values[-1], parameters))
    assert torch.equal(*values)
    assert all(torch.equal(one, other) for one, other in zip(*slopes, strict=True))
    assert any(bool(slope.any()) for slope in slopes[0])
    parameters[1].data += 0.1
    torch.manual_seed(5)
    taught = method.loss(model, batch)
    torch.manual_seed(5)
    assert taught.item() > answer_loss(model, batch).item()


@pytest.mark.parametrize("name", ["seq-lora", "mh-moe"])
def test_a_pass_without_gradients_has_the_numbers_of_one_with_them(name):
    model, _ = with_adapters(name, scale=0.02)
    prepare_for_cpu(model, "bf16")
    batch = padded_batch()
    with torch.no_grad():
        without = supervised_logits(model, batch)[0]
    assert torch.equal(without, supervised_logits(model, batch)[0])


def test_diagnostics_and_choices_of_rounded_models_are_those_of_their_losses():
    model, _ = with_adapters("mh-moe", scale=0.02)
    prepare_for_cpu(model, "bf16")
    batch = padded_batch()
    rows = [
        Example(row[-length:].numpy(), row[-length:].numpy(), 1)
        for row, length in zip(batch["input_ids"], LENGTHS, strict=True)
    ]
    old = SimpleNamespace(rows=rows, token_row=np.repeat(np.arange(len(rows)), LENGTHS))
    seen = watch(model, old, 0).losses
    labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    wanted = []
    for at in range(len(LENGTHS)):  # one row a time: the loss's own way, rows joined
        one = {key: value[at : at + 1] for key, value in {**batch, "labels": labels}.items()}
        logits, tokens = supervised_logits(model, one)
        wanted.append(torch.nn.functional.cross_entropy(logits, tokens, reduction="none").detach().numpy())
    assert np.allclose(seen[np.isfinite(seen)], np.concatenate(wanted), rtol=2e-3, atol=2e-3)


def test_adapters_that_look_at_rows_and_windows_of_attention_keep_padded_rows():
    model, method = decoder(), small_method("loramoe", adapter={"lbc": 0.1})
    method.prepare(model)
    prepare_for_cpu(model, "fp32")
    assert not are_joined(model)
    model, method = decoder(), small_method("seq-lora")
    model.config.sliding_window = 8
    method.prepare(model)
    prepare_for_cpu(model, "fp32")
    assert not are_joined(model)
    bare = decoder()
    prepare_for_cpu(bare, "bf16")
    assert not are_joined(bare)
    assert not is_rounded(bare)


def test_a_batch_without_supervised_tokens_is_refused():
    model, _ = with_adapters("seq-lora")
    prepare_for_cpu(model, "fp32")
    batch = padded_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(InputError, match="no token of a batch"):
        supervised_logits(model, batch)
