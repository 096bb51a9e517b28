"""A language model as a ranker of candidates, by four ways of reading its answer (fairlrm 5).

| back-end | what is asked | score of a candidate |
|---|---|---|
| `label_logits` | one forward pass per order | log-probability of its label over all labels (LlamaRec) |
| `title_loglik` | likelihood of every title | log p(title given prompt) - log p(title), per token (PMI) |
| `yes_no` | one question per candidate | log p(yes), normalised over yes and no (TALLRec's form) |
| `generate` | a written list | minus its place; what is not listed follows in backbone order, and the row is marked |

`title_loglik` also gives `raw_scores`, without the second term: raw likelihood carries the model's own popularity.
The place of a candidate and the letter of its label carry a prior of their own: every request is asked in M seeded
orders and averaged, and `calibrate` subtracts what the same prompt says without any user. Calls are planned apart from
being answered, so that whoever answers can batch, journal and share prefixes across users, orders and presets.

Not covered: gradient training of the model; see `recollect.distill`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from recollect.backbones.protocol import (
    Answer,
    Call,
    Choice,
    Chosen,
    Completion,
    Message,
    Request,
    Scored,
    Scoring,
    answer_tokens,
    call_key,
)
from recollect.errors import ConfigError, InputError
from recollect.prompts.fairlrm import USER_SIDE, YES_NO, FairPrompts, Form, RankingRequest
from recollect.prompts.fairlrm_answers import RankingParser
from recollect.rng import stream

Backend = Literal["label_logits", "title_loglik", "yes_no", "generate"]
BACKENDS: tuple[Backend, ...] = ("label_logits", "title_loglik", "yes_no", "generate")
Orders = Literal["shuffled", "retrieval"]
Answers = Callable[[Sequence[Call]], list[Answer]]

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
LABEL_POOL = (*LETTERS, *(first + second for first in LETTERS for second in LETTERS))
TITLES_PER_CALL = 64
_FORMS: dict[Backend, Form] = {
    "label_logits": "label",
    "title_loglik": "title",
    "yes_no": "yes_no",
    "generate": "list",
}
_PROBE = (Message("user", "Answer with a label only."),)


@dataclass(frozen=True)
class RankingResponse:
    """What a model made of a request.

    candidates: (C,) items in the request's order.  order: (C,) the same items, best first.
    scores: (C,) in the request's order, higher is better, float64.
    raw_scores: (C,) likewise without the unconditional part, `title_loglik` only.  orders: (M, C) items as ranked under
    each order of the candidates alone.  entries, invalid, duplicates, missing: of written lists, summed over orders.
    fill: "backbone" where a written list named too few.  texts: what was written.  prompt_hash: of the first prompt.
    prompt_tokens, completion_tokens: of all calls, shared prefixes counted in full.
    """

    candidates: np.ndarray
    order: np.ndarray
    scores: np.ndarray
    orders: np.ndarray
    prompt_hash: str
    prompt_tokens: int
    completion_tokens: int
    raw_scores: np.ndarray | None = None
    entries: int = 0
    invalid: int = 0
    duplicates: int = 0
    missing: int = 0
    fill: str = ""
    texts: tuple[str, ...] = ()


def single_token_labels(answer: Answers, n: int) -> tuple[str, ...]:
    """The first `n` labels that are one token as the assistant's answer; asks the model once.

    Raises:
        ConfigError: a needed letter is several tokens, or there are not enough two-letter labels of one token.
    """
    pool = LABEL_POOL[: len(LETTERS)] if n <= len(LETTERS) else LABEL_POOL
    (scored,) = answer([Scoring(_PROBE, pool, "prompt-rank.labels")])
    if not isinstance(scored, Scored):
        raise TypeError(f"a scoring is answered by Scored, got {type(scored).__name__}")
    single = [label for label, n_tokens in zip(pool, scored.n_tokens, strict=True) if n_tokens == 1]
    if n <= len(LETTERS) and single[:n] != list(pool[:n]):
        broken = next(label for label in pool if label not in single)
        raise ConfigError(
            f"the label {broken!r} is not one token for this model, so label_logits cannot read it; use fewer "
            "candidates or another back-end (title_loglik, yes_no, generate)"
        )
    if len(single) < n:
        raise ConfigError(
            f"this model has {len(single)} labels of one token where {n} candidates need one each; use fewer "
            "candidates or another back-end (title_loglik, yes_no, generate)"
        )
    return tuple(single[:n])


class PromptedRanker:
    """Plans the calls of requests and reads their answers.

    Args:
        prompts: builds the chats.
        backend: one of `BACKENDS`.
        permutations: M, orders of the candidates that are asked and averaged.
        orders: "shuffled" by seed, or "retrieval", the one order given (M = 1).
        calibrate: subtract the scores of the same prompt without history and user side (`label_logits`, `yes_no`).
        max_tokens: of a written list.
        seed: of the orders.

    Raises:
        ConfigError: options that do not go together.
    """

    def __init__(
        self,
        prompts: FairPrompts,
        *,
        backend: Backend = "label_logits",
        permutations: int = 4,
        orders: Orders = "shuffled",
        calibrate: bool = False,
        max_tokens: int = 256,
        seed: int = 0,
    ) -> None:
        if backend not in BACKENDS:
            raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if permutations < 1:
            raise ConfigError(f"permutations must be at least 1, got {permutations!r}")
        if orders == "retrieval" and permutations != 1:
            raise ConfigError(f"there is one retrieval order; use permutations 1 with it, got {permutations!r}")
        if calibrate and backend not in ("label_logits", "yes_no"):
            raise ConfigError(f"calibration subtracts label scores; {backend!r} has none")
        self.prompts = prompts
        self.backend: Backend = backend
        self.permutations = 1 if backend == "yes_no" else permutations  # its candidates never meet
        self._orders = orders
        self._calibrate = calibrate
        self._max_tokens = max_tokens
        self._seed = seed
        self._unconditional: dict[int, tuple[float, int]] = {}

    def order(self, request: RankingRequest, permutation: int) -> np.ndarray:
        """(C,) positions: how the candidates stand in the prompt under one permutation; depends on (seed, user)."""
        if self._orders == "retrieval":
            return np.arange(len(request.candidates))
        return stream(self._seed, "order", request.key, permutation).permutation(len(request.candidates))

    def calls(self, request: RankingRequest, components: frozenset[str], site: str = "") -> list[Call]:
        """Everything to be asked for one request; the same list every time."""
        listed = self._listed(request, components)
        calls: list[Call] = []
        for permutation in range(self.permutations):
            asked = request.reordered(self.order(request, permutation))
            calls += self._ask(asked, listed, site)
            if self._calibrate:
                nobody = listed - {"H", "A", *USER_SIDE}
                calls += self._ask(asked, nobody, site)
        return calls

    def _listed(self, request: RankingRequest, components: frozenset[str]) -> frozenset[str]:
        """A set that no prompt can hold is scored title by title, without a list of candidates."""
        whole_catalogue = self.backend == "title_loglik" and len(request.candidates) > len(request.labels)
        return components - {"C", "I2"} if whole_catalogue else components

    def _ask(self, asked: RankingRequest, components: frozenset[str], site: str) -> list[Call]:
        form = _FORMS[self.backend]
        if self.backend == "yes_no":
            yes_no = YES_NO[self.prompts.locale]
            one_by_one = [asked.reordered(np.array([place])) for place in range(len(asked.candidates))]
            return [Choice(self.prompts.chat(one, components, form), yes_no, site) for one in one_by_one]
        shown = asked if "C" in components else asked.reordered(np.zeros(0, dtype=np.int64))
        chat = self.prompts.chat(shown, components, form)
        if self.backend == "label_logits":
            return [Choice(chat, asked.labels[: len(asked.candidates)], site)]
        if self.backend == "generate":
            return [Request(chat, max_tokens=self._max_tokens, site=site)]
        titles = [self.prompts.title(item) for item in asked.candidates.tolist()]
        return [
            Scoring(chat, tuple(titles[start : start + TITLES_PER_CALL]), site)
            for start in range(0, len(titles), TITLES_PER_CALL)
        ]

    def prepare(self, answer: Answers, items: np.ndarray) -> None:
        """Ask once for the unconditional likelihood of titles (`title_loglik`; nothing otherwise)."""
        if self.backend != "title_loglik":
            return
        new = [item for item in np.unique(items).tolist() if item not in self._unconditional]
        chat = self.prompts.neutral()
        chunks = [new[start : start + TITLES_PER_CALL] for start in range(0, len(new), TITLES_PER_CALL)]
        calls = [Scoring(chat, tuple(map(self.prompts.title, chunk)), "prompt-rank.titles") for chunk in chunks]
        for chunk, scored in zip(chunks, answer(calls), strict=True):
            assert isinstance(scored, Scored)
            for item, log_prob, n_tokens in zip(chunk, scored.log_probs, scored.n_tokens, strict=True):
                self._unconditional[item] = log_prob, n_tokens

    def response(self, request: RankingRequest, calls: Sequence[Call], answers: Sequence[Answer]) -> RankingResponse:
        """Read the answers to `calls(request, …)`, in that order.

        Raises:
            InputError: `title_loglik` without `prepare`.
        """
        size = len(answers) // self.permutations
        parts = [answers[start : start + size] for start in range(0, len(answers), size)]
        rows, raw_rows, counts, texts = [], [], np.zeros(4, dtype=np.int64), []
        for permutation, part in enumerate(parts):
            order = self.order(request, permutation)
            if self.backend == "generate":
                row, found, text = self._read_list(request, order, part[0])
                counts += found
                texts.append(text)
            else:
                shown = self._read_scores(request.candidates[order], part)
                row = np.empty((len(shown), len(order)))
                row[:, order] = shown
                raw_rows.append(row[-1])
                row = row[0]
            rows.append(row)
        scores = np.mean(rows, axis=0)
        best = [request.candidates[np.argsort(-row, kind="stable")] for row in (*rows, scores)]
        tokens = np.array([answer_tokens(answer) for answer in answers]).sum(axis=0)
        return RankingResponse(
            candidates=request.candidates,
            order=best[-1],
            scores=scores,
            orders=np.stack(best[:-1]),
            prompt_hash=call_key("", calls[0])[:16],
            prompt_tokens=int(tokens[0]),
            completion_tokens=int(tokens[1]),
            raw_scores=np.mean(raw_rows, axis=0) if self.backend == "title_loglik" else None,
            entries=int(counts[0]),
            invalid=int(counts[1]),
            duplicates=int(counts[2]),
            missing=int(counts[3]),
            fill="backbone" if counts[3] else "",
            texts=tuple(texts),
        )

    def _read_scores(self, shown: np.ndarray, part: Sequence[Answer]) -> np.ndarray:
        """(1 or 2, C) scores in the order shown; the second row of `title_loglik` is the raw likelihood."""
        if self.backend == "title_loglik":
            found = [
                pair for scored in part if isinstance(scored, Scored) for pair in zip(*_pairs(scored), strict=True)
            ]
            log_probs, n_tokens = np.array([pair[0] for pair in found]), np.array([pair[1] for pair in found])
            if any(item not in self._unconditional for item in shown.tolist()):
                raise InputError("title_loglik needs prepare() on the candidates before their answers are read")
            prior = np.array([self._unconditional[item][0] for item in shown.tolist()])
            return np.stack([(log_probs - prior) / n_tokens, log_probs / n_tokens])
        chosen = [answer.log_probs for answer in part if isinstance(answer, Chosen)]
        n = len(shown)
        if self.backend == "yes_no":
            values = np.array([log_probs[0] for log_probs in chosen])
            return (values[:n] - values[n:] if self._calibrate else values)[None]
        rows = np.array(chosen)  # (1 or 2, C): with the user, and without
        return (rows[0] - rows[1] if self._calibrate else rows[0])[None]

    def _read_list(
        self, request: RankingRequest, order: np.ndarray, answer: Answer
    ) -> tuple[np.ndarray, np.ndarray, str]:
        """Minus the place of each candidate, the counts (entries, invalid, duplicates, missing), and the text."""
        assert isinstance(answer, Completion)
        titles = [self.prompts.title(item) for item in request.candidates[order].tolist()]
        parsed = RankingParser(request.labels[: len(titles)], titles).parse(answer.text)
        listed = order[list(parsed.order)]
        rest = np.setdiff1d(np.arange(len(order)), listed)  # ascending = backbone order
        row = np.empty(len(order))
        row[np.r_[listed, rest].astype(np.int64)] = -np.arange(len(order), dtype=np.float64)
        return row, np.array([parsed.entries, parsed.invalid, parsed.duplicates, parsed.missing]), answer.text

    def rank(
        self, answer: Answers, requests: Sequence[RankingRequest], components: frozenset[str], site: str = ""
    ) -> list[RankingResponse]:
        """Ask for all requests at once and read the answers."""
        if requests:
            self.prepare(answer, np.concatenate([request.candidates for request in requests]))
        planned = [self.calls(request, components, site) for request in requests]
        answers = iter(answer([call for calls in planned for call in calls]))
        return [
            self.response(request, calls, [next(answers) for _ in calls])
            for request, calls in zip(requests, planned, strict=True)
        ]


def _pairs(scored: Scored) -> tuple[Sequence[float], Sequence[int]]:
    return scored.log_probs, scored.n_tokens


__all__ = [
    "BACKENDS",
    "LABEL_POOL",
    "Backend",
    "Orders",
    "PromptedRanker",
    "RankingResponse",
    "single_token_labels",
]
