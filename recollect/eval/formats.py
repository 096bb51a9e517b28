"""How a report writes numbers, intervals, names and untrusted text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

MISSING = "–"

# C0 and C1 controls except tab and newline, bidirectional overrides and isolates, zero-width and invisible characters,
# lone surrogates, and code points no XML document may hold: none of them may reach a page, an SVG or a terminal.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufffe\uffff\U000e0000-\U000e007f]"
)
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")

_LOWER_IS_BETTER = frozenset(
    {"mae", "rmse", "w1", "tv", "js", "ks", "ece", "kl", "logloss", "log_loss", "brier", "gap", "distance"}
    | {"bias_spread", "flip_rate", "mrmc", "tokens_per_user", "seconds_per_user"}
    | {"relative_mse", "collision_rate", "items_in_collision", "max_group", "tokens_per_item", "fit_seconds"}
    | {"peak_mb", "forgetting", "forgetting_nonnegative"}
)

# Best near zero, one or a half, or a property of the data: no direction is the better one.
_NEUTRAL = frozenset(
    {"bias", "variance_ratio", "first_option_share", "kl_of_uniform", "best_mrr"}
    | {"lpd", "dgap", "tail_share", "gini", "coverage"}
)

_LABELS = {
    "ranking/mrr": "MRR",
    "ranking/ndcg@10": "NDCG@10",
    "ranking/ndcg@5": "NDCG@5",
    "ranking/hr@1": "HR@1",
    "choice/accuracy": "Choice accuracy",
    "rating/mae": "Rating MAE",
    "rating/rmse": "Rating RMSE",
    "rating/w1": "Rating W1",
    "taste/balanced_accuracy": "Taste balanced accuracy",
    "reconstruction/relative_mse": "Relative squared error",
    "reconstruction/rmse": "RMSE",
    "reconstruction/cosine": "Cosine",
    "knn_overlap@10": "kNN overlap@10",
    "collision_rate": "Collision rate",
    "items_in_collision": "Items in collision",
    "unique_rate": "Different codes / items",
    "max_group": "Largest group",
    "icr": "ICR",
    "alignment/lift": "Behaviour lift",
    "tokens_per_item": "Tokens per item",
    "op": "OP",
    "bwt": "BWT",
    "forgetting": "Forgetting",
    "op_norm": "OP above floors",
    "fwt": "Forward transfer",
}


def clean(text: Any) -> str:
    """`text` without terminal sequences, control, bidirectional and invisible characters."""
    return _INVISIBLE.sub("", _ANSI.sub("", str(text)))


def one_line(text: Any, limit: int = 120) -> str:
    """`clean` text with its whitespace folded, cut with an ellipsis beyond `limit` characters."""
    folded = " ".join(clean(text).split())
    return folded if len(folded) <= limit else folded[: limit - 1].rstrip() + "…"


def number(value: Any, digits: int = 3) -> str:
    """Whole numbers with thousands separators, others with `digits` decimals; very small ones in scientific form."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    value = float(value)
    if value != value:
        return MISSING
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 100:
        text = f"{value:.1f}"
    elif 0 < size < 0.5 * 10**-digits:
        text = f"{value:.1e}"
    else:
        text = f"{value:.{digits}f}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def interval(ci95: Any, digits: int = 3) -> str:
    """`[lo, hi]`, or "" where there is none."""
    if not ci95 or ci95[0] is None or ci95[1] is None:
        return ""
    return f"[{number(ci95[0], digits)}, {number(ci95[1], digits)}]"


def metric_label(metric: str) -> str:
    """A metric's name for people; unknown ones are shown as they are."""
    return _LABELS.get(metric, clean(metric))


def direction(metric: str) -> Literal["higher", "lower", "neither"]:
    """Which values of `metric` are the better ones: lower for errors and distances, neither for biases and ratios."""
    parts = re.split(r"[/@]", metric.lower())
    if any(part in _NEUTRAL for part in parts):
        return "neither"
    is_error = any(part in _LOWER_IS_BETTER or part.endswith(("_mae", "_gap", "_distance")) for part in parts)
    return "lower" if is_error else "higher"


def scalar(value: Any) -> str:
    """Any JSON value as short text for a two-column list."""
    if isinstance(value, str):
        return clean(value)
    if value is None or isinstance(value, int | float):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(key)}: {scalar(item)}" for key, item in value.items())
    return ", ".join(scalar(item) for item in value)


def label(key: str) -> str:
    """A JSON key as words: underscores become spaces, the first letter a capital."""
    words = clean(key).replace("_", " ").strip()
    return words[:1].upper() + words[1:]
