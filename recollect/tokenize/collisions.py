"""Items that got the same code tuple, and the ways to tell them apart, behind one interface.

Nothing is random, and ties are broken by item id where ids are given (by row otherwise), so the result does not depend
on the order of rows. Generative models need every item to have its own tuple (`zcr`); click models want similar items
to share (`none`). Exactly equal embeddings always collide; only strategies that look at more than an embedding's codes
can separate them: the suffixes, `zcr` and `neighbour_repair`, `hash_last` where the items' attributes differ,
`capacity` and `constrained` unless a last digit has to hold several items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from recollect.errors import ConfigError, InputError, UnknownName
from recollect.tokenize.groups import canonical_rank, sizes_of, tuple_ids
from recollect.tokenize.protocol import ItemTokenizer
from recollect.tokenize.suffix import attribute_digits, suffix_digits

Strategy = Literal[
    "none",
    "suffix",
    "variable_suffix",
    "sinkhorn",
    "constrained",
    "capacity",
    "hash_last",
    "neighbour_repair",
    "zcr",
]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True)
class CollisionConfig:
    """Options of the strategies; each is read by the one it names."""

    epsilon: float = 0.003
    """sinkhorn: strength of the entropy term."""
    iterations: int = 100
    """sinkhorn: pairs of row and column normalisations."""
    rounds: int = 20
    """sinkhorn: times that groups which still share a tuple are assigned anew."""
    capacity: int = 1
    """capacity: items a last digit may hold inside a prefix group; raised where a group would not fit."""
    neighbours: int = 5
    """neighbour_repair: nearest codes of each level that are combined."""
    buckets: int = 0
    """hash_last: codes of the last level; 0 = as many as it had."""

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < float("inf"):
            raise ConfigError(f"epsilon must be above 0, got {self.epsilon!r}")
        for name, least in (("iterations", 1), ("rounds", 1), ("capacity", 1), ("neighbours", 1), ("buckets", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Resolution:
    """Codes after collision handling, and what that took.

    codes: (N, L) or, with an extra digit, (N, L+1) int32; -1 (only in the last column of `variable_suffix`) = the tuple
    has ended.  codebook_sizes: codes per column.  decodable_levels: leading columns that still address the tokenizer's
    codebooks.  changed_items, changed_digits: how many items and digits differ from what was emitted, extra digits
    apart.  extended_items: items for which an extra digit matters.  added_distortion: mean over all items of the
    growth in squared reconstruction error, None where it cannot be told.  unresolved: items that still share their
    tuple.  notes: sentences a user must read.
    """

    strategy: str
    codes: np.ndarray
    codebook_sizes: tuple[int, ...]
    decodable_levels: int
    changed_items: int = 0
    changed_digits: int = 0
    extended_items: int = 0
    added_distortion: float | None = 0.0
    unresolved: int = 0
    notes: tuple[str, ...] = field(default=())

    def summary(self) -> dict[str, Any]:
        """Everything but the codes, as JSON values for manifest and page."""
        return {
            "strategy": self.strategy,
            "codebook_sizes": list(self.codebook_sizes),
            "decodable_levels": self.decodable_levels,
            "changed_items": self.changed_items,
            "changed_digits": self.changed_digits,
            "extended_items": self.extended_items,
            "added_distortion": self.added_distortion,
            "unresolved": self.unresolved,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Question:
    """What a strategy is given: codes (N, L), tie-breaking rank (N,), existing tuples (M, L) and extra digits (M,)."""

    codes: np.ndarray
    sizes: tuple[int, ...]
    rank: np.ndarray
    existing: np.ndarray
    existing_digits: np.ndarray | None
    config: CollisionConfig
    tokenizer: ItemTokenizer | None
    embeddings: np.ndarray | None
    attributes: Sequence[Sequence[object]] | None

    def fitted(self, strategy: str) -> tuple[ItemTokenizer, np.ndarray]:
        """Tokenizer and embeddings (N, D) of a strategy that weighs distances."""
        if self.tokenizer is None or self.embeddings is None:
            raise InputError(f"the collision strategy {strategy!r} weighs distances; give tokenizer and embeddings")
        if len(self.embeddings) != len(self.codes):
            raise InputError(f"{len(self.embeddings)} embeddings for {len(self.codes)} rows of codes")
        return self.tokenizer, self.embeddings


@dataclass(frozen=True)
class _Answer:
    """codes (N, L); extra digits (N,) or None; leading levels still decodable (None = all); sentences to read."""

    codes: np.ndarray
    digits: np.ndarray | None = None
    decodable: int | None = None
    last_size: int | None = None
    notes: tuple[str, ...] = ()


def check_strategy(
    strategy: str, tokenizer: ItemTokenizer, sizes: Sequence[int], config: CollisionConfig = CollisionConfig()
) -> None:
    """Refuse a strategy that cannot work with a method, by what its options say; the tokenizer need not be fitted.

    Args:
        sizes: K_0..K_{L-1} that the tokenizer has or will have.

    Raises:
        InputError: codes that have no price; too many tuples to search, or a method that does not search.
    """
    from recollect.tokenize.digit_costs import check_last_digits, check_reconstruction
    from recollect.tokenize.neighbour_repair import searched_codes

    if strategy in ("sinkhorn", "constrained", "capacity", "zcr"):
        check_last_digits(tokenizer)
    elif strategy == "neighbour_repair":
        check_reconstruction(tokenizer)
        tokenizer.check_search(top_m=searched_codes(config.neighbours, sizes))


def resolve_collisions(
    codes: np.ndarray,
    strategy: str = "zcr",
    *,
    tokenizer: ItemTokenizer | None = None,
    embeddings: np.ndarray | None = None,
    codebook_sizes: Sequence[int] | None = None,
    item_ids: Sequence[str] | None = None,
    attributes: Sequence[Sequence[object]] | None = None,
    existing: np.ndarray | None = None,
    config: CollisionConfig = CollisionConfig(),
) -> Resolution:
    """Tell items with equal codes apart.

    Args:
        codes: (N, L) int, as the tokenizer emitted them.
        strategy: one of `STRATEGIES`; see the modules of the same names, and `last_digit` for zcr, constrained and
            capacity.
        tokenizer, embeddings: the fitted tokenizer and the (N, D) rows it encoded; needed by sinkhorn, constrained,
            capacity, neighbour_repair and zcr, and by hash_last for its `added_distortion` only.
        codebook_sizes: K_0..K_{L-1}; default those of `tokenizer`.
        item_ids: N distinct names that break ties; default the order of rows.
        attributes: columns of N values, for hash_last.
        existing: (M, L) or (M, L+1) tuples of items that must not change, resolved before with the same strategy;
            nothing new is given one of them where it can be helped.
        config: options of the strategies.

    Raises:
        UnknownName: an unknown strategy.
        InputError: codes outside their codebooks; something the strategy needs is missing or of another length; a
            tokenizer whose codes cannot be priced (see `digit_costs`).
    """
    if strategy not in _STRATEGIES:
        raise UnknownName("collision strategy", strategy, STRATEGIES)
    sizes = _checked_sizes(codes, codebook_sizes, tokenizer)
    n, depth = codes.shape
    tuples, digits = _split_existing(existing, depth, strategy)
    emitted = np.array(codes, dtype=np.int32, order="C")
    emitted.flags.writeable = False  # strategies answer with a copy
    rank = canonical_rank(n, item_ids)
    question = _Question(emitted, sizes, rank, tuples, digits, config, tokenizer, embeddings, attributes)
    answer = _STRATEGIES[strategy](question)

    kept = depth if answer.decodable is None else answer.decodable
    differs = answer.codes != emitted
    whole, old = answer.codes, tuples
    if answer.digits is not None:
        whole = np.concatenate([whole, answer.digits[:, None]], axis=1)
        held = np.zeros(0, dtype=np.int32) if digits is None else digits  # none only where nothing exists
        old = np.concatenate([tuples, held[:, None]], axis=1)
        sizes = (*sizes, int(max(answer.digits.max(initial=0), held.max(initial=0))) + 1)
    elif answer.last_size is not None:
        sizes = (*sizes[:-1], answer.last_size)
    unresolved = int((sizes_of(tuple_ids(np.concatenate([whole, old])))[:n] > 1).sum())
    return Resolution(
        strategy=strategy,
        codes=whole,
        codebook_sizes=sizes,
        decodable_levels=kept,
        changed_items=int(differs.any(axis=1).sum()),
        changed_digits=int(differs.sum()),
        extended_items=0 if answer.digits is None else _extended(answer.codes, tuples),
        added_distortion=_added_distortion(question, answer.codes, kept, differs.any(axis=1)),
        unresolved=unresolved,
        notes=answer.notes,
    )


def _checked_sizes(
    codes: np.ndarray, codebook_sizes: Sequence[int] | None, tokenizer: ItemTokenizer | None
) -> tuple[int, ...]:
    if codebook_sizes is None:
        if tokenizer is None:
            raise InputError("give codebook_sizes or a fitted tokenizer")
        tokenizer.check_fitted()
        codebook_sizes = tokenizer.codebook_sizes
    sizes = tuple(int(size) for size in codebook_sizes)
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or not sizes or not np.issubdtype(codes.dtype, np.integer):
        raise InputError(f"codes must be integers of shape (N, {len(sizes)}), got {codes.dtype} {codes.shape}")
    for level, size in enumerate(sizes):
        wrong = np.flatnonzero((codes[:, level] < 0) | (codes[:, level] >= size))
        if len(wrong):
            raise InputError(
                f"code {int(codes[wrong[0], level])} of row {int(wrong[0])} at level {level} is outside 0..{size - 1}"
            )
    return sizes


def _split_existing(existing: np.ndarray | None, depth: int, strategy: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Existing tuples (M, L) and their extra digits (M,), None where they have none."""
    if existing is None:
        return np.zeros((0, depth), dtype=np.int32), None
    allowed = {"suffix": (depth + 1,), "variable_suffix": (depth + 1,), "zcr": (depth, depth + 1)}
    widths = allowed.get(strategy, (depth,))
    if existing.ndim != 2 or existing.shape[1] not in widths or not np.issubdtype(existing.dtype, np.integer):
        raise InputError(
            f"existing codes must be integers of shape (M, {' or '.join(map(str, widths))}) with {depth} levels under "
            f"{strategy!r}, got {existing.dtype} {existing.shape}; use the strategy they were resolved with"
        )
    existing = existing.astype(np.int32)
    return np.ascontiguousarray(existing[:, :depth]), existing[:, depth] if existing.shape[1] > depth else None


