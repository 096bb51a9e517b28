"""Bodies of the OpenAI-compatible protocol (and vLLM's additions): requests out, answers in. Pure functions.

Every `parse_…` raises `RequestFault("semantic", …)` on a body that is not an answer to what was asked: no choices,
another model, an ignored schema, missing log-probabilities. Nothing is guessed or filled in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recollect.backbones.protocol import Chat, Completion, Request
from recollect.backbones.retry import RequestFault

# What templates that print a date or think aloud are given; fixed, so that a prompt depends on its messages alone,
# and equal to what the in-process engine gives them.
TEMPLATE_VALUES = {"date_string": "26 Jul 2024", "enable_thinking": False}

PROBE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"q7": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["q7"],
    "additionalProperties": False,
}

_JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
}


def sendable(text: str) -> str:
    """`text` with "?" for lone surrogates, which have no bytes; as the in-process engine does."""
    return text.encode("utf-8", "replace").decode("utf-8")


def messages_json(messages: Chat) -> list[dict[str, str]]:
    """A chat as the protocol spells it."""
    return [{"role": role, "content": sendable(content)} for role, content in messages]


def chat_body(model: str, request: Request, *, is_vllm: bool) -> dict[str, Any]:
    """Body of `/v1/chat/completions` for a `Request`."""
    body: dict[str, Any] = {
        "model": model,
        "messages": messages_json(request.messages),
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
    }
    if request.top_p < 1:
        body["top_p"] = request.top_p
    if request.stop:
        body["stop"] = list(request.stop)
    if request.temperature > 0:
        body["seed"] = request.seed
    if request.schema:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": json.loads(request.schema), "strict": True},
        }
    if is_vllm:
        # vLLM takes what is not said here from the model's generation_config.json; the request decides alone.
        body |= {"top_k": 0, "top_p": request.top_p, "min_p": 0.0, "repetition_penalty": 1.0}
        body["chat_template_kwargs"] = TEMPLATE_VALUES
    return body


def probe_body(model: str) -> dict[str, Any]:
    """The smallest generation: one token."""
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}


def next_token_body(model: str, prompts: Sequence[Sequence[int]], wanted: Sequence[int]) -> dict[str, Any]:
    """Body of `/v1/completions` that asks the next token's log-probability of the ids `wanted` (<= 128) per prompt."""
    return {
        "model": model,
        "prompt": [list(prompt) for prompt in prompts],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": len(wanted),
        "logprob_token_ids": list(wanted),
        "return_tokens_as_token_ids": True,
    }


def prompt_log_probs_body(model: str, prompts: Sequence[Sequence[int]], *, echo: bool) -> dict[str, Any]:
    """Body of `/v1/completions` that asks the log-probability of every prompt token."""
    body: dict[str, Any] = {"model": model, "prompt": [list(prompt) for prompt in prompts], "temperature": 0}
    if echo:
        return body | {"max_tokens": 0, "echo": True, "logprobs": 1}
    return body | {"max_tokens": 1, "prompt_logprobs": 0}


def top_tokens_body(model: str, messages: Chat, n_top: int) -> dict[str, Any]:
    """Body of `/v1/chat/completions` that asks the `n_top` likeliest first tokens of the answer."""
    return {
        "model": model,
        "messages": messages_json(messages),
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": n_top,
    }


def model_checker(model: str, root: str) -> Callable[[Any], dict[str, Any]]:
    """Checks that a body is an object answered by `model` (or its served name, or a dated version of it)."""
    known = {model, root}

    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise RequestFault("semantic", f"the body is {type(value).__name__}, not an object")
        named = value.get("model")
        if named not in known and not (isinstance(named, str) and named.startswith(model + "-")):
            raise RequestFault("semantic", f"asked model {model!r}, answered by {named!r}")
        return value

    return check


