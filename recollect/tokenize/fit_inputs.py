"""What a fit takes beside the vectors: which items it may see, their weights, behaviour vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from recollect.errors import ConfigError, InputError
from recollect.tokenize.collaborative import collaborative_vectors
from recollect.tokenize.embeddings import Items, read_vectors
from recollect.tokenize.protocol import ItemTokenizer
from recollect.tokenize.run_config import ItemOptions, Weighting


def fit_inputs(
    tokenizer: ItemTokenizer, items: Items, config: ItemOptions, collaborative: str | None = None
) -> dict[str, Any]:
    """The keywords `mask`, `weight` and `collaborative` of `ItemTokenizer.fit`.

    Args:
        collaborative: a file of behaviour vectors, for methods that use them.

    Raises:
        ConfigError: options that need a log, without one.
        InputError: nothing is left to fit on, or vectors that do not fit the items.
    """
    return {
        "mask": fit_mask(items, config.hold_out_cold),
        "weight": fit_weight(items, config.weight),
        "collaborative": behaviour_vectors(tokenizer, items, collaborative),
    }


def check_fit_inputs(
    tokenizer: ItemTokenizer, config: ItemOptions, n_items: int, *, has_log: bool, collaborative: str | None = None
) -> None:
    """Refuse what `fit_inputs` or `fit` would refuse for the options' sake, before there are vectors of the items.

    Raises:
        ConfigError, InputError: a method that takes no weights; see `check_behaviour`.
    """
    if config.weight != "none":
        tokenizer.check_weighted()
    check_behaviour(tokenizer, n_items, has_log=has_log, file=collaborative)


def fit_weight(items: Items, weight: Weighting) -> np.ndarray | None:
    """(N,) float64, what each item counts while fitting; None = all the same.

    Raises:
        ConfigError: see `popularity_weight`.
    """
    return popularity_weight(items) if weight == "popularity" else None


def popularity_weight(items: Items) -> np.ndarray:
    """(N,) float64, 1 + the training events of each item.

    Raises:
        ConfigError: there is no log.
    """
    if items.dataset is None or items.split is None:
        raise ConfigError("--weight popularity needs a log that says how popular items are; an .npy file has none")
    events = items.dataset.interactions.item[items.split.train]
    return 1.0 + np.bincount(events, minlength=len(items))


def fit_mask(items: Items, hold_out_cold: bool) -> np.ndarray | None:
    """(N,) bool, items with a training event; None = all.

    Raises:
        InputError: no item has one.
    """
    if not hold_out_cold or items.dataset is None or items.split is None:
        return None
    mask = np.zeros(len(items), dtype=bool)
    mask[items.dataset.interactions.item[items.split.train]] = True
    if not mask.any():
        raise InputError(f"no item of {items.dataset.name!r} has a training event, so --hold-out-cold leaves none")
    return mask


def check_behaviour(tokenizer: ItemTokenizer, n_items: int, *, has_log: bool, file: str | None = None) -> None:
    """Refuse behaviour vectors a method does not use, and a method that would be without; reads a file's header only.

    Raises:
        ConfigError: there is neither a log nor a file to take them from, or a file for a method without use for it.
        InputError: the file has another number of rows than there are items.
    """
    if not tokenizer.uses_collaborative:
        if file is not None:
            raise ConfigError(f"{tokenizer.name} does not use behaviour vectors; leave --collaborative out")
    elif file is not None:
        n_rows = len(read_vectors(file))
        if n_rows != n_items:
            raise InputError(f"{file} holds {n_rows} behaviour vectors where there are {n_items} items")
    elif not has_log:
        raise ConfigError(
            f"{tokenizer.name} needs behaviour vectors: give a data set with a log, or --collaborative FILE"
        )


def behaviour_vectors(tokenizer: ItemTokenizer, items: Items, file: str | None = None) -> np.ndarray | None:
    """What `fit` takes as `collaborative`, for a method that uses it; None for the others.

    Raises:
        ConfigError, InputError: see `check_behaviour`.
    """
    check_behaviour(tokenizer, len(items), has_log=items.dataset is not None, file=file)
    if not tokenizer.uses_collaborative:
        return None
    if file is not None:
        return np.asarray(read_vectors(file), dtype=np.float32)
    assert items.dataset is not None
    assert items.split is not None
    return collaborative_vectors(items.dataset, items.split, int(tokenizer.config.code_dim), seed=tokenizer.config.seed)