def _extended(codes: np.ndarray, existing: np.ndarray) -> int:
    return int((sizes_of(tuple_ids(np.concatenate([codes, existing])))[: len(codes)] > 1).sum())


def _added_distortion(question: _Question, codes: np.ndarray, kept: int, changed: np.ndarray) -> float | None:
    from recollect.tokenize.digit_costs import ReconstructionCosts

    is_shorter = kept < question.codes.shape[1]
    if not is_shorter and not changed.any():
        return 0.0
    tokenizer, embeddings = question.tokenizer, question.embeddings
    if tokenizer is None or embeddings is None or not tokenizer.reconstructs or kept == 0:
        return None
    costs = ReconstructionCosts(tokenizer, embeddings)
    rows = np.arange(len(codes)) if is_shorter else np.flatnonzero(changed)
    before = costs.of_codes(rows, question.codes[rows])
    return float((costs.of_codes(rows, codes[rows, :kept]) - before).sum() / len(codes))


def _none(question: _Question) -> _Answer:
    return _Answer(question.codes)


def _suffix(question: _Question, is_variable: bool) -> _Answer:
    held = question.existing_digits if question.existing_digits is not None else np.zeros(0, dtype=np.int32)
    digits = suffix_digits(question.codes, question.rank, question.existing, held, is_variable=is_variable)
    return _Answer(question.codes, digits)


