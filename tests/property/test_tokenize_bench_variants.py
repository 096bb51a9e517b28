"""Rows written as METHOD:NAME=VALUE,…: what is read is what was meant, and every mistake is one sentence."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.errors import ConfigError, InputError
from recollect.tokenize.methods import make_entries
from recollect.tokenize.run_config import BenchConfig
from recollect.tokenize.variants import folder_name, joined_rows, split_row

NAMES = st.sampled_from(["rq-kmeans", "rq-gmm", "opq", "narrow"])
PAIRS = st.dictionaries(
    st.sampled_from(["covariance", "shrinkage", "whiten", "pca_dimension"]),
    st.text("abcxyz0123456789.-_+", min_size=1, max_size=8),
    max_size=3,
)


def entries(text: str, sections=None):
    """As the command reads them: split at every comma, then joined again."""
    return make_entries(BenchConfig(methods=tuple(text.split(","))).methods, sections or {}, levels=2, codebook_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, PAIRS), min_size=1, max_size=5))
def test_rows_come_back_as_written_however_they_are_cut(rows):
    labels = [
        name + (":" + ",".join(f"{key}={value}" for key, value in pairs.items()) if pairs else "")
        for name, pairs in rows
    ]
    assert joined_rows(labels) == joined_rows(",".join(labels).split(",")) == tuple(labels)
    for label, (name, pairs) in zip(labels, rows, strict=True):
        assert split_row(label) == (name, tuple(f"{key}={value}" for key, value in pairs.items()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=90), min_size=2, max_size=2, unique=True))
def test_different_rows_have_different_plain_folders(labels):
    one, other = map(folder_name, labels)
    assert one != other
    assert all(letter.isascii() and (letter.isalnum() or letter in "._-") for letter in one)


def test_options_of_a_row_reach_its_method_only():
    plain, tied, sparse, white = entries(
        "rq-kmeans,rq-gmm:covariance=tied-spherical,rq-gmm: covariance = diag, shrinkage=0.3,"
        "rq-gmm:preprocess=centre+pca,pca-dimension=16,whiten=true"
    )
    assert (plain.label, plain.spec.name) == ("rq-kmeans", "rq-kmeans")
    assert (tied.options.covariance, tied.options.shrinkage) == ("tied_spherical", 10.0)
    assert (sparse.options.covariance, sparse.options.shrinkage) == ("diag", 0.3)
    assert (white.options.preprocess, white.options.pca_dimension, white.options.whiten) == (
        ("centre", "pca"),
        16,
        True,
    )
    assert white.label == "rq-gmm:preprocess=centre+pca,pca_dimension=16,whiten=true"
    assert {(entry.options.levels, entry.options.codebook_size) for entry in (tied, sparse, white)} == {(2, 8)}


def test_a_row_may_vary_a_section_of_the_file_and_wins_over_it():
    section = {"narrow": {"method": "rq-gmm", "covariance": "tied_diag", "shrinkage": 3}}
    plain, varied = entries("narrow,narrow:shrinkage=0", section)
    assert (plain.options.covariance, plain.options.shrinkage) == ("tied_diag", 3.0)
    assert (varied.options.covariance, varied.options.shrinkage) == ("tied_diag", 0.0)
    assert [entry.options.shrinkage for entry in entries("narrow:shrinkage=0", section)] == [0.0]


def test_the_row_compared_with_may_be_a_variant_however_it_is_spelled():
    config = BenchConfig(
        methods=("rq-kmeans: pca-dimension = 4,preprocess=pca",), against="rq-kmeans:pca-dimension=4,preprocess=pca"
    )
    assert config.against in config.methods


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shrinkage=1", "'shrinkage=1' is an option of no row; write METHOD:shrinkage=1"),
        ("rq-gmm,shrinkage=1", "'shrinkage=1' is an option of no row; write rq-gmm:shrinkage=1"),
        ("rq-gmm:", "'rq-gmm:' is not METHOD:NAME=VALUE"),
        ("rq-gmm:diag", "'rq-gmm:diag' is not METHOD:NAME=VALUE"),
        ("rq-gmm:shrinkage=", "'rq-gmm:shrinkage=' is not METHOD:NAME=VALUE"),
        (":shrinkage=1", "':shrinkage=1' is not METHOD:NAME=VALUE"),
        ("rq-gmm:shrinkage=1,shrinkage=2", "gives 'shrinkage' twice"),
        ("rq-gmm:colour=red", "'colour=red' is not NAME=VALUE with an option of rq-gmm: annealing"),
        ("rq-gmm:covariance=full", "must be one of diag, spherical, tied_diag, tied_spherical, got 'full'"),
        ("rq-gmm:shrinkage=much", "must be a number, got 'much'"),
        ("rq-gmm:shrinkage=-1", "shrinkage must be at least 0, got -1.0"),
        ("rq-gmm:whiten=true", "need the step pca"),
        ("rq-gmm:seed=1", "use --seed and --seeds"),
        ("best:shrinkage=1", "unknown method 'best'"),
        ("rq-gmm:shrinkage=1,rq-gmm: shrinkage=1", "methods names 'rq-gmm:shrinkage=1' more than once"),
    ],
)
def test_every_mistake_is_refused_in_one_sentence(text, message):
    with pytest.raises(InputError) as caught:
        entries(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError) or text.startswith("best")
