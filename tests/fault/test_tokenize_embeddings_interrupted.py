"""An embedder that breaks down half-way, torn and foreign files: what was paid for is kept, what is wrong is named."""

import errno
import os

import numpy as np
import pytest
from support.recommender_worlds import random_log
from support.token_worlds import CountingEmbedder, described, themed_vectors, write_shop

from recollect.cli.main import main
from recollect.data import leave_one_out
from recollect.errors import InputError, StorageRefused
from recollect.tokenize import embeddings
from recollect.tokenize.embeddings import embed_texts, items_of_dataset, items_of_file, read_item_ids, read_vectors
from recollect.tokenize.run_config import BenchConfig
from recollect.tokenize.source import preprocessed

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


def raising(error):
    """A function that only raises."""

    def refuse(*_):
        raise error

    return refuse


def shop():
    """A log with a text for each item, and its split."""
    dataset = described(random_log(n_users=12, n_items=10), TEXTS)
    return dataset, leave_one_out(dataset)


def given_backwards(folder, rows):
    """Vectors of the shop's items and the file of ids that names their rows, last item first."""
    np.save(folder / "given.npy", rows[::-1])
    (folder / "ids.txt").write_text("".join(f"i{item}\n" for item in reversed(range(len(rows)))))
    return {"vectors": folder / "given.npy", "vector_ids": folder / "ids.txt"}


def test_given_vectors_that_replace_embedded_ones_are_never_taken_for_them(tmp_path):
    run, given = tmp_path / "run", themed_vectors(10)
    run.mkdir()
    embedded = np.array(items_of_dataset(*shop(), run, embedder=CountingEmbedder()).embeddings)
    replaced = items_of_dataset(*shop(), run, **given_backwards(tmp_path, given))
    np.testing.assert_array_equal(replaced.embeddings, given)
    again = CountingEmbedder()
    np.testing.assert_array_equal(items_of_dataset(*shop(), run, embedder=again).embeddings, embedded)
    assert again.texts == 10


def test_vectors_that_were_not_joined_to_the_end_are_not_vouched_for(tmp_path, monkeypatch):
    embed_texts(TEXTS, CountingEmbedder(), tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(embeddings, "write_json", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            embed_texts(TEXTS[::-1], CountingEmbedder(), tmp_path)
    found, _ = embed_texts(TEXTS, CountingEmbedder(), tmp_path)
    np.testing.assert_array_equal(found, embed_texts(TEXTS, CountingEmbedder(), tmp_path / "other")[0])


def embed(folder):
    embed_texts(TEXTS, CountingEmbedder(), folder)


def take_given(folder):
    items_of_dataset(*shop(), folder, **given_backwards(folder.parent, themed_vectors(10)))


def preprocess(folder):
    np.save(folder.parent / "x.npy", themed_vectors(10))
    preprocessed(items_of_file(folder.parent / "x.npy", None), BenchConfig(preprocess=("centre",)), folder)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this platform reserves no space on disk")
@pytest.mark.parametrize("write", [embed, take_given, preprocess])
def test_a_full_disk_refuses_a_table_before_it_is_filled(tmp_path, monkeypatch, write):
    run, asked = tmp_path / "run", []
    run.mkdir()

    def full(descriptor, offset, length):
        asked.append((offset, length, os.fstat(descriptor).st_size))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(StorageRefused, match="free some space and resume"):
            write(run)
    ((offset, length, size),) = asked
    assert (offset, length) == (0, size)
    assert [path.name for path in run.iterdir() if path.suffix in (".npy", ".tmp")] == []
    write(run)
    assert len(list(run.glob("*.npy"))) == 1


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this platform reserves no space on disk")
def test_a_full_disk_ends_the_command_with_status_74_and_resume_embeds_nothing_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop", random_log(n_users=12, n_items=10), TEXTS)
    embedder = CountingEmbedder()
    monkeypatch.setattr("recollect.backbones.resolve.open_embedder", lambda name: embedder)
    words = ["tokenize", "shop", "--method", "rq-gmm", "--levels", "1", "--codebook-size", "4", "--out", "run"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        assert main(words) == 74
    assert "No space left on device; free some space and resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert embedder.texts == 10


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
