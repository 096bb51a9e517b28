"""What any recommender must do, as one check to run on your own: `check_recommender(make, dataset, split, folder)`.

Covers shapes and types, questions that must be refused, candidates, independence of batch mates, determinism, that
test events are never read, and the model folder.  Says nothing about how good the scores are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from recollect.errors import InputError, ModelFileError
from recollect.io import read_json, write_json
from recollect.recommenders.protocol import Recommender
from recollect.types import Dataset, Split

MODEL_FILES = {"config.json", "model.safetensors"}


class ConformanceError(AssertionError):
    """The recommender breaks the protocol; the message names the rule."""


def check_recommender(
    make: Callable[[], Recommender], dataset: Dataset, split: Split, folder: Path, *, tolerance: float = 1e-5
) -> None:
    """Run every check; returns nothing, raises at the first rule broken.

    Args:
        make: a fresh, unfitted model of the same options and seed at each call.
        dataset: a small log with at least 8 items and 3 test cases; it is fitted several times.
        split: with validation and test cases of one target each.
        folder: an empty folder for model files.
        tolerance: by which scores may differ between batches of another composition, relative to the largest score.

    Raises:
        ConformanceError: names the rule and what was seen.
    """
    histories = example_histories(dataset.n_items)
    _unfitted(make(), histories, folder)
    model = make()
    _require(model.fit(dataset, split) is model, "fit returns the model itself")
    scores = _scores(model, histories, dataset.n_items)
    _refusals(model, dataset.n_items)
    _candidates(model, histories, scores, tolerance)
    _batch_mates(model, histories, scores, tolerance)
    _repeatable(make, model, dataset, split, histories, scores)
    _files(model, histories, scores, folder)


def example_histories(n_items: int) -> list[np.ndarray]:
    """Histories of many kinds: short, one item, empty, with a repeat, the last item, longer than any window."""
    last = n_items - 1
    rows = [[0, 3, 5], [2], [], [4, 4, 4], [last], [position % n_items for position in range(300)], [7, 1]]
    return [np.array(row, dtype=np.int64) for row in rows]


def _require(holds: bool, rule: str, seen: object = "") -> None:
    if not holds:
        raise ConformanceError(f"broken rule: {rule}" + (f"; seen: {seen}" if seen != "" else ""))


def _refused(call: Callable[[], object], expected: type[Exception], rule: str) -> None:
    try:
        call()
    except expected:
        return
    raise ConformanceError(f"broken rule: {rule}; seen: no {expected.__name__}")


def _close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(found - expected).max(initial=0) <= tolerance * max(1.0, float(np.abs(expected).max(initial=0))))


def _unfitted(model: Recommender, histories: list[np.ndarray], folder: Path) -> None:
    _require(isinstance(model, Recommender), "it has name, n_items, fit, score, save_pretrained, from_pretrained")
    _require(isinstance(model.name, str) and bool(model.name), "its name is a text", model.name)
    _refused(lambda: model.score(histories), InputError, "an unfitted model refuses to score")
    _refused(lambda: model.save_pretrained(folder / "unfitted"), InputError, "an unfitted model refuses to be saved")


def _scores(model: Recommender, histories: list[np.ndarray], n_items: int) -> np.ndarray:
    before = [history.copy() for history in histories]
    scores = model.score(histories)
    _require(model.n_items == n_items, "n_items is the data set's", model.n_items)
    _require(scores.shape == (len(histories), n_items), "scores are (B, n_items)", scores.shape)
    _require(scores.dtype == np.float32, "scores are float32", scores.dtype)
    _require(bool(np.isfinite(scores).all()), "scores are finite, also for an empty history")
    same = all(np.array_equal(old, new) for old, new in zip(before, histories, strict=True))
    _require(same, "the histories are left as they were")
    return scores


def _refusals(model: Recommender, n_items: int) -> None:
    known, good = [np.array([0, 1])], np.array([[0, 1]])
    for item in (-1, n_items):
        _refused(lambda item=item: model.score([np.array([0, item])]), InputError, f"item {item} is refused")  # type: ignore[misc]
        _refused(
            lambda item=item: model.score(known, np.array([[0, item]])),  # type: ignore[misc]
            InputError,
            f"candidate {item} is refused",
        )
    _refused(lambda: model.score(known * 2, good), InputError, "candidates need one row per history")


def _candidates(model: Recommender, histories: list[np.ndarray], scores: np.ndarray, tolerance: float) -> None:
    generator = np.random.default_rng(0)
    candidates = generator.integers(scores.shape[1], size=(len(histories), 5))
    found = model.score(histories, candidates)
    _require(found.shape == (len(histories), 5) and found.dtype == np.float32, "candidate scores are (B, C) float32")
    expected = np.take_along_axis(scores, candidates, axis=1)
    _require(_close(found, expected, tolerance), "a candidate's score is that of its column")


def _batch_mates(model: Recommender, histories: list[np.ndarray], scores: np.ndarray, tolerance: float) -> None:
    alone = np.concatenate([model.score([history]) for history in histories])
    _require(_close(alone, scores, tolerance), "a history's scores do not depend on the others asked with it")
    reverse = model.score(histories[::-1])[::-1]
    _require(_close(reverse, scores, tolerance), "rows of scores follow the order of the histories")
    _require(np.array_equal(model.score(histories), scores), "the same question gets the same scores")
    _require(model.score([]).shape == (0, scores.shape[1]), "no history gives no row")


def _repeatable(
    make: Callable[[], Recommender],
    model: Recommender,
    dataset: Dataset,
    split: Split,
    histories: list[np.ndarray],
    scores: np.ndarray,
) -> None:
    # The test targets become other items: whoever reads them gets another model.
    item = dataset.interactions.item.copy()
    item[split.test_row] = (item[split.test_row] + 1) % dataset.n_items
    changed = replace(dataset, interactions=replace(dataset.interactions, item=item))
    again = make().fit(changed, split).score(histories)
    _require(
        np.array_equal(again, scores),
        "the same seed and training rows give the same model, whatever the test events",
        f"largest difference {np.abs(again - scores).max():g}",
    )


def _files(model: Recommender, histories: list[np.ndarray], scores: np.ndarray, folder: Path) -> None:
    saved = folder / "model"
    model.save_pretrained(saved)
    found = {file.name for file in saved.iterdir()}
    _require(found == MODEL_FILES, f"a model folder holds {sorted(MODEL_FILES)}", sorted(found))
    loaded = type(model).from_pretrained(saved)
    _require(np.array_equal(loaded.score(histories), scores), "a loaded model scores bit for bit the same")
    content = read_json(saved / "config.json")
    _require(content["n_items"] == model.n_items and bool(content["data_fingerprint"]), "config.json names the data")
    write_json(saved / "config.json", {**content, "kind": "another-kind"})
    _refused(lambda: type(model).from_pretrained(saved), ModelFileError, "a folder of another kind is refused")
    _refused(lambda: type(model).from_pretrained(folder / "absent"), ModelFileError, "an absent folder is refused")
