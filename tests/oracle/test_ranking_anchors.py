"""List metrics of MostPop and Markov1 on ML-100K 5-core, to every printed digit of the evaluation spec."""

import numpy as np
import pytest
from support.ranking_worlds import LastItemMarkov, MostPopular

from recollect import load_dataset
from recollect.data import k_core, leave_one_out
from recollect.eval.list_metrics import with_list_metrics
from recollect.eval.popularity import head_items
from recollect.eval.ranking import evaluate_ranker

MOST_POPULAR = {
    "hr@10": ".08537",
    "ndcg@10": ".04424",
    "mrr": ".04112",
    "coverage@10": ".06746",
    "gini@10": ".98198",
    "entropy@10": "3.4688",
    "arp@10": "416.098",
    "tail_share@10:items20": "0",
    "ltc@10:items20": "0",
    "gap_profile": "188.176",
    "dgap@10": "1.2112",
    "lpd@10": "1.0821",
    "mrmc@10:head/tail": ".29891",
}
MARKOV = {
    "hr@10": ".13730",
    "ndcg@10": ".07308",
    "mrr": ".06417",
    "coverage@10": ".66864",
    "gini@10": ".73214",
    "entropy@10": "6.1737",
    "arp@10": "190.692",
    "tail_share@10:items20": ".31516",
    "ltc@10:items20": ".58573",
    "dgap@10": ".0134",
    "lpd@10": ".0752",
    "mrmc@10:head/tail": ".15865",
}


@pytest.fixture(scope="module")
def movies(shared_data):
    dataset = k_core(load_dataset(shared_data / "recsys" / "ml-100k"), 5)
    return dataset, leave_one_out(dataset)


@pytest.mark.parametrize(("model", "anchors"), [(MostPopular, MOST_POPULAR), (LastItemMarkov, MARKOV)])
def test_list_metrics_reproduce_the_printed_row(movies, model, anchors):
    dataset, split = movies
    table = evaluate_ranker(model(dataset, split.train), dataset, split)
    table, totals = with_list_metrics(table, dataset, split, resamples=50)
    for name, printed in anchors.items():
        got = totals[name]["value"] if name in totals else table.mean(name)
        digits = len(printed.partition(".")[2])
        assert abs(got - float(printed)) <= 0.5 * 10.0**-digits + 1e-12, (name, got, printed)


def test_head_conventions_differ_as_measured(movies):
    dataset, split = movies
    count = np.bincount(dataset.interactions.item[split.train], minlength=dataset.n_items)
    items20, mass80 = head_items(count, "items20"), head_items(count, "mass80")
    assert (items20.sum(), mass80.sum(), dataset.n_items) == (270, 524, 1349)
    assert count[items20].sum() / count.sum() == pytest.approx(0.578, abs=5e-4)


def test_the_protocol_and_the_doubtful_targets_are_reported(movies):
    dataset, split = movies
    table = evaluate_ranker(MostPopular(dataset, split.train), dataset, split)
    assert table.protocol["filters"] == ["k_core(5)"]
    assert table.protocol["candidates"].startswith("full ranking of the 1349 items")
    assert table.tied_target_share == pytest.approx(415 / 943, abs=0.01)
    assert table.leak is not None
    assert table.leak.leaking_cases > 900, "leave-one-out trains on other users' future"
