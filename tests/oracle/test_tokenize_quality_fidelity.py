"""Reconstruction errors and neighbour overlap equal their definitions, computed the slow way."""

import numpy as np
import pytest
from support.chained_tokenizer import ChainedConfig, ChainedTokenizer

from recollect.errors import InputError
from recollect.rng import stream
from recollect.tokenize.fidelity import neighbour_overlap, reconstruction
from recollect.tokenize.protocol import Encoding
from recollect.tokenize.quality import code_metrics, gini, perplexity, quality
from recollect.types import Interactions, SemanticIDs


@pytest.fixture(scope="module")
def fitted():
    rows = stream(0, "fidelity").standard_normal((300, 6)).astype(np.float32)
    tokenizer = ChainedTokenizer(ChainedConfig(levels=2, codebook_size=5)).fit(rows)
    return tokenizer, tokenizer.encode(rows).codes, rows


def test_errors_of_every_depth_equal_their_definition(fitted):
    tokenizer, codes, rows = fitted
    for depth, step in enumerate(reconstruction(tokenizer, codes, rows), start=1):
        decoded = tokenizer.decode(codes[:, :depth]).astype(np.float64)
        rest = rows.astype(np.float64) - decoded
        assert step.rmse == pytest.approx(np.sqrt((rest**2).mean()))
        assert step.relative_mse == pytest.approx((rest**2).sum() / ((rows - rows.mean(0)) ** 2).sum(), rel=1e-6)
        cosine = (rows * decoded).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(decoded, axis=1)
        assert step.cosine == pytest.approx(cosine.mean(), rel=1e-6)


def test_overlap_is_the_mean_over_random_orders_of_tied_items(fitted):
    tokenizer, codes, rows = fitted
    k, n_orders = 10, 60
    decoded = tokenizer.decode(codes).astype(np.float64)
    true = ((rows[:, None].astype(np.float64) - rows[None]) ** 2).sum(-1)
    coded = ((decoded[:, None] - decoded[None]) ** 2).sum(-1).round(9)
    np.fill_diagonal(true, np.inf)
    np.fill_diagonal(coded, np.inf)
    nearest = np.argsort(true, axis=1)[:, :k]
    draw = stream(1, "orders")
    kept = []
    for _ in range(n_orders):
        order = np.lexsort((draw.random(coded.shape), coded), axis=1)[:, :k]
        kept.append(np.mean([len(np.intersect1d(one, other)) for one, other in zip(order, nearest, strict=True)]) / k)
    found = neighbour_overlap(tokenizer, codes, rows, k=k)
    assert found == pytest.approx(np.mean(kept), abs=4 * np.std(kept) / n_orders**0.5 + 1e-4)


def test_overlap_does_not_depend_on_blocks_or_the_order_of_rows(fitted, monkeypatch):
    tokenizer, codes, rows = fitted
    found = neighbour_overlap(tokenizer, codes, rows)
    order = stream(2, "order").permutation(len(rows))
    assert neighbour_overlap(tokenizer, codes[order], rows[order]) == pytest.approx(found, abs=1e-9)
    monkeypatch.setattr("recollect.tokenize.fidelity._BLOCK", 7)
    monkeypatch.setattr("recollect.tokenize.fidelity._QUERIES", 41)
    assert neighbour_overlap(tokenizer, codes, rows) == pytest.approx(found, abs=1e-9)
    assert neighbour_overlap(tokenizer, codes, rows, queries=100) == pytest.approx(found, abs=0.1)


def test_perfect_codes_keep_every_neighbour():
    rows = stream(3, "perfect").standard_normal((40, 4)).astype(np.float32)
    tokenizer = ChainedTokenizer(ChainedConfig(levels=1, codebook_size=40)).fit(rows)
    codes = tokenizer.encode(rows).codes
    assert neighbour_overlap(tokenizer, codes, rows) == 1
    step = reconstruction(tokenizer, codes, rows)[0]
    assert (step.relative_mse, step.rmse) == (0, 0)
    assert step.cosine == pytest.approx(1)


def test_one_code_for_everything_keeps_neighbours_by_chance(fitted):
    tokenizer, codes, rows = fitted
    assert neighbour_overlap(tokenizer, np.zeros_like(codes), rows) == pytest.approx(10 / 299)


def test_balance_measures_at_their_ends():
    assert gini(np.array([4, 4, 4])) == pytest.approx(0)
    assert gini(np.array([0.0, 0, 0, 9])) == pytest.approx(0.75)
    assert perplexity(np.arange(7).repeat(3)) == pytest.approx(7)
    assert perplexity(np.zeros(5, dtype=int)) == pytest.approx(1)


def test_a_digit_that_only_duplicates_have_counts_as_a_token_of_those():
    codes = np.array([[0, 1, -1], [2, 2, 0], [2, 2, 1]], dtype=np.int32)
    found = code_metrics(codes, (4, 4, 2))
    assert found["tokens_per_item"] == pytest.approx(8 / 3)
    assert found["collision_rate"] == 0
    assert found["utilization/level_2"] == 1
    assert found["used_prefixes/level_1"] == 2


def test_quality_gathers_what_its_inputs_allow(fitted):
    tokenizer, codes, rows = fitted
    ids = SemanticIDs(np.array([f"i{n}" for n in range(300)], dtype=object), codes, (5, 5))
    bare = quality(ids)
    assert not any(name.startswith(("reconstruction", "alignment", "knn", "posterior")) for name in bare)
    draw = stream(4, "log")
    log = Interactions(np.repeat(np.arange(50), 4), draw.integers(300, size=200), np.arange(200))
    entropy = np.full((300, 2), 0.5, dtype=np.float32)
    full = quality(
        ids,
        embeddings=rows,
        tokenizer=tokenizer,
        encoding=Encoding(codes, entropy=entropy, confidence=1 - entropy),
        interactions=log,
    )
    assert full.items() >= bare.items()
    assert full["reconstruction/relative_mse"] == full["reconstruction/relative_mse/level_1"]
    assert full["reconstruction/relative_mse/level_0"] > full["reconstruction/relative_mse"] > 0
    assert 0 < full["knn_overlap@10"] < 1
    assert full["posterior_entropy/level_1"] == 0.5
    first = codes[log.item, 0].reshape(50, 4)
    assert full["alignment/same_first_code"] == pytest.approx((first[:, 1:] == first[:, :-1]).mean())
    assert full["alignment/random"] == pytest.approx((codes[:, None, 0] == codes[None, :, 0]).mean())
    seen = codes[log.item, 0]
    assert full["alignment/random_events"] == pytest.approx((seen[:, None] == seen[None]).mean())
    pairs = (codes[:, None] == codes[None])[:, :, :2].all(axis=2)
    assert full["alignment/random/level_1"] == pytest.approx(pairs.mean())


def test_inputs_that_do_not_belong_together_are_refused(fitted):
    tokenizer, codes, rows = fitted
    with pytest.raises(InputError, match="one row per item"):
        reconstruction(tokenizer, codes[:5], rows)
    with pytest.raises(InputError, match="no variance"):
        reconstruction(tokenizer, codes[:5], np.ones((5, 6), dtype=np.float32))
    with pytest.raises(InputError, match="at least two items"):
        neighbour_overlap(tokenizer, codes[:1], rows[:1])
    with pytest.raises(InputError, match="codebooks"):
        code_metrics(codes, (5,))
    ids = SemanticIDs(np.array(["a", "b"], dtype=object), codes[:2], (5, 5))
    with pytest.raises(InputError, match="codes for 2 items only"):
        quality(ids, interactions=Interactions(np.zeros(2, int), np.array([0, 2]), np.arange(2)))
