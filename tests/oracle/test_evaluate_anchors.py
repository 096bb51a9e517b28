"""MostPop, Markov1 and EASE on the public files reproduce the evaluation specification's table to every printed digit.

5-core unless said, leave-one-out, full ranking, history train+val, ties in expectation, target never masked.
"""

import numpy as np
import pytest

from recollect.data import global_temporal, k_core, leave_one_out, load_dataset, refit_mask
from recollect.eval.ranking import evaluate_ranker
from recollect.recommenders.ease import Ease, EaseConfig
from recollect.recommenders.markov import Markov
from recollect.recommenders.popularity import Popularity

METRICS = ("hr@5", "ndcg@5", "hr@10", "ndcg@10", "hr@20", "ndcg@20", "mrr")

# (data, core), (model, mask): the seven metrics
ANCHORS = {
    ("ml-100k", 5): {
        ("pop", "history"): (0.05832, 0.03582, 0.08537, 0.04424, 0.12831, 0.05504, 0.04112),
        ("pop", "none"): (0.02545, 0.01451, 0.04984, 0.02248, 0.08537, 0.03128, 0.02240),
        ("markov", "history"): (0.08710, 0.05693, 0.13730, 0.07308, 0.20682, 0.09064, 0.06417),
        ("ease-100", "history"): (0.08484, 0.05387, 0.14634, 0.07369, 0.22906, 0.09451, 0.06706),
    },
    ("ml-100k", 0): {
        ("pop", "history"): (0.05832, 0.03582, 0.08484, 0.04409, 0.12672, 0.05462, 0.04090),
    },
    ("ml-1m", 5): {
        ("pop", "history"): (0.02003, 0.01264, 0.03692, 0.01803, 0.06818, 0.02583, 0.01991),
        ("pop", "none"): (0.00778, 0.00521, 0.01623, 0.00790, 0.04023, 0.01387, 0.01194),
        ("markov", "history"): (0.15122, 0.10523, 0.21198, 0.12485, 0.27912, 0.14173, 0.10852),
        ("ease-250", "history"): (0.06175, 0.03826, 0.10778, 0.05299, 0.17881, 0.07085, 0.04952),
    },
    ("amazon-beauty", 5): {
        ("pop", "history"): (0.00742, 0.00413, 0.01147, 0.00544, 0.02012, 0.00755, 0.00559),
        ("markov", "history"): (0.05052, 0.03888, 0.06194, 0.04256, 0.07326, 0.04544, 0.03818),
        ("markov", "none"): (0.04973, 0.03789, 0.06135, 0.04164, 0.07292, 0.04457, 0.03718),
    },
}
SIZES = {
    ("ml-100k", 5): (943, 1_349, 99_287),
    ("ml-100k", 0): (943, 1_682, 100_000),
    ("ml-1m", 5): (6_040, 3_416, 999_611),
    ("amazon-beauty", 5): (22_363, 12_101, 198_502),
}


def make(name):
    kind, _, ridge = name.partition("-")
    if kind == "ease":
        return Ease(EaseConfig(regularization=float(ridge)))
    return {"pop": Popularity, "markov": Markov}[kind]()


@pytest.fixture(scope="module", params=sorted(ANCHORS), ids=lambda key: f"{key[0]}-{key[1]}core")
def data(request, shared_data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECOLLECT_DATA", str(shared_data))
        dataset = load_dataset(request.param[0])
    core = request.param[1]
    return request.param, k_core(dataset, core) if core else dataset


def test_anchors_to_every_printed_digit(data):
    key, dataset = data
    assert (dataset.n_users, dataset.n_items, len(dataset.interactions)) == SIZES[key]
    split = leave_one_out(dataset)
    fitted = {name: make(name).fit(dataset, split) for name in {name for name, _ in ANCHORS[key]}}
    for (name, mask), expected in ANCHORS[key].items():
        table = evaluate_ranker(fitted[name], dataset, split, mask=mask)
        found = tuple(round(table.mean(metric), 5) for metric in METRICS)
        assert found == expected, (key, name, mask)


@pytest.mark.parametrize("target", ["successive", "last"])
def test_a_global_temporal_split_leaks_nothing(shared_data, monkeypatch, target):
    monkeypatch.setenv("RECOLLECT_DATA", str(shared_data))
    dataset = k_core(load_dataset("ml-100k"), 5)
    split = global_temporal(dataset, target=target)
    for rows in (split.train, refit_mask(dataset, split)):
        for model in (Popularity(), Markov()):
            table = evaluate_ranker(model.fit(dataset, rows=rows), dataset, split, rows=rows)
            assert (table.leak.leaking_cases, table.leak.future_share) == (0, 0.0)
            assert 0 < table.mean("ndcg@10") < 1


def test_leave_one_out_leaks_and_the_check_says_how_much(shared_data, monkeypatch):
    monkeypatch.setenv("RECOLLECT_DATA", str(shared_data))
    dataset = k_core(load_dataset("ml-100k"), 5)
    split = leave_one_out(dataset)
    table = evaluate_ranker(Popularity().fit(dataset, split), dataset, split)
    log = dataset.interactions
    latest = log.time[split.train].max()
    assert table.leak.leaking_cases == int((latest > log.time[split.test_row]).sum()) > 0
    assert np.isfinite(table.leak.future_share)
