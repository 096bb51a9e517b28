"""Jagged batches hold every training pair once, in a random order fixed by the seed, and nothing leaks through them."""

import itertools

import numpy as np
import pytest
import torch
from support.neural_worlds import CAUSAL, SEQUENTIAL, small_model
from support.recommender_worlds import random_log

from recollect.data.examples import Sequences
from recollect.errors import ConfigError, InputError
from recollect.recommenders import packing
from recollect.recommenders.layers import Dropout
from recollect.recommenders.packing import TrainingBatches, history_batches, make_batch, over_groups


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(packing, "MIN_GROUP_POSITIONS", 8)


def sequences(lengths, seed=0):
    starts = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    items = np.random.default_rng(seed).integers(1000, size=starts[-1])
    return Sequences(items, starts, np.arange(len(lengths)), 1000)


LENGTHS = [1, 2, 3, 5, 8, 13, 21, 34, 2, 2, 9, 30, 6]


def windows(batches, epoch):
    found = []
    for index in range(len(batches(epoch))):
        batch = batches(epoch)[index]
        bounds = batch.starts.tolist()
        for begin, end in itertools.pairwise(bounds):
            found.append((batch.items[begin:end].tolist(), batch.targets[begin:end].tolist()))
            assert batch.place[begin:end].tolist() == list(range(end - begin))
    return found


def test_an_epoch_holds_the_last_window_of_every_sequence_once():
    data = sequences(LENGTHS)
    expected = []
    for index in range(len(data)):
        items = data[index][-11:].tolist()
        if len(items) > 1:
            expected.append((items[:-1], items[1:]))
    batches = TrainingBatches(data, max_length=10, batch_size=4, seed=3)
    assert sorted(windows(batches, 0)) == sorted(windows(batches, 1)) == sorted(expected)
    assert batches.n_positions == sum(len(items) for items, _ in expected)


def test_batches_depend_on_seed_and_epoch_alone():
    data = sequences(LENGTHS)
    first = TrainingBatches(data, max_length=10, batch_size=4, seed=3)
    again = TrainingBatches(data, max_length=10, batch_size=4, seed=3)
    other = TrainingBatches(data, max_length=10, batch_size=4, seed=4)
    assert windows(first, 5) == windows(again, 5)
    assert windows(first, 5) != windows(first, 6)
    assert windows(first, 5) != windows(other, 5)


def test_every_position_has_one_cell_and_rectangles_are_mostly_full():
    lengths = np.sort(np.array(LENGTHS))[::-1].astype(np.int64)
    batch = make_batch(np.arange(lengths.sum()), lengths)
    cells = sum(group.size * group.width for group in batch.groups)
    assert len(batch.groups) > 2
    assert len(batch.source) == cells < 2 * lengths.sum()
    assert torch.equal(batch.source[batch.cell], torch.arange(lengths.sum()))
    assert torch.cat([group.valid.flatten() for group in batch.groups]).nonzero().squeeze(1).equal(batch.cell)


def test_values_and_gradients_go_to_rectangles_and_back_unharmed():
    lengths = np.array([7, 5, 5, 2, 1, 1, 1, 1, 1, 1, 1, 1], dtype=np.int64)
    batch = make_batch(np.arange(lengths.sum()), lengths)
    x = torch.randn(int(lengths.sum()), 3, dtype=torch.double, requires_grad=True)
    weights = torch.randn(len(x), 3, dtype=torch.double)
    there_and_back = over_groups(batch, x, lambda cells, group: cells * 2)
    torch.testing.assert_close(there_and_back, 2 * x)
    (gradient,) = torch.autograd.grad((there_and_back * weights).sum(), x)
    torch.testing.assert_close(gradient, 2 * weights)
    sums = over_groups(batch, x, lambda cells, group: cells.cumsum(1))
    (gradient,) = torch.autograd.grad((sums * weights).sum(), x)
    bounds = batch.starts.tolist()
    for begin, end in itertools.pairwise(bounds):
        torch.testing.assert_close(gradient[begin:end], weights[begin:end].flip(0).cumsum(0).flip(0))


