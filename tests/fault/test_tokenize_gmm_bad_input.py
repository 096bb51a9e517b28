"""What cannot be fitted or encoded is refused in one clear sentence."""

import numpy as np
import pytest
import torch
from support.gmm_worlds import clouds

from recollect.errors import ConfigError, InputError
from recollect.tokenize import greedy_seeds
from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.rq_gmm import RQGMM

VALUES = clouds(seed=1, n=200, d=4, k=5)
SMALL = RQGMMConfig(levels=2, codebook_size=8, max_iterations=4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_the_item(bad):
    values = VALUES.copy()
    values[137, 2] = bad
    with pytest.raises(InputError, match="embedding of item 137 holds NaN"):
        RQGMM(SMALL).fit(values)
    model = RQGMM(SMALL).fit(VALUES)
    with pytest.raises(InputError, match="embedding of item 137 holds NaN"):
        model.encode(values)
    mask = np.ones(len(values), dtype=bool)
    mask[:50] = False
    with pytest.raises(InputError, match="embedding of item 137 holds NaN"):
        RQGMM(SMALL).fit(values, mask=mask)


def test_values_beyond_float32_are_refused():
    values = VALUES.astype(np.float64)
    values[3, 0] = 1e200
    with pytest.raises(InputError, match="item 3 holds NaN, infinity or a value beyond float32"):
        RQGMM(SMALL).fit(values)
    with pytest.raises(InputError, match="scale them to about unit size"):
        RQGMM(SMALL).fit(VALUES * np.float32(1e25))


def test_fewer_items_than_codes_are_refused():
    with pytest.raises(InputError, match="5 items cannot fill a codebook of 8 codes; use --codebook-size 5 or fewer"):
        RQGMM(SMALL).fit(VALUES[:5])
    with pytest.raises(InputError, match="6 items cannot fill"):
        RQGMM(SMALL).fit(VALUES, mask=np.arange(200) < 6)


@pytest.mark.parametrize("initialisation", ["kmeans", "kmeans++", "random_points"])
def test_weights_of_too_few_items_are_refused(initialisation):
    config = RQGMMConfig(levels=2, codebook_size=8, max_iterations=4, initialisation=initialisation)
    message = "5 items of positive weight cannot fill a codebook of 8 codes; use --codebook-size 5 or fewer"
    with pytest.raises(InputError, match=message):
        RQGMM(config).fit(VALUES, weight=np.r_[np.ones(5), np.zeros(195)])
    RQGMM(config).fit(VALUES, weight=np.r_[np.ones(8), np.zeros(192)])


def test_components_of_many_items_begin_at_the_few_with_weight(monkeypatch):
    monkeypatch.setattr(greedy_seeds, "_FEWEST_ROWS", 16)
    monkeypatch.setattr(greedy_seeds, "_ROWS_PER_SEED", 1)
    many = clouds(seed=2, n=3000, d=4, k=5)
    weight = np.zeros(3000)
    weight[2500:2508] = 1.0
    model = RQGMM(RQGMMConfig(levels=1, codebook_size=8, max_iterations=5)).fit(many, weight=weight)
    assert len(np.unique(model.encode(many[2500:2508]).codes)) == 8


def test_constant_embeddings_are_refused():
    with pytest.raises(InputError, match="every item has the same embedding"):
        RQGMM(SMALL).fit(np.ones((50, 4), dtype=np.float32))
    line = np.linspace(1, 2, 50, dtype=np.float32)[:, None]
    with pytest.raises(InputError, match="nothing differs between the items after preprocess"):
        RQGMM(RQGMMConfig(levels=1, codebook_size=4, preprocess=("l2",))).fit(line)


def test_another_dimension_than_fitted_is_refused():
    model = RQGMM(SMALL).fit(VALUES)
    with pytest.raises(InputError, match=r"shape \(200, 3\) where the codebooks were fitted on \(N, 4\)"):
        model.encode(VALUES[:, :3])


def test_wrong_form_is_refused():
    for wrong in (VALUES[0], VALUES[None], VALUES.astype(np.int64), np.zeros((5, 0), dtype=np.float32)):
        with pytest.raises(InputError, match="embeddings must be a float array"):
            RQGMM(SMALL).fit(wrong)


def test_unfitted_and_wrongly_asked_models_say_so():
    with pytest.raises(InputError, match="not fitted yet"):
        RQGMM(SMALL).encode(VALUES)
    model = RQGMM(SMALL).fit(VALUES)
    with pytest.raises(InputError, match="top_m must be between 1 and 8, got 9"):
        model.encode(VALUES, top_m=9)
    with pytest.raises(InputError, match="beam must be at least 1"):
        model.encode(VALUES, beam=0)
    with pytest.raises(InputError, match="code 8 of row 0 at level 1 is outside"):
        model.decode(np.array([[0, 8]]))
    with pytest.raises(InputError, match="does not use behaviour vectors"):
        RQGMM(SMALL).fit(VALUES, collaborative=VALUES)


def test_given_codebooks_must_be_there_and_fit():
    given = RQGMMConfig(levels=2, codebook_size=8, initialisation="given")
    with pytest.raises(InputError, match="no codebooks were handed over"):
        RQGMM(given).fit(VALUES)
    with pytest.raises(InputError, match=r"start must be 2 arrays of shape \(8, 4\)"):
        RQGMM(given, start=[VALUES[:8], VALUES[:7]]).fit(VALUES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 0}, "levels must be between 1 and 32, got 0"),
        ({"codebook_size": 0}, "codebook_size must be at least 1"),
        ({"shrinkage": -1.0}, "shrinkage must be at least 0, got -1.0"),
        ({"variance_floor": float("nan")}, "variance_floor must be at least 0, got nan"),
        ({"batch_rows": 100}, "batch_rows must be 0 or at least codebook_size"),
        ({"annealing": "all", "batch_rows": 512}, "annealing needs updates that see all rows"),
        ({"annealing": "alternate", "restarts": 1}, "set restarts to 2 or more"),
        ({"annealing": True}, "annealing must be one of auto, none, all, alternate, got True"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
    ],
)
def test_illegal_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RQGMMConfig(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_refused():
    with pytest.raises(ConfigError, match="device 'cuda' was asked for"):
        RQGMM(RQGMMConfig(device="cuda"))
    assert RQGMM(RQGMMConfig(device="auto")).device.type == "cpu"


def test_saved_arrays_of_another_shape_are_refused():
    arrays = dict(RQGMM(SMALL).fit(VALUES).arrays())
    for config, message in (
        (RQGMMConfig(levels=3, codebook_size=8), "hold no 'codebook.2'"),
        (RQGMMConfig(levels=2, codebook_size=16), "a saved codebook is"),
        (RQGMMConfig(levels=2, codebook_size=8, covariance="spherical"), "where the options say covariance spherical"),
    ):
        with pytest.raises(InputError, match=message):
            RQGMM(config).take_arrays(arrays)
    del arrays["variance.1"]
    with pytest.raises(InputError, match=r"hold no 'variance\.1'"):
        RQGMM(SMALL).take_arrays(arrays)


@pytest.mark.parametrize("covariance", ["diag", "spherical", "tied_diag", "tied_spherical"])
def test_one_dimension_works(covariance):
    values = VALUES[:, :1]
    model = RQGMM(RQGMMConfig(levels=2, codebook_size=8, covariance=covariance)).fit(values)
    error = ((values - model.decode(model.encode(values).codes)) ** 2).mean()
    assert error < 0.05 * values.var()


def test_as_many_codes_as_items_and_a_single_code_work():
    every = RQGMM(RQGMMConfig(levels=2, codebook_size=20, max_iterations=5)).fit(VALUES[:20])
    assert every.encode(VALUES[:20]).codes.shape == (20, 2)
    single = RQGMM(RQGMMConfig(levels=2, codebook_size=1, max_iterations=5)).fit(VALUES)
    assert not single.encode(VALUES, return_posterior=True).codes.any()


def test_mostly_duplicate_items_are_fitted_and_share_codes():
    values = np.repeat(VALUES[:5], 40, axis=0)  # 5 distinct rows, 8 codes
    model = RQGMM(SMALL).fit(values)
    codes = model.encode(values).codes.reshape(5, 40, 2)
    assert (codes == codes[:, :1]).all()
    assert len({tuple(row) for row in codes[:, 0]}) == 5
    assert np.isfinite([level["log_likelihood"] for level in model.report.levels]).all()


def test_no_items_are_encoded_to_no_codes():
    model = RQGMM(SMALL).fit(VALUES)
    assert model.encode(VALUES[:0], return_posterior=True).codes.shape == (0, 2)
