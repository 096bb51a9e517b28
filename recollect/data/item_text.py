"""One text per item, for whatever embeds or reads items."""

from __future__ import annotations

from recollect.types import Catalog


def item_texts(catalog: Catalog) -> list[str]:
    """What is embedded of each item: title, categories and text, in that order, joined by ". "."""
    texts = []
    for title, categories, text in zip(catalog.titles, catalog.categories, catalog.texts, strict=True):
        parts = [str(title or ""), ", ".join(categories), str(text or "")]
        texts.append(". ".join(part for part in parts if part))
    return texts
