"""An embedder that breaks down half-way, torn and foreign files: what was paid for is kept, what is wrong is named."""

import numpy as np
import pytest
from support.token_worlds import CountingEmbedder, themed_vectors

from recollect.errors import InputError
from recollect.tokenize import embeddings
from recollect.tokenize.embeddings import embed_texts, items_of_file, read_item_ids, read_vectors

TEXTS = [f"text {number}" for number in range(10)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(embeddings, "PART", 3)


def test_an_interrupted_embedding_goes_on_where_it_stopped_with_the_same_vectors(tmp_path):
    whole, key = embed_texts(TEXTS, CountingEmbedder(), tmp_path / "whole")
    with pytest.raises(RuntimeError, match="broke down"):
        embed_texts(TEXTS, CountingEmbedder(breaks_after=2), tmp_path / "run")
    assert not (tmp_path / "run" / "embeddings.npy").exists()
    rest = CountingEmbedder()
    found, same = embed_texts(TEXTS, rest, tmp_path / "run")
    assert rest.texts == 4
    assert key == same
    np.testing.assert_array_equal(found, whole)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["embeddings.json", "embeddings.npy"]


def test_parts_of_other_texts_are_not_taken(tmp_path):
    with pytest.raises(RuntimeError, match="broke down"):
        embed_texts(TEXTS, CountingEmbedder(breaks_after=2), tmp_path)
    other = CountingEmbedder()
    embed_texts([text.upper() for text in TEXTS], other, tmp_path)
    assert other.texts == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an .npy array"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "is not an .npy array"),
        (b"item,x\n1,2\n", "is not an .npy array"),
    ],
)
def test_a_file_that_is_no_array_is_named(tmp_path, content, message):
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_vectors(path)


def test_a_truncated_array_and_one_of_another_shape_are_named(tmp_path):
    np.save(tmp_path / "x.npy", themed_vectors())
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"is not an \.npy array"):
        read_vectors(tmp_path / "x.npy")
    np.save(tmp_path / "y.npy", np.zeros(5))
    with pytest.raises(InputError, match=r"must hold one array \(items, dimensions\), found shape \(5,\)"):
        read_vectors(tmp_path / "y.npy")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a\nb\n", "holds 2 ids where there are 3 vectors"),
        ("a\n\nc\n", "line 2 is empty"),
        ("a\nb\na\n", "'a' in lines 1 and 3"),
    ],
)
def test_wrong_item_ids_are_named_by_line(tmp_path, lines, message):
    (tmp_path / "ids.txt").write_text(lines)
    with pytest.raises(InputError, match=message):
        read_item_ids(tmp_path / "ids.txt", 3)


def test_rows_of_a_file_are_numbered_without_ids_and_another_file_is_another_fingerprint(tmp_path):
    np.save(tmp_path / "x.npy", themed_vectors(5))
    np.save(tmp_path / "y.npy", themed_vectors(5, seed=1))
    items = items_of_file(tmp_path / "x.npy", None)
    assert items.item_ids == ("0", "1", "2", "3", "4")
    assert items.fingerprint != items_of_file(tmp_path / "y.npy", None).fingerprint
