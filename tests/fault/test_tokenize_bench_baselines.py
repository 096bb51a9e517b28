"""A baseline that is broken ends a comparison: each check must catch the mistake it is there for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.token_worlds import themed_vectors
from support.trained_tokenizers import behaviour_vectors

from recollect.cli.main import main
from recollect.errors import BaselineFailed
from recollect.tokenize import product, prq_kmeans
from recollect.tokenize.bench_checks import (
    check_codes,
    check_depths,
    check_distances,
    check_random,
    check_rotation,
    check_unit,
    occupied_cells,
)
from recollect.tokenize.methods import METHODS, make_entries
from recollect.tokenize.random_codes import RandomCodes
from recollect.tokenize.rq_kmeans import RQKMeans


def entry(name):
    return make_entries([name], {}, levels=2, codebook_size=16)[0]


QUICK = {
    "rq-vae": "hidden=8,steps=5,code_dim=4",
    "vq-vae": "hidden=8,steps=5,code_dim=4",
    "letter": "hidden=8,steps=5,code_dim=4,diversity_weight=0",
    "fsq": "hidden=8,steps=5",
}
VARIANTS = (
    "rq-kmeans:preprocess=centre+pca",
    "rq-kmeans:preprocess=l2",
    "rq-kmeans:normalize_residuals=true",
    "rq-gmm:residual=soft",
    "rq-gmm:preprocess=pca,pca_dimension=3,whiten=true",
    "opq:preprocess=centre",
    "prq-kmeans:preprocess=centre",
    "constrained-rq-kmeans:preprocess=l2",
)


def quick(name):
    """The method's row with options under which it is fitted at once."""
    return f"{name}:{QUICK[name]}" if name in QUICK else name


def uneven(n=240, dimension=6):
    """(n, dimension) float32 rows of clusters of very different sizes, four of them equal, far from the origin."""
    generator = np.random.default_rng(3)
    middle = generator.normal(0, 2, (10, dimension))
    chosen = np.minimum(generator.geometric(0.4, n) - 1, 9)
    rows = middle[chosen] + generator.normal(0, 0.5, (n, dimension)) + 5
    rows[20:23] = rows[19]
    return rows.astype(np.float32)


def fitted(label, rows):
    """The row's entry, its tokenizer fitted on all `rows`, and the encoding of these."""
    (found,) = make_entries([label], {}, levels=2, codebook_size=8)
    tokenizer = found.spec.open(found.options, seed=0)
    behaviour = behaviour_vectors(len(rows), 4) if tokenizer.uses_collaborative else None
    tokenizer.fit(rows, collaborative=behaviour)
    return found, tokenizer, tokenizer.encode(rows)


def check_all(found, tokenizer, rows, encoding):
    """Every check but that of errors by depth, as of a method that was fitted on all rows."""
    check_unit(found, tokenizer, rows, encoding, encoding.codes, {}, is_fitted_on_all=True)


@pytest.mark.parametrize("label", [*map(quick, METHODS), *VARIANTS])
def test_sound_methods_pass_every_check(label):
    rows = uneven()
    found, tokenizer, encoding = fitted(label, rows)
    check_all(found, tokenizer, rows, encoding)


@pytest.mark.parametrize("name", ["rq-kmeans", "rq-gmm", "pq", "opq", "rq-vae", "random"])
def test_a_distance_that_is_not_of_the_decoded_row_is_refused(name):
    rows = uneven()
    found, tokenizer, encoding = fitted(quick(name), rows)
    wrong = encoding.distance.copy()
    wrong[239] = 1.01 * wrong[239] + 0.01
    with pytest.raises(BaselineFailed, match="squared distance told of item 239 is"):
        check_all(found, tokenizer, rows, replace(encoding, distance=wrong))
    with pytest.raises(BaselineFailed, match="one of encode and decode is broken"):
        check_distances(found, tokenizer, rows, replace(encoding, codes=encoding.codes[::-1]))


