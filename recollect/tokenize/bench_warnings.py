"""What a reader must know before believing the table of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recollect.tokenize.bench_generative import budget_of
from recollect.tokenize.downstream_cases import CaseSets
from recollect.tokenize.embeddings import Items
from recollect.tokenize.run_config import BenchConfig
from recollect.tokenize.run_report import FEW_ITEMS_PER_CODE

SEEDS_FOR_A_CLAIM = 3
NO_GENERATIVE = "generative retrieval (HR and NDCG of a model that writes codes) was not measured; --generative does it"


def find_warnings(
    config: BenchConfig,
    items: Items,
    cases: CaseSets | None,
    models: Mapping[str, Mapping[str, Any]],
    rows: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Warnings about the rows, the click model and the data; `rows` are those of the report."""
    found = []
    if config.seeds < SEEDS_FOR_A_CLAIM:
        found.append(f"{config.seeds} seed(s) only; use --seeds {SEEDS_FOR_A_CLAIM} or more for a claim")
    if config.against not in models:
        found.append(f"{config.against!r} is not in the table, so no differences are reported; add it to --methods")
    bits = {label: row["bits"] for label, row in rows.items()}
    usual = bits.get(config.against, max(bits.values()))
    odd = {label: value for label, value in bits.items() if abs(value - usual) > 1e-6}
    if odd:
        listed = ", ".join(f"{label} {value:g}" for label, value in odd.items())
        found.append(f"not at the {usual:g} bits per item of the other rows: {listed}; read their errors beside that")
    found += [*few_items(len(items), models, rows), *unequal_starts(rows)]
    if config.downstream and cases is None:
        found.append("there is no log behind an .npy file, so the click model was left out")
    found += click_model_warnings(rows, config)
    if not config.generative:
        found.append(NO_GENERATIVE)
    elif items.dataset is None:
        found.append("there is no log behind an .npy file, so the generator was left out")
    aligned = [label for label, row in rows.items() if row["method"] == "letter"]
    if aligned:
        found.append(
            f"{', '.join(aligned)} also learns from the training log, which no other row sees, by singular vectors in "
            "place of the paper's sequence model"
        )
    without = items.source.get("items_without_text")
    if without:
        found.append(f"{without} items have no text at all and share one vector")
    found += [f"{label}: {warning}" for label, row in rows.items() for warning in row["warnings"]]
    if items.dataset is not None:
        found += [str(warning) for warning in items.dataset.meta.get("warnings", ())]
    return found


def few_items(n: int, models: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows with codebooks so large that the error of the items they were fitted on says little of others."""
    fitted = {
        label: max(row["sizes"])
        for label, row in rows.items()
        if row["starts"] is not None and "reconstruction/relative_mse" in models[label]
    }
    few = {label: size for label, size in fitted.items() if n < FEW_ITEMS_PER_CODE * size}
    if not few:
        return []
    listed = ", ".join(f"{label} ({size})" for label, size in few.items())
    return [
        f"{n} items for the codebooks of {listed}: under {FEW_ITEMS_PER_CODE} items a code, so errors look better than "
        "they are on new items; use a smaller --codebook-size"
    ]


def unequal_starts(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows whose fits were the best of other numbers of starts."""
    starts = {label: row["starts"] for label, row in rows.items() if row["starts"] is not None}
    if len(set(starts.values())) < 2:
        return []
    listed = ", ".join(f"{label} {count}" for label, count in starts.items())
    return [f"the best of more starts has the smaller error, and rows had other numbers of them: {listed}"]


def click_model_warnings(rows: Mapping[str, Mapping[str, Any]], config: BenchConfig) -> list[str]:
    """Rows whose click model was still improving, and a table of rows validated at other intervals."""
    found = []
    late = [label for label, row in rows.items() if any(epoch >= config.probe_epochs for epoch in row["best_epochs"])]
    if late:
        found.append(
            f"the click model of {', '.join(late)} was best at the end of its {config.probe_epochs} epochs; use a "
            "larger --probe-epochs before ranking these rows by it"
        )
    if len({count for row in rows.values() for count in row["validations"]}) > 1:
        found.append(
            "the click models of these rows were validated at other intervals, as rows of an older version are; "
            "make the comparison again with --overwrite"
        )
    return found


def generative_warnings(details: Mapping[str, Mapping[str, Sequence[Any]]], config: BenchConfig) -> list[str]:
    """Rows whose generator was still getting better when its epochs ran out."""
    last = budget_of(config)
    late = [
        label
        for label, row in details.items()
        if any(epoch + last.validate_every > last.epochs for epoch in row["best_epochs"])
    ]
    if not late:
        return []
    return [
        f"the generator of {', '.join(late)} was still improving at the last of {last.epochs} epochs; use a larger "
        "--generative-epochs before ranking these rows by it"
    ]
