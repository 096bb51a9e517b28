"""Prompt and answer to token ids, labels and padded batches, with exact loss masking.

A row is [start token] prompt answer [end token].  Prompt and answer are tokenised apart and their ids joined, so which
positions are supervised is exact by construction: where a tokenisation of the joined text merges across the boundary,
masking by the length of the answer alone hits the wrong token.  The start token is there where the model's tokenizer
puts one; the end token follows every whole answer and is supervised.  Text is data: control tokens inside it are read
as letters.  Arrays are numpy, rows are padded on the left.
Source: trace_benchmark 2.5, 3.1, 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from recollect.continual.trace_prompts import fit_prompt, split_prompt
from recollect.continual.trace_tasks import TraceTask
from recollect.errors import ConfigError, DataError, ModelFileError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NO_LOSS = -100
Template = Literal["none", "chat"]
Truncation = Literal["body", "official_left"]
LossOn = Literal["answer", "all"]


@dataclass(frozen=True)
class Lengths:
    """Tokens allowed.

    max_prompt: of a prompt, its start token and chat template included.  max_answer: what prompt and answer together
    may have beyond `max_prompt`; a longer answer shortens the prompt.  truncation: "body" shortens what is between
    instruction and cue; "official_left" drops ids from the left, as the benchmark's own collator does.
    """

    max_prompt: int = 1024
    max_answer: int = 512
    truncation: Truncation = "body"

    def __post_init__(self) -> None:
        for name in ("max_prompt", "max_answer"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.truncation not in ("body", "official_left"):
            raise ConfigError(f"truncation must be 'body' or 'official_left', got {self.truncation!r}")

    @property
    def total(self) -> int:
        """Tokens of the longest row."""
        return self.max_prompt + self.max_answer

    def check_context(self, context: int) -> None:
        """Refuse rows that are longer than the model's context.

        Raises:
            ConfigError: they are.
        """
        if self.total > context:
            raise ConfigError(
                f"max_prompt {self.max_prompt} + max_answer {self.max_answer} = {self.total} tokens do not fit the "
                f"model's context of {context}; lower one of them"
            )


class TaskTokenizer:
    """Token ids of prompts and answers for one model.

    template: "none" = [start token] + prompt; "chat" = the prompt as the user's message, up to where the assistant's
    answer begins.  Evaluate with the template of training.

    Raises:
        ModelFileError: no fast tokenizer, no end token, or "chat" without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: Template = "none") -> None:
        from recollect.backbones.chat_tokens import ChatTokenizer
        from recollect.backbones.plain_tokens import PlainTokenizer

        if template not in ("none", "chat"):
            raise ConfigError(f"template must be 'none' or 'chat', got {template!r}")
        if tokenizer.eos_token_id is None:
            raise ModelFileError("the model's tokenizer has no end token; an answer could never end")
        self.tokenizer = tokenizer
        self.template: Template = template
        self.end_id = int(tokenizer.eos_token_id)
        self.pad_id = self.end_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self._text = PlainTokenizer(tokenizer)
        self._chat = ChatTokenizer(tokenizer) if template == "chat" else None
        around = tokenizer("a")["input_ids"]
        has_start = tokenizer.bos_token_id is not None and around[:1] == [tokenizer.bos_token_id]
        self.start_ids: tuple[int, ...] = (int(tokenizer.bos_token_id),) if has_start else ()

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a whole prompt, start token or chat template included."""
        if self._chat is not None:
            from recollect.backbones.protocol import Message

            return self._chat.encode_chat((Message("user", prompt),))
        return [*self.start_ids, *self._text.encode(prompt)]

    def encode_answer(self, answer: str) -> list[int]:
        """Ids of an answer without the end token."""
        return self._text.encode(answer)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of generated ids up to the first end token, blanks as generated."""
        values = [int(token) for token in ids]
        if self.end_id in values:
            values = values[: values.index(self.end_id)]
        return str(self.tokenizer.decode(values, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Example:
    """One training row.

    input_ids, labels: (T,) int64; labels are NO_LOSS where nothing is learned.  n_prompt: ids of the prompt.
    n_dropped: how much of the prompt was left out, characters under "body", ids under "official_left".
    is_answer_cut: the answer was too long even beside the shortest prompt; its rest and the end token are missing.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    n_prompt: int
    n_dropped: int = 0
    is_answer_cut: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


class PromptIds(NamedTuple):
    """Ids of a prompt that fits, and how much was left out (characters, or ids under "official_left")."""

    ids: list[int]
    n_dropped: int


class PaddedBatch(NamedTuple):
    """Rows padded on the left, each (B, T) int64; labels are NO_LOSS in padding, position ids count real tokens."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


def encode_prompt(
    task: TraceTask, prompt: str, tokens: TaskTokenizer, lengths: Lengths, where: str = "prompt", *, room: int = 0
) -> PromptIds:
    """Ids of a prompt as it is generated from, at most `lengths.max_prompt` (or `room`, where given) of them.

    Raises:
        DataError: instruction and cue alone are longer; the message begins with `where`.
    """
    budget = room or lengths.max_prompt
    if lengths.truncation == "body":
        fitted = fit_prompt(task, prompt, lambda text: len(tokens.encode_prompt(text)), budget, where)
        return PromptIds(tokens.encode_prompt(fitted.text), fitted.n_dropped)
    ids = tokens.encode_prompt(prompt)
    n_dropped = max(0, len(ids) - budget)
    n_start = len(tokens.start_ids) if tokens.template == "none" else 0
    if budget <= n_start:
        raise DataError(f"{where}: a prompt of at most {budget} tokens has no room for text; raise the prompt length")
    return PromptIds(ids[:n_start] + ids[n_start + n_dropped :], n_dropped)


def encode_example(
    task: TraceTask,
    prompt: str,
    answer: str,
    tokens: TaskTokenizer,
    lengths: Lengths,
    loss_on: LossOn = "answer",
    where: str = "row",
) -> Example:
    """A training row of at most `lengths.total` ids.

    Raises:
        DataError: the answer is empty, or instruction and cue do not fit; the message begins with `where`.
    """
    answer_ids = tokens.encode_answer(answer)
    if not answer_ids:
        raise DataError(f"{where}: the answer is empty; nothing could be learned from it")
    target = [*answer_ids, tokens.end_id]
    room = _room_for_prompt(task, prompt, tokens, lengths, len(target), where)
    encoded = encode_prompt(task, prompt, tokens, lengths, where, room=room)
    is_cut = len(encoded.ids) + len(target) > lengths.total
    if is_cut:
        target = answer_ids[: lengths.total - len(encoded.ids)]
    ids = np.array([*encoded.ids, *target], dtype=np.int64)
    labels = ids.copy()
    if loss_on == "answer":
        labels[: len(encoded.ids)] = NO_LOSS
    return Example(ids, labels, len(encoded.ids), encoded.n_dropped, is_cut)


def _room_for_prompt(
    task: TraceTask, prompt: str, tokens: TaskTokenizer, lengths: Lengths, n_target: int, where: str
) -> int:
    """Ids the prompt may have beside `n_target` ids of answer.

    A long answer shortens the prompt, though not below half of what a prompt may have nor below what the task asks;
    an answer longer than that is cut.
    """
    left = lengths.total - n_target
    if lengths.truncation == "official_left":
        return max(left, len(tokens.start_ids) + 1)
    if left >= lengths.max_prompt:
        return lengths.max_prompt
    if len(tokens.encode_prompt(prompt)) <= left:
        return left
    parts = split_prompt(task, prompt, where)
    fixed = len(tokens.encode_prompt(parts.prefix + parts.cue))
    return max(left, min(lengths.max_prompt, max(fixed, lengths.max_prompt // 2)))


def pad_left(rows: Sequence[Example], pad_id: int, multiple: int = 8) -> PaddedBatch:
    """Rows of unequal length as one batch, its width rounded up to `multiple`.

    Position ids count from 0 at a row's first real token, so a row's result does not depend on its neighbours.

    Raises:
        ConfigError: no rows, or `multiple` below 1.
    """
    if not rows or multiple < 1:
        raise ConfigError(f"padding needs at least one row and a multiple of at least 1, got {len(rows)}, {multiple!r}")
    width = -(-max(map(len, rows)) // multiple) * multiple
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, NO_LOSS, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    for at, row in enumerate(rows):
        start = width - len(row)
        input_ids[at, start:] = row.input_ids
        labels[at, start:] = row.labels
        mask[at, start:] = 1
        positions[at, start:] = np.arange(len(row))
    return PaddedBatch(input_ids, mask, labels, positions)


def prompt_row(encoded: PromptIds) -> Example:
    """A prompt as a row for `pad_left` before generation: nothing is supervised."""
    ids = np.array(encoded.ids, dtype=np.int64)
    return Example(ids, np.full(len(ids), NO_LOSS, dtype=np.int64), len(ids), encoded.n_dropped)
