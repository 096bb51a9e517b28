"""Fields of a click model mean the same whichever items they are made for, and differ where codes do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recollect
from recollect.errors import InputError
from recollect.rng import stream
from recollect.tokenize import ctr_fields
from recollect.tokenize.artefact import TokenizedItems
from recollect.tokenize.bench_checks import occupied_cells
from recollect.tokenize.catalogue import extend
from recollect.tokenize.collisions import resolve_collisions
from recollect.tokenize.item_features import MOST_ROWS
from recollect.tokenize.methods import method_spec
from recollect.tokenize.text_form import texts_of
from recollect.tokenize.vocabulary import SemanticVocabulary
from recollect.types import SemanticIDs


def ids_of(codes, sizes):
    return SemanticIDs(np.array([f"i{row}" for row in range(len(codes))], dtype=object), np.asarray(codes), sizes)


def drawn(n, sizes, seed=0):
    draw = stream(seed, "item features")
    return ids_of(np.stack([draw.integers(size, size=n) for size in sizes], axis=1), sizes)


def test_levels_are_the_codes_and_prefixes_their_mixed_radix_numbers():
    ids = ids_of([[3, 5, 1], [0, 7, 0], [3, 5, 0]], (4, 8, 2))
    both = ctr_fields(ids)
    assert both.names == ("level_0", "level_1", "level_2", "prefix_2", "prefix_3")
    assert both.sizes == (4, 8, 2, 32, 64)
    assert both.indices.tolist() == [[3, 5, 1, 23, 55], [0, 7, 0, 28, 28], [3, 5, 0, 23, 23]]
    assert ctr_fields(ids, "levels").indices.tolist() == ids.codes.tolist()
    assert ctr_fields(ids, "prefixes").names == ("prefix_1", "prefix_2", "prefix_3")
    assert ctr_fields(ids, "prefixes", levels=2).indices.tolist() == [[3, 23], [0, 28], [3, 23]]


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6), seed=st.integers(0, 99), grown=st.integers(0, 500))
def test_an_index_is_a_function_of_the_code_alone(sizes, seed, grown):
    ids = drawn(80, tuple(sizes), seed)
    whole = ctr_fields(ids)
    assert (whole.indices >= 0).all()
    assert (whole.indices < whole.sizes).all()
    part = np.array([70, 3, 3, 41])
    some = ids_of(ids.codes[part], (*sizes[:-1], sizes[-1] + grown))  # a collision digit grows with the catalogue
    np.testing.assert_array_equal(ctr_fields(some).indices, whole.indices[part])
    if np.prod(sizes) <= MOST_ROWS:
        tuples, rows = len(np.unique(ids.codes, axis=0)), len(np.unique(whole.indices[:, -1]))
        assert tuples == rows


def test_prefixes_beyond_the_table_are_hashed_evenly_and_by_every_code():
    sizes = (256, 256, 256, 256)
    codes = np.unique(drawn(200_000, sizes).codes, axis=0)
    rows = ctr_fields(ids_of(codes, sizes), "prefixes")
    assert rows.sizes == (256, 65_536, MOST_ROWS, MOST_ROWS)
    for length in (3, 4):
        n_prefixes = len(np.unique(codes[:, :length], axis=0))
        mean, deviation = occupied_cells(n_prefixes, MOST_ROWS)
        assert len(np.unique(rows.indices[:, length - 1])) == pytest.approx(mean, abs=6 * deviation)
    for level in range(4):  # a number modulo 2^20 would forget some
        other = codes.copy()
        other[:, level] = (other[:, level] + 16) % 256
        differs = ctr_fields(ids_of(other, sizes), "prefixes").indices[:, 3] != rows.indices[:, 3]
        assert differs.mean() > 0.999


def hashed(codes):
    """The row of a prefix by whole numbers of Python: SplitMix64's finaliser over the codes."""
    state = 0
    for code in codes:
        state ^= code + 1
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state % MOST_ROWS


def test_hashed_rows_are_the_same_on_every_machine():
    codes = [[1, 2, 3], [1023, 1023, 1023], [7, 0, 0]]
    fields = ctr_fields(ids_of(codes, (1024, 1024, 1024)), "prefixes")
    assert fields.indices[:, 1].tolist() == [2049, MOST_ROWS - 1, 7]
    assert fields.indices[:, 2].tolist() == [hashed(codes[0]), hashed(codes[1]), 7]


def test_ids_of_different_lengths_give_fields_of_the_levels_all_items_have():
    ids = ids_of([[1, 2, -1], [1, 3, 0], [1, 3, 1]], (4, 4, 2))
    with pytest.raises(InputError, match=r"item 'i0' has no digit at level 2: .* read fewer levels"):
        ctr_fields(ids)
    assert ctr_fields(ids, levels=2).indices.tolist() == [[1, 2, 9], [1, 3, 13], [1, 3, 13]]
    for levels in (0, 4):
        with pytest.raises(InputError, match=f"levels must be between 1 and 3, got {levels}"):
            ctr_fields(ids, levels=levels)
    with pytest.raises(InputError, match="fields must be one of levels, prefixes, both, got 'all'"):
        ctr_fields(ids, "all", levels=2)


def test_one_artefact_serves_click_features_decoding_vocabulary_and_logs_also_after_it_grew(tmp_path):
    rows = stream(1, "item features").standard_normal((90, 5)).astype(np.float32)
    spec = method_spec("rq-gmm")
    tokenizer = spec.open(spec.options({"max_iterations": 5}, "test", levels=2, codebook_size=6), seed=0).fit(rows[:60])
    names = [f"i{row}" for row in range(90)]
    emitted = tokenizer.encode(rows[:60]).codes
    first = resolve_collisions(emitted, "suffix", codebook_sizes=(6, 6), item_ids=names[:60])
    made = SemanticIDs(np.array(names[:60], dtype=object), first.codes, first.codebook_sizes)
    loaded = TokenizedItems.load(TokenizedItems(made, tokenizer).save(tmp_path / "sid"))
    before = recollect.tokenize.ctr_fields(loaded.ids)
    assert loaded.trie.codebook_sizes == loaded.ids.codebook_sizes
    SemanticVocabulary.consecutive(loaded.ids.codebook_sizes, 1, 0).check_sizes(loaded.ids.codebook_sizes)
    assert loaded.items_of(loaded.texts[7]) == ["i7"]

    grown = extend(loaded.tokenizer, rows[60:], loaded.ids.codes, strategy="suffix", item_ids=names[60:])
    assert grown.resolution.codebook_sizes[-1] > first.codebook_sizes[-1]
    whole = np.concatenate([loaded.ids.codes, grown.codes])
    after = ctr_fields(SemanticIDs(np.array(names, dtype=object), whole, grown.resolution.codebook_sizes))
    np.testing.assert_array_equal(after.indices[:60], before.indices)
    assert after.sizes[:2] == before.sizes[:2]
    new = ctr_fields(SemanticIDs(np.array(names[60:], dtype=object), grown.codes, grown.resolution.codebook_sizes))
    np.testing.assert_array_equal(new.indices, after.indices[60:])
    assert len(set(texts_of(whole))) == len(np.unique(after.indices[:, -1])) == 90
