"""Prompts that fit: the body gives way, what the task asks stays.

The official collator lets the tokenizer cut on the left, which on every long transcript deletes the only statement of
the task.  Here a prompt is split into (prefix, body, cue) and the body loses its tail (for code: its head) until the
prompt, rendered and tokenised again as a whole, fits.
Source: trace_benchmark 2.5 [our design].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from recollect.continual.trace_tasks import Keep, TraceTask
from recollect.errors import DataError


class PromptParts(NamedTuple):
    """A prompt cut in three; joined they are the prompt."""

    prefix: str
    body: str
    cue: str


class FittedPrompt(NamedTuple):
    """A prompt of at most the tokens allowed, and how many characters of its body were left out."""

    text: str
    n_dropped: int


def has_task_form(task: TraceTask, prompt: str) -> bool:
    """Whether the prompt begins with the task's prefix and ends with its cue; the body may be empty."""
    if not (prompt.startswith(task.prefix) and prompt.endswith(task.cue)):
        return False
    return task.cue_from in prompt[len(task.prefix) :] or prompt == task.prefix + task.cue


def split_prompt(task: TraceTask, prompt: str, where: str = "prompt") -> PromptParts:
    """The three parts of a prompt of `task`.

    Raises:
        DataError: the prompt does not have the task's form; the message begins with `where`.
    """
    if not has_task_form(task, prompt):
        raise DataError(
            f"{where}: not a prompt of {task.name}: it must begin with {task.prefix!r} and end with {task.cue!r}, "
            f"got {prompt[:60]!r} … {prompt[-30:]!r}"
        )
    if task.cue and prompt == task.prefix + task.cue:
        return PromptParts(task.prefix, "", task.cue)
    end = prompt.rindex(task.cue_from) if task.cue_from else len(prompt)
    return PromptParts(prompt[: len(task.prefix)], prompt[len(task.prefix) : end], prompt[end:])


def paragraph(task: TraceTask, prompt: str, where: str = "prompt") -> str:
    """The body alone: the transcript, the paragraph, the question."""
    return split_prompt(task, prompt, where).body


def fit_prompt(
    task: TraceTask, prompt: str, n_tokens: Callable[[str], int], budget: int, where: str = "prompt"
) -> FittedPrompt:
    """The prompt with its body shortened until `n_tokens` of the whole is at most `budget`.

    Args:
        n_tokens: tokens of a whole prompt as the model will see it (start token and chat template included).

    Raises:
        DataError: even without a body it does not fit, or it would have to be cut and does not have the task's form.
    """
    if n_tokens(prompt) <= budget:
        return FittedPrompt(prompt, 0)
    parts = split_prompt(task, prompt, where)
    smallest = n_tokens(parts.prefix + parts.cue)
    if smallest > budget:
        raise DataError(
            f"{where}: instruction and cue of {task.name} alone need {smallest} tokens where {budget} are allowed; "
            "raise the prompt length"
        )
    kept = _longest_that_fits(parts, task.keep, n_tokens, budget)
    return FittedPrompt(_with_body(parts, task.keep, kept), len(parts.body) - kept)


def _with_body(parts: PromptParts, keep: Keep, n_characters: int) -> str:
    start = len(parts.body) - n_characters
    body = parts.body[:n_characters] if keep == "head" else parts.body[start:]
    return parts.prefix + body + parts.cue


def _longest_that_fits(parts: PromptParts, keep: Keep, n_tokens: Callable[[str], int], budget: int) -> int:
    """Characters of the body that fit: none more does, or the budget is met exactly.

    Text is cut, not token ids, and every candidate is tokenised anew, so nothing depends on how ids decode.  The next
    candidate is guessed from the tokens per character seen so far; the bracket halves at least every other time.
    """
    fits, tokens_fitting = 0, n_tokens(_with_body(parts, keep, 0))
    # A first upper end close to the answer, since tokenising a whole transcript again and again is slow.
    too_long = min(len(parts.body), max(1, 4 * budget))
    while too_long < len(parts.body) and n_tokens(_with_body(parts, keep, too_long)) <= budget:
        fits, too_long = too_long, min(2 * too_long, len(parts.body))
    tokens_too_long = n_tokens(_with_body(parts, keep, too_long))
    tokens_fitting = n_tokens(_with_body(parts, keep, fits))
    halve = False
    while too_long - fits > 1 and tokens_fitting < budget:
        guess = (fits + too_long) // 2
        if not halve:
            guess = fits + (too_long - fits) * (budget - tokens_fitting) // max(1, tokens_too_long - tokens_fitting)
            guess = min(max(guess, fits + 1), too_long - 1)
        count = n_tokens(_with_body(parts, keep, guess))
        if count <= budget:
            fits, tokens_fitting = guess, count
        else:
            too_long, tokens_too_long = guess, count
        halve = not halve
    return fits