def test_distances_are_not_compared_where_decoding_cannot_be_exact():
    rows = uneven()
    for label in ("rq-kmeans:preprocess=l2", "rq-kmeans:preprocess=pca,pca_dimension=3", "opq:levels=4"):
        found, tokenizer, encoding = fitted(label, rows)
        check_distances(found, tokenizer, rows, replace(encoding, distance=encoding.distance + 1))


def test_a_rotation_that_is_not_orthogonal_is_refused():
    found, tokenizer, _ = fitted("opq", uneven())
    tokenizer.rotation[0] *= np.float32(1.0001)
    with pytest.raises(BaselineFailed, match=r"the rotation is 8\.\d+e-05 away from an orthogonal one"):
        check_rotation(found, tokenizer)


def orthogonal_at_random(residual, centre):
    """Unit vectors orthogonal to the centre that are not the nearest to the residual."""
    return projection_residual(torch.randn(residual.shape, generator=torch.Generator().manual_seed(0)), centre)


projection_residual = prq_kmeans.projection_residual


@pytest.mark.parametrize("broken", [lambda residual, centre: prq_kmeans.unit(residual - centre), orthogonal_at_random])
def test_a_residual_that_is_no_projection_is_refused(monkeypatch, broken):
    rows = uneven()
    found, tokenizer, encoding = fitted("prq-kmeans", rows)
    monkeypatch.setattr(prq_kmeans, "projection_residual", broken)
    with pytest.raises(BaselineFailed, match="what level 0 leaves of item 0 has"):
        check_all(found, tokenizer, rows, encoding)


@pytest.mark.parametrize("name", ["balanced-rq-kmeans", "constrained-rq-kmeans"])
def test_balanced_codes_of_nearest_centroids_are_refused(name):
    rows = uneven()
    found, tokenizer, encoding = fitted(name, rows)
    check_all(found, tokenizer, rows, encoding)
    for level in tokenizer.levels:
        level.prices.zero_()
    nearest = tokenizer.encode(rows)
    with pytest.raises(BaselineFailed, match=r"codes of level 0 have \d+ to \d+ items where balance is"):
        check_all(found, tokenizer, rows, nearest)


def test_equal_items_may_fill_a_code_of_a_balanced_method():
    rows = uneven(60)
    rows[20:] = rows[5]
    for name in ("balanced-rq-kmeans", "constrained-rq-kmeans"):
        found, tokenizer, encoding = fitted(name, rows)
        assert np.bincount(encoding.codes[:, 0]).max() >= 40
        check_all(found, tokenizer, rows, encoding)


def test_a_broken_rotation_ends_the_run_before_any_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", themed_vectors(200, dimension=6))
    whole = product.fit_rotation
    monkeypatch.setattr(product, "fit_rotation", lambda *arguments: whole(*arguments) * np.float32(1.1))
    words = ["--methods", "opq", "--levels", "2", "--codebook-size", "16", "--seeds", "1", "--out", "run"]
    assert main(["tokenize-bench", "x.npy", *words]) == 1
    assert "away from an orthogonal one" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_k_means_chain_whose_error_grows_is_refused_and_one_that_does_not_is_not():
    check_depths(entry("rq-kmeans"), [0.5, 0.3, 0.3])
    check_depths(entry("rq-gmm"), [0.5, 0.6])  # a mixture may
    with pytest.raises(BaselineFailed, match=r"grows from 0.3 to 0.31 at level 3"):
        check_depths(entry("rq-kmeans"), [0.5, 0.3, 0.31])
    with pytest.raises(BaselineFailed, match="at level 1"):
        check_depths(entry("rq-kmeans"), [1.1])


