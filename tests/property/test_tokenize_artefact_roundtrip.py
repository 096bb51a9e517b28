"""The saved folder holds everything, and a loaded tokenizer encodes bit for bit as the saved one (semantic_ids O14)."""

import hashlib
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chained_tokenizer import ChainedConfig, ChainedTokenizer

from recollect.errors import DataError, InputError
from recollect.rng import stream
from recollect.tokenize.artefact import TokenizedItems, array_sha256
from recollect.tokenize.methods import METHODS, method_spec, tokenizer_class
from recollect.tokenize.protocol import Encoding
from recollect.tokenize.text_form import codes_of, find_ids, level_name, texts_of
from recollect.types import SemanticIDs


@pytest.fixture
def known_chained(monkeypatch):
    monkeypatch.setattr(
        "recollect.tokenize.methods.tokenizer_class",
        lambda name: ChainedTokenizer if name == "chained" else tokenizer_class(name),
    )


def rows_of(n: int = 120, d: int = 6) -> np.ndarray:
    return stream(0, "artefact").standard_normal((n, d)).astype(np.float32)


def names_of(n: int) -> np.ndarray:
    return np.array([f"item {number} é" for number in range(n)], dtype=object)


def made(rows: np.ndarray) -> TokenizedItems:
    tokenizer = ChainedTokenizer(ChainedConfig(levels=2, codebook_size=5)).fit(rows)
    encoding = tokenizer.encode(rows)
    ids = SemanticIDs(names_of(len(rows)), encoding.codes, tokenizer.codebook_sizes)
    return TokenizedItems(ids, tokenizer, encoding, {"seed": 7, "embeddings_sha256": array_sha256(rows)})


def test_everything_comes_back_and_encodes_bit_for_bit(tmp_path, known_chained):
    rows = rows_of()
    before = made(rows)
    after = TokenizedItems.load(before.save(tmp_path / "sid"))
    assert (after.ids.codes == before.ids.codes).all()
    assert after.ids.codes.dtype == np.int32
    assert after.ids.item_ids.tolist() == before.ids.item_ids.tolist()
    assert after.ids.codebook_sizes == (5, 5)
    assert after.tokenizer.config == before.tokenizer.config
    assert after.details == before.details
    assert (after.encoding.distance == before.encoding.distance).all()
    again = after.tokenizer.encode(rows)
    assert (again.codes == before.encoding.codes).all()
    assert again.distance.tobytes() == before.encoding.distance.tobytes()


@pytest.mark.parametrize("name", ["rq-gmm", "prq-kmeans", "random"])
def test_what_was_fitted_on_a_gpu_encodes_where_there_is_none(tmp_path, monkeypatch, name):
    rows, spec = rows_of(), method_spec(name)
    tokenizer = spec.open(spec.options({}, "test", levels=2, codebook_size=5), seed=0).fit(rows)
    encoding = tokenizer.encode(rows)
    ids = SemanticIDs(names_of(len(rows)), encoding.codes, tokenizer.codebook_sizes)
    folder = TokenizedItems(ids, tokenizer, encoding).save(tmp_path / "sid")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["options"]["device"] = "cuda"
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    loaded = TokenizedItems.load(folder).tokenizer
    assert loaded.config.device == "auto"
    np.testing.assert_array_equal(loaded.encode(rows).codes, encoding.codes)