def _sinkhorn(question: _Question) -> _Answer:
    from recollect.tokenize.digit_costs import LastDigitCosts
    from recollect.tokenize.sinkhorn import sinkhorn_last_digits

    config = question.config
    codes = sinkhorn_last_digits(
        question.codes,
        LastDigitCosts(*question.fitted("sinkhorn")),
        question.rank,
        question.existing,
        epsilon=config.epsilon,
        iterations=config.iterations,
        rounds=config.rounds,
    )
    return _Answer(codes)


def _constrained(question: _Question) -> _Answer:
    from recollect.tokenize.digit_costs import LastDigitCosts
    from recollect.tokenize.last_digit import constrained_last_digits

    costs = LastDigitCosts(*question.fitted("constrained"))
    return _Answer(constrained_last_digits(question.codes, costs, question.rank, question.existing))


def _capacity(question: _Question) -> _Answer:
    from recollect.tokenize.digit_costs import LastDigitCosts
    from recollect.tokenize.last_digit import capacity_last_digits

    costs = LastDigitCosts(*question.fitted("capacity"))
    capacity = question.config.capacity
    return _Answer(capacity_last_digits(question.codes, costs, question.rank, question.existing, capacity=capacity))


def _hash_last(question: _Question) -> _Answer:
    if question.attributes is None:
        raise InputError("the collision strategy 'hash_last' needs attributes: columns with one value per item")
    buckets = question.config.buckets or question.sizes[-1]
    digits = attribute_digits(question.attributes, buckets)
    if len(digits) != len(question.codes):
        raise InputError(f"attributes describe {len(digits)} items where there are {len(question.codes)}")
    codes = question.codes.copy()
    codes[:, -1] = digits
    return _Answer(codes, decodable=codes.shape[1] - 1, last_size=buckets)


