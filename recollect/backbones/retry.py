"""What to do when a model server fails: classes of failure, how often and how long to try again (reliability §5).

| class | signal | policy |
|---|---|---|
| transient | no connection, reset, read timeout, 408/425/502/503/504 | 1, 2, 4, ... s, full jitter, cap 60 s; 8 tries |
| rate | 429 | `Retry-After` if given, else as transient; only the deadline ends it |
| sick | 500 and other 5xx | as transient; the first two do not count towards the breaker |
| ours | 400, 413, 422 and other 4xx | never |
| config | 401, 403, 404 | never; the run stops |
| semantic | 200 with a body that is not an answer | at once, 3 retries, then `MalformedOutput` |
| hung | the server went silent and a one-token probe failed | the breaker opens; tries are not counted |

Everything ends at the deadline, counted from a request's first failure. `tenacity` runs the loop; clock, sleep and
jitter are injected, so tests pass hours in milliseconds.
"""

from __future__ import annotations

import email.utils
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import tenacity

from recollect.errors import BackboneConfigError, BackboneError, ContextTooLong, MalformedOutput, ServerAway

FaultKind = Literal["transient", "rate", "sick", "ours", "config", "semantic", "hung"]

_TRANSIENT_STATUS = frozenset({408, 425, 502, 503, 504})
_CONFIG_STATUS = frozenset({401, 403, 404})
_CONTEXT_MARKS = ("context length", "context_length", "max_model_len", "maximum model length", "too many tokens")
_QUOTED = 300


class RequestFault(Exception):
    """One try of one request failed; `kind` decides what follows."""

    def __init__(
        self, kind: FaultKind, message: str, *, retry_after_s: float | None = None, overload: bool = False
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s
        self.overload = overload


def fault_of_status(status: int, body: str, headers: Mapping[str, str]) -> RequestFault:
    """Class of an HTTP answer other than 200; the message quotes the start of the body."""
    message = f"HTTP {status}: {' '.join(body.split())[:_QUOTED] or 'empty body'}"
    if status == 429:
        return RequestFault("rate", message, retry_after_s=retry_after_seconds(headers), overload=True)
    if status in _TRANSIENT_STATUS:
        return RequestFault("transient", message, retry_after_s=retry_after_seconds(headers), overload=status == 503)
    if status >= 500:
        return RequestFault("sick", message)
    if status in _CONFIG_STATUS:
        return RequestFault("config", message)
    return RequestFault("ours", message)


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds asked for by `Retry-After`; a date is read against the server's own `Date`, never our clock."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(value)
        now = email.utils.parsedate_to_datetime(headers["date"])
        return max(0.0, (until - now).total_seconds())
    except (KeyError, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class RetryPolicy:
    """Bounds of trying again; seconds. `deadline_s` counts from a request's first failure."""

    base_s: float = 1.0
    cap_s: float = 60.0
    transient_tries: int = 8
    uncounted_sick_tries: int = 2
    semantic_retries: int = 3
    deadline_s: float = 600.0

    def gives_up(self, fault: RequestFault, tries: Counter[FaultKind], elapsed_s: float) -> bool:
        """Whether a request with these failures so far (`fault` included) is abandoned."""
        if fault.kind in ("ours", "config"):
            return True
        if fault.kind == "semantic" and tries["semantic"] > self.semantic_retries:
            return True
        if fault.kind in ("transient", "sick") and tries["transient"] + tries["sick"] >= self.transient_tries:
            return True
        return elapsed_s >= self.deadline_s

    def wait_s(self, fault: RequestFault, tries: Counter[FaultKind], elapsed_s: float, jitter: float) -> float:
        """Seconds before the next try; `jitter` is uniform in [0, 1)."""
        if fault.kind in ("semantic", "hung"):
            return 0.0
        if fault.retry_after_s is not None:
            wait = fault.retry_after_s
        else:
            count = tries["transient"] + tries["sick"] + tries["rate"]
            wait = min(self.cap_s, self.base_s * 2.0 ** (count - 1)) * jitter
        return min(wait, max(0.0, self.deadline_s - elapsed_s))

    def speaks_against_server(self, fault: RequestFault, tries: Counter[FaultKind]) -> bool:
        """Whether the breaker hears of this failure."""
        return fault.kind == "transient" or (fault.kind == "sick" and tries["sick"] > self.uncounted_sick_tries)


def final_error(fault: RequestFault, n_tries: int, where: str) -> BackboneError:
    """The error a caller sees when a request is abandoned; `where` is the server's address."""
    text = str(fault)
    if fault.kind == "config":
        return BackboneConfigError(f"{where} refuses the request: {text}; check the address, model name and API key")
    if fault.kind == "ours":
        if any(mark in text.lower() for mark in _CONTEXT_MARKS):
            return ContextTooLong(f"the prompt does not fit the model at {where}: {text}")
        return BackboneError(f"{where} refuses the request as malformed: {text}")
    if fault.kind == "semantic":
        return MalformedOutput(f"{where} gave no usable answer in {n_tries} tries: {text}")
    if fault.kind == "sick":
        return BackboneError(f"{where} failed {n_tries} times on one request: {text}")
    return ServerAway(f"server {where} stayed away ({n_tries} tries): {text}; start it again and resume")


def fault_of(state: tenacity.RetryCallState) -> RequestFault:
    """The failure tenacity is looking at."""
    fault = state.outcome.exception() if state.outcome is not None else None
    if not isinstance(fault, RequestFault):
        raise TypeError(f"only RequestFault is retried, got {fault!r}")
    return fault


async def run_with_retries(
    attempt: Callable[[], Awaitable[object]],
    *,
    policy: RetryPolicy,
    now: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]],
    jitter: Callable[[], float],
    on_fault: Callable[[RequestFault, Counter[FaultKind], bool], None],
    where: Callable[[], str],
) -> object:
    """Run `attempt` until it returns, or until the policy gives up.

    `on_fault(fault, failures so far, gives up)` is told of every failed try, before any wait.

    Raises:
        BackboneError: see `final_error`; other exceptions of `attempt` pass through untouched.
    """
    tries: Counter[FaultKind] = Counter()
    first_failure: float | None = None
    gives_up = False

    def wait(state: tenacity.RetryCallState) -> float:
        # tenacity asks for the wait before it asks whether to stop, so the failure is judged here.
        nonlocal first_failure, gives_up
        fault = fault_of(state)
        tries[fault.kind] += 1
        moment = now()
        first_failure = moment if first_failure is None else first_failure
        gives_up = policy.gives_up(fault, tries, moment - first_failure)
        on_fault(fault, tries, gives_up)
        return 0.0 if gives_up else policy.wait_s(fault, tries, moment - first_failure, jitter())

    def abandon(state: tenacity.RetryCallState) -> object:
        fault = fault_of(state)
        raise final_error(fault, state.attempt_number, where()) from fault

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(RequestFault),
        wait=wait,
        stop=lambda _state: gives_up,
        sleep=sleep,
        retry_error_callback=abandon,
    )
    return await retrying(attempt)
