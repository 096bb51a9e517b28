"""What the tokenizers of the comparison refuse, and what they say."""

import builtins

import numpy as np
import pytest
from support.baseline_tokenizers import METHODS, clustered, unfitted

from recollect.errors import ConfigError, InputError, MissingExtra
from recollect.tokenize import greedy_seeds
from recollect.tokenize.balanced import BalancedRQKMeans
from recollect.tokenize.baseline_options import (
    BalancedConfig,
    KMeansConfig,
    OPQConfig,
    PRQKMeansConfig,
    RQKMeansConfig,
    VQConfig,
)
from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.greedy_seeds import seed_sample
from recollect.tokenize.kmeans import first_means
from recollect.tokenize.preprocess import Preprocess, PreprocessConfig
from recollect.tokenize.rq_gmm import RQGMM
from recollect.tokenize.rq_kmeans import VQ, RQKMeans

pytest.importorskip("faiss")
pytest.importorskip("k_means_constrained")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named_in_fit_and_in_encode(method, value):
    rows = clustered()
    tokenizer = unfitted(method).fit(rows)
    rows[17, 3] = value
    with pytest.raises(InputError, match="item 17"):
        unfitted(method).fit(rows)
    with pytest.raises(InputError, match="item 17"):
        tokenizer.encode(rows)


@pytest.mark.parametrize("method", METHODS)
def test_constant_rows_and_too_few_items_are_refused(method):
    with pytest.raises(InputError, match="same embedding"):
        unfitted(method).fit(np.ones((50, 4), dtype=np.float32))
    with pytest.raises(InputError, match="--codebook-size 8"):
        unfitted(method).fit(clustered(8))


@pytest.mark.parametrize("method", METHODS)
def test_another_dimension_an_unfitted_tokenizer_and_foreign_codes_are_refused(method):
    tokenizer = unfitted(method)
    with pytest.raises(InputError, match="not fitted"):
        tokenizer.encode(clustered())
    tokenizer.fit(clustered())
    with pytest.raises(InputError, match=r"\(N, 10\)"):
        tokenizer.encode(clustered(dimension=9))
    with pytest.raises(InputError):
        tokenizer.decode(np.full((2, 1), 12))
    with pytest.raises(InputError):
        tokenizer.decode(np.zeros((2, 9), dtype=np.int32))


@pytest.mark.parametrize("method", METHODS)
def test_saved_arrays_of_another_shape_are_refused(method):
    arrays = dict(unfitted(method).fit(clustered()).arrays())
    with pytest.raises(InputError):
        unfitted(method, codebook_size=13).take_arrays(arrays)
    arrays.pop("codebook.0")
    with pytest.raises(InputError, match=r"codebook\.0"):
        unfitted(method).take_arrays(arrays)


@pytest.mark.parametrize("method", METHODS)
def test_as_many_items_as_codes_and_one_level_work(method):
    rows = clustered(12)
    tokenizer = unfitted(method, levels=1).fit(rows)
    assert tokenizer.encode(rows).codes.shape == (12, 1)
    if method in ("rq-kmeans", "vq", "pq", "opq"):
        np.testing.assert_allclose(tokenizer.encode(rows).distance, 0, atol=1e-8)


@pytest.mark.parametrize("method", ["rq-kmeans", "balanced", "constrained", "vq", "random", "pq"])
def test_one_dimension_works(method):
    rows = clustered(60, 1)
    tokenizer = unfitted(method, levels=1).fit(rows)
    assert tokenizer.decode(tokenizer.encode(rows).codes).shape == (60, 1)


@pytest.mark.parametrize("method", METHODS)
def test_mostly_duplicate_items_are_fitted(method):
    rows = np.concatenate([clustered(5), np.tile(clustered(1), (60, 1))])
    codes = unfitted(method).fit(rows).encode(rows).codes
    assert len(np.unique(codes[5:], axis=0)) == 1


def test_fewer_dimensions_than_blocks_are_refused():
    with pytest.raises(InputError, match="2 dimensions cannot be split into 3 levels"):
        unfitted("pq").fit(clustered(dimension=2))


@pytest.mark.parametrize("method", ["rq-kmeans-unit", "prq-kmeans"])
def test_methods_without_reconstruction_refuse_to_decode_and_to_search_by_error(method):
    tokenizer = unfitted(method).fit(clustered())
    with pytest.raises(InputError, match="reconstruction"):
        tokenizer.decode(np.zeros((1, 3), dtype=np.int32))
    with pytest.raises(InputError, match="beam"):
        tokenizer.encode(clustered(), beam=4)


@pytest.mark.parametrize("method", ["pq", "opq", "random"])
def test_a_beam_is_refused_where_it_means_nothing(method):
    with pytest.raises(InputError, match="beam 1"):
        unfitted(method).fit(clustered()).encode(clustered(), beam=2)


