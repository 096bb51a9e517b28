"""SARI: how well a simplification keeps, deletes and adds n-grams of its source, judged by references.

Lower-cased, cut by the 13a rules, n = 1..4.  Per n: F1 of what is kept, precision of what is deleted, F1 of what is
added; empty comparisons count 1.  Counts of source and candidate are multiplied by the number of references, and the
recall of keeping divides by the total count of what could be kept.
Source: trace_benchmark 5 [paper], the semantics of the metric `sari` of the Hugging Face hub.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_ORDERS = (1, 2, 3, 4)
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_RULES = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),  # every sign but ' , - . and letters, digits
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),  # full stops and commas, unless between digits
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),  # a dash after a digit
)


def tokenize_13a(text: str) -> list[str]:
    """Lower-cased words of `text` by the rules of mteval-v13a; one empty word where there is none."""
    text = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text.split() or [""]


def _ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision or recall else 0.0


def _scaled(counts: Counter[tuple[str, ...]], factor: int) -> Counter[tuple[str, ...]]:
    return Counter({gram: count * factor for gram, count in counts.items()})


def keep_delete_add(
    source: Counter[tuple[str, ...]],
    candidate: Counter[tuple[str, ...]],
    references: Sequence[Counter[tuple[str, ...]]],
) -> tuple[float, float, float]:
    """F1 of keeping, precision of deleting and F1 of adding, from n-gram counts of one order."""
    wanted: Counter[tuple[str, ...]] = sum(references, Counter())
    times = len(references)
    had, has = _scaled(source, times), _scaled(candidate, times)

    kept, keepable = had & has, had & wanted
    well_kept = kept & wanted
    precision = sum(well_kept[gram] / kept[gram] for gram in well_kept) / len(kept) if kept else 1.0
    recall = sum(well_kept.values()) / sum(keepable.values()) if keepable else 1.0
    keep = _f1(precision, recall)

    deleted = had - has
    well_deleted = deleted - wanted
    delete = sum(well_deleted[gram] / deleted[gram] for gram in well_deleted) / len(deleted) if deleted else 1.0

    added, addable = candidate.keys() - source.keys(), wanted.keys() - source.keys()
    well_added = added & wanted.keys()
    precision = len(well_added) / len(added) if added else 1.0
    recall = len(well_added) / len(addable) if addable else 1.0
    return keep, delete, _f1(precision, recall)


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI in 0..100 of one prediction, given at least one reference."""
    from_source, predicted = tokenize_13a(source), tokenize_13a(prediction)
    wanted = [tokenize_13a(reference) for reference in references]
    total = 0.0
    for n in _ORDERS:
        grams = [_ngrams(tokens, n) for tokens in wanted]
        total += sum(keep_delete_add(_ngrams(from_source, n), _ngrams(predicted, n), grams))
    return 100.0 * total / (3 * len(_ORDERS))
