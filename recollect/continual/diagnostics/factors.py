"""The old examples that are looked at, and what is known of each of their tokens.

A token's composition is (task, label of its example, frequency, position, class).  All of it is our choice; the names
of the factors are the MH-MoE study's [secondary].  A label is the first token of the answer, where a task's answers
begin with few different ones; the tokens at the beginning that all rows of a task share have none, for they are the
same whatever the label.
Source: moe_lora 5.1.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from recollect.io import canonical_json, sha256_text
from recollect.rng import stream

if TYPE_CHECKING:
    from recollect.continual.examples import Example
    from recollect.continual.task_stream import TaskRows

FACTORS = ("task", "label", "frequency", "position", "class")
CLASSES = ("word", "number", "punctuation", "symbol")
QUARTERS = 4
MOST_LABELS = 8
"""A task whose training answers begin with more different tokens has no labels."""
ABSENT = -1


@dataclass(frozen=True)
class OldExamples:
    """Examples of tasks in the order of training, task after task, and the factors of their n real tokens.

    tasks: names.  rows: (examples,).  row_task: (examples,) number of each one's task.  token_row: (n,) example of each
    token.  factors: {name: (n,) int64 value, ABSENT where there is none}.
    is_answer: (n,) bool, the next token belongs to the answer.
    """

    tasks: tuple[str, ...]
    rows: tuple[Example, ...]
    row_task: np.ndarray
    token_row: np.ndarray
    factors: Mapping[str, np.ndarray]
    is_answer: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def compositions(self) -> np.ndarray:
        """(n,) int64: tokens with the same value of every factor have the same number."""
        table = np.stack([self.factors[name] for name in FACTORS], axis=1)
        return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)

    @cached_property
    def row_prompt(self) -> np.ndarray:
        """(examples,) int64: examples of one prompt have the same number."""
        known: dict[bytes, int] = {}
        prompts = (row.input_ids[: row.n_prompt].tobytes() for row in self.rows)
        return np.array([known.setdefault(prompt, len(known)) for prompt in prompts])

    def first_tasks(self, n_tasks: int) -> OldExamples:
        """The examples of the first `n_tasks` tasks; their tokens are the first ones here."""
        return self.some(np.flatnonzero(self.row_task < n_tasks), n_tasks)

    def some(self, rows: np.ndarray, n_tasks: int | None = None) -> OldExamples:
        """The examples with the given numbers, in rising order."""
        kept = np.isin(self.token_row, rows)
        return OldExamples(
            self.tasks[:n_tasks],
            tuple(self.rows[at] for at in rows),
            self.row_task[rows],
            np.searchsorted(rows, self.token_row[kept]),
            {name: values[kept] for name, values in self.factors.items()},
            self.is_answer[kept],
        )

    def spread_rows(self, n_rows: int) -> np.ndarray:
        """Numbers of `n_rows` examples or a few more in rising order, as many of each task; all where it has fewer."""
        n_tasks = len(self.tasks)
        each = -(-n_rows // n_tasks)
        return np.concatenate([np.flatnonzero(self.row_task == task)[:each] for task in range(n_tasks)])

    def spread_tokens(self, n_tokens: int) -> np.ndarray:
        """Numbers of about `n_tokens` tokens in order, as many of each example, evenly over its length."""
        each = max(1, n_tokens // max(len(self.rows), 1))
        starts = np.searchsorted(self.token_row, np.arange(len(self.rows)))
        found = []
        for start, row in zip(starts, self.rows, strict=True):
            found.append(start + np.unique(np.linspace(0, len(row) - 1, min(each, len(row))).astype(np.int64)))
        return np.concatenate(found)

    def fingerprint(self) -> str:
        """SHA-256 of tasks and token ids."""
        return sha256_text(canonical_json([list(self.tasks), [row.input_ids.tolist() for row in self.rows]]))


def choose_old(tasks: Sequence[TaskRows], decode: Callable[[int], str], *, per_task: int, seed: int) -> OldExamples:
    """At most `per_task` training examples of every task, drawn at random, with the factors of their tokens.

    Args:
        tasks: of the stream, in order.
        decode: the text of one token id.
    """
    frequency = frequency_quarters([row.input_ids for one in tasks for row in one.rows])
    rows: list[Example] = []
    row_task: list[int] = []
    labels: list[int] = []
    shared: list[int] = []
    for number, one in enumerate(tasks):
        drawn = stream(seed, "diagnostic examples", one.name).permutation(len(one.rows))[:per_task]
        chosen = [one.rows[int(at)] for at in drawn]
        first_answers = {int(row.input_ids[row.n_prompt]) for row in one.rows}
        has_labels = len(first_answers) <= MOST_LABELS
        rows += chosen
        row_task += [number] * len(chosen)
        shared += [common_prefix([row.input_ids for row in one.rows])] * len(chosen)
        labels += [int(row.input_ids[row.n_prompt]) if has_labels else ABSENT for row in chosen]
    lengths = np.array([len(row) for row in rows])
    token_row = np.repeat(np.arange(len(rows)), lengths)
    ids = np.concatenate([row.input_ids for row in rows])
    position = np.concatenate([np.arange(length) for length in lengths])
    known: dict[int, int] = {}
    for token in np.unique(ids).tolist():
        known[token] = CLASSES.index(token_class(decode(token)))
    factors = {
        "task": np.array(row_task)[token_row],
        "label": np.where(position < np.array(shared)[token_row], ABSENT, np.array(labels)[token_row]),
        "frequency": np.array([frequency[token] for token in ids.tolist()]),
        "position": QUARTERS * position // lengths[token_row],
        "class": np.array([known[token] for token in ids.tolist()]),
    }
    prompt = np.array([row.n_prompt for row in rows])[token_row]
    is_answer = (position >= prompt - 1) & (position < lengths[token_row] - 1)
    return OldExamples(tuple(one.name for one in tasks), tuple(rows), np.array(row_task), token_row, factors, is_answer)


def common_prefix(rows: Sequence[np.ndarray]) -> int:
    """How many ids all rows begin with; 0 for a single row."""
    if len(rows) < 2:
        return 0
    shortest = min(map(len, rows))
    table = np.stack([row[:shortest] for row in rows])
    differs = np.flatnonzero((table != table[0]).any(axis=0))
    return int(differs[0]) if len(differs) else shortest


def frequency_quarters(rows: Sequence[np.ndarray]) -> dict[int, int]:
    """{token id: 0..3}: tokens by falling frequency in `rows`, cut where each quarter of all tokens is passed.

    Of equally frequent tokens the one with the smaller id comes first.
    """
    ids, counts = np.unique(np.concatenate(list(rows)), return_counts=True)
    order = np.lexsort((ids, -counts))
    before = np.cumsum(counts[order]) - counts[order]
    quarter = np.minimum(QUARTERS * before // counts.sum(), QUARTERS - 1)
    return dict(zip(ids[order].tolist(), quarter.tolist(), strict=True))


def token_class(text: str) -> str:
    """word, number, punctuation or symbol, by the first character that is no blank; part of a character is a word."""
    bare = text.strip()
    if not bare:
        return "symbol"
    if bare[0] == "\N{REPLACEMENT CHARACTER}":
        return "word"
    return {"L": "word", "M": "word", "N": "number", "P": "punctuation"}.get(unicodedata.category(bare[0])[0], "symbol")
