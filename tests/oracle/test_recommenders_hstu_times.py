"""HSTU's bias by time: the published buckets, the same in packed batches, nothing of the future, and of use."""

import itertools
import math

import numpy as np
import pytest
import torch
from support.neural_worlds import small_model
from support.recommender_worlds import random_log, small_log
from torch.nn import functional

import recollect
from recollect.data.examples import held_out_cases
from recollect.data.splits import leave_one_out
from recollect.distill.learners import Crm
from recollect.errors import ConfigError, InputError
from recollect.eval.ranking import evaluate_ranker
from recollect.eval.sampled import sampled_columns
from recollect.recommenders import packing
from recollect.recommenders.conformance import check_recommender
from recollect.recommenders.hstu import HSTU, time_buckets
from recollect.recommenders.packing import make_batch

DAY = 86_400


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(packing, "MIN_GROUP_POSITIONS", 8)


def timed(**options):
    return small_model("hstu", time_bias=True, **options)


def module_with_large_biases(**options):
    module = timed(**options).build(40)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return module.eval()


def packed(lengths, seed=0):
    generator = np.random.default_rng(seed)
    lengths = np.array(lengths, dtype=np.int64)
    items = generator.integers(40, size=lengths.sum())
    times = np.concatenate([1_500_000_000 + np.sort(generator.integers(90 * DAY, size=n)) for n in lengths])
    return items, lengths, times


def test_buckets_are_the_floor_of_the_scaled_logarithm_of_the_gap():
    gaps = [0, 1, 2, 3, 60, 3600, DAY, 365 * DAY, 2**31]
    times = torch.tensor([[1_600_000_000, 1_600_000_000 + gap] for gap in gaps])
    assert time_buckets(times)[:, 1, 0].tolist() == [int(math.log(max(gap, 1)) / 0.301) for gap in gaps]
    assert time_buckets(torch.tensor([[0, 2**62]]))[0, 1, 0] == 127


def test_a_block_is_its_formula():
    module = module_with_large_biases(blocks=1, hidden=8)
    items, lengths, times = packed([6])
    batch = make_batch(items, lengths, times=times)
    block = module.blocks[0]
    with torch.no_grad():
        x = module.items(batch.items) * math.sqrt(8) + module.positions(torch.arange(6))
        gate, value, query, key = functional.silu(block.projection(block.norm(x))).chunk(4, -1)
        weights = torch.zeros(6, 6)
        for i in range(6):
            for j in range(i + 1):
                bucket = int(math.log(max(int(times[i] - times[j]), 1)) / 0.301)
                bias = block.bias[i - j] + block.time_bias.weight[bucket, 0]
                weights[i, j] = functional.silu(query[i] @ key[j] + bias) / 12
        expected = x + block.output(block.attended_norm(weights @ value) * gate)
        torch.testing.assert_close(module(batch), expected, rtol=1e-5, atol=1e-5)


def test_a_packed_batch_gives_what_each_sequence_gives_alone():
    module = module_with_large_biases()
    items, lengths, times = packed([12, 9, 5, 5, 4, 3, 2, 2, 2, 2, 1])
    batch = make_batch(items, lengths, times=times)
    assert len(batch.groups) == 3
    starts = np.r_[0, np.cumsum(lengths)]
    with torch.no_grad():
        together = module(batch)
        for low, high in itertools.pairwise(starts):
            alone = module(make_batch(items[low:high], np.array([high - low]), times=times[low:high]))
            torch.testing.assert_close(together[low:high], alone, rtol=1e-4, atol=1e-5)


def test_only_gaps_of_the_past_count():
    module = module_with_large_biases()
    items, lengths, times = packed([12, 7])
    with torch.no_grad():
        before = module(make_batch(items, lengths, times=times))
        moved = module(make_batch(items, lengths, times=times + 1000 * DAY))
        later = times.copy()
        later[9:12] += 400 * DAY  # the last three events of the first sequence
        changed = module(make_batch(items, lengths, times=later))
    torch.testing.assert_close(moved, before, rtol=0, atol=0)
    torch.testing.assert_close(changed[:9], before[:9], rtol=0, atol=0)
    torch.testing.assert_close(changed[12:], before[12:], rtol=0, atol=0)
    assert (changed[9:12] - before[9:12]).abs().amax(1).min() > 1e-4


