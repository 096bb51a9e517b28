"""Generative retrieval over codes: what it must score exactly, find in worlds with a known answer, and never write."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.generative_worlds import successor_log, themed_walks, tiny_generator
from support.recommender_worlds import random_log

from recollect.data import leave_one_out
from recollect.data.examples import training_sequences
from recollect.errors import ConfigError, InputError
from recollect.tokenize.generative import (
    COLUMNS,
    GenerativeBudget,
    Retriever,
    reference_columns,
    run_generative,
    unique_codes,
)
from recollect.tokenize.generator import GeneratorShape
from recollect.tokenize.generator_windows import WindowBatches, cut_windows

SMALL = GeneratorShape(width=32, blocks=1, heads=2, inner=64, dropout=0.0, history=4)


@pytest.fixture(scope="module")
def world():
    """A log of 25 items, unique codes of unequal levels, an untrained generator over them, and its retriever."""
    dataset = random_log(n_users=30, n_items=25, length=9)
    model = tiny_generator(25, sizes=(5, 3, 4), shape=SMALL, seed=3)
    return dataset, model, Retriever(model, dataset)


def exhaustive(model, history):
    """(N,) log-probability of every item after a history, by teacher forcing, one item at a time in a window."""
    read = [int(item) for item in history[-model.shape.history :]]
    windows = torch.tensor([[*read, item] for item in range(len(model.tokens))])
    with torch.inference_mode():
        losses = model.level_losses(windows)  # (N (n + 1), L)
    return -losses.view(len(windows), len(read) + 1, -1)[:, -1].sum(1).numpy()


@pytest.mark.parametrize("length", [0, 1, 3, 4, 7])
def test_a_beam_as_wide_as_the_catalogue_is_exhaustive_teacher_forced_scoring(world, length):
    _, model, retriever = world
    generator = np.random.default_rng(length)
    histories = [generator.integers(25, size=length) for _ in range(6)]
    items, scores = retriever.lists(histories, 25)
    for row, history in enumerate(histories):
        wanted = exhaustive(model, history)
        np.testing.assert_array_equal(items[row], np.argsort(-wanted, kind="stable"))
        np.testing.assert_allclose(scores[row], np.sort(wanted)[::-1], atol=1e-5)
    assert np.logaddexp.reduce(scores, axis=1).max() <= 1e-5  # codes without an item take a share of the probability


def test_lists_hold_every_item_once_and_none_that_is_masked_or_has_no_event(world):
    dataset, model, _ = world
    kept = dataset.interactions.item != 7
    retriever = Retriever(model, replace(dataset, interactions=dataset.interactions.take(kept)))
    histories = [np.array([1, 2, 3]), np.array([4]), np.array([5, 6])]
    items, scores = retriever.lists(histories, 30, masked=histories)
    for row, history in enumerate(histories):
        listed = items[row][items[row] >= 0]
        assert sorted(listed) == sorted(set(range(25)) - {7} - set(history.tolist()))
        assert np.isneginf(scores[row][items[row] < 0]).all()
    narrow, _ = retriever.lists(histories, 5, masked=histories)
    assert all(len(set(row)) == 5 and min(row) >= 0 for row in narrow.tolist())


def test_masking_equals_taking_items_out_of_an_exhaustive_list(world):
    _, _, retriever = world
    histories = [np.array([0, 9, 9, 3]), np.array([24, 11])]
    whole, _ = retriever.lists(histories, 25)
    masked, _ = retriever.lists(histories, 25, masked=histories)
    for row, history in enumerate(histories):
        expected = [item for item in whole[row] if item not in history]
        assert masked[row][: len(expected)].tolist() == expected


def test_what_comes_later_and_padding_change_no_loss(world):
    _, model, _ = world
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(25, (4, 5), generator=generator)
    with torch.inference_mode():
        whole = model.level_losses(windows).view(4, 5, -1)
        other = windows.clone()
        other[:, 3:] = (other[:, 3:] + 1) % 25
        changed = model.level_losses(other).view(4, 5, -1)
        short = windows.clone()
        short[:, 2:] = -1
        torch.testing.assert_close(model.level_losses(short).view(4, 2, -1), whole[:, :2])
    torch.testing.assert_close(changed[:, :3], whole[:, :3])
    assert not torch.allclose(changed[:, 3:], whole[:, 3:])


def test_a_successor_that_follows_from_the_last_item_is_found():
    dataset, codes, sizes = successor_log(n_items=30, n_users=150, length=8)
    budget = GenerativeBudget(shape=SMALL, epochs=24, batch=16, learning_rate=1e-2, validate_every=6)
    found = run_generative(codes, sizes, dataset, leave_one_out(dataset), budget, seed=0)
    assert found.columns["hr@1"].mean() >= 0.99
    assert found.valid_ndcg >= 0.99
    assert (found.lists >= 0).all()
    popularity = reference_columns(dataset, leave_one_out(dataset))["popularity"]
    assert popularity["hr@1"].mean() < 0.2


def test_codes_that_share_content_beat_random_ones_where_items_are_rare_and_a_seed_repeats_itself():
    dataset, themes = themed_walks()
    split = leave_one_out(dataset)
    content = np.stack([themes, np.arange(dataset.n_items) // (themes.max() + 1)], axis=1)
    shuffled = np.random.default_rng(0).permutation(content)
    sizes = (int(themes.max()) + 1, int(content[:, 1].max()) + 1)
    budget = GenerativeBudget(shape=SMALL, epochs=6, batch=32, learning_rate=1e-2, validate_every=3)
    one = run_generative(content, sizes, dataset, split, budget, seed=0)
    null = run_generative(shuffled, sizes, dataset, split, budget, seed=0)
    assert one.columns["hr@10"].mean() > 2 * null.columns["hr@10"].mean()
    assert one.columns["hr@10"].mean() > 2 * reference_columns(dataset, split)["popularity"]["hr@10"].mean()
    again = run_generative(content, sizes, dataset, split, budget, seed=0)
    other = run_generative(content, sizes, dataset, split, budget, seed=1)
    for name in COLUMNS:
        np.testing.assert_array_equal(one.columns[name], again.columns[name])
    np.testing.assert_array_equal(one.lists, again.lists)
    assert not np.array_equal(one.lists, other.lists)


def test_colliding_items_get_one_more_digit_and_unique_ones_none():
    codes = np.array([[0, 1], [1, 0], [0, 1], [0, 1]])
    ids, sizes = unique_codes(codes, (2, 2), ("b", "x", "a", "c"))
    assert (ids.tolist(), sizes) == ([[0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 1, 2]], (2, 2, 3))
    ids, sizes = unique_codes(codes[:2], (2, 2), ("b", "x"))
    assert (ids.tolist(), sizes) == ([[0, 1], [1, 0]], (2, 2))


def test_windows_hold_every_training_event_once_and_an_epoch_every_window_once():
    dataset = random_log(n_users=23, n_items=25, length=11, seed=4)
    sequences = training_sequences(dataset, leave_one_out(dataset).train)  # 9 events a user
    windows = cut_windows(sequences, 4)
    assert sorted(windows[windows >= 0].tolist()) == sorted(
        item for user in range(len(sequences)) for item in sequences[user][1:].tolist()
    )  # 4 + 4, and the first event is a window of its own, which has no history
    assert all((row[: (row >= 0).sum()] >= 0).all() for row in windows)
    batches = WindowBatches(windows, 5, seed=0)
    rows = [row for batch in batches(3) for row in batch.tolist()]
    padded = sorted(tuple(row + [-1] * (4 - len(row))) for row in rows)
    assert padded == sorted(map(tuple, windows.tolist()))
    assert [batch.tolist() for batch in batches(3)] == [batch.tolist() for batch in batches(3)]
    assert [batch.tolist() for batch in batches(3)] != [batch.tolist() for batch in batches(4)]


def test_wrong_inputs_are_named(world):
    dataset, _, retriever = world
    split = leave_one_out(dataset)
    with pytest.raises(InputError, match="codes of 3 items where the log has 25"):
        run_generative(np.zeros((3, 2), int), (2, 2), dataset, split, seed=0)
    with pytest.raises(ConfigError, match="beams must be at least 10"):
        retriever.evaluated(split, beams=5, mask="none")
    with pytest.raises(ConfigError, match="width must be a multiple of heads"):
        GeneratorShape(width=10, heads=4)
    with pytest.raises(InputError, match="absent last digits"):
        tiny_generator(4, codes=np.array([[0, -1], [0, 0], [1, 0], [1, 1]]), sizes=(2, 2), shape=SMALL)
    with pytest.raises(InputError, match="no training sequence has two items"):
        cut_windows(training_sequences(random_log(n_users=3, n_items=6, length=1, n_groups=1)), 4)
