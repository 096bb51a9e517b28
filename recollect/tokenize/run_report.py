"""The report of one tokenization: every metric, beside random codes of the same size, and panels to judge it by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from recollect.rng import stream
from recollect.tokenize.artefact import TokenizedItems
from recollect.tokenize.embeddings import Items
from recollect.tokenize.measure import measured
from recollect.tokenize.methods import Entry
from recollect.tokenize.panels import cluster_panels, collision_panels, level_table, uncertain_panel, usage_curve
from recollect.tokenize.protocol import ItemTokenizer
from recollect.tokenize.quality import code_metrics
from recollect.tokenize.run_config import TokenizeConfig
from recollect.types import Report

FIRST = (
    "reconstruction/relative_mse",
    "reconstruction/cosine",
    "knn_overlap@10",
    "collision_rate",
    "items_in_collision",
    "max_group",
    "alignment/lift",
    "tokens_per_item",
)
"""Columns of the first table; the other metrics follow by family."""

FEW_ITEMS_PER_CODE = 4


def make_report(
    config: TokenizeConfig,
    entry: Entry,
    items: Items,
    made: TokenizedItems,
    notes: Mapping[str, Any],
    manifest: dict[str, Any],
) -> Report:
    """The report of a finished artefact; the numbers are of the IDs after collision handling."""
    tokenizer = made.tokenizer
    assert tokenizer is not None
    metrics = measured(
        tokenizer,
        items,
        made.ids,
        made.encoding,
        decodable_levels=notes["decodable_levels"],
        seed=config.seed,
    )
    ordered = {name: metrics[name] for name in FIRST if name in metrics} | metrics
    sizes = made.ids.codebook_sizes
    report = Report(
        kind="tokenize",
        protocol=protocol(config, items, made, notes),
        metrics={name: _entry(value, len(items)) for name, value in ordered.items()},
        baselines={"random": random_floor(tokenizer.codebook_sizes, len(items), config.seed)},
        ledger={
            "items": len(items),
            "seconds": _rounded((notes["fit_seconds"] or 0.0) + notes["encode_seconds"]),
            "fit_seconds": _rounded(notes["fit_seconds"]),
            "encoded_items_per_second": _rounded(len(items) / max(notes["encode_seconds"], 1e-9)),
            "peak_memory_mb_above_start": _rounded(notes["peak_mb"]),
        },
        warnings=find_warnings(config, items, made, notes, tokenizer),
        sections={
            "subject": entry.spec.name,
            "primary_metric": "reconstruction/relative_mse" if tokenizer.reconstructs else "collision_rate",
            "levels": notes["levels"],
            "collisions": notes["collisions"],
            "codebook_sizes": list(sizes),
            "run": manifest,
        },
    )
    codes = np.asarray(made.ids.codes)
    report.sections["panels"] = [
        headline(items, made, notes),
        level_table(sizes, metrics, notes["levels"]),
        usage_curve(codes, sizes),
        *cluster_panels(items, codes, seed=config.seed),
        *collision_panels(items, codes),
        *_uncertain(items, made),
    ]
    return report


def _entry(value: float, n: int) -> dict[str, Any]:
    return {"value": float(value), "ci95": [None, None], "n": n}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 3)


def random_floor(sizes: tuple[int, ...], n: int, seed: int) -> dict[str, dict[str, Any]]:
    """`code_metrics` of n draws at these sizes: how much use and how many collisions chance alone gives."""
    generator = stream(seed, "random codes beside the report")
    codes = np.stack([generator.integers(size, size=n) for size in sizes], axis=1)
    return {name: _entry(value, n) for name, value in code_metrics(codes, sizes).items()}


def headline(items: Items, made: TokenizedItems, notes: Mapping[str, Any]) -> dict[str, Any]:
    """What came out, in one sentence."""
    distinct = len(np.unique(made.ids.codes, axis=0))
    sizes = made.ids.codebook_sizes
    shape = f"{len(sizes)} x {sizes[0]}" if len(set(sizes)) == 1 else " x ".join(map(str, sizes))
    text = (
        f"{len(items):,} items have {distinct:,} different codes of {shape} "
        f"({sum(math.log2(size) for size in sizes):.1f} bits), for example {made.texts[0]}."
    )
    found = notes["collisions"]
    if found["strategy"] != "none":
        text += (
            f" The tokenizer itself emitted {notes['emitted_distinct']:,}; {found['strategy']} changed "
            f"{found['changed_items']:,} items and extended {found['extended_items']:,}"
        )
        added = found["added_distortion"]
        text += "." if added is None else f", which adds {added:.3g} to the mean squared error of an item."
    return {"kind": "text", "title": "In one sentence", "text": text, "terminal": True}


def _uncertain(items: Items, made: TokenizedItems) -> list[dict[str, Any]]:
    if made.encoding is None or made.encoding.confidence is None:
        return []
    return uncertain_panel(items, np.asarray(made.ids.codes), made.encoding.confidence)


def protocol(config: TokenizeConfig, items: Items, made: TokenizedItems, notes: Mapping[str, Any]) -> dict[str, Any]:
    """Everything a number of the page depends on."""
    fitted = made.details["fitted_items"]
    return {
        "data": items.dataset.name if items.dataset is not None else config.data,
        "method": config.method,
        "items": len(items),
        "dimension": int(items.embeddings.shape[1]),
        "vectors": items.source,
        "embedder": items.source.get("embedder", "none, vectors are given"),
        "fitted_on": "all items" if fitted == len(items) else f"the {fitted:,} items with a training event",
        "weight": config.weight,
        "beam": config.beam,
        "collisions": notes["collisions"]["strategy"],
        "seed": config.seed,
        "errors": "squared distance to what the codes decode to, over the squared distance to the mean vector",
        "perplexity": "exp of the entropy of a level's codes, over the number of its codes",
        "behaviour": "successive events of training histories" if items.split is not None else "no log",
    }


def find_warnings(
    config: TokenizeConfig, items: Items, made: TokenizedItems, notes: Mapping[str, Any], tokenizer: ItemTokenizer
) -> list[str]:
    """What a reader must know before using these IDs."""
    found = list(notes["warnings"])
    largest = max(tokenizer.codebook_sizes)
    if len(items) < FEW_ITEMS_PER_CODE * largest:
        found.append(
            f"{len(items)} items for codebooks of {largest}: under {FEW_ITEMS_PER_CODE} items a code, so errors look "
            "better than they are on new items; use a smaller --codebook-size"
        )
    without = items.source.get("items_without_text")
    if without:
        found.append(f"{without} items have no text at all and share one vector")
    if not tokenizer.reconstructs:
        found.append(f"{config.method} gives no reconstruction, so there is no error to report")
    unresolved = notes["collisions"]["unresolved"]
    if config.collisions != "none" and unresolved:
        found.append(f"{unresolved} items still share their code after {config.collisions}")
    if items.dataset is not None:
        found += [str(warning) for warning in items.dataset.meta.get("warnings", ())]
    return found
