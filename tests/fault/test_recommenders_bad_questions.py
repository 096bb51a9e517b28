"""What the closed-form recommenders refuse: unknown items, unfitted models, foreign or torn files, illegal options."""

import json

import numpy as np
import pytest
from support.recommender_worlds import random_log, small_log

from recollect.data import leave_one_out
from recollect.errors import ConfigError, DataError, InputError, ModelFileError
from recollect.recommenders import ease
from recollect.recommenders.ease import Ease, EaseConfig, ease_weights
from recollect.recommenders.itemknn import ItemKNN, ItemKNNConfig
from recollect.recommenders.markov import Markov
from recollect.recommenders.popularity import Popularity
from recollect.recommenders.text import TextSimilarity, TextSimilarityConfig, item_vectors

CLASSES = [Popularity, Markov, Ease, ItemKNN]


@pytest.fixture(scope="module")
def log():
    dataset = random_log()
    return dataset, leave_one_out(dataset)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_unknown_item_of_a_history_is_named(kind, log):
    model = kind().fit(*log)
    for item in (25, -1):
        with pytest.raises(InputError, match=f"history 1 holds item {item}, .* fitted on items 0..24"):
            model.score([np.array([1]), np.array([2, item])])


@pytest.mark.parametrize("kind", CLASSES)
def test_candidates_must_be_known_and_one_row_per_history(kind, log):
    model = kind().fit(*log)
    with pytest.raises(InputError, match=r"range over 3\.\.25"):
        model.score([np.array([1])], np.array([[3, 25]]))
    with pytest.raises(InputError, match="1 histories"):
        model.score([np.array([1])], np.array([[3], [4]]))


@pytest.mark.parametrize("kind", CLASSES)
def test_an_unfitted_model_neither_scores_nor_saves(kind, tmp_path):
    with pytest.raises(InputError, match="not fitted"):
        kind().score([np.array([1])])
    with pytest.raises(InputError, match="not fitted"):
        kind().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", [Markov])
def test_a_row_mask_that_fits_no_log_is_refused(kind, log):
    with pytest.raises(DataError, match="row mask"):
        kind().fit(log[0], rows=np.ones(3, dtype=bool))


@pytest.mark.parametrize("kind", CLASSES)
def test_files_of_another_kind_torn_or_missing_are_refused(kind, log, tmp_path):
    folder = tmp_path / "model"
    kind().fit(*log).save_pretrained(folder)
    other = Markov if kind is not Markov else Popularity
    with pytest.raises(ModelFileError, match=f"kind '{kind.name}' where '{other.name}'"):
        other.from_pretrained(folder)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    with pytest.raises(ModelFileError, match="is not what"):
        kind.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(ModelFileError, match="missing"):
        kind.from_pretrained(folder)
    with pytest.raises(ModelFileError, match="holds no model"):
        kind.from_pretrained(tmp_path / "nowhere")


def test_options_of_a_saved_model_are_checked(log, tmp_path):
    Ease().fit(*log).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["options"]["regularization"] = -1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="regularization must be a positive number, got -1"):
        Ease.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EaseConfig(regularization=0.0), "regularization"),
        (lambda: EaseConfig(regularization=float("nan")), "regularization"),
        (lambda: ItemKNNConfig(neighbours=0), "neighbours"),
        (lambda: ItemKNNConfig(shrinkage=-1.0), "shrinkage"),
        (lambda: TextSimilarityConfig(last=0), "last"),
    ],
)
def test_illegal_options_are_refused_at_once(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_ease_refuses_a_catalogue_that_memory_cannot_hold(log, monkeypatch):
    monkeypatch.setattr(ease.os, "sysconf", lambda name: 70 if name == "SC_PHYS_PAGES" else 100)
    with pytest.raises(InputError, match=r"EASE on 25 items needs .* use itemknn"):
        Ease().fit(*log)


def test_ease_says_when_the_ridge_is_too_small_for_the_arithmetic():
    gram = np.asfortranarray(np.full((3, 3), 1e20))
    with pytest.raises(InputError, match="not positive definite"):
        ease_weights(gram, 1e-9)


def test_text_models_refuse_a_catalogue_without_text():
    dataset = small_log([[0, 1, 2]], 3, titles=["", None, ""])
    with pytest.raises(InputError, match="no title, category or text"):
        TextSimilarity().fit(dataset)


def test_a_misspelt_embedder_is_refused(log):
    with pytest.raises(InputError, match="unknown model 'minilmm'"):
        item_vectors(log[0], "minilmm")
