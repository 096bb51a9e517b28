"""Shuffled histories tell a model of sets from a model of sequences, by the metric and by the user vectors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tiny_decoder import patterned_log

from recollect.data import leave_one_out
from recollect.data.examples import held_out_cases
from recollect.distill.order_sensitivity import Shuffled, order_sensitivity, shuffled, user_cosine
from recollect.eval.ranking import evaluate_ranker
from recollect.io import write_json
from recollect.progress import SilentProgress
from recollect.recommenders.bpr import BPR
from recollect.recommenders.configs import BPRConfig, SASRecConfig
from recollect.recommenders.sasrec import SASRec

LOG = patterned_log(n_users=40)
SPLIT = leave_one_out(LOG)
CASES = held_out_cases(LOG, SPLIT, "test")


def sensitivity_of(model, folder):
    config = SimpleNamespace(primary_metric="ndcg@10", k=(10,))
    shop = SimpleNamespace(config=config, dataset=LOG, split=SPLIT, progress=SilentProgress())
    return order_sensitivity(shop, SimpleNamespace(folder=folder), lambda: model, 0)


def test_shuffling_keeps_the_items_of_a_history_and_is_the_same_every_time():
    histories = CASES.histories()
    mixed = shuffled(histories, 50, 3)
    assert all(np.array_equal(np.sort(one), np.sort(two)) for one, two in zip(histories, mixed, strict=True))
    assert sum(not np.array_equal(one, two) for one, two in zip(histories, mixed, strict=True)) > 30
    again = shuffled(histories[::-1], 50, 3)[::-1]
    assert all(np.array_equal(one, two) for one, two in zip(mixed, again, strict=True))
    assert any(not np.array_equal(one, two) for one, two in zip(mixed, shuffled(histories, 50, 4), strict=True))


def test_a_model_of_sets_keeps_its_user_vectors_and_a_model_of_sequences_does_not(tmp_path):
    bag = BPR(BPRConfig(hidden=8, epochs=2)).fit(LOG, SPLIT)
    found = sensitivity_of(bag, tmp_path)
    in_order = evaluate_ranker(bag, LOG, SPLIT, ks=(10,)).mean("ndcg@10")
    assert found["shuffled"] == pytest.approx(in_order, abs=1e-6)
    assert found["cosine"] == pytest.approx(1.0, abs=1e-5)
    model = SASRec(SASRecConfig(hidden=16, epochs=8, batch_size=8, learning_rate=0.01, max_length=12)).fit(LOG, SPLIT)
    (tmp_path / "sasrec").mkdir()
    found = sensitivity_of(model, tmp_path / "sasrec")
    in_order = evaluate_ranker(model, LOG, SPLIT, ks=(10,)).mean("ndcg@10")
    assert found["shuffled"] < 0.9 * in_order
    assert found["cosine"] < 0.95
    expected = evaluate_ranker(Shuffled(model, 0), LOG, SPLIT, ks=(10,)).mean("ndcg@10")
    assert found["shuffled"] == expected
    histories = CASES.histories()
    assert user_cosine(model, histories, histories) == pytest.approx(1.0, abs=1e-5)
    vectors = [model.user_states(one).numpy() for one in (histories, shuffled(histories, 12, 0))]
    norms = [np.linalg.norm(rows, axis=1) for rows in vectors]
    assert found["cosine"] == pytest.approx(((vectors[0] * vectors[1]).sum(axis=1) / norms[0] / norms[1]).mean())


def test_only_the_items_that_a_model_reads_change_places(tmp_path):
    """A model of sets that reads 3 items loses nothing: were the whole history shuffled, it would read other items."""
    histories = CASES.histories()
    assert min(map(len, histories)) > 3
    for history, mixed in zip(histories, shuffled(histories, 3, 0), strict=True):
        assert np.array_equal(history[:-3], mixed[:-3])
        assert np.array_equal(np.sort(history[-3:]), np.sort(mixed[-3:]))
    bag = BPR(BPRConfig(hidden=8, epochs=2, max_length=3)).fit(LOG, SPLIT)
    with torch.no_grad():
        bag.module.inputs.weight.mul_(64).round_().div_(64)  # sums of such numbers do not depend on their order
    found = sensitivity_of(bag, tmp_path)
    assert found["shuffled"] == evaluate_ranker(bag, LOG, SPLIT, ks=(10,)).mean("ndcg@10")
    assert found["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(bag.user_states(histories), bag.user_states(shuffled(histories, 3, 0)))
    assert not torch.equal(bag.user_states(histories), bag.user_states(shuffled(histories, 50, 0)))


def test_what_was_measured_is_kept_and_what_was_measured_in_another_way_is_not_read(tmp_path):
    model = BPR(BPRConfig(hidden=8, epochs=1)).fit(LOG, SPLIT)
    write_json(tmp_path / "shuffled-ndcg-10.json", {"shuffled": 9.0, "cosine": 9.0})  # whole histories were shuffled
    found = sensitivity_of(model, tmp_path)
    assert found["shuffled"] <= 1
    assert found["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert sensitivity_of(None, tmp_path) == found
