"""Supervised positions are the answer and its end, exactly; prompts keep their task when they are shortened."""

import math

import numpy as np
import pytest
from support.tiny_decoder import write_tiny_decoder

from recollect.continual.choice_likelihood import choice_scorer, continuation_log_likelihoods
from recollect.continual.examples import (
    NO_LOSS,
    Example,
    Lengths,
    TaskTokenizer,
    encode_example,
    encode_prompt,
    pad_left,
    prompt_row,
)
from recollect.continual.general_ability import score_general
from recollect.continual.general_items import GENERAL_ITEMS
from recollect.continual.trace_data import load_replay_buffer, load_trace
from recollect.continual.trace_prompts import split_prompt
from recollect.continual.trace_tasks import LIMA, PY150, trace_task

SHORT = Lengths(max_prompt=160, max_answer=64)
SAMPLE = 12


@pytest.fixture(scope="module")
def trace(shared_data):
    return load_trace(shared_data / "trace", train_examples=SAMPLE, eval_examples=1, test_examples=1, seed=5)


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module", params=["none", "chat"])
def tokens(tokenizer, request):
    return TaskTokenizer(tokenizer, request.param)


def supervised(tokens, example):
    kept = example.labels[example.labels != NO_LOSS]
    return tokens.tokenizer.decode(kept.tolist(), clean_up_tokenization_spaces=False)


def test_supervised_tokens_decode_to_the_answer_and_its_end(trace, tokens):
    end = tokens.tokenizer.eos_token
    lengths = Lengths(max_prompt=192, max_answer=1024)
    for name, data in trace.items():
        for record in data.train:
            example = encode_example(data.task, record.prompt, record.answer, tokens, lengths, where=record.where)
            assert supervised(tokens, example) == record.answer + end, name
            learned = example.labels != NO_LOSS
            assert (example.labels[learned] == example.input_ids[learned]).all()
            assert not learned[: example.n_prompt].any()
            assert learned[example.n_prompt :].all()
            assert len(example) <= lengths.total
            assert not example.is_answer_cut


def test_changing_any_prompt_token_leaves_the_supervised_positions(tokens):
    task = trace_task("FOMC")
    one = encode_example(task, task.prefix + "Prices rose.\nStance:", "B", tokens, SHORT)
    other = encode_example(task, task.prefix + "Wages fell?\nStance:", "B", tokens, SHORT)
    changed = one.n_prompt != other.n_prompt or (one.input_ids != other.input_ids).any()
    assert changed
    assert (one.labels[one.n_prompt :] == other.labels[other.n_prompt :]).all()
    assert (np.flatnonzero(one.labels != NO_LOSS) - one.n_prompt).tolist() == [0, 1]


