"""The benchmark of sequence models counts what it says it counts."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

from recollect.data.examples import held_out_cases, training_sequences

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def sequential(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import sequential

    yield sequential
    for name in set(sys.modules) - before:
        module_file = getattr(sys.modules[name], "__file__", None)
        if module_file and Path(module_file).parent == BENCHMARKS:
            del sys.modules[name]


def test_the_synthetic_log_holds_every_item_and_full_histories(sequential):
    dataset, split = sequential.synthetic(700, length=5)
    assert len(np.unique(dataset.interactions.item)) == dataset.n_items == 700
    assert len(split.test_row) == dataset.n_users >= sequential.GROWTH_CASES
    assert sequential.samples_per_epoch(dataset, split, 5) == 5 * dataset.n_users


@pytest.mark.parametrize("length", [3, 50])
def test_samples_are_the_positions_a_training_epoch_predicts(sequential, length):
    from recollect.recommenders.sasrec import SASRec

    dataset, split = sequential.synthetic(300, length=7)
    batches = SASRec(sequential.config_of(length)).batches(training_sequences(dataset, split.train))
    predicted = sum(len(batch.targets) for batch in batches(0))
    assert sequential.samples_per_epoch(dataset, split, length) == predicted


def test_recbole_is_given_the_same_log_in_the_same_order_and_the_same_cases(sequential, tmp_path):
    dataset, split = sequential.synthetic(300, length=5)
    sequential.write_for_recbole(tmp_path, dataset, split, argparse.Namespace(threads=1, length=5), 256)
    header, *lines = (tmp_path / "bench" / "bench.inter").read_text().splitlines()
    assert header.split("\t") == ["user_id:token", "item_id:token", "timestamp:float"]
    user, item, time = np.array([line.split("\t") for line in lines], dtype=np.int64).T
    assert np.array_equal(user, dataset.interactions.user)
    assert np.array_equal(item, dataset.interactions.item)
    assert (np.diff(time) > 0).all()
    cases = held_out_cases(dataset, split)
    stored = np.load(tmp_path / "cases.npz")
    assert np.array_equal(stored["target"], cases.target)
    assert np.array_equal(stored["items"][stored["starts"][4] : stored["starts"][5]], cases.histories()[4])
