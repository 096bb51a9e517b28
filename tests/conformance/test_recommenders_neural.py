"""Every model trained by gradient passes the battery that users can run on theirs."""

import numpy as np
import pytest
from support.neural_worlds import VARIANTS, small_model
from support.recommender_worlds import random_log

from recollect.data.splits import leave_one_out
from recollect.recommenders.conformance import ConformanceError, check_recommender
from recollect.recommenders.markov import Markov
from recollect.recommenders.popularity import Popularity


@pytest.fixture(scope="module")
def log():
    dataset = random_log(n_users=30, n_items=20, length=8)
    return dataset, leave_one_out(dataset)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_model_conforms(variant, log, tmp_path):
    check_recommender(lambda: small_model(variant), *log, tmp_path)


@pytest.mark.parametrize("make", [Popularity, Markov])
def test_closed_form_models_conform(make, log, tmp_path):
    check_recommender(make, *log, tmp_path)


class _ReadsTheTest(Popularity):
    def fit(self, dataset, split=None, *, rows=None):
        return super().fit(dataset)


class _Forgetful(Popularity):
    def score(self, histories, candidates=None):
        scores = super().score(histories, candidates)
        return scores + np.float32(len(histories))


class _IgnoresCandidates(Popularity):
    def score(self, histories, candidates=None):
        scores = super().score(histories)
        return scores if candidates is None else scores[:, : candidates.shape[1]]


@pytest.mark.parametrize("broken", [_ReadsTheTest, _Forgetful, _IgnoresCandidates])
def test_the_battery_fails_on_planted_faults(broken, log, tmp_path):
    with pytest.raises(ConformanceError, match="broken rule"):
        check_recommender(broken, *log, tmp_path)
