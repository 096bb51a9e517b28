"""Every recommender without gradient training keeps the contract of `recollect.recommenders.protocol`."""

import numpy as np
import pytest
from support.recommender_worlds import random_log

from recollect.data import leave_one_out
from recollect.errors import ConfigError
from recollect.recommenders.conformance import check_recommender
from recollect.recommenders.ease import Ease, EaseConfig
from recollect.recommenders.itemknn import ItemKNN, ItemKNNConfig
from recollect.recommenders.markov import Markov
from recollect.recommenders.popularity import Popularity
from recollect.recommenders.text import TextSimilarity, TextSimilarityConfig


class LetterEmbedder:
    """Counts of the characters of a text, as a unit vector: an embedder that needs no weights."""

    fingerprint = "letters"

    def __init__(self):
        self.calls = 0

    def embed(self, texts):
        self.calls += 1
        counts = np.array([[text.count(chr(code)) for code in range(32, 127)] for text in texts], dtype=np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    def close(self):
        pass


MODELS = {
    "pop": Popularity,
    "markov": Markov,
    "ease": lambda: Ease(EaseConfig(regularization=5.0)),
    "ease-float32": lambda: Ease(EaseConfig(regularization=5.0, precision="float32")),
    "itemknn": lambda: ItemKNN(ItemKNNConfig(neighbours=4, shrinkage=1.0)),
    "minilm": lambda: TextSimilarity(embedder=LetterEmbedder()),
    "minilm-closest": lambda: TextSimilarity(TextSimilarityConfig(pool="closest", last=3), embedder=LetterEmbedder()),
}
HISTORIES = [np.array([3, 7, 3]), np.array([], dtype=np.int64), np.array([24]), np.arange(10)]


def sasrec_text():
    """A tiny SASRec with text; its class brings torch, hence the late import."""
    from recollect.recommenders.sasrec_text import SASRecText
    from recollect.recommenders.text import SASRecTextConfig

    return SASRecText(SASRecTextConfig(hidden=8, epochs=2, max_length=6, text_size=95), embedder=LetterEmbedder())


@pytest.mark.parametrize("name", [*sorted(MODELS), "sasrec-text"])
def test_it_passes_the_battery_that_every_recommender_passes(name, log, tmp_path):
    check_recommender(MODELS.get(name, sasrec_text), *log, tmp_path)


def test_text_is_frozen_and_decides_what_an_item_without_training_scores(log):
    dataset, split = log
    model = sasrec_text().fit(dataset, split)
    np.testing.assert_array_equal(model.module.text.numpy(), LetterEmbedder().embed([f"item {i}" for i in range(25)]))
    assert "text" not in dict(model.module.named_parameters())
    vectors = model.module.item_vectors().detach().numpy()
    np.testing.assert_allclose(
        vectors - model.module.items.weight.detach().numpy(),
        model.module.text.numpy() @ model.module.projection.weight.detach().numpy().T,
        atol=1e-5,
    )


def test_an_embedder_of_another_size_is_refused(log):
    from recollect.recommenders.sasrec_text import SASRecText

    with pytest.raises(ConfigError, match="vectors of 95 numbers where text_size is 384; set text_size: 95"):
        SASRecText(embedder=LetterEmbedder()).fit(*log)


@pytest.fixture(params=sorted(MODELS))
def make(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def log():
    dataset = random_log()
    return dataset, leave_one_out(dataset)


def test_without_a_split_every_row_is_used_and_rows_win_over_the_split(make, log):
    dataset, split = log
    by_split, by_rows = make().fit(dataset, split), make().fit(dataset, None, rows=split.train)
    np.testing.assert_array_equal(by_split.score(HISTORIES), by_rows.score(HISTORIES))
    everything = np.ones(len(dataset.interactions), dtype=bool)
    whole, masked = make().fit(dataset), make().fit(dataset, split, rows=everything)
    np.testing.assert_array_equal(whole.score(HISTORIES), masked.score(HISTORIES))


def test_a_saved_model_scores_the_same_bit_for_bit(make, log, tmp_path):
    model = make().fit(*log)
    model.save_pretrained(tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    again = type(model).from_pretrained(tmp_path / "model")
    assert (again.config, again.n_items, again.data) == (model.config, model.n_items, model.data)
    np.testing.assert_array_equal(again.score(HISTORIES), model.score(HISTORIES))