def test_history_batches_cover_every_history_but_the_empty_ones():
    histories = [np.arange(n) + 100 * n for n in (3, 0, 9, 1, 40, 9)]
    seen = {}
    for rows, batch in history_batches(histories, max_length=8, max_positions=16):
        assert len(batch.items) <= 16
        for row, begin, end in zip(rows, batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True):
            seen[int(row)] = batch.items[begin:end].tolist()
    assert seen == {row: items[-8:].tolist() for row, items in enumerate(histories) if len(items)}


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(InputError, match="no training sequence has 2 items"):
        TrainingBatches(sequences([1, 1]), max_length=5, batch_size=2, seed=0)
    with pytest.raises(ConfigError, match="must be at least 1"):
        TrainingBatches(sequences([4]), max_length=0, batch_size=2, seed=0)
    with pytest.raises(IndexError):
        TrainingBatches(sequences([4]), max_length=5, batch_size=2, seed=0)(0)[1]


def fresh(variant, **options):
    """A module with random weights (in training they would only be smaller), in eval mode."""
    model = small_model(variant, **options)
    module = model.build(40)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return module.eval()


@pytest.mark.parametrize("variant", CAUSAL)
def test_a_later_item_changes_no_earlier_state(variant):
    module = fresh(variant)
    lengths = np.array([12, 9, 5, 3, 3, 2], dtype=np.int64)
    items = np.random.default_rng(0).integers(40, size=lengths.sum())
    batch, changed = make_batch(items, lengths), items.copy()
    changed[9] = (changed[9] + 1) % 40  # position 9 of the first sequence
    with torch.no_grad():
        before, after = module(batch), module(make_batch(changed, lengths))
    torch.testing.assert_close(before[:9], after[:9], rtol=0, atol=0)
    torch.testing.assert_close(before[12:], after[12:], rtol=0, atol=0)
    assert (before[9:12] - after[9:12]).abs().amax(1).min() > 1e-6


@pytest.mark.parametrize("variant", CAUSAL)
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_user_is_the_state_after_the_last_item(variant, blocks):
    module = fresh(variant, blocks=blocks)
    for lengths in ([12, 9, 5, 5, 4, 3, 2, 2, 2, 1], [4, 4, 4], [1]):
        items = np.random.default_rng(0).integers(40, size=sum(lengths))
        batch = make_batch(items, np.array(lengths, dtype=np.int64))
        with torch.no_grad():
            torch.testing.assert_close(module.user_vectors(batch), module(batch)[batch.last], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", SEQUENTIAL)
def test_the_order_of_a_history_matters(variant):
    module = fresh(variant)
    items = np.arange(8)
    with torch.no_grad():
        forwards = module.user_vectors(make_batch(items, np.array([8])))
        backwards = module.user_vectors(make_batch(np.r_[items[:-1][::-1], items[-1:]], np.array([8])))
    assert (forwards - backwards).abs().max() > 1e-4


@pytest.mark.parametrize("variant", SEQUENTIAL)
def test_gradients_do_not_depend_on_how_a_batch_is_cut_into_rectangles(variant, monkeypatch):
    lengths = np.array([12, 7, 6, 3, 2, 2], dtype=np.int64)
    items = np.random.default_rng(0).integers(40, size=lengths.sum())
    found = []
    for least in (1, 10_000):
        monkeypatch.setattr(packing, "MIN_GROUP_POSITIONS", least)
        module = fresh(variant)
        batch = make_batch(items, lengths, np.roll(items, 1))
        torch.manual_seed(5)
        module.training_loss(batch).backward()
        found.append((len(batch.groups), [parameter.grad.clone() for parameter in module.parameters()]))
    assert found[0][0] > found[1][0] == 1
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_cheap_dropout_keeps_the_stated_share_and_the_expectation():
    dropout = Dropout(0.3).train()
    torch.manual_seed(0)
    out = dropout(torch.ones(400, 999))
    kept = 1 - 77 / 256
    assert out.unique().tolist() == pytest.approx([0.0, 1 / kept])
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (out == 0).float().mean(0).std().item() == pytest.approx((0.3 * 0.7 / 400) ** 0.5, rel=0.1)
    assert torch.equal(dropout.eval()(out), out)


def test_fit_reads_windows_as_long_as_the_model_allows():
    short = small_model("sasrec", max_length=3, epochs=1).fit(random_log(20, 12, length=9))
    long, cut = np.arange(9), np.arange(6, 9)
    np.testing.assert_array_equal(short.score([long]), short.score([cut]))