def test_the_folder_is_what_the_interface_says(tmp_path, known_chained):
    rows = rows_of()
    before = made(rows)
    folder = before.save(tmp_path / "sid")
    assert {path.name for path in folder.iterdir()} == {
        "codes.npy", "codebooks.safetensors", "item_ids.txt", "sid_to_items.jsonl", "encoding.safetensors",
        "manifest.json",
    }  # fmt: skip
    codes = np.load(folder / "codes.npy", allow_pickle=False)
    assert codes.dtype == np.int32
    assert codes.shape == (120, 2)
    from safetensors.numpy import load_file

    books = load_file(folder / "codebooks.safetensors")
    assert books["codebook.0"].dtype == np.float32
    assert books["codebook.1"].shape == (5, 6)
    assert (folder / "item_ids.txt").read_text(encoding="utf-8").split("\n")[:-1] == before.ids.item_ids.tolist()
    inverse = [json.loads(line) for line in (folder / "sid_to_items.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = dict(zip(before.ids.item_ids, texts_of(codes), strict=True))
    assert {item: entry["sid"] for entry in inverse for item in entry["items"]} == texts
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["algorithm"] == "chained"
    assert manifest["options"] == {"levels": 2, "codebook_size": 5, "seed": 0}
    assert manifest["details"]["embeddings_sha256"] == array_sha256(rows)
    assert manifest["versions"]["numpy"] == np.__version__
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    twice = before.save(tmp_path / "again")
    assert all((twice / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())


def test_inverse_map_text_and_tree_agree(known_chained):
    before = made(rows_of())
    rows, starts = before.groups()
    assert sorted(rows.tolist()) == list(range(120))
    for first, end in itertools.pairwise(starts):
        members = rows[first:end]
        assert (np.diff(members) > 0).all()
        text = before.texts[members[0]]
        assert before.items_of(text) == before.ids.item_ids[members].tolist()
        assert (before.ids.codes[members] == before.ids.codes[members[0]]).all()
    assert before.trie.n_ids == len(starts) - 1
    absent = next(f"<a_{a}><b_{b}>" for a in range(5) for b in range(5) if f"<a_{a}><b_{b}>" not in set(before.texts))
    assert before.items_of(absent) == []
    assert before.items_of("<a_4294967>") == []
    assert before.items_of("<a_0><b_0><c_0>") == []
    with pytest.raises(InputError, match="not a semantic ID"):
        before.items_of("the third one")


def test_a_collision_digit_is_a_level_without_a_codebook(tmp_path, known_chained):
    rows = rows_of()
    base = made(rows)
    digit = np.full((120, 1), -1, dtype=np.int32)
    digit[:2, 0] = [0, 1]
    codes = np.concatenate([base.ids.codes, digit], axis=1)
    ids = SemanticIDs(base.ids.item_ids, codes, (5, 5, 2))
    after = TokenizedItems.load(TokenizedItems(ids, base.tokenizer).save(tmp_path))
    books = after.codebooks()
    assert [None if book is None else book.shape for book in books] == [(5, 6), (5, 6), None]
    assert after.texts[0].endswith("<c_0>")
    assert after.texts[5] == f"<a_{codes[5, 0]}><b_{codes[5, 1]}>"
    assert after.items_of(after.texts[1]) == [ids.item_ids[1]]
    assert after.encoding is None
    hashed = TokenizedItems(base.ids, base.tokenizer, details={"collisions": {"decodable_levels": 1}})
    assert [book is None for book in hashed.codebooks()] == [False, True]


def test_codes_from_elsewhere_need_no_tokenizer(tmp_path):
    ids = SemanticIDs(names_of(3), np.array([[0], [1], [1]]), (4,))
    after = TokenizedItems.load(TokenizedItems(ids).save(tmp_path))
    assert after.tokenizer is None
    assert after.codebooks() == [None]
    assert after.items_of("<a_1>") == names_of(3)[1:].tolist()


@pytest.mark.parametrize("name", ["random", "rq-kmeans", "rq-gmm", "pq", "opq", "prq-kmeans", "balanced-rq-kmeans"])
def test_real_methods_encode_bit_for_bit_after_loading(tmp_path, name):
    rows = rows_of(200, 8)
    spec = METHODS[name]
    tokenizer = spec.open(spec.options({}, "the test", levels=2, codebook_size=8), seed=3).fit(rows)
    encoding = tokenizer.encode(rows, return_posterior=name == "rq-gmm")
    ids = SemanticIDs(names_of(200), encoding.codes, tokenizer.codebook_sizes)
    after = TokenizedItems.load(TokenizedItems(ids, tokenizer, encoding).save(tmp_path))
    other = stream(1, "other rows").standard_normal((50, 8)).astype(np.float32)
    assert (after.tokenizer.encode(other).codes == tokenizer.encode(other).codes).all()
    assert (after.tokenizer.encode(rows).codes == encoding.codes).all()
    assert after.tokenizer.dimension == 8


def test_every_name_a_tokenizer_gives_itself_leads_back_to_it():
    for name, spec in METHODS.items():
        kind = spec.tokenizer_class
        assert tokenizer_class(kind.name) is kind, name


@given(st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=30), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_text_of_an_id_says_its_codes(rows):
    for row in rows:
        text = texts_of(np.array([row]))[0]
        assert codes_of(text) == tuple(row)
        assert find_ids(f"of {text}, or {text}<b_3> {text}")[0] == tuple(row)
        with pytest.raises(InputError):
            codes_of(text + " ")
        with pytest.raises(InputError):
            codes_of(text[1:])


def test_ids_are_found_inside_longer_text():
    text = "<a_1><b_2><c_3> then <a_4> and <b_5> or <a_6><c_7><a_8><b_9><a_1>"
    assert find_ids(text) == [(1, 2, 3), (4,), (6,), (8, 9), (1,)]
    assert find_ids("nothing <z_1>") == []


def test_levels_have_letters_beyond_the_alphabet():
    names = [level_name(level) for level in range(60)]
    assert names[:3] == ["a", "b", "c"]
    assert names[25:28] == ["z", "aa", "ab"]
    assert names[51:53] == ["az", "ba"]
    assert len(set(names)) == 60


def test_rows_are_found_by_item_id_and_unknown_ones_are_named():
    ids = SemanticIDs(names_of(4), np.zeros((4, 1), dtype=np.int64), (3,))
    assert ids.rows_of([ids.item_ids[2], ids.item_ids[0]]).tolist() == [2, 0]
    with pytest.raises(DataError, match="'nobody' has no semantic ID"):
        ids.rows_of(["nobody"])
    with pytest.raises(ValueError, match="read-only"):
        ids.codes[0, 0] = 1
    with pytest.raises(DataError, match="not distinct"):
        SemanticIDs(np.array(["a", "a"], dtype=object), np.zeros((2, 1), int), (3,)).rows_of(["a"])


@pytest.mark.parametrize(
    ("codes", "sizes", "message"),
    [
        ([[0, 3]], (3, 3), r"code 3 at level 1; allowed: 0\.\.2"),
        ([[-1, 0]], (3, 3), "-1 may only end a row"),
        ([[-1, -1]], (3, 3), "-1 may only end a row"),
        ([[0, 0]], (3,), "2 levels where there are 1 codebooks"),
        ([[0.5]], (3,), "must be integers"),
        ([[0], [1]], (3,), "1 item ids where there are 2 rows"),
    ],
)
def test_impossible_codes_are_refused(codes, sizes, message):
    with pytest.raises(DataError, match=message):
        SemanticIDs(np.array(["i"], dtype=object), np.array(codes), sizes)


def test_encoding_arrays_are_optional(tmp_path, known_chained):
    rows = rows_of()
    base = made(rows)
    bare = TokenizedItems(base.ids, base.tokenizer, Encoding(4 - base.ids.codes))
    after = TokenizedItems.load(bare.save(tmp_path)).encoding
    assert (after.codes == 4 - base.ids.codes).all()
    assert after.distance is after.confidence is after.entropy is None
