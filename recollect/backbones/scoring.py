"""Exact log-probabilities of continuations from a server that takes token ids.

Two ways, both teacher-forced on the ids that the server's own `/tokenize` gives, so both equal the in-process engine
up to float noise:

* next-token: for every distinct prefix of the continuations one prompt "context + prefix", asked for the
  log-probabilities of the tokens that follow it (`logprob_token_ids`, vLLM). Uses the server's prefix cache, and works
  beside LoRA adapters. One prompt for a choice among single-token labels.
* prompt log-probabilities: one prompt "context + continuation" (`prompt_logprobs` of vLLM, `echo` elsewhere). No prefix
  cache; on vLLM's CPU engine it kills a server started with `--enable-lora` [seen with 0.32.0]. Cheaper only for long
  continuations.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from recollect.backbones import wire
from recollect.errors import BackboneError

Parsed = TypeVar("Parsed")

MAX_WANTED = 128  # vLLM's bound on `logprob_token_ids`
MAX_PROMPTS = 256  # per request; vLLM's own bound is 1024
LONG = 24  # tokens of a continuation from which prompt log-probabilities are cheaper

Way = Literal["next-token", "prompt", "echo"]


class Ask(Protocol):
    """Posts a body to `/v1/completions` and parses the answer."""

    def __call__(self, body: dict[str, Any], parse: Callable[[dict[str, Any]], Parsed]) -> Awaitable[Parsed]: ...


@dataclass(frozen=True)
class ScoringWays:
    """What a server can do. `whole` is the prompt way; "" where there is none or where it is unsafe."""

    next_token: bool
    whole: Literal["prompt", "echo", ""]

    def way_for(self, longest: int) -> Way:
        """The way for continuations of up to `longest` tokens.

        Raises:
            BackboneError: the server has neither.
        """
        if self.next_token and (longest <= LONG or not self.whole):
            return "next-token"
        if self.whole:
            return self.whole
        raise BackboneError(
            "the server gives no log-probabilities of chosen tokens; use vLLM >= 0.30, a server with "
            "'echo' + 'logprobs' on /v1/completions, or an in-process model"
        )


@dataclass(frozen=True)
class _Plan:
    """Prompts of one request and the tokens wanted after any of them."""

    prefixes: list[tuple[int, ...]]
    wanted: list[int]


def plan_next_token(continuations: Sequence[Sequence[int]]) -> list[_Plan]:
    """Cut the distinct prefixes into requests of at most MAX_PROMPTS prompts and MAX_WANTED wanted tokens."""
    following: dict[tuple[int, ...], dict[int, None]] = {}
    for continuation in continuations:
        for at, token in enumerate(continuation):
            following.setdefault(tuple(continuation[:at]), {})[token] = None
    plans: list[_Plan] = []
    wanted: dict[int, None] = {}
    prefixes: list[tuple[int, ...]] = []

    def flush() -> None:
        nonlocal wanted, prefixes
        if prefixes:
            plans.append(_Plan(prefixes, list(wanted)))
        wanted, prefixes = {}, []

    for prefix, tokens in following.items():
        for start in range(0, len(tokens), MAX_WANTED):
            part = list(tokens)[start : start + MAX_WANTED]
            if len(wanted | dict.fromkeys(part)) > MAX_WANTED or len(prefixes) == MAX_PROMPTS:
                flush()
            wanted |= dict.fromkeys(part)
            prefixes.append(prefix)
    flush()
    return plans


async def log_probs_of(
    ask: Ask, model: str, way: Way, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[float]:
    """Summed log-probability (nats) of each continuation (token ids, non-empty) after `context`."""
    if way == "next-token":
        return await _by_next_token(ask, model, context, continuations)
    sums: list[float] = []
    for start in range(0, len(continuations), MAX_PROMPTS):
        part = continuations[start : start + MAX_PROMPTS]
        prompts = [[*context, *continuation] for continuation in part]
        lengths = [len(continuation) for continuation in part]
        echo = way == "echo"
        parse = wire.prompt_log_probs_parser(prompts, lengths, echo=echo)
        sums += await ask(wire.prompt_log_probs_body(model, prompts, echo=echo), parse)
    return sums


async def _by_next_token(
    ask: Ask, model: str, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[float]:
    plans = plan_next_token(continuations)

    async def run(plan: _Plan) -> list[dict[int, float]]:
        prompts = [[*context, *prefix] for prefix in plan.prefixes]
        body = wire.next_token_body(model, prompts, plan.wanted)
        return await ask(body, lambda value: wire.parse_next_token(value, len(prompts), plan.wanted))

    step: dict[tuple[tuple[int, ...], int], float] = {}
    for plan, rows in zip(plans, await asyncio.gather(*map(run, plans)), strict=True):
        for prefix, row in zip(plan.prefixes, rows, strict=True):
            for token, log_prob in row.items():
                step[prefix, token] = log_prob
    return [
        math.fsum(step[tuple(continuation[:at]), token] for at, token in enumerate(continuation))
        for continuation in continuations
    ]
