"""A baseline that is broken ends a comparison: each check must catch the mistake it is there for."""

import numpy as np
import pytest
from support.token_worlds import themed_vectors

from recollect.cli.main import main
from recollect.errors import BaselineFailed
from recollect.tokenize.bench_checks import check_codes, check_depths, check_random, occupied_cells
from recollect.tokenize.methods import make_entries
from recollect.tokenize.random_codes import RandomCodes
from recollect.tokenize.rq_kmeans import RQKMeans


def entry(name):
    return make_entries([name], {}, levels=2, codebook_size=16)[0]


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
        from dataclasses import replace

        def folded(self, embeddings, **options):
            found = encode(self, embeddings, **options)
            return replace(found, codes=found.codes // 2)

        monkeypatch.setattr(broken, "encode", folded)
    words = ["--methods", method, "--levels", "2", "--codebook-size", "16", "--seeds", "1", "--out", "run"]
    assert main(["tokenize-bench", "x.npy", *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.json").exists()
    assert not list((tmp_path / "run").glob("rows/*/*/result.json"))