class AtHourlyEvents(HSTU):
    """Asked without times, as the battery asks."""

    def score(self, histories, candidates=None, *, times=None):
        hourly = [3600 * np.arange(len(history)) for history in histories]
        return super().score(histories, candidates, times=times or hourly)


def test_the_model_conforms(tmp_path):
    dataset = random_log(n_users=30, n_items=20, length=8)
    check_recommender(lambda: AtHourlyEvents(timed().config), dataset, leave_one_out(dataset), tmp_path)


def visits_log(n_users=200, n_items=12, length=12, seed=0):
    """Pairs of events: what follows depends on the item and on whether the one before it was a minute or days ago."""
    generator = np.random.default_rng(seed)
    soon, late = generator.permutation(n_items), generator.permutation(n_items)
    sequences, clocks = [], []
    for _ in range(n_users):
        items, clock = [int(generator.integers(n_items))], [1_500_000_000]
        is_soon = True
        while len(items) < length:
            items.append(int((soon if is_soon else late)[items[-1]]))
            is_soon = bool(generator.random() < 0.5)
            clock.append(clock[-1] + (60 if is_soon else 30 * DAY))
        sequences.append(items)
        clocks.append(clock)
    return small_log(sequences, n_items, times=clocks)


def test_what_depends_on_time_is_learned_from_times_alone():
    dataset = visits_log()
    split = leave_one_out(dataset)
    found = {}
    for reads_times in (False, True):
        options = {"epochs": 25, "patience": None, "validate_every": 25, "dropout": 0.0, "blocks": 1}
        options |= {"max_length": 8, "batch_size": 16, "learning_rate": 0.01}
        model = small_model("hstu", time_bias=reads_times, **options)
        found[reads_times] = evaluate_ranker(model.fit(dataset, split), dataset, split, mask="none").mean("hr@1")
    assert found[False] < 0.7  # the better of the two successors, drawn by a coin
    assert found[True] > 0.9


def test_every_evaluation_hands_over_the_times(tmp_path):
    dataset = random_log(n_users=30, n_items=20, length=8)
    split = leave_one_out(dataset)
    model = timed().fit(dataset, split)
    cases = held_out_cases(dataset, split)
    scores = model.score(cases.histories(), times=cases.times())
    assert np.abs(scores - model.score(cases.histories(), times=[row * 0 for row in cases.times()])).max() > 1e-4
    given = type("Given", (), {"score": lambda self, histories: scores})()
    for judge in (
        lambda one: evaluate_ranker(one, dataset, split, batch_size=99).column("ndcg@10"),
        lambda one: sampled_columns(one, dataset, split, n_negatives=5, batch_size=99)["ndcg@10~uni5"],
    ):
        np.testing.assert_array_equal(judge(model), judge(given))
    options = {"hstu": {"time_bias": True, "hidden": 8, "max_length": 8, "epochs": 2}}
    report = recollect.evaluate(
        dataset, models=("pop", "hstu"), model_options=options, core=0, out=tmp_path / "run", save_models=True
    )
    saved = HSTU.from_pretrained(tmp_path / "run/rows/hstu/seed-0/model")
    own = evaluate_ranker(saved, dataset, split).mean("ndcg@10")
    assert report.sections["models"]["hstu"]["ndcg@10"]["value"] == pytest.approx(own, abs=1e-12)


def test_missing_times_are_refused():
    dataset = random_log(n_users=30, n_items=20, length=8)
    model = timed().fit(dataset)
    histories = [np.array([1, 2, 3])]
    with pytest.raises(InputError, match=r"'hstu' as configured reads the times of events: score\(histories, times="):
        model.score(histories)
    with pytest.raises(InputError, match="one array per history, of its length"):
        model.score(histories, times=[np.array([1, 2])])
    with pytest.raises(InputError, match="this batch carries none"):
        model.module(make_batch(histories[0], np.array([3])))
    with pytest.raises(ConfigError, match="which a distillation does not pass on"):
        Crm(model)
    without = type(dataset)(
        dataset.name, dataset.interactions, dataset.catalog, dataset.users, dataset.domains, {"clock": "position"}
    )
    with pytest.raises(ConfigError, match="'small' has no clock; leave time_bias off"):
        timed().fit(without)
