"""New tokens are whole words of the model, begin where the codebooks say, and change nothing it said before."""

import numpy as np
import pytest
import torch
from support.tiny_decoder import write_tiny_decoder

from recollect.errors import ConfigError, InputError
from recollect.rng import stream
from recollect.tokenize.constrained import beam_search, decoder_of
from recollect.tokenize.text_form import texts_of
from recollect.tokenize.trie import PrefixTrie
from recollect.tokenize.vocabulary import STARTS, SemanticVocabulary, add_to
from recollect.types import SemanticIDs

SIZES = (6, 4)
WIDTH = 5


def loaded(folder, *, tied: bool = False, spare_rows: int = 0):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if tied:
        model.config.tie_word_embeddings = True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = type(model)(model.config)
    if spare_rows:
        model.resize_token_embeddings(len(tokenizer) + spare_rows, mean_resizing=False)
    return tokenizer, model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def ids():
    codes = stream(0, "vocabulary codes").integers([6, 4], size=(30, 2)).astype(np.int32)
    return SemanticIDs(np.array([f"i{n}" for n in range(30)], dtype=object), codes, SIZES)


@pytest.fixture(scope="module")
def codebooks():
    draw = stream(0, "vocabulary books")
    return [
        draw.standard_normal((6, WIDTH)).astype(np.float32),
        0.1 * draw.standard_normal((4, WIDTH)).astype(np.float32),
    ]


def head_of(model):
    return model.get_output_embeddings().weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_old_rows_and_old_logits_are_untouched(folder, ids, codebooks, tied, start):
    tokenizer, model = loaded(folder, tied=tied)
    before = model.get_input_embeddings().weight.detach().clone(), head_of(model).detach().clone()
    asked = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.inference_mode():
        said = model(asked).logits
    vocabulary = add_to(tokenizer, model, ids, codebooks, start=start, item_texts=["history items"] * 30)
    assert vocabulary.codebook_sizes == SIZES
    n_old = len(before[0])
    assert len(tokenizer) == n_old + 10 == len(model.get_input_embeddings().weight) == model.config.vocab_size
    assert torch.equal(model.get_input_embeddings().weight[:n_old], before[0])
    assert torch.equal(head_of(model)[:n_old], before[1])
    assert (head_of(model) is model.get_input_embeddings().weight) == tied
    with torch.inference_mode():
        assert torch.allclose(model(asked).logits[..., :n_old], said, atol=1e-6)
        assert model(asked).logits.shape[-1] == n_old + 10


def test_each_token_is_one_id_in_every_company(folder, ids, codebooks):
    tokenizer, model = loaded(folder)
    vocabulary = add_to(tokenizer, model, ids, codebooks)
    for row, text in zip(ids.codes, texts_of(ids.codes), strict=True):
        wanted = [int(vocabulary.token_ids[level][code]) for level, code in enumerate(row)]
        for around in ("{}", "history {} items", "chose{}is", "{0}{0}"):
            found = tokenizer.encode(around.format(text), add_special_tokens=False)
            kept = [token for token in found if token >= len(tokenizer) - 10]
            assert kept == wanted * around.count("{")
        assert tokenizer.decode(wanted, skip_special_tokens=True).replace(" ", "") == text


def test_calling_again_and_reloading_change_nothing(folder, ids, codebooks, tmp_path):
    tokenizer, model = loaded(folder)
    first = add_to(tokenizer, model, ids, codebooks)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():  # as if it had been trained
        model.get_input_embeddings().weight[int(first.token_ids[0][2])] += 1
        weights["model.embed_tokens.weight"][int(first.token_ids[0][2])] += 1
    again = add_to(tokenizer, model, ids, codebooks, seed=5)
    assert [a.tolist() for a in again.token_ids] == [a.tolist() for a in first.token_ids]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    new_tokenizer, new_model = loaded(tmp_path)
    assert SemanticVocabulary.of(new_tokenizer, SIZES).token_ids[1].tolist() == first.token_ids[1].tolist()
    assert all(torch.equal(value, weights[name]) for name, value in new_model.state_dict().items())
    add_to(new_tokenizer, new_model, ids, codebooks)
    assert all(torch.equal(value, weights[name]) for name, value in new_model.state_dict().items())
    asked = torch.tensor([[3, *first.token_ids[0][:3].tolist(), 4]])
    with torch.inference_mode():
        assert torch.equal(new_model(asked).logits, model(asked).logits)


def test_more_levels_later_leave_the_first_ones_alone(folder, ids, codebooks):
    tokenizer, model = loaded(folder)
    add_to(tokenizer, model, ids, codebooks)
    before = model.get_input_embeddings().weight.detach().clone()
    digit = SemanticIDs(ids.item_ids, np.concatenate([ids.codes, np.zeros((30, 1), np.int32)], 1), (6, 4, 3))
    vocabulary = add_to(tokenizer, model, digit, [*codebooks, None])
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[: len(before)], before)
    assert len(rows) == len(before) + 3
    assert vocabulary.token_ids[2].tolist() == list(range(len(before), len(before) + 3))
    assert not torch.equal(rows[-1], rows[-2])


