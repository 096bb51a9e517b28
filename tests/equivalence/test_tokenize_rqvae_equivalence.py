"""RQ-VAE without networks is residual k-means; batches of any size and runs of any length make the same passes."""

import numpy as np
import pytest
from support.trained_tokenizers import small_tokenizer, unit_embeddings

from recollect.tokenize.baseline_options import RQKMeansConfig
from recollect.tokenize.neural_config import ROUND_STEPS
from recollect.tokenize.preprocess import Preprocess
from recollect.tokenize.rq_kmeans import RQKMeans
from recollect.tokenize.training_rows import TrainingRound, TrainingRows


@pytest.fixture(scope="module")
def rows():
    return unit_embeddings(200, 6)


@pytest.mark.parametrize("beam", [1, 3])
def test_with_identity_networks_and_its_codebooks_the_codes_are_those_of_residual_kmeans(beam, rows):
    pytest.importorskip("faiss")
    kmeans = RQKMeans(RQKMeansConfig(levels=3, codebook_size=8)).fit(rows)
    identity = {
        f"{part}.0.{name}": array
        for part in ("encoder", "decoder")
        for name, array in (("weight", np.eye(6, dtype=np.float32)), ("bias", np.zeros(6, dtype=np.float32)))
    }
    tokenizer = small_tokenizer("rq-vae", hidden=(), code_dim=6, codebook_size=8)
    tokenizer.take_arrays({**kmeans.arrays(), **identity})
    expected, found = kmeans.encode(rows, beam=beam, top_m=2), tokenizer.encode(rows, beam=beam, top_m=2)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.alternatives, expected.alternatives)
    np.testing.assert_allclose(found.distance, expected.distance, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(tokenizer.decode(found.codes), kmeans.decode(expected.codes), atol=1e-6)


@pytest.mark.parametrize("batch_size", [64, 200, 1000])
def test_every_pass_sees_each_item_once_whatever_the_batch(batch_size, rows):
    data = TrainingRows(rows, np.arange(200), None, None, Preprocess())
    per_pass = -(-200 // batch_size)
    passes = ROUND_STEPS // per_pass
    batches = TrainingRound(data, batch_size, 0, 10 * ROUND_STEPS, 0)
    orders = []
    for number in range(min(passes, 3)):
        seen = [batches[number * per_pass + step].rows.numpy() for step in range(per_pass)]
        orders.append(np.concatenate(seen))
        np.testing.assert_array_equal(np.unique(orders[-1], axis=0), np.unique(rows, axis=0))
    assert not np.array_equal(orders[0], orders[1])


def test_rounds_follow_each_other_and_the_last_is_as_long_as_the_run_needs(rows):
    data = TrainingRows(rows, np.arange(200), None, None, Preprocess())
    steps = ROUND_STEPS + 7
    rounds = [TrainingRound(data, 64, 0, steps, index) for index in range(2)]
    assert [len(batches) for batches in rounds] == [ROUND_STEPS, 7]
    first, second = divmod(ROUND_STEPS + 2, 4)  # pass and batch of the third step of the second round
    expected = data.order(0, first)[second * 64 : (second + 1) * 64]
    np.testing.assert_array_equal(rounds[1][2].rows.numpy(), rows[expected])
