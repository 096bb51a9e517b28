"""Models behind a journal: `Journaled` pays for a call once; its twin without a model is `recollect.backbones.replay`.

An answer is recorded before anyone sees it. Equal calls share one payment, also while the first is still in flight.
Batches for in-process models are cut from the list of calls alone, never from what happens to be recorded, so the last
bits of a float, which depend on the company in a batch, are the same in an undisturbed and in a resumed run.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np

from recollect.backbones.budget import Budget
from recollect.backbones.protocol import (
    Answer,
    Backbone,
    Call,
    Completion,
    answer_batch,
    answer_from_json,
    answer_to_json,
    answer_tokens,
    call_key,
    call_to_json,
    primitive_of,
)
from recollect.backbones.replay import Replay, text_key
from recollect.errors import BackboneError, ConfigError, ContextTooLong, MalformedOutput
from recollect.journal import Journal, RecordedCall, RecordedText

TEXTS_PER_BATCH = 256
CALL_FAULTS = (MalformedOutput, ContextTooLong)
"""Errors of one call: the agent that asked decides what follows. Any other error ends the run."""


class Embedder(Protocol):
    """Whoever turns texts into unit rows (B, D) float32."""

    @property
    def fingerprint(self) -> str: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


@runtime_checkable
class _Submits(Protocol):
    def submit(self, call: Call) -> Future[Answer]: ...


@runtime_checkable
class _CountsRetries(Protocol):
    def stats(self) -> dict[str, float]: ...


@dataclass(slots=True)
class _Sent:
    """A call in flight: its future is resolved by `settle`, once the answer is recorded."""

    key: str
    call: Call
    since: float
    future: Future[Answer]


@dataclass(frozen=True, slots=True)
class _Arrived:
    sent: _Sent
    answer: Answer | None
    error: BaseException | None
    seconds: float


class Journaled:
    """A backbone whose every answer is recorded, and paid for once.

    Args:
        backbone: who answers. One with `submit` is asked call by call, another in batches of `batch_size`.
        journal: where answers go. Methods belong to the journal's thread.
        embedder: who embeds; the backbone where None.
        batch_size: calls per batch of an in-process model; part of what makes its floats repeatable.
        budget: limits of the run, sessions before this one included.
    """

    def __init__(
        self,
        backbone: Backbone,
        journal: Journal,
        *,
        embedder: Embedder | None = None,
        batch_size: int = 16,
        budget: Budget | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size!r}")
        self.journal = journal
        self.fingerprint = backbone.fingerprint
        self._backbone = backbone
        self._server = backbone if isinstance(backbone, _Submits) else None
        self._embedder: Embedder = embedder or backbone
        self._embedder_fingerprint = self._embedder.fingerprint
        self._batch_size = batch_size
        self._budget = budget
        if budget is not None:
            budget.start_from(journal.ledger())
        self._retries = 0
        self._flying: dict[str, _Sent] = {}
        self._arrivals: queue.SimpleQueue[_Arrived] = queue.SimpleQueue()
        self._unrecorded: list[_Arrived] = []

    @property
    def is_concurrent(self) -> bool:
        """Whether calls are sent one by one (`submit`, `settle`)."""
        return self._server is not None

    @property
    def in_flight(self) -> int:
        """Calls sent and not yet recorded."""
        return len(self._flying)

    # ---- whole lists ---------------------------------------------------------------------------------------------

    def answer(self, calls: Sequence[Call]) -> list[Answer]:
        """Answers in order: from the journal where it has them, else from the model, recorded first.

        Raises:
            BudgetReached: before the first call that may not be paid for; batches before it are recorded.
            BackboneError: the model failed; what it answered before is recorded.
        """
        if self._server is not None:
            futures = [self.submit(call) for call in calls]
            while any(not future.done() for future in futures):
                self.settle()
            return [future.result() for future in futures]
        keys = [call_key(self.fingerprint, call) for call in calls]
        unique = dict(zip(keys, calls, strict=True))
        found = self.journal.answers(unique, answer_from_json)
        self.journal.count("cached", len(calls) - (len(unique) - len(found)))
        listed = list(unique)
        for start in range(0, len(listed), self._batch_size):
            missing = {key: unique[key] for key in listed[start : start + self._batch_size] if key not in found}
            if missing:
                found.update(self._pay(missing))
        return [found[key] for key in keys]

    def _pay(self, missing: dict[str, Call]) -> dict[str, Answer]:
        if self._budget is not None:
            self._budget.check(sending=len(missing))
        began = time.monotonic()
        try:
            answers = answer_batch(self._backbone, list(missing.values()))
        except CALL_FAULTS as error:
            self._note_failure(next(iter(missing)), next(iter(missing.values())).site, error)
            raise
        seconds = (time.monotonic() - began) / len(missing)
        found = dict(zip(missing, answers, strict=True))
        self.journal.record([self._recorded(key, missing[key], answer, seconds) for key, answer in found.items()])
        for answer in answers:
            self._spend(answer, seconds)
        return found

    def _recorded(self, key: str, call: Call, answer: Answer, seconds: float) -> RecordedCall:
        """The journal's row; raises `MalformedOutput` for an answer that could not be read back."""
        if not isinstance(answer, Completion) and not all(map(math.isfinite, answer.log_probs)):
            raise MalformedOutput(f"the model answered a {primitive_of(call)} with numbers that are not finite")
        prompt_tokens, completion_tokens = answer_tokens(answer)
        return RecordedCall(
            key,
            primitive_of(call),
            call.site,
            self.fingerprint,
            call_to_json(call),
            answer_to_json(answer),
            prompt_tokens,
            completion_tokens,
            seconds,
        )

    def _spend(self, answer: Answer, seconds: float) -> None:
        if self._budget is not None:
            self._budget.spend(tokens=sum(answer_tokens(answer)), seconds=seconds)

    def _note_failure(self, key: str, site: str, error: BaseException) -> None:
        self.journal.record_failure(key=key, site=site, kind=type(error).__name__, message=str(error))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(B, D) float32 unit rows, in order; each distinct text is embedded once per run."""
        keys = [text_key(self._embedder_fingerprint, text) for text in texts]
        unique = dict(zip(keys, texts, strict=True))
        found = self.journal.embeddings(unique)
        listed = list(unique)
        for start in range(0, len(listed), TEXTS_PER_BATCH):
            missing = [key for key in listed[start : start + TEXTS_PER_BATCH] if key not in found]
            if missing:
                rows = self._embedder.embed([unique[key] for key in missing])
                if not np.isfinite(rows).all():
                    raise BackboneError(f"the embedder {self._embedder_fingerprint!r} gave values that are not finite")
                vectors = dict(zip(missing, np.asarray(rows, dtype=np.float32), strict=True))
                self.journal.record_embeddings(
                    self._embedder_fingerprint,
                    [RecordedText(key, unique[key], vector) for key, vector in vectors.items()],
                )
                found.update(vectors)
        return np.stack([found[key] for key in keys]) if keys else np.zeros((0, 0), dtype=np.float32)

    # ---- one by one ----------------------------------------------------------------------------------------------

    def submit(self, call: Call) -> Future[Answer]:
        """Ask for one answer. The future is done at once on a hit; else `settle` resolves it, on this thread.

        Raises:
            BudgetReached: the call may not be paid for; nothing was sent.
        """
        if self._server is None:
            raise ConfigError("this backbone answers batches; use answer()")
        key = call_key(self.fingerprint, call)
        flying = self._flying.get(key)
        if flying is not None:
            self.journal.count("cached")
            return flying.future
        future: Future[Answer] = Future()
        hit = self.journal.answers((key,), answer_from_json)
        if hit:
            self.journal.count("cached")
            future.set_result(hit[key])
            return future
        if self._budget is not None:
            self._budget.check(sending=1, in_flight=len(self._flying))
        sent = _Sent(key, call, time.monotonic(), future)
        self._flying[key] = sent
        self._server.submit(call).add_done_callback(partial(self._arrive, sent))
        return future

    def _arrive(self, sent: _Sent, answered: Future[Answer]) -> None:
        """On whatever thread the server's answers come in: hand over, touch nothing else."""
        seconds = time.monotonic() - sent.since
        if answered.cancelled():
            self._arrivals.put(_Arrived(sent, None, BackboneError("the call was cancelled"), seconds))
        elif (error := answered.exception()) is not None:
            self._arrivals.put(_Arrived(sent, None, error, seconds))
        else:
            self._arrivals.put(_Arrived(sent, answered.result(), None, seconds))

    def settle(self, *, wait: bool = True) -> int:
        """Record every answer that has come in, in one transaction, then resolve their futures.

        Args:
            wait: for at least one answer, where any call is in flight.

        Returns:
            Number of calls settled, failed ones included.
        """
        with self.journal.interrupts.deferred():
            self._take_arrivals()
        if wait and not self._unrecorded and self._flying:
            self._unrecorded.append(self._arrivals.get())
        with self.journal.interrupts.deferred():
            self._take_arrivals()
            batch = [self._to_row(one) for one in self._unrecorded]
            rows = [row for _, row in batch if row is not None]
            if rows:
                self._count_retries()
                self.journal.record(rows)
            self._unrecorded = []
            for one, _ in batch:
                del self._flying[one.sent.key]
                if one.answer is not None:
                    self._spend(one.answer, one.seconds)
                elif isinstance(one.error, CALL_FAULTS):
                    self._note_failure(one.sent.key, one.sent.call.site, one.error)
        for one, _ in batch:
            if one.answer is not None:
                one.sent.future.set_result(one.answer)
            else:
                one.sent.future.set_exception(one.error)
        return len(batch)

    def _to_row(self, one: _Arrived) -> tuple[_Arrived, RecordedCall | None]:
        if one.answer is None:
            return one, None
        try:
            return one, self._recorded(one.sent.key, one.sent.call, one.answer, one.seconds)
        except MalformedOutput as error:
            return _Arrived(one.sent, None, error, one.seconds), None

    def _take_arrivals(self) -> None:
        while True:
            try:
                self._unrecorded.append(self._arrivals.get_nowait())
            except queue.Empty:
                return

    def _count_retries(self) -> None:
        if isinstance(self._backbone, _CountsRetries):
            total = int(self._backbone.stats()["retries"])
            self.journal.count("retries", total - self._retries)
            self._retries = total


__all__ = ["CALL_FAULTS", "Embedder", "Journaled", "Replay"]