@pytest.mark.parametrize("options", ["preprocess=l2", "preprocess=direction", "preprocess=pca,whiten=true"])
def test_a_chain_fitted_on_other_distances_may_grow_in_those_of_the_input(options):
    check_depths(entry(f"rq-kmeans:{options}"), [0.5, 0.6])
    with pytest.raises(BaselineFailed):
        check_depths(entry("rq-kmeans:preprocess=centre+pca,pca_dimension=2"), [0.5, 0.6])


def test_uniform_draws_pass_and_draws_from_half_of_the_codes_do_not():
    generator = np.random.default_rng(0)
    for n, sizes in ((300, (16, 16)), (5000, (256, 256, 256)), (50, (4, 2))):
        codes = np.stack([generator.integers(size, size=n) for size in sizes], axis=1)
        check_random(entry("random"), codes, sizes, n)
    halved = generator.integers(8, size=(300, 2))
    with pytest.raises(BaselineFailed, match="these codes are not random"):
        check_random(entry("random"), halved, (16, 16), 300)
    repeated = generator.integers(16, size=(300, 1)).repeat(2, axis=1)
    with pytest.raises(BaselineFailed, match="distinct codes"):
        check_random(entry("random"), repeated, (16, 16), 300)


def test_occupied_cells_are_those_of_a_simulation():
    generator = np.random.default_rng(1)
    for n, cells in ((100, 50), (40, 1000), (500, 20)):
        counts = [len(np.unique(generator.integers(cells, size=n))) for _ in range(3000)]
        mean, deviation = occupied_cells(n, cells)
        assert mean == pytest.approx(np.mean(counts), abs=0.15)
        assert deviation == pytest.approx(np.std(counts), rel=0.06, abs=0.05)
    mean, deviation = occupied_cells(10_000, 256**4)
    assert mean == pytest.approx(10_000 - 10_000**2 / 2 / 256**4, abs=1e-3)
    assert deviation == pytest.approx((10_000**2 / 2 / 256**4) ** 0.5, rel=0.01)


def test_codes_that_change_or_differ_between_equal_rows_are_refused():
    vectors = themed_vectors(8)
    vectors[5] = vectors[2]
    vectors[6] = -0.0 * vectors[6]
    vectors[7] = 0.0
    codes = np.arange(8)[:, None]
    codes[5], codes[7] = codes[2], codes[6]
    assert check_codes(entry("vq"), vectors, codes, codes) == 6
    with pytest.raises(BaselineFailed, match="changes the codes of 1 items"):
        check_codes(entry("vq"), vectors, codes, np.r_[codes[:-1], [[9]]])
    codes[5] = 5
    with pytest.raises(BaselineFailed, match="items 2 and 5 have the same embedding"):
        check_codes(entry("vq"), vectors, codes, codes)


@pytest.mark.parametrize(
    ("broken", "method", "message"),
    [
        (RQKMeans, "rq-kmeans", "which k-means on residuals cannot do"),
        (RandomCodes, "random", "these codes are not random"),
    ],
)
def test_a_broken_baseline_ends_the_run_with_a_message_and_no_report(
    tmp_path, monkeypatch, capsys, broken, method, message
):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", themed_vectors(200, dimension=6))
    decode, encode = broken.decode, broken.encode
    if broken is RQKMeans:  # the second level is subtracted where it must be added
        monkeypatch.setattr(
            broken,
            "decode",
            lambda self, codes: (
                decode(self, codes[:, :1]) * 2 - decode(self, codes) if codes.shape[1] > 1 else decode(self, codes)
            ),
        )
    else:

        def folded(self, embeddings, **options):
            found = encode(self, embeddings, **options)
            return replace(found, codes=found.codes // 2)

        monkeypatch.setattr(broken, "encode", folded)
    words = ["--methods", method, "--levels", "2", "--codebook-size", "16", "--seeds", "1", "--out", "run"]
    assert main(["tokenize-bench", "x.npy", *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.json").exists()
    assert not list((tmp_path / "run").glob("rows/*/*/result.json"))
