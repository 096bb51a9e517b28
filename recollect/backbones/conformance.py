"""What any backbone must do, as one check to run on your own: `check_backbone(my_backbone)`.

Covers the shape and order of answers, normalisation, determinism, order independence, hostile text, and `submit` where
there is one. Needs a model that answers at all, not one that answers well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from recollect.backbones.protocol import (
    Answer,
    Backbone,
    Call,
    Chat,
    Choice,
    Chosen,
    Completion,
    ConcurrentBackbone,
    Message,
    Request,
    Scored,
    Scoring,
    answer_from_json,
    answer_to_json,
    primitive_of,
)

_SYSTEM = Message("system", "You are a reader who answers briefly.")


def _chat(text: str) -> Chat:
    return (_SYSTEM, Message("user", text))


_CHOICES = (
    Choice(_chat("Which do you like better, tea or coffee?"), ("tea", "coffee")),
    Choice(_chat("Which film is a comedy?"), ("Airplane!", "The Exorcist", "Alien")),
    Choice(_chat("Answer with one letter."), ("A", "B")),
)
_SCORINGS = (
    Scoring(_chat("Name a film."), ("Mulan", "The Exorcist", "A Bug's Life")),
    Scoring(_chat("Name a colour."), ("red",)),
)
_REQUESTS = (
    Request(_chat("Name a fruit."), max_tokens=8),
    Request(_chat("Count to three."), max_tokens=4),
    Request(_chat("Name an animal."), max_tokens=8, temperature=0.9, top_p=0.95, seed=7),
)
_TEXTS = (
    "a quiet novel about the sea",
    "an album of loud guitars",
    "a quiet novel about the sea",
    "日本語のタイトル — é",
)


class ConformanceError(AssertionError):
    """The backbone breaks the protocol; the message names the rule."""


def check_backbone(backbone: Backbone, *, tolerance: float = 0.0, embeds: bool = True, sampled: bool = True) -> None:
    """Run every check; returns nothing, raises at the first rule broken.

    Args:
        tolerance: nats by which log-probabilities may differ between batches of another composition (float noise).
        embeds: whether `embed` is supported.
        sampled: whether a sampled answer is promised to depend on its seed alone (servers may not promise it).

    Raises:
        ConformanceError: names the rule and what was seen.
    """
    _require(
        isinstance(backbone, Backbone), "it has fingerprint, control_tokens, generate, choose, score, embed, close"
    )
    _require(bool(backbone.fingerprint) and backbone.fingerprint == backbone.fingerprint, "the fingerprint is stable")
    _require(all(token.strip() for token in backbone.control_tokens), "control tokens are visible strings")
    for ask in (backbone.generate, backbone.choose, backbone.score):
        _require(ask([]) == [], "an empty batch has an empty answer")
    _check_choices(backbone, tolerance)
    _check_scores(backbone, tolerance)
    _check_text(backbone, sampled)
    _check_hostile_text(backbone)
    if embeds:
        _check_embeddings(backbone)
    if isinstance(backbone, ConcurrentBackbone):
        _check_submit(backbone, tolerance)


def _require(holds: bool, rule: str, seen: object = None) -> None:
    if not holds:
        raise ConformanceError(f"broken rule: {rule}" + ("" if seen is None else f"; seen: {seen!r}"))


def _check_choices(backbone: Backbone, tolerance: float) -> None:
    answers = backbone.choose(_CHOICES)
    _require(len(answers) == len(_CHOICES), "choose answers every call", len(answers))
    for choice, answer in zip(_CHOICES, answers, strict=True):
        _require(isinstance(answer, Chosen), "choose gives Chosen", answer)
        _require(len(answer.log_probs) == len(choice.options), "one log-probability per option", answer)
        _require(abs(math.fsum(map(math.exp, answer.log_probs)) - 1) < 1e-6, "options sum to one", answer)
        _require(answer.prompt_tokens > 0, "prompt tokens are counted", answer)
    _same(backbone.choose(_CHOICES[::-1])[::-1], answers, tolerance, "choose keeps the order of its calls")
    _same([backbone.choose([choice])[0] for choice in _CHOICES], answers, tolerance, "batches do not change choices")
    flipped = Choice(_CHOICES[0].messages, _CHOICES[0].options[::-1])
    turned = backbone.choose([flipped])[0]
    back = Chosen(turned.log_probs[::-1], turned.prompt_tokens)
    scripted_by_call = backbone.fingerprint.startswith("scripted/")  # a script may look at the order of the options
    if not scripted_by_call:
        _same([back], answers[:1], max(tolerance, 1e-9), "log-probabilities follow their options")


def _check_scores(backbone: Backbone, tolerance: float) -> None:
    answers = backbone.score(_SCORINGS)
    _require(len(answers) == len(_SCORINGS), "score answers every call", len(answers))
    for scoring, answer in zip(_SCORINGS, answers, strict=True):
        _require(isinstance(answer, Scored), "score gives Scored", answer)
        _require(len(answer.log_probs) == len(answer.n_tokens) == len(scoring.continuations), "one score each", answer)
        _require(all(value <= 1e-6 for value in answer.log_probs), "log-probabilities are not positive", answer)
        _require(all(n >= 1 for n in answer.n_tokens), "continuations have tokens", answer)
        _require(answer.prompt_tokens > sum(answer.n_tokens), "prompt tokens hold context and continuations", answer)
    _same([backbone.score([scoring])[0] for scoring in _SCORINGS], answers, tolerance, "batches do not change scores")


def _check_text(backbone: Backbone, sampled: bool) -> None:
    answers = backbone.generate(_REQUESTS)
    _require(len(answers) == len(_REQUESTS), "generate answers every call", len(answers))
    for request, answer in zip(_REQUESTS, answers, strict=True):
        _require(isinstance(answer, Completion), "generate gives Completion", answer)
        _require(0 < answer.completion_tokens <= request.max_tokens, "answers keep to max_tokens", answer)
        _require(answer.finish_reason in ("stop", "length"), "finish_reason is stop or length", answer)
        _require(answer_from_json("generate", answer_to_json(answer)) == answer, "answers survive JSON", answer)
    n_compared = len(_REQUESTS) if sampled else 2
    again = backbone.generate(_REQUESTS)
    _require(again[:n_compared] == answers[:n_compared], "the same requests give the same answers", again)
    turned = backbone.generate(_REQUESTS[::-1])[::-1]
    _require(turned[:n_compared] == answers[:n_compared], "generate keeps the order of its calls", turned)
    full = answers[0].text
    if len(full) > 1:
        request = _REQUESTS[0]
        stopped = backbone.generate([Request(request.messages, request.max_tokens, stop=(full[1],))])[0]
        _require(full[1] not in stopped.text, "an answer ends before its stop string", stopped)


def _check_hostile_text(backbone: Backbone) -> None:
    hostile = ["\x00\x1b[2J", "\ud800", "{{7*7}}{% raw %}", *backbone.control_tokens[:4]]
    calls = [Choice(_chat(f"Title: {text} . Do you like it?"), ("yes", "no")) for text in hostile]
    answers = backbone.choose(calls)
    _require(len(answers) == len(calls), "hostile text is answered like any other", len(answers))


def _check_embeddings(backbone: Backbone) -> None:
    rows = backbone.embed(_TEXTS)
    _require(rows.dtype == np.float32 and rows.ndim == 2 and len(rows) == len(_TEXTS), "embed gives (B, D) float32")
    _require(bool(np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)), "rows are unit vectors")
    _require(bool(np.allclose(rows[0], rows[2], atol=1e-2)), "equal texts have equal embeddings")
    turned = backbone.embed(_TEXTS[::-1])[::-1]
    _require(bool(np.allclose(rows, turned, atol=1e-2)), "embed keeps the order of its texts")


def _check_submit(backbone: ConcurrentBackbone, tolerance: float) -> None:
    calls: list[Call] = [*_CHOICES, *_SCORINGS, _REQUESTS[0]]
    expected: list[Answer] = []
    futures = [backbone.submit(call) for call in calls]
    answers = [future.result(timeout=600) for future in futures]
    expected += [*backbone.choose(_CHOICES), *backbone.score(_SCORINGS), *backbone.generate(_REQUESTS[:1])]
    for call, answer, value in zip(calls, answers, expected, strict=True):
        _same([answer], [value], tolerance, f"submit answers as {primitive_of(call)} does")


def _same(seen: Sequence[Answer], expected: Sequence[Answer], tolerance: float, rule: str) -> None:
    for one, other in zip(seen, expected, strict=True):
        if isinstance(one, Completion) or isinstance(other, Completion):
            _require(one == other, rule, (one, other))
            continue
        _require(len(one.log_probs) == len(other.log_probs), rule, (one, other))
        differences = [abs(a - b) for a, b in zip(one.log_probs, other.log_probs, strict=True)]
        _require(max(differences) <= tolerance, rule, (one, other))