@pytest.mark.parametrize("method", ["rq-kmeans", "balanced", "prq-kmeans", "pq", "vq"])
def test_weights_of_too_few_items_are_refused(method):
    message = "5 items of positive weight cannot fill a codebook of 12 codes; use --codebook-size 5 or fewer"
    with pytest.raises(InputError, match=message):
        unfitted(method).fit(clustered(), weight=np.r_[np.ones(5), np.zeros(235)])


def test_first_means_of_many_rows_are_among_the_few_with_weight(monkeypatch):
    monkeypatch.setattr(greedy_seeds, "_FEWEST_ROWS", 24)
    monkeypatch.setattr(greedy_seeds, "_ROWS_PER_SEED", 1)
    rows = clustered(2000)
    counted = np.arange(1980, 1992)
    weight = np.zeros(2000)
    weight[counted] = 1.0
    for seed in range(3):
        found = first_means(rows, 12, "k-means++", seed, weight)
        np.testing.assert_array_equal(np.unique(found, axis=0), np.unique(rows[counted], axis=0))


@pytest.mark.parametrize("n", [30, 2000])
def test_weights_that_are_all_positive_change_no_draw_of_the_rows_that_seeds_come_from(monkeypatch, n):
    monkeypatch.setattr(greedy_seeds, "_FEWEST_ROWS", 100)
    monkeypatch.setattr(greedy_seeds, "_ROWS_PER_SEED", 1)
    weight = np.random.default_rng(1).random(n) + 1e-9
    plain, weighted = (seed_sample(n, 12, one, np.random.default_rng(0)) for one in (None, weight))
    np.testing.assert_array_equal(plain, weighted)
    assert (plain is None) == (n == 30)


def test_constrained_sizes_refuse_weights_and_what_would_take_hours():
    with pytest.raises(InputError, match="greedy"):
        unfitted("constrained").fit(clustered(), weight=np.ones(240))
    config = BalancedConfig(levels=1, codebook_size=256, balancing="constrained")
    many = np.random.default_rng(0).normal(size=(100_001, 2)).astype(np.float32)
    with pytest.raises(InputError, match="use balancing 'greedy'"):
        BalancedRQKMeans(config).fit(many)


@pytest.mark.parametrize(
    ("method", "package"), [("rq-kmeans", "faiss"), ("pq", "faiss"), ("constrained", "k_means_constrained")]
)
def test_a_missing_package_is_named_with_its_extra(method, package, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **more):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"recollect\[tokenize\]"):
        unfitted(method).fit(clustered())


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (KMeansConfig, {"restarts": 0}),
        (KMeansConfig, {"iterations": 0}),
        (KMeansConfig, {"tolerance": 1.0}),
        (VQConfig, {"levels": 2}),
        (OPQConfig, {"rotation_iterations": 0}),
        (BalancedConfig, {"rounds": 0}),
        (PRQKMeansConfig, {"neighbours": 0}),
        (PRQKMeansConfig, {"sharpness": 0.0}),
        (PreprocessConfig, {"preprocess": ("l3",)}),
        (PreprocessConfig, {"preprocess": ("l2", "l2")}),
        (PreprocessConfig, {"pca_dimension": 4}),
        (PreprocessConfig, {"preprocess": ("pca",), "pca_dimension": -1}),
    ],
)
def test_illegal_options_are_refused(config, options):
    with pytest.raises(ConfigError):
        config(**options)


def test_preprocessing_refuses_what_it_cannot_do():
    rows = clustered(dimension=4)
    flat = np.concatenate([rows, rows[:, :1]], axis=1)  # 5 dimensions of rank 4
    with pytest.raises(InputError, match="set pca_dimension to 4"):
        Preprocess(PreprocessConfig(("pca",), whiten=True)).fit(flat)
    with pytest.raises(InputError, match="more than the 4"):
        Preprocess(PreprocessConfig(("pca",), pca_dimension=5)).fit(rows)
    with pytest.raises(InputError, match="no common direction"):
        Preprocess(PreprocessConfig(("direction",))).fit(np.concatenate([rows, -rows]))
    with pytest.raises(InputError, match="not fitted"):
        Preprocess(PreprocessConfig(("l2",))).apply(rows)
    chain = Preprocess(PreprocessConfig(("centre",))).fit(rows)
    with pytest.raises(InputError, match=r"\(B, 4\)"):
        chain.apply(flat)
    with pytest.raises(InputError, match="preprocess"):
        Preprocess(PreprocessConfig(("centre",))).take_arrays({})


@pytest.mark.parametrize(
    "tokenizer",
    [
        RQKMeans(RQKMeansConfig(levels=1, codebook_size=8)),
        VQ(VQConfig(codebook_size=8)),
        BalancedRQKMeans(BalancedConfig(levels=1, codebook_size=8)),
        RQGMM(RQGMMConfig(levels=1, codebook_size=8)),
    ],
    ids=lambda tokenizer: tokenizer.name,
)
def test_every_method_warns_of_codes_that_no_item_has(tokenizer):
    four = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    fitted = tokenizer.fit(np.repeat(four, 10, axis=0))
    assert any("4 of 8 codes are the code of no fitted item" in warning for warning in fitted.report.warnings)
