"""The mask and the search against transformers' own constrained beam search, on models of random weights."""

import numpy as np
import pytest
import torch

from recollect.rng import stream
from recollect.tokenize.constrained import TrieLogitsProcessor, beam_search, decoder_of, ranked_items
from recollect.tokenize.trie import PrefixTrie
from recollect.tokenize.vocabulary import SemanticVocabulary

SIZES = (6, 5, 7)
END, PAD = 2, 0
N_VOCABULARY = 40
NO_BEAM = -1e8  # transformers gives -1e9 to beams that do not exist


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=N_VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=PAD, eos_token_id=END, bos_token_id=1,
        initializer_range=0.6,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=N_VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=PAD,
        eos_token_id=END, decoder_start_token_id=PAD, initializer_factor=1.0, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module", params=[llama, t5], ids=["causal", "encoder-decoder"])
def model(request):
    return request.param()


def world(seed: int, n_items: int = 60):
    """(codes, trie, vocabulary): a random catalogue; token ids are scattered over the vocabulary."""
    draw = stream(seed, "world")
    codes = np.stack([draw.integers(size, size=n_items) for size in SIZES], axis=1).astype(np.int32)
    tokens = 3 + draw.permutation(N_VOCABULARY - 3)[: sum(SIZES)]
    bounds = np.r_[0, np.cumsum(SIZES)]
    ids = tuple(tokens[bounds[level] : bounds[level + 1]] for level in range(3))
    return codes, PrefixTrie(codes, SIZES), SemanticVocabulary(ids, END)


def prompts(seed: int, n: int = 3, length: int = 7):
    """(ids, mask) padded on the left by different amounts."""
    draw = stream(seed, "prompts")
    ids = torch.from_numpy(draw.integers(3, N_VOCABULARY, size=(n, length)))
    mask = torch.ones_like(ids)
    for row in range(n):
        mask[row, :row] = 0
    return ids.masked_fill(mask == 0, PAD), mask


def allowed_by_sets(codes, vocabulary, prompt_length):
    """The textbook `prefix_allowed_tokens_fn`: a dictionary from prefixes to sets of tokens."""
    follow: dict[tuple[int, ...], set[int]] = {}
    for row in codes.tolist():
        tokens = [int(vocabulary.token_ids[level][code]) for level, code in enumerate(row)] + [END]
        for depth, token in enumerate(tokens):
            follow.setdefault(tuple(tokens[:depth]), set()).add(token)

    def allowed(batch_id, written):
        return sorted(follow.get(tuple(written[prompt_length:].tolist()), {END}))

    return allowed


def generated(model, ids, mask, n_beams, **options):
    found = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=n_beams, num_return_sequences=n_beams, max_new_tokens=4,
        do_sample=False, length_penalty=0.0, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    return found.sequences.view(len(ids), n_beams, -1), found.sequences_scores.view(len(ids), n_beams)


def start_of(model, ids):
    return 1 if model.config.is_encoder_decoder else ids.shape[1]


