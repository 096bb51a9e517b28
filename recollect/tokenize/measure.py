"""All numbers of one encoding of a catalogue, by the report's names: `quality` and one ratio of them."""

from __future__ import annotations

import numpy as np

from recollect.tokenize.embeddings import Items
from recollect.tokenize.protocol import Encoding, ItemTokenizer
from recollect.tokenize.quality import quality
from recollect.types import Interactions, SemanticIDs


def semantic_ids(items: Items, codes: np.ndarray, sizes: tuple[int, ...]) -> SemanticIDs:
    """The codes under the items' ids."""
    return SemanticIDs(np.array(items.item_ids, dtype=object), codes, sizes)


def training_log(items: Items) -> Interactions | None:
    """The training events, where there is a log with two different items in a row; else None."""
    if items.dataset is None or items.split is None:
        return None
    log = items.dataset.interactions.take(items.split.train)
    follows = (log.user[1:] == log.user[:-1]) & (log.item[1:] != log.item[:-1])
    return log if follows.any() else None


def measured(
    tokenizer: ItemTokenizer,
    items: Items,
    ids: SemanticIDs,
    encoding: Encoding | None,
    *,
    decodable_levels: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """`quality` of the ids on these items and their training log.

    Adds `alignment/lift`: how many times as often successive items share their first code as random ones do.

    Args:
        ids: rows in the order of `items`, after collision handling where there was any.
        decodable_levels: see `quality`.
        seed: of the items whose neighbours are compared.
    """
    found = quality(
        ids,
        embeddings=items.embeddings,
        tokenizer=tokenizer,
        encoding=encoding,
        interactions=training_log(items),
        decodable_levels=decodable_levels,
        seed=seed,
    )
    if found.get("alignment/random"):
        found["alignment/lift"] = found["alignment/same_first_code"] / found["alignment/random"]
    return found
