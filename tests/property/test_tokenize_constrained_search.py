"""The beam search gives items alone, in the order of exhaustive scoring, whatever the tree."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scripted_decoder import HashDecoder, exhaustive

from recollect.errors import InputError
from recollect.rng import stream
from recollect.tokenize import constrained
from recollect.tokenize.constrained import Beams, TrieLogitsProcessor, beam_search, ranked_items
from recollect.tokenize.trie import PrefixTrie
from recollect.tokenize.vocabulary import SemanticVocabulary


@st.composite
def searches(draw):
    """(codes, sizes, vocabulary, size of the vocabulary): some trees with IDs of unequal length."""
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    rows = draw(st.lists(st.tuples(*[st.integers(0, size - 1) for size in sizes]), min_size=1, max_size=25))
    codes = np.array(rows, dtype=np.int32)
    if len(sizes) > 1 and draw(st.booleans()):
        codes[: draw(st.integers(0, len(rows))), -1] = -1
    n_vocabulary = sum(sizes) + 6
    shuffled = stream(draw(st.integers(0, 99)), "tokens").permutation(n_vocabulary)
    bounds = np.r_[0, np.cumsum(sizes)]
    ids = tuple(shuffled[bounds[level] : bounds[level + 1]] for level in range(len(sizes)))
    return codes, sizes, SemanticVocabulary(ids, int(shuffled[-1])), n_vocabulary


@given(searches(), st.booleans(), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_beam_as_wide_as_the_catalogue_is_exhaustive(search, renormalise, seed):
    codes, sizes, vocabulary, n_vocabulary = search
    trie = PrefixTrie(codes, sizes)
    decoder = HashDecoder(2, n_vocabulary, seed)
    beams = beam_search(decoder, trie, vocabulary, trie.n_ids + 3, renormalise=renormalise)
    for request in range(2):
        scores = exhaustive(decoder, request, codes, vocabulary, renormalise=renormalise)
        best = sorted(scores, key=lambda row: (-scores[row], row))
        found = [tuple(row) for row in beams.codes[request, : trie.n_ids].tolist()]
        assert sorted(found) == sorted(best)
        assert beams.scores[request, : trie.n_ids].numpy() == pytest.approx([scores[row] for row in found], abs=1e-4)
        assert (beams.scores[request].diff()[: trie.n_ids - 1] <= 0).all()
        assert (beams.leaves[request, trie.n_ids :] == -1).all()
        assert torch.isneginf(beams.scores[request, trie.n_ids :]).all()


@given(searches(), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_every_id_found_is_an_items_id_and_scored_as_alone(search, n_beams, seed):
    codes, sizes, vocabulary, n_vocabulary = search
    trie = PrefixTrie(codes, sizes)
    decoder = HashDecoder(3, n_vocabulary, seed, scale=30.0)
    beams = beam_search(decoder, trie, vocabulary, n_beams)
    for request in range(3):
        scores = exhaustive(decoder, request, codes, vocabulary)
        live = int((beams.leaves[request] >= 0).sum())
        assert live >= 1
        found = [tuple(row) for row in beams.codes[request, :live].tolist()]
        assert len(set(found)) == live
        assert beams.scores[request, :live].numpy() == pytest.approx([scores[row] for row in found], rel=1e-5, abs=1e-4)


@given(searches(), st.integers(1, 30), st.data())
@settings(max_examples=80, deadline=None)
def test_a_subset_of_items_equals_the_tree_of_that_subset(search, n_beams, data):
    codes, sizes, vocabulary, n_vocabulary = search
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(codes), max_size=len(codes))))
    kept[data.draw(st.integers(0, len(codes) - 1))] = True
    trie, small = PrefixTrie(codes, sizes), PrefixTrie(codes[kept], sizes)
    renormalise = data.draw(st.booleans())
    allowed = torch.from_numpy(kept)[None].expand(2, -1)
    found = beam_search(
        HashDecoder(2, n_vocabulary), trie, vocabulary, n_beams, allowed=allowed, renormalise=renormalise
    )
    rebuilt = beam_search(HashDecoder(2, n_vocabulary), small, vocabulary, n_beams, renormalise=renormalise)
    assert (found.codes == rebuilt.codes).all()
    assert torch.allclose(found.scores, rebuilt.scores, rtol=1e-5, atol=1e-6)
    items, scores = ranked_items(found, trie, 12, allowed=allowed)
    small_items, small_scores = ranked_items(rebuilt, small, 12)
    rows = np.append(np.flatnonzero(kept), -1)
    assert items.tolist() == rows[small_items.numpy()].tolist()
    assert torch.allclose(scores, small_scores, rtol=1e-5, atol=1e-6)


def test_wider_beams_never_lower_the_best_score():
    draw = stream(0, "wider")
    codes = draw.integers(6, size=(80, 3)).astype(np.int32)
    trie = PrefixTrie(codes, (6, 6, 6))
    vocabulary = SemanticVocabulary.consecutive((6, 6, 6), first=1, end_token=0)
    best = [beam_search(HashDecoder(20, 19), trie, vocabulary, n).scores[:, 0] for n in (1, 2, 4, 8, 100)]
    exact = best[-1]
    assert all((one <= exact + 1e-6).all() for one in best)
    assert (best[0] < exact).any()
    assert [float((exact - one).clamp(min=0).sum()) for one in best] == sorted(
        (float((exact - one).clamp(min=0).sum()) for one in best), reverse=True
    )


def test_equal_scores_go_to_the_smaller_id_and_then_the_smaller_row():
    codes = np.array([[1, 1], [0, 2], [1, 0], [0, 2], [1, 1]], dtype=np.int32)
    trie = PrefixTrie(codes, (2, 3))
    vocabulary = SemanticVocabulary.consecutive((2, 3), first=1, end_token=0)

    class Flat(HashDecoder):
        def logits(self, written):
            return np.zeros(self.n_vocabulary, dtype=np.float32)

    beams = beam_search(Flat(1, 6), trie, vocabulary, 2)
    assert beams.codes[0].tolist() == [[0, 2], [1, 0]]
    everything = beam_search(Flat(1, 6), trie, vocabulary, 5)
    items, scores = ranked_items(everything, trie, 7)
    assert items.tolist() == [[0, 1, 2, 3, 4, -1, -1]]
    assert torch.isneginf(scores[0, 5:]).all()


def test_a_request_whose_items_are_all_forbidden_gets_nothing():
    codes = np.array([[0, 1], [1, 0]], dtype=np.int32)
    trie = PrefixTrie(codes, (2, 2))
    vocabulary = SemanticVocabulary.consecutive((2, 2), first=1, end_token=0)
    allowed = torch.tensor([[False, False], [True, False]])
    for renormalise in (False, True):
        beams = beam_search(HashDecoder(2, 5), trie, vocabulary, 3, allowed=allowed, renormalise=renormalise)
        assert beams.leaves.tolist() == [[-1, -1, -1], [0, -1, -1]]
        assert not beams.scores.isnan().any()
        assert ranked_items(beams, trie, 2, allowed=allowed)[0].tolist() == [[-1, -1], [0, -1]]


def test_renormalising_changes_nothing_where_every_continuation_is_legal():
    sizes = (3, 4)
    codes = np.array([(a, b) for a in range(3) for b in range(4)], dtype=np.int32)
    trie = PrefixTrie(codes, sizes)
    vocabulary = SemanticVocabulary((np.arange(3), np.arange(4)), end_token=4)  # levels share the vocabulary

    class Complete(HashDecoder):
        def logits(self, written):
            logits = super().logits(written)
            logits[(3 if len(written) == 1 else 4) :] = -np.inf
            return logits

    plain = beam_search(Complete(4, 5), trie, vocabulary, 12)
    conditional = beam_search(Complete(4, 5), trie, vocabulary, 12, renormalise=True)
    assert torch.equal(plain.leaves, conditional.leaves)
    assert torch.allclose(plain.scores, conditional.scores, atol=1e-5)
    assert torch.allclose(plain.scores.exp().sum(1), torch.ones(4), atol=1e-5)


def words_of(codes, vocabulary):
    """(N, L) tokens, the end token where an ID has no digit."""
    columns = [np.append(ids, vocabulary.end_token)[codes[:, level]] for level, ids in enumerate(vocabulary.token_ids)]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("dense_bytes", [0, 60, constrained.DENSE_BYTES])
@pytest.mark.parametrize("huge_pages_from", [0, constrained.HUGE_PAGES_FROM])
@given(search=searches(), is_run=st.booleans(), is_half=st.booleans(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_mask_is_that_of_python_sets_with_tables_and_without(
    dense_bytes, huge_pages_from, search, is_run, is_half, data
):
    codes, sizes, vocabulary, n_vocabulary = search
    if is_run:
        vocabulary = SemanticVocabulary.consecutive(sizes, 4, 1)
    words = words_of(codes, vocabulary)
    draw = stream(data.draw(st.integers(0, 99)), "prefixes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constrained, "DENSE_BYTES", dense_bytes)
        patch.setattr(constrained, "HUGE_PAGES_FROM", huge_pages_from)
        processor = TrieLogitsProcessor(PrefixTrie(codes, sizes), vocabulary, prompt_length=1)
        for depth in draw.permutation(len(sizes) + 2):  # in any order: nothing is kept between calls
            real = np.pad(words, ((0, 0), (0, 2)), constant_values=vocabulary.end_token)[:, :depth]
            foreign = draw.integers(n_vocabulary, size=(10, depth))
            written = draw.permutation(np.concatenate([real, foreign]))
            scores = torch.from_numpy(draw.standard_normal((len(written), n_vocabulary)).astype(np.float32))
            scores = scores.bfloat16() if is_half else scores
            given_scores = scores.clone()
            found = processor(torch.from_numpy(np.pad(written, ((0, 0), (1, 0)))), scores)
            expected = torch.full_like(scores, -torch.inf)
            for row, prefix in enumerate(written):
                after = {int(word[depth]) for word in words if depth < len(sizes) and (word[:depth] == prefix).all()}
                kept = sorted(after or {vocabulary.end_token})
                expected[row, kept] = scores[row, kept]
            assert found.dtype == scores.dtype
            assert torch.equal(found, expected)
            assert torch.equal(scores, given_scores)


@given(searches(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_random_sampling_through_the_mask_gives_items_alone_even_when_the_model_wants_others(search, seed):
    codes, sizes, vocabulary, n_vocabulary = search
    trie = PrefixTrie(codes, sizes)
    processor = TrieLogitsProcessor(trie, vocabulary, prompt_length=2)
    n_rows = 500
    draw = stream(seed, "sampling")
    written = torch.from_numpy(draw.integers(n_vocabulary, size=(n_rows, 2)))
    legal = {
        tuple([vocabulary.end_token if c < 0 else int(vocabulary.token_ids[level][c]) for level, c in enumerate(row)])
        for row in codes.tolist()
    }
    known = np.unique(np.concatenate([*vocabulary.token_ids, [vocabulary.end_token]]))
    for step in range(len(sizes) + 2):
        logits = torch.from_numpy(draw.standard_normal((n_rows, n_vocabulary)).astype(np.float32))
        logits[:, np.setdiff1d(np.arange(n_vocabulary), known)] += 100  # what is no code at all
        logits[:, : n_vocabulary // 2] += 100
        masked = processor(written, logits)
        is_kept = masked > -torch.inf
        assert is_kept.any(1).all()
        assert torch.equal(masked[is_kept], logits[is_kept])
        picked = torch.multinomial(masked.softmax(1), 1, generator=torch.Generator().manual_seed(seed + step))
        written = torch.cat([written, picked], dim=1)
    for row in written[:, 2:].tolist():
        assert tuple(row[: len(sizes)]) in legal
        assert row[len(sizes) :] == [vocabulary.end_token] * 2


def test_a_beam_of_none_and_foreign_vocabularies_are_refused():
    trie = PrefixTrie(np.array([[0, 1]]), (2, 2))
    vocabulary = SemanticVocabulary.consecutive((2, 2), first=1, end_token=0)
    with pytest.raises(InputError, match="at least 1"):
        beam_search(HashDecoder(1, 5), trie, vocabulary, 0)
    with pytest.raises(InputError, match="codebooks"):
        beam_search(HashDecoder(1, 5), trie, SemanticVocabulary.consecutive((2, 3), 1, 0), 1)
    beams = beam_search(HashDecoder(1, 5), trie, vocabulary, 1)
    assert isinstance(beams, Beams)


def test_a_hundred_thousand_decodes_that_prefer_impossible_tokens_give_items_alone():
    draw = stream(0, "hundred thousand")
    sizes = (8, 8, 8)
    codes = draw.integers(8, size=(200, 3)).astype(np.int32)
    trie = PrefixTrie(codes, sizes)
    vocabulary = SemanticVocabulary.consecutive(sizes, first=3, end_token=2)
    processor = TrieLogitsProcessor(trie, vocabulary, prompt_length=1)
    written = torch.zeros(100_000, 1, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        logits = torch.randn(100_000, 30, generator=generator)
        nodes = (
            trie.walk(written[:, 1:].sub(3 + 8 * torch.arange(written.shape[1] - 1))) if written.shape[1] < 4 else None
        )
        if nodes is not None:
            legal = torch.zeros_like(logits, dtype=torch.bool)
            depth = written.shape[1] - 1
            legal[:, 3 + 8 * depth : 11 + 8 * depth] = trie.mask(depth, nodes)
            logits[~legal] += 100
        picked = torch.multinomial(processor(written, logits).softmax(1), 1, generator=generator)
        written = torch.cat([written, picked], dim=1)
    found = written[:, 1:4] - 3 - 8 * torch.arange(3)
    assert (trie.walk(found) >= 0).all()
    assert (written[:, 4] == 2).all()
    assert len(found.unique(dim=0)) == trie.n_ids