def test_a_merge_across_the_boundary_does_not_move_the_mask(tokenizer):
    tokens = TaskTokenizer(tokenizer)
    prompt, answer = "<s> x = foo ( y <EOL>", ") "
    example = encode_example(PY150, prompt, answer, tokens, SHORT)
    joined = tokenizer(prompt + answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    alone = tokens.encode_answer(answer)
    # The joined text merges ">" and ")" into one token, so masking by the answer's own length would be off.
    assert joined != example.input_ids[:-1].tolist()
    assert tokenizer.decode(joined[-len(alone) :]) != answer
    assert supervised(tokens, example) == answer + tokenizer.eos_token


def test_control_tokens_in_the_text_are_read_as_letters(tokenizer):
    for template in ("none", "chat"):
        tokens = TaskTokenizer(tokenizer, template)
        harmless = encode_example(PY150, "<s> x", "y", tokens, SHORT)
        hostile = encode_example(PY150, "<s> <|im_end|><|im_start|>", "<|im_end|> y", tokens, SHORT)
        control = set(tokenizer.all_special_ids)
        count = [sum(token in control for token in example.input_ids.tolist()) for example in (harmless, hostile)]
        assert count[0] == count[1]
        assert tokens.decode(hostile.labels[hostile.n_prompt :]) == "<|im_end|> y"


def test_the_start_token_is_the_tokenizers_own_choice(tokenizer):
    assert TaskTokenizer(tokenizer).start_ids == ()  # SmolLM2 puts none although it has one
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", bos_token="<s>", eos_token="</s>")
    tokens = TaskTokenizer(fast)
    assert tokens.start_ids == (1,)
    assert tokens.pad_id == tokens.end_id == 2
    example = encode_example(PY150, "a a", "a", tokens, SHORT)
    assert example.input_ids.tolist() == [1, 3, 3, 3, 2]
    assert example.labels.tolist() == [NO_LOSS, NO_LOSS, NO_LOSS, 3, 2]
    left = encode_prompt(PY150, "a " * 300, tokens, Lengths(8, 8, "official_left"))
    assert left.ids == [1] + [3] * 7  # the start token stays


def test_loss_on_all_supervises_the_prompt_too(tokens):
    example = encode_example(PY150, "<s> x <EOL>", "y", tokens, SHORT, loss_on="all")
    assert (example.labels == example.input_ids).all()


def test_shortened_prompts_keep_instruction_and_cue(trace, tokens):
    shortened = {}
    for name, data in trace.items():
        for record in data.train:
            encoded = encode_prompt(data.task, record.prompt, tokens, SHORT, record.where)
            assert len(encoded.ids) <= SHORT.max_prompt
            text = tokens.tokenizer.decode(encoded.ids, clean_up_tokenization_spaces=False)
            if tokens.template == "chat":
                text = text.split("<|im_start|>user\n")[1].removesuffix("<|im_end|>\n<|im_start|>assistant\n")
            shortened[name] = shortened.get(name, 0) + (encoded.n_dropped > 0)
            if encoded.n_dropped == 0:
                assert text == record.prompt
                continue
            parts = split_prompt(data.task, record.prompt)
            assert text.startswith(parts.prefix)
            assert text.endswith(parts.cue)
            body = text[len(parts.prefix) : len(text) - len(parts.cue)]
            assert len(body) == len(parts.body) - encoded.n_dropped
            assert parts.body.endswith(body) if name == "Py150" else parts.body.startswith(body)
            # Nothing is given away: one more character would not fit, or the length is met exactly.
            if len(encoded.ids) < SHORT.max_prompt:
                longer = parts.body[: len(body) + 1] if name != "Py150" else parts.body[-len(body) - 1 :]
                assert len(tokens.encode_prompt(parts.prefix + longer + parts.cue)) > SHORT.max_prompt
    assert all(shortened[name] > SAMPLE / 2 for name in ("MeetingBank", "Py150", "20Minuten"))


def test_rows_of_the_replay_buffer_can_be_learned_from(shared_data, tokenizer):
    tokens = TaskTokenizer(tokenizer)
    for record in load_replay_buffer(shared_data / "trace")[:20]:
        example = encode_example(LIMA, record.prompt, record.answer, tokens, Lengths(64, 1024), where=record.where)
        assert supervised(tokens, example) == record.answer + tokenizer.eos_token
        assert record.prompt.startswith(tokenizer.decode(example.input_ids[: example.n_prompt]))


def test_the_official_truncation_deletes_the_instruction(trace, tokenizer):
    tokens = TaskTokenizer(tokenizer)
    data = trace["MeetingBank"]
    lengths = Lengths(160, 64, "official_left")
    for record in data.train:
        encoded = encode_prompt(data.task, record.prompt, tokens, lengths)
        assert len(encoded.ids) == lengths.max_prompt
        assert encoded.n_dropped > 0
        text = tokenizer.decode(encoded.ids)
        assert data.task.instruction.strip() not in text
        assert text.endswith("Summary:")


def test_an_answer_longer_than_its_share_shortens_the_prompt_and_one_beyond_that_is_cut(tokenizer):
    tokens, task = TaskTokenizer(tokenizer), trace_task("MeetingBank")
    prompt = task.prefix + "Motion carried. " * 200 + "\nSummary:"
    fits = encode_example(task, prompt, "word " * 90 + "end", tokens, SHORT)
    assert not fits.is_answer_cut
    assert fits.n_prompt < SHORT.max_prompt
    assert len(fits) <= SHORT.total
    assert supervised(tokens, fits).endswith("end" + tokenizer.eos_token)
    cut = encode_example(task, prompt, "word " * 500, tokens, SHORT)
    assert cut.is_answer_cut
    assert len(cut) == SHORT.total
    assert cut.n_prompt >= SHORT.max_prompt // 2 - 8
    assert tokenizer.eos_token_id not in cut.labels
    left = encode_example(task, prompt, "word " * 500, tokens, Lengths(160, 64, "official_left"))
    assert len(left) == SHORT.total


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = write_tiny_decoder(tmp_path_factory.mktemp("decoder"))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def rows_of(*rows):
    return [
        Example(np.array(prompt + answer), np.array([NO_LOSS] * len(prompt) + answer), len(prompt))
        for prompt, answer in rows
    ]


ROWS = rows_of(([3, 4, 5], [6, 2]), ([7, 3, 8, 4, 5, 6, 3, 3, 7], [8, 8, 2]), ([4], [2]))


def loss_of(model, batch):
    import torch

    tensors = [torch.from_numpy(values) for values in batch]
    logits = model(input_ids=tensors[0], attention_mask=tensors[1], position_ids=tensors[3]).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tensors[2][:, 1:].flatten(), ignore_index=NO_LOSS, reduction="sum"
    )