def _neighbour_repair(question: _Question) -> _Answer:
    from recollect.tokenize.digit_costs import ReconstructionCosts
    from recollect.tokenize.neighbour_repair import repaired_tuples

    tokenizer, embeddings = question.fitted("neighbour_repair")
    codes = repaired_tuples(
        question.codes,
        ReconstructionCosts(tokenizer, embeddings),
        embeddings,
        question.rank,
        question.existing,
        neighbours=question.config.neighbours,
    )
    return _Answer(codes)


def _zcr(question: _Question) -> _Answer:
    from recollect.tokenize.digit_costs import LastDigitCosts
    from recollect.tokenize.last_digit import zcr_last_digits

    costs = LastDigitCosts(*question.fitted("zcr"))
    codes, is_full = zcr_last_digits(question.codes, costs, question.rank, question.existing)
    n_full, held = int(is_full.sum()), question.existing_digits
    if not n_full and held is None:
        return _Answer(codes)
    crowded = (
        f"{n_full} items are in prefix groups with more items than the {question.sizes[-1]} codes of the last level"
    )
    if held is None and len(question.existing):
        return _Answer(codes, notes=(f"{crowded}; existing tuples leave no room for an extra digit, refit instead",))
    if held is None:
        held = np.zeros(0, dtype=np.int32)
    digits = suffix_digits(codes, question.rank, question.existing, held, is_variable=False)
    notes = (f"{crowded}; these are told apart by an extra digit (suffix)",) if n_full else ()
    return _Answer(codes, digits, notes=notes)


_STRATEGIES: dict[str, Callable[[_Question], _Answer]] = {
    "none": _none,
    "suffix": lambda question: _suffix(question, is_variable=False),
    "variable_suffix": lambda question: _suffix(question, is_variable=True),
    "sinkhorn": _sinkhorn,
    "constrained": _constrained,
    "capacity": _capacity,
    "hash_last": _hash_last,
    "neighbour_repair": _neighbour_repair,
    "zcr": _zcr,
}