def test_spare_rows_of_the_model_are_used_and_padding_is_kept(folder, ids, codebooks):
    tokenizer, model = loaded(folder, spare_rows=4)
    n_tokens = len(tokenizer)
    old = model.get_input_embeddings().weight.detach().clone()
    vocabulary = add_to(tokenizer, model, ids, codebooks, pad_to_multiple_of=16)
    rows = model.get_input_embeddings().weight
    assert len(rows) % 16 == 0
    assert len(rows) >= n_tokens + 10
    assert vocabulary.token_ids[0][0] == n_tokens
    assert torch.equal(rows[:n_tokens], old[:n_tokens])
    assert not torch.equal(rows[n_tokens : n_tokens + 4], old[n_tokens:])
    assert torch.allclose(rows[n_tokens + 10 :], old[:n_tokens].mean(0).expand(len(rows) - n_tokens - 10, -1))
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    add_to(tokenizer, model, ids, codebooks, pad_to_multiple_of=16)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def wide_model():
    """An embedding of 3,000 rows in 64 dimensions with a covariance far from round, untied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=3000, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    draw = stream(0, "wide model")
    with torch.no_grad():
        for place, matrix in enumerate((model.get_input_embeddings().weight, head_of(model))):
            rows = draw.standard_normal((3000, 64)) * np.geomspace(0.1, 1, 64)[:: 1 - 2 * place] + 0.3 * (place + 1)
            matrix.copy_(torch.from_numpy(rows.astype(np.float32)))
    return model


def test_new_rows_have_the_models_mean_and_spread_and_the_codebooks_geometry(folder):
    tokenizer, _ = loaded(folder)
    model = wide_model()
    sizes = (256, 256)
    draw = stream(1, "geometry")
    books = [
        draw.standard_normal((256, 16)).astype(np.float32) + 5,
        0.01 * draw.standard_normal((256, 16)).astype(np.float32),
    ]
    ids = SemanticIDs(np.array(["i"], dtype=object), np.zeros((1, 2), dtype=np.int32), sizes)
    olds = [model.get_input_embeddings().weight.detach().clone(), head_of(model).detach().clone()]
    # the tokenizer holds fewer tokens than the matrices: all 3,000 rows would be spare, so name them all
    tokenizer.add_tokens([f"word{n}" for n in range(3000 - len(tokenizer))])
    vocabulary = add_to(tokenizer, model, ids, books)
    for old, matrix in zip(olds, (model.get_input_embeddings().weight, head_of(model)), strict=True):
        mean = old.mean(0)
        spread = (old - mean).square().sum(1).mean()
        for level, book in enumerate(books):
            rows = matrix[torch.from_numpy(vocabulary.token_ids[level])].detach()
            assert (rows - mean).square().sum(1).mean() == pytest.approx(float(spread), rel=0.01)
            centred = rows - rows.mean(0)
            wanted = torch.from_numpy(book - book.mean(0))
            ours = torch.pdist(centred)
            theirs = torch.pdist(wanted)
            assert np.corrcoef(ours, theirs)[0, 1] > 0.7
        # variance lies along the model's own axes, not evenly
        found = torch.cat([matrix[torch.from_numpy(one)] for one in vocabulary.token_ids]).detach().var(0)
        assert np.corrcoef(found.log(), old.var(0).log())[0, 1] > 0.9
        # levels are told apart
        first, second = (matrix[torch.from_numpy(one)].detach().mean(0) for one in vocabulary.token_ids)
        assert (first - second).square().sum() > 0.2 * spread


def test_the_least_squares_map_recovers_a_planted_linear_relation(folder):
    tokenizer, _ = loaded(folder)
    model = wide_model()
    words = [f"word{n}" for n in range(3000 - len(tokenizer))]
    tokenizer.add_tokens(words)
    draw = stream(2, "planted")
    books = [draw.standard_normal((8, 6)).astype(np.float32), draw.standard_normal((8, 6)).astype(np.float32)]
    codes = draw.integers(8, size=(400, 2)).astype(np.int32)
    ids = SemanticIDs(np.array([f"i{n}" for n in range(400)], dtype=object), codes, (8, 8))
    plane = draw.standard_normal((6, 64)).astype(np.float32)
    vectors = books[0][codes[:, 0]] + books[1][codes[:, 1]]
    texts = words[:400]
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        where = tokenizer.convert_tokens_to_ids(texts)
        rows[where] = rows.mean(0) + torch.from_numpy((vectors - vectors.mean(0)) @ plane)
    vocabulary = add_to(tokenizer, model, ids, books, start="least-squares", item_texts=texts)
    for level, book in enumerate(books):
        found = rows_of(model, vocabulary, level)
        wanted = (book - book.mean(0)) @ plane
        cosine = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
        assert cosine.min() > 0.99


def rows_of(model, vocabulary, level):
    rows = model.get_input_embeddings().weight[torch.from_numpy(vocabulary.token_ids[level])].detach().numpy()
    return rows - rows.mean(0)


def test_rows_depend_on_the_seed_alone(folder, ids, codebooks):
    def first(seed, global_seed):
        tokenizer, model = loaded(folder)
        torch.manual_seed(global_seed)
        state = torch.random.get_rng_state()
        add_to(tokenizer, model, ids, codebooks, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        return model.get_input_embeddings().weight.detach()

    assert torch.equal(first(0, 1), first(0, 2))
    assert not torch.equal(first(0, 1), first(1, 1))


def test_a_model_with_the_tokens_decodes_items_alone(folder, ids, codebooks):
    tokenizer, model = loaded(folder)
    vocabulary = add_to(tokenizer, model, ids, codebooks)
    assert vocabulary.end_token == tokenizer.eos_token_id
    trie = PrefixTrie(ids.codes, SIZES)
    asked = torch.tensor([tokenizer.encode("history items chose", add_special_tokens=False)])
    beams = beam_search(decoder_of(model, asked), trie, vocabulary, 5)
    assert {tuple(row) for row in beams.codes[0].tolist()} <= {tuple(row) for row in ids.codes.tolist()}


def test_bfloat16_models_keep_their_dtype(folder, ids, codebooks):
    tokenizer, model = loaded(folder)
    model = model.bfloat16()
    old = model.get_input_embeddings().weight.detach().clone()
    add_to(tokenizer, model, ids, codebooks)
    rows = model.get_input_embeddings().weight
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows[: len(old)], old)
    assert torch.isfinite(rows.float()).all()


def test_a_head_tied_by_the_config_alone_is_not_overwritten(folder, ids, codebooks):
    tokenizer, model = loaded(folder)
    model.config.tie_word_embeddings = True
    with pytest.raises(InputError, match="tie_word_embeddings = False"):
        add_to(tokenizer, model, ids, codebooks)


def test_inputs_that_do_not_fit_are_refused(folder, ids, codebooks):
    tokenizer, model = loaded(folder)
    with pytest.raises(InputError, match=r"codebooks have \[6\] rows where the IDs use \[6, 4\]"):
        add_to(tokenizer, model, ids, codebooks[:1])
    with pytest.raises(InputError, match=r"codebooks have \[4, 6\]"):
        add_to(tokenizer, model, ids, codebooks[::-1])
    with pytest.raises(ConfigError, match="start must be one of"):
        add_to(tokenizer, model, ids, codebooks, start="warm")
    with pytest.raises(ConfigError, match="needs item_texts"):
        add_to(tokenizer, model, ids, codebooks, start="least-squares")
    with pytest.raises(ConfigError, match="1 texts for 30 items"):
        add_to(tokenizer, model, ids, codebooks, start="least-squares", item_texts=["a"])
    with pytest.raises(InputError, match="no token '<a_0>'"):
        SemanticVocabulary.of(tokenizer, SIZES)
    assert len(tokenizer) == len(model.get_input_embeddings().weight)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end token"):
        add_to(tokenizer, model, ids, codebooks)


def test_the_embedded_model_learns_the_tokens_and_says_what_it_said(smollm2_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    draw = stream(3, "smollm2")
    sizes = (256, 256, 256)
    codes = draw.integers(256, size=(500, 3)).astype(np.int32)
    ids = SemanticIDs(np.array([f"i{n}" for n in range(500)], dtype=object), codes, sizes)
    books = [draw.standard_normal((256, 32)).astype(np.float32) for _ in sizes]
    chat = [{"role": "user", "content": "Name a film."}]
    template = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(template, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.inference_mode():
        said = model(asked).logits[0, -1]
    vocabulary = add_to(tokenizer, model, ids, books, pad_to_multiple_of=256)
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == template
    assert len(model.get_input_embeddings().weight) == 49_920
    assert head_of(model) is model.get_input_embeddings().weight
    with torch.inference_mode():
        after = model(asked).logits[0, -1]
    assert (after[: len(said)] - said).abs().max() < 1e-4
    for text in texts_of(codes[:50]):
        assert len(tokenizer.encode(f"I watched {text}, then{text}", add_special_tokens=False)) < 13
    trie = PrefixTrie(codes, sizes)
    beams = beam_search(decoder_of(model, asked), trie, vocabulary, 3)
    assert {tuple(row) for row in beams.codes[0].tolist()} <= {tuple(row) for row in codes.tolist()}