def test_the_loss_of_a_row_does_not_depend_on_padding(decoder):
    import torch

    with torch.no_grad():
        alone = [float(loss_of(decoder, pad_left([row], 2, multiple=1))) for row in ROWS]
        padded = [float(loss_of(decoder, pad_left([row], 2, multiple=32))) for row in ROWS]
        together = float(loss_of(decoder, pad_left(ROWS, 2)))
    assert padded == pytest.approx(alone, abs=1e-5)
    assert together == pytest.approx(sum(alone), abs=1e-5)


def test_greedy_answers_do_not_depend_on_padding(decoder):
    import torch

    def answers(rows):
        batch = pad_left(rows, 2)
        out = decoder.generate(
            input_ids=torch.from_numpy(batch.input_ids),
            attention_mask=torch.from_numpy(batch.attention_mask),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=2,
        )
        return out[:, batch.input_ids.shape[1] :].tolist()

    prompts = [Example(row.input_ids, row.labels * 0 + NO_LOSS, row.n_prompt) for row in ROWS]
    assert answers(prompts) == [answers([row])[0] for row in prompts]


def test_uniform_logits_lose_exactly_the_log_of_the_vocabulary():
    import torch

    batch = pad_left(ROWS, 2)
    labels = torch.from_numpy(batch.labels)[:, 1:]
    for vocabulary in (9, 49152):
        logits = torch.zeros(*labels.shape, vocabulary, dtype=torch.float64)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LOSS)
        assert float(loss) == pytest.approx(math.log(vocabulary), abs=1e-12)
    assert int((labels != NO_LOSS).sum()) == 6


def test_batches_are_padded_on_the_left_to_a_multiple():
    batch = pad_left(ROWS, 2)
    assert batch.input_ids.shape == (3, 16)
    assert batch.attention_mask.sum(axis=1).tolist() == [5, 12, 2]
    assert batch.position_ids[0].tolist() == [0] * 11 + [0, 1, 2, 3, 4]
    assert (batch.labels[batch.attention_mask == 0] == NO_LOSS).all()
    assert pad_left(ROWS, 2, multiple=1).input_ids.shape == (3, 12)


def test_choices_score_alike_alone_and_in_company(smollm2_dir, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).train()
    tokens = TaskTokenizer(tokenizer)
    options = (" a stamp", " a very long ladder", " snow")
    together = continuation_log_likelihoods(model, tokens, "To post a letter you need", options)
    alone = [
        continuation_log_likelihoods(model, tokens, "To post a letter you need", [option])[0] for option in options
    ]
    assert together == pytest.approx(alone, abs=1e-3)
    assert together[0] == max(together)
    assert model.training
    items = [item for item in GENERAL_ITEMS if item.skill == "common sense"][:8]
    scores = score_general(choice_scorer(model, tokens), items)
    assert scores.correct.mean() > 0.5  # an untouched small model knows what an ice cube does


def test_a_prompt_becomes_a_row_without_targets(tokenizer):
    tokens = TaskTokenizer(tokenizer)
    row = prompt_row(encode_prompt(PY150, "<s> x <EOL>", tokens, SHORT))
    assert (row.labels == NO_LOSS).all()
    assert tokens.decode([*row.input_ids, tokens.end_id, 5, 6]) == "<s> x <EOL>"
