"""Breaker, limiter and retry policy do exactly what their tables say."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.backbones.breaker import Breaker
from recollect.backbones.limiter import AdaptiveLimiter
from recollect.backbones.retry import (
    RequestFault,
    RetryPolicy,
    fault_of_status,
    retry_after_seconds,
    run_with_retries,
)
from recollect.errors import BackboneConfigError, BackboneError, ContextTooLong, MalformedOutput, ServerAway


def test_breaker_opens_after_five_failures_in_a_row_and_not_after_four():
    breaker = Breaker()
    for _ in range(4):
        breaker.on_failure(0.0)
    breaker.on_success()
    for _ in range(4):
        breaker.on_failure(0.0)
    assert breaker.state == "closed"
    breaker.on_failure(7.0)
    assert (breaker.state, breaker.opened_at, breaker.times_opened) == ("open", 7.0, 1)


def test_breaker_opens_on_more_than_half_of_the_last_twenty():
    breaker = Breaker()
    for failed in [True, False] * 10:
        breaker.on_failure(1.0) if failed else breaker.on_success()
    assert breaker.state == "closed"
    for _ in range(2):  # 11 of the last 20, never five in a row
        breaker.on_failure(2.0)
    assert breaker.state == "open"


def test_breaker_probes_every_thirty_seconds_and_keeps_the_time_it_opened():
    breaker = Breaker()
    breaker.trip(100.0)
    assert breaker.seconds_to_probe(110.0) == 20.0
    assert breaker.seconds_to_probe(131.0) == 0.0
    breaker.start_probe()
    assert breaker.state == "half-open"
    breaker.end_probe(False, 135.0)
    assert (breaker.state, breaker.opened_at, breaker.seconds_to_probe(135.0)) == ("open", 100.0, 30.0)
    breaker.start_probe()
    breaker.end_probe(True, 170.0)
    assert (breaker.state, breaker.opened_at) == ("closed", None)
    for _ in range(4):  # the history before was forgotten
        breaker.on_failure(171.0)
    assert breaker.state == "closed"


def test_limiter_cuts_by_a_fifth_at_most_every_fifteen_seconds():
    limiter = AdaptiveLimiter(100)
    limiter.on_overload(0.0)
    limiter.on_overload(14.9)
    assert limiter.limit == 80
    limiter.on_overload(15.0)
    assert limiter.limit == 64


def test_limiter_grows_five_percent_after_a_clean_and_saturated_round_only():
    limiter = AdaptiveLimiter(100)
    limiter.on_overload(0.0)
    for _ in range(80):
        limiter.on_answer()
    assert limiter.limit == 80  # nobody needed more
    for _ in range(80):
        limiter.take()
    for _ in range(80):
        limiter.give_back()
        limiter.on_answer()
    assert limiter.limit == 84


@given(st.lists(st.sampled_from(["take", "back", "ok", "overload"]), max_size=300), st.integers(1, 40))
def test_limit_stays_between_one_and_the_ceiling(events, ceiling):
    limiter, now = AdaptiveLimiter(ceiling), 0.0
    for event in events:
        now += 5.0
        if event == "take" and limiter.has_room:
            limiter.take()
        elif event == "back" and limiter.in_flight:
            limiter.give_back()
        elif event == "ok":
            limiter.on_answer()
        elif event == "overload":
            limiter.on_overload(now)
        assert 1 <= limiter.limit <= ceiling
        assert limiter.in_flight >= 0


@pytest.mark.parametrize(
    ("status", "kind", "overload"),
    [
        (429, "rate", True),
        (503, "transient", True),
        (502, "transient", False),
        (504, "transient", False),
        (408, "transient", False),
        (500, "sick", False),
        (400, "ours", False),
        (422, "ours", False),
        (401, "config", False),
        (403, "config", False),
        (404, "config", False),
    ],
)
def test_statuses_fall_into_their_classes(status, kind, overload):
    fault = fault_of_status(status, "body", {})
    assert (fault.kind, fault.overload) == (kind, overload)


def test_retry_after_is_read_in_seconds_and_as_a_date_of_the_servers_clock():
    assert retry_after_seconds({"retry-after": "7"}) == 7.0
    dates = {"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert retry_after_seconds(dates) == 30.0
    assert retry_after_seconds({"retry-after": "soon"}) is None
    assert retry_after_seconds({}) is None


class Trial:
    """Runs a sequence of failures through the policy with a clock that only sleeps move."""

    def __init__(self, faults, jitter=1.0, deadline=600.0):
        self.now, self.waits, self.calls, self.seen = 0.0, [], 0, []
        faults = iter(faults)

        async def attempt():
            self.calls += 1
            fault = next(faults, None)
            if fault is not None:
                raise fault
            return "answer"

        async def sleep(seconds):
            self.waits.append(seconds)
            self.now += seconds

        self.run = lambda: asyncio.run(
            run_with_retries(
                attempt,
                policy=RetryPolicy(deadline_s=deadline),
                now=lambda: self.now,
                sleep=sleep,
                jitter=lambda: jitter,
                on_fault=lambda fault, tries, gives_up: self.seen.append((fault.kind, gives_up)),
                where=lambda: "http://one/v1",
            )
        )


def test_transient_waits_double_to_the_cap_and_end_after_eight_tries():
    trial = Trial([RequestFault("transient", "refused")] * 20)
    with pytest.raises(ServerAway, match="http://one/v1") as caught:
        trial.run()
    assert trial.waits == [1, 2, 4, 8, 16, 32, 60]
    assert trial.calls == 8
    assert caught.value.exit_code == 75


@given(st.floats(0, 1, exclude_max=True))
def test_jitter_is_full(jitter):
    wait = RetryPolicy().wait_s(RequestFault("transient", ""), Counter({"transient": 4}), 0.0, jitter)
    assert wait == pytest.approx(8.0 * jitter)


def test_retry_after_is_honoured_until_the_deadline():
    trial = Trial([RequestFault("rate", "slow down", retry_after_s=100.0)] * 20)
    with pytest.raises(ServerAway):
        trial.run()
    assert trial.waits == [100.0] * 6  # 600 s, then no more
    assert Trial([RequestFault("rate", "slow down", retry_after_s=5.0)] * 30).run() == "answer"


def test_sick_servers_are_tried_eight_times_and_do_not_stop_the_run():
    trial = Trial([RequestFault("sick", "HTTP 500: boom")] * 20)
    with pytest.raises(BackboneError, match="HTTP 500") as caught:
        trial.run()
    assert trial.calls == 8
    assert caught.value.exit_code == 1
    policy = RetryPolicy()
    heard = [policy.speaks_against_server(RequestFault("sick", ""), Counter(sick=n)) for n in (1, 2, 3)]
    assert heard == [False, False, True]


def test_semantic_faults_are_retried_three_times_at_once():
    trial = Trial([RequestFault("semantic", "half a body")] * 9)
    with pytest.raises(MalformedOutput, match="half a body"):
        trial.run()
    assert (trial.calls, sum(trial.waits)) == (4, 0.0)
    assert Trial([RequestFault("semantic", "half a body")] * 3).run() == "answer"


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (RequestFault("ours", "HTTP 400: bad"), BackboneError),
        (RequestFault("ours", "HTTP 400: maximum context length is 8"), ContextTooLong),
        (RequestFault("config", "HTTP 401: no"), BackboneConfigError),
    ],
)
def test_our_own_mistakes_are_never_retried(fault, error):
    trial = Trial([fault] * 5)
    with pytest.raises(error):
        trial.run()
    assert trial.calls == 1


def test_bugs_are_not_retried():
    trial = Trial([ZeroDivisionError()])
    with pytest.raises(ZeroDivisionError):
        trial.run()
    assert trial.calls == 1