@pytest.mark.parametrize("n_beams", [1, 4, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_beams_and_scores_equal_those_of_prefix_allowed_tokens_fn(model, seed, n_beams):
    codes, trie, vocabulary = world(seed)
    ids, mask = prompts(seed)
    start = start_of(model, ids)
    if n_beams == 1:  # greedy: there are no beam scores
        options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        ours = model.generate(**options, logits_processor=[TrieLogitsProcessor(trie, vocabulary, start)])
        theirs = model.generate(**options, prefix_allowed_tokens_fn=allowed_by_sets(codes, vocabulary, start))
        assert torch.equal(ours, theirs)
        return
    sets = allowed_by_sets(codes, vocabulary, start)
    theirs, their_scores = generated(model, ids, mask, n_beams, prefix_allowed_tokens_fn=sets)
    processor = TrieLogitsProcessor(trie, vocabulary, start)
    ours, our_scores = generated(model, ids, mask, n_beams, logits_processor=[processor])
    is_real = their_scores > NO_BEAM
    assert torch.equal(is_real, our_scores > NO_BEAM)
    assert is_real.sum() > 2 * n_beams
    assert torch.equal(ours[is_real], theirs[is_real])
    assert torch.equal(our_scores[is_real], their_scores[is_real])
    legal = {
        (*(int(vocabulary.token_ids[level][code]) for level, code in enumerate(row)), END) for row in codes.tolist()
    }
    assert {tuple(row) for row in ours[is_real][:, start:].tolist()} <= legal


@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_equals_exhaustive_scoring_of_every_item(model, seed):
    _, trie, vocabulary = world(seed)
    ids, mask = prompts(seed)
    beams = beam_search(decoder_of(model, ids, mask), trie, vocabulary, trie.n_ids)
    every = trie.codes_at(3, torch.arange(trie.n_ids))
    tokens = torch.stack([torch.from_numpy(vocabulary.token_ids[level])[every[:, level]] for level in range(3)], dim=1)
    for request in range(len(ids)):
        real = ids[request, mask[request] == 1]  # without the padding
        with torch.inference_mode():
            if model.config.is_encoder_decoder:
                inputs = torch.cat([torch.full((len(tokens), 1), PAD), tokens[:, :-1]], dim=1)
                logits = model(input_ids=real.expand(len(tokens), -1), decoder_input_ids=inputs).logits
            else:
                inputs = torch.cat([real.expand(len(tokens), -1), tokens[:, :-1]], dim=1)
                logits = model(input_ids=inputs).logits[:, -3:]
        scores = logits.log_softmax(-1).gather(2, tokens[..., None]).sum((1, 2))
        assert torch.allclose(beams.scores[request], scores[beams.leaves[request]], atol=1e-4)
        assert sorted(beams.leaves[request].tolist()) == list(range(trie.n_ids))
        assert (scores[beams.leaves[request]].diff() < 1e-4).all()


def test_the_search_finds_what_generate_finds(model):
    _, trie, vocabulary = world(2, n_items=200)
    ids, mask = prompts(2)
    start = start_of(model, ids)
    tokens, _ = generated(model, ids, mask, 10, logits_processor=[TrieLogitsProcessor(trie, vocabulary, start)])
    beams = beam_search(decoder_of(model, ids, mask), trie, vocabulary, 10)
    ours = torch.stack([torch.from_numpy(vocabulary.token_ids[lvl])[beams.codes[..., lvl]] for lvl in range(3)], dim=-1)
    for request in range(len(ids)):
        theirs = {tuple(row) for row in tokens[request, :, start : start + 3].tolist()}
        # `generate` adds the end token's log-probability, so its order and its last places may differ
        assert len({tuple(row) for row in ours[request].tolist()} & theirs) >= 8
    items, _ = ranked_items(beams, trie, 10)
    assert (items >= 0).all()


def test_padding_changes_nothing(model):
    _, trie, vocabulary = world(3)
    ids, mask = prompts(3, n=1)
    plain = beam_search(decoder_of(model, ids, mask), trie, vocabulary, 8)
    if model.config.is_encoder_decoder:
        padded = (
            torch.cat([ids, torch.full((1, 4), PAD)], 1),
            torch.cat([mask, torch.zeros(1, 4, dtype=torch.int64)], 1),
        )
    else:
        padded = (
            torch.cat([torch.full((1, 4), PAD), ids], 1),
            torch.cat([torch.zeros(1, 4, dtype=torch.int64), mask], 1),
        )
    again = beam_search(decoder_of(model, *padded), trie, vocabulary, 8)
    assert torch.equal(plain.leaves, again.leaves)
    assert torch.allclose(plain.scores, again.scores, atol=1e-4)


def test_short_ids_end_where_they_end(model):
    codes, _, vocabulary = world(4)
    codes[::3, 2] = -1
    trie = PrefixTrie(codes, SIZES)
    ids, mask = prompts(4)
    start = start_of(model, ids)
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    rows = model.generate(**options, logits_processor=[TrieLogitsProcessor(trie, vocabulary, start)])[:, start:]
    legal = [
        [int(vocabulary.token_ids[level][code]) for level, code in enumerate(row) if code >= 0]
        for row in codes.tolist()
    ]
    for row in rows.tolist():
        assert row[: row.index(END)] in legal
    beams = beam_search(decoder_of(model, ids, mask), trie, vocabulary, trie.n_ids)
    assert (beams.codes[..., 2] == -1).any()
    assert beams.scores.exp().sum(1).max() <= 1


def test_a_mask_per_position_would_be_seen(model):
    """Public code allows, at each position, every code some item has there: tuples that are no item come out."""
    codes, _, vocabulary = world(5, n_items=12)
    grid = np.array(np.meshgrid(*[np.unique(column) for column in codes.T], indexing="ij")).reshape(3, -1).T
    ids, mask = prompts(5)
    items = {tuple(row) for row in codes.tolist()}
    by_position = beam_search(decoder_of(model, ids, mask), PrefixTrie(grid, SIZES), vocabulary, 20)
    by_prefix = beam_search(decoder_of(model, ids, mask), PrefixTrie(codes, SIZES), vocabulary, len(items))
    assert not {tuple(row) for row in by_position.codes.flatten(0, 1).tolist()} <= items
    assert {tuple(row) for row in by_prefix.codes.flatten(0, 1).tolist()} == items
