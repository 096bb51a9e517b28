"""Model output in, checked value or typed error out; and the ladder that asks again.

The parser is total: any text or bytes give a value the schema allows or a `MalformedOutput`, never another exception.
It accepts raw control characters inside strings (constrained decoders emit them), code fences and chatter around the
JSON; it refuses repeated keys, NaN, unpaired surrogates, nesting deeper than 8 and answers over the size bound.
Never a silent default: an answer that stays unusable becomes a `MalformedAnswer`, which the caller records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recollect.backbones.protocol import Answer, Call, Completion, Message, Request
from recollect.errors import MalformedOutput
from recollect.prompts.render import rendered
from recollect.prompts.schemas import complaint
from recollect.prompts.words import match_title, word_limit

__all__ = [
    "LIMITS",
    "Limits",
    "MalformedAnswer",
    "ask_json",
    "match_title",
    "parse_json",
    "parse_numbered",
    "word_limit",
]

_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBERED = re.compile(r"\s*(\d{1,4})[.)]\s+(\S.*?)\s*")
# What a complaint may hold when it is quoted back to a model: nothing that any template treats as structure.
_NOT_PLAIN = re.compile(r"""[^\w ,.;:'"()-]+""")


@dataclass(frozen=True)
class Limits:
    """Bounds of the parser. `max_starts`: how many places where JSON might begin are tried."""

    max_characters: int = 20_000
    max_depth: int = 8
    max_starts: int = 32


LIMITS = Limits()


@dataclass(frozen=True)
class MalformedAnswer:
    """An answer that stayed unusable: the last complaint and every text received."""

    reason: str
    texts: tuple[str, ...]


class _Refused(ValueError):
    """Valid for the json module, not for us."""


def _no_constant(name: str) -> Any:
    raise _Refused(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _Refused("a number is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Refused("a name appears twice in one object")
    return value


_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)


def parse_json(text: str | bytes, schema: Mapping[str, Any], limits: Limits = LIMITS) -> Any | MalformedOutput:
    """The first JSON value in `text` that `schema` allows, or what is wrong with the answer.

    Args:
        text: a model's answer. Bytes are read as UTF-8; everything up to a closing `</think>` is skipped.
        schema: of type object or array (subset of `recollect.prompts.schemas`).
        limits: size bounds.

    Returns:
        The value, or a `MalformedOutput` (returned, not raised) whose message is fit to be quoted to the model.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if len(text) > limits.max_characters:
        return MalformedOutput(f"the answer is longer than {limits.max_characters} characters")
    is_object = schema.get("type") == "object"
    bracket = "{" if is_object else "["
    start = text.find(bracket, text.rfind("</think>") + 1)
    problem = f"the answer holds no JSON {'object' if is_object else 'list'}"
    for attempt in range(limits.max_starts):
        if start < 0:
            break
        try:
            value, end = _DECODER.raw_decode(text, start)
        except RecursionError:
            found, end = f"the JSON is nested deeper than {limits.max_depth} levels", len(text)
        except _Refused as error:
            found, end = str(error), start + 1
        except ValueError:
            found, end = "the JSON is incomplete or has a syntax error", start + 1
        else:
            found = _unfit(value, limits.max_depth) or complaint(value, schema)
            if not found:
                return value
        problem = found if attempt == 0 else problem
        start = text.find(bracket, end)
    return MalformedOutput(problem)


def _unfit(value: Any, depth: int) -> str:
    """Why a decoded value is refused whatever the schema says; "" when it is not."""
    match value:
        case str():
            return "text holds an unpaired surrogate" if not value.isascii() and _SURROGATE.search(value) else ""
        case list() | dict():
            if depth == 0:
                return "the JSON is nested too deeply"
            inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            return next((found for entry in inner if (found := _unfit(entry, depth - 1))), "")
    return ""


def parse_numbered(text: str, limits: Limits = LIMITS) -> tuple[str, ...] | MalformedOutput:
    """The entries of a list numbered 1, 2, 3, … one a line; anything else on a line is malformed.

    Blank lines are allowed. Returns `MalformedOutput` (not raised) on an empty list, a gap or a stray line.
    """
    if len(text) > limits.max_characters:
        return MalformedOutput(f"the answer is longer than {limits.max_characters} characters")
    entries: list[str] = []
    for line in text.splitlines():
        if not line.strip():
            continue
        match = _NUMBERED.fullmatch(line)
        if match is None or int(match[1]) != len(entries) + 1:
            return MalformedOutput(f"line {len(entries) + 1} of the list must begin with '{len(entries) + 1}.'")
        if _SURROGATE.search(match[2]):
            return MalformedOutput("text holds an unpaired surrogate")
        entries.append(match[2])
    return tuple(entries) if entries else MalformedOutput("the answer holds no numbered list")


def plain(message: str) -> str:
    """A complaint as it may be quoted to a model: one line of letters, digits and harmless signs, at most 200."""
    return " ".join(_NOT_PLAIN.sub(" ", message).replace("_", " ").split())[:200].rstrip(" .")


def ask_json(
    request: Request,
    schema: Mapping[str, Any] | None = None,
    validate: Callable[[Any], str | None] | None = None,
) -> Generator[Sequence[Call], list[Answer], tuple[Any | MalformedAnswer, int, int]]:
    """Ask for JSON, at most three times: as given, then quoting the complaint, then quoting it at temperature 0.

    Args:
        request: its `schema` is what the backbone enforces where it can.
        schema: what the answer is checked against; default: the request's.
        validate: judges an answer against the world; returns a complaint, or "" or None when it is fine.

    Yields:
        One call at a time; expects its answer as a list of one.

    Returns:
        (value or `MalformedAnswer`, prompt tokens, completion tokens), the tokens summed over all tries. The caller
        applies its declared no-op to a `MalformedAnswer` and records it.
    """
    expected = json.loads(request.schema) if schema is None else schema
    texts: list[str] = []
    tokens_in = tokens_out = 0
    problem = ""
    asked: list[Request] = []
    for call in (_first, _again, _greedily):
        if (asking := call(request, problem)) in asked:
            break  # a greedy question asked again gets the same answer
        asked.append(asking)
        (answer,) = yield [asking]
        if not isinstance(answer, Completion):
            raise TypeError(f"a request is answered by a Completion, got {type(answer).__name__}")
        tokens_in += answer.prompt_tokens
        tokens_out += answer.completion_tokens
        texts.append(answer.text)
        value = parse_json(answer.text, expected)
        if isinstance(value, MalformedOutput):
            problem = str(value)
            if answer.finish_reason == "length":
                problem += "; the answer was cut off, be shorter"
            continue
        problem = (validate(value) if validate is not None else "") or ""
        if not problem:
            return value, tokens_in, tokens_out
    return MalformedAnswer(problem, tuple(texts)), tokens_in, tokens_out


def _first(request: Request, problem: str) -> Request:
    return request


def _again(request: Request, problem: str) -> Request:
    """The same question with the complaint after it: the start of the prompt stays in a server's prefix cache."""
    (note,) = rendered("reask", "", {"complaint": plain(problem)})
    *earlier, last = request.messages
    return replace(request, messages=(*earlier, Message(last.role, f"{last.content}\n{note.content}")))


def _greedily(request: Request, problem: str) -> Request:
    return replace(_again(request, problem), temperature=0.0)