def _choices(value: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """The `n` choices in the order of the prompts."""
    choices = value.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise RequestFault("semantic", f"no list of choices: {str(choices)[:80]}")
    if sorted(str(choice.get("index")) for choice in choices) != sorted(str(i) for i in range(n)):
        raise RequestFault("semantic", f"asked {n} prompts, answered {len(choices)} choices")
    return sorted(choices, key=lambda choice: choice["index"])


def parse_completion(value: dict[str, Any], request: Request) -> Completion:
    """The answer to a `chat_body`."""
    choice = _choices(value, 1)[0]
    message, reason, usage = choice.get("message"), choice.get("finish_reason"), value.get("usage")
    if reason not in ("stop", "length"):
        raise RequestFault("semantic", f"the answer ended by {reason!r}")
    if not isinstance(message, dict) or not isinstance(message.get("content") or "", str):
        raise RequestFault("semantic", f"no message text: {str(message)[:80]}")
    text = message.get("content") or ""
    if request.schema and reason == "stop":
        _check_shape(text, json.loads(request.schema))
    try:
        counts = int(usage["prompt_tokens"]), int(usage["completion_tokens"])  # type: ignore[index]
    except (TypeError, KeyError, ValueError) as error:
        raise RequestFault("semantic", f"no token counts in the answer: {usage!r}") from error
    return Completion(text, *counts, reason)


def _check_shape(text: str, schema: dict[str, Any]) -> None:
    """Refuse text that shows the schema was ignored; full validation is the caller's (`recollect.prompts`)."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise RequestFault("semantic", f"schema ignored, not JSON ({error}): {text[:80]!r}") from error
    expected = _JSON_TYPES.get(str(schema.get("type")))
    if expected is not None and not isinstance(value, expected):
        raise RequestFault("semantic", f"schema ignored, asked {schema['type']!r}: {text[:80]!r}")
    if isinstance(value, dict) and (missing := [key for key in schema.get("required", []) if key not in value]):
        raise RequestFault("semantic", f"schema ignored, no {missing[0]!r}: {text[:80]!r}")


def completion_parser(request: Request) -> Callable[[Any], Completion]:
    """`parse_completion` of one request."""
    return lambda value: parse_completion(value, request)


def parse_models(value: Any) -> list[dict[str, Any]]:
    """The cards of `/v1/models`."""
    cards = value.get("data") if isinstance(value, dict) else None
    if not isinstance(cards, list) or not cards or not all(isinstance(card, dict) and "id" in card for card in cards):
        raise RequestFault("semantic", f"no list of models: {str(value)[:80]}")
    return cards


def parse_version(value: Any) -> str:
    """The engine's version of `/version`."""
    if not isinstance(value, dict) or not isinstance(value.get("version"), str):
        raise RequestFault("semantic", f"no version: {str(value)[:80]}")
    return value["version"]


def parse_tokens(value: Any) -> tuple[list[int], list[str]]:
    """Token ids (and strings, where asked for) of vLLM's `/tokenize`."""
    tokens = value.get("tokens") if isinstance(value, dict) else None
    if not isinstance(tokens, list) or not tokens or value.get("count") != len(tokens):
        raise RequestFault("semantic", f"not a tokenisation: {str(value)[:80]}")
    if not all(isinstance(token, int) for token in tokens):
        raise RequestFault("semantic", f"token ids are not integers: {str(tokens)[:80]}")
    return tokens, [str(text) for text in value.get("token_strs") or []]


def parse_next_token(value: dict[str, Any], n_prompts: int, wanted: Sequence[int]) -> list[dict[int, float]]:
    """Per prompt {token id: log-probability} for every id of `wanted`."""
    rows = []
    for choice in _choices(value, n_prompts):
        try:
            top = choice["logprobs"]["top_logprobs"][0]
            rows.append({token: _log_prob(top[f"token_id:{token}"]) for token in wanted})
        except (TypeError, KeyError, IndexError) as error:
            raise RequestFault("semantic", f"log-probabilities of asked tokens are missing ({error!r})") from error
    return rows


def prompt_log_probs_parser(
    prompts: Sequence[Sequence[int]], n_last: Sequence[int], *, echo: bool
) -> Callable[[dict[str, Any]], list[float]]:
    """`parse_prompt_log_probs` of these prompts."""
    return lambda value: parse_prompt_log_probs(value, prompts, n_last, echo=echo)


def parse_prompt_log_probs(
    value: dict[str, Any], prompts: Sequence[Sequence[int]], n_last: Sequence[int], *, echo: bool
) -> list[float]:
    """Per prompt the summed log-probability of its last `n_last[i]` tokens."""
    sums = []
    for choice, prompt, n in zip(_choices(value, len(prompts)), prompts, n_last, strict=True):
        first, end = len(prompt) - n, len(prompt)
        try:
            if echo:
                steps = choice["logprobs"]["token_logprobs"][first:end]
            else:
                rows = choice["prompt_logprobs"]
                steps = [rows[at][str(prompt[at])]["logprob"] for at in range(first, end)]
            if len(steps) != n:
                raise IndexError(f"{len(steps)} of {n}")
            sums.append(math.fsum(_log_prob(step) for step in steps))
        except (TypeError, KeyError, IndexError) as error:
            raise RequestFault("semantic", f"log-probabilities of the prompt are missing ({error!r})") from error
    return sums


def parse_top_tokens(value: dict[str, Any]) -> tuple[dict[str, float], int]:
    """{token text: log-probability} of the first position, and the prompt's token count."""
    choice = _choices(value, 1)[0]
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        return {entry["token"]: _log_prob(entry["logprob"]) for entry in top}, int(value["usage"]["prompt_tokens"])
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise RequestFault("semantic", f"no top_logprobs in the answer ({error!r})") from error


def _log_prob(value: Any) -> float:
    """A log-probability (nats), at most 0 but for rounding."""
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not number <= 1e-3:
        raise KeyError(f"{value!r} is not a log-probability")
    return number


def parse_embeddings(value: dict[str, Any], n_texts: int) -> np.ndarray:
    """(n_texts, D) float32 rows in the order of the texts, L2-normalised."""
    data = value.get("data")
    if not isinstance(data, list) or sorted(str(row.get("index")) for row in data) != sorted(map(str, range(n_texts))):
        raise RequestFault("semantic", f"asked {n_texts} embeddings, got {str(data)[:80]}")
    try:
        rows = np.asarray([row["embedding"] for row in sorted(data, key=lambda row: row["index"])], dtype=np.float32)
    except (KeyError, ValueError, TypeError) as error:
        raise RequestFault("semantic", f"embeddings are not equal-length vectors ({error})") from error
    lengths = np.linalg.norm(rows, axis=1, keepdims=True) if rows.ndim == 2 else np.zeros(1)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise RequestFault("semantic", "embeddings are not finite non-zero vectors")
    return rows / lengths


def normalised(log_probs: Sequence[float]) -> tuple[float, ...]:
    """Log-probabilities renormalised to sum to one."""
    top = max(log_probs)
    total = top + math.log(math.fsum(math.exp(value - top) for value in log_probs))
    return tuple(value - total for value in log_probs)
