"""An unwell server delays a run and never changes its results (reliability §5, D5; backbones oracles 5 and 6).

Time is virtual: 90 s hangs and 10 min patience take milliseconds. Faults are drawn from a printed seed.
"""

import asyncio
import itertools
import threading

import pytest
from support.fake_server import FakeModel, MemoryServer, SocketServer
from support.virtual_time import VirtualTimeLoop

from recollect.backbones.fleet import Timeouts
from recollect.backbones.protocol import Choice, Message, Request, Scoring, answer_to_json
from recollect.backbones.retry import RetryPolicy
from recollect.backbones.server import ServerBackbone
from recollect.errors import BackboneConfigError, MalformedOutput, ServerAway
from recollect.rng import stream

FAULTS = (
    "refuse", "reset", "429", "500", "502", "503", "hang", "half-json", "html", "no-choices", "wrong-model",
)  # fmt: skip


def chat(i: int) -> tuple[Message, ...]:
    return Message("system", f"You are user {i % 7}."), Message("user", f"Question {i}: A or B?")


def calls(n: int) -> list:
    made = []
    for i in range(n):
        made.append(Request(chat(i), max_tokens=32, temperature=0.7, seed=i))
        made.append(Choice(chat(i), ("A", "B")))
        made.append(Scoring(chat(i), (f"Title {i}", "Another title")))
    return made


def virtual(transport, url="http://one", **options) -> ServerBackbone:
    return ServerBackbone(url, transport=transport, make_loop=VirtualTimeLoop, **options)


def submitted(server: ServerBackbone, asked, beside=None) -> list:
    """Futures of all calls (and of a coroutine beside them), handed over in one virtual instant.

    The loop stands still meanwhile: its clock would run ahead of a main thread that has to wait for a core.
    """
    reached, released = threading.Event(), threading.Event()

    async def stand_still() -> None:
        reached.set()
        released.wait()

    server._run(stand_still())
    assert reached.wait(timeout=60)
    if beside is not None:
        server._run(beside)
    futures = [server.submit(call) for call in asked]
    released.set()
    return futures


def answers(server: ServerBackbone, asked, beside=None) -> list:
    return [answer_to_json(future.result(timeout=60)) for future in submitted(server, asked, beside)]


@pytest.fixture(scope="module")
def fault_free() -> list:
    with virtual(MemoryServer(FakeModel())) as server:
        return answers(server, calls(100))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("url", ["http://one", "http://one,http://two,http://three"])
def test_a_fifth_of_requests_failing_in_every_way_changes_no_result(seed, url, fault_free):
    def fault(number: int, path: str) -> str | None:
        draw = stream(seed, "fault", number)
        return FAULTS[draw.integers(len(FAULTS))] if draw.random() < 0.2 else None

    transport = MemoryServer(FakeModel(), fault=fault)
    with virtual(transport, url, concurrency=16) as server:
        assert answers(server, calls(100)) == fault_free
        stats = server.stats()
    assert set(transport.faults) == set(FAULTS)
    assert stats["failures"] == 0
    # All but those that met a probe or a question about what the server can do, which nobody repeats.
    assert stats["retries"] >= 0.9 * sum(transport.faults.values())
    n_servers = url.count(",") + 1
    assert transport.most_in_flight <= 16 * n_servers + n_servers  # and one probe each


def test_a_server_killed_and_restarted_fifty_times_completes_with_the_same_results(fault_free):
    transport = MemoryServer(FakeModel(), delay=15.0)
    kills = 0

    async def chaos() -> None:
        nonlocal kills
        draw = stream(3, "chaos")
        while kills < 50:
            await asyncio.sleep(draw.uniform(5, 50))
            transport.down.add("one")
            kills += 1
            await asyncio.sleep(draw.uniform(1, 100))
            transport.down.discard("one")

    # A probe needs 15 s of a server that is up; by chance many in a row meet it down, which is not what is tested.
    with virtual(transport, concurrency=4, patience_s=100_000.0) as server:
        server.fingerprint  # noqa: B018
        assert answers(server, calls(100), beside=chaos()) == fault_free
        stats = server.stats()
    assert kills == 50
    assert stats["failures"] == 0
    assert stats["breaker_opened"] >= 5


def test_a_server_that_stays_away_ends_every_call_after_the_patience_with_its_address():
    transport = MemoryServer(FakeModel())
    with virtual(transport, "http://one:8000", concurrency=4, patience_s=600.0) as server:
        answers(server, calls(2))
        transport.down.add("one")
        left_at = transport.log[-1][0]
        futures = submitted(server, calls(20)[10:])
        errors = [future.exception(timeout=60) for future in futures]
        assert all(isinstance(error, ServerAway) for error in errors), errors
        assert all("http://one:8000/v1" in str(error) for error in errors)
        assert 590 <= transport.log[-1][0] - left_at <= 700
        probes = [when for when, _, _ in transport.log if when > left_at + 60]
        assert all(later - earlier >= 29 for earlier, later in itertools.pairwise(probes))
        # Somebody starts it again: the same object recovers at the next probe.
        transport.down.clear()
        assert len(answers(server, calls(2))) == 6


def test_breaker_opens_on_five_refusals_and_closes_on_a_generation_probe():
    transport = MemoryServer(FakeModel())
    with virtual(transport, concurrency=1) as server:
        answers(server, calls(1))
        start = len(transport.log)
        transport.fault = lambda number, path: "refuse" if number < start + 6 else None
        assert server.generate([Request(chat(1))])[0].text
        tried = transport.log[start:]
        assert server.stats()["breaker_opened"] == 1
        assert [path for _, _, path in tried] == ["/v1/chat/completions"] * 8  # 5 tries, 2 probes, the answer
        times = [when for when, _, _ in tried]
        assert times[5] - times[4] == pytest.approx(30.0, abs=0.1)
        assert times[6] - times[5] == pytest.approx(30.0, abs=0.1)


@pytest.mark.parametrize("n_servers", [1, 2])
def test_a_server_that_accepts_and_never_answers_is_found_hung(n_servers):
    transport = MemoryServer(FakeModel())
    url = ",".join(f"http://s{i}" for i in range(n_servers))
    with virtual(transport, url, concurrency=8) as server:
        answers(server, calls(1))
        transport.frozen.add("s0")
        started = transport.log[-1][0]

        def thaw(number: int, path: str) -> None:
            if asyncio.get_running_loop().time() > started + 150:
                transport.frozen.clear()

        if n_servers == 1:
            transport.fault = thaw
        futures = submitted(server, calls(20))
        assert len([future.result(timeout=60) for future in futures]) == 60
        assert server.stats()["breaker_opened"] >= 1
        if n_servers == 2:  # 60 s of silence, 30 s of probing, then the other server takes the load
            assert transport.log[-1][0] - started < 180


def test_slow_answers_are_not_taken_for_a_hang():
    transport = MemoryServer(FakeModel(), delay=0.0)
    with virtual(transport) as server:
        answers(server, calls(1))
        original, slow = transport._reply, {"left": 1}

        async def reply(request, host, path, fault):
            if path == "/v1/chat/completions" and slow["left"]:
                slow["left"] = 0
                await asyncio.sleep(200)
            return await original(request, host, path, fault)

        transport._reply = reply
        assert server.generate([Request(chat(5))])[0].text
        stats = server.stats()
    assert (stats["breaker_opened"], stats["retries"]) == (0, 0)
    assert stats["probes"] >= 3


def test_open_servers_are_avoided_and_equal_beginnings_share_a_server():
    transport = MemoryServer(FakeModel())
    with virtual(transport, "http://one,http://two,http://three", concurrency=64) as server:
        answers(server, calls(1))
        start = len(transport.log)
        same = [Request((Message("system", "Shared."), Message("user", str(i)))) for i in range(20)]
        answers(server, same)
        assert len({host for _, host, _ in transport.log[start:]}) == 1
        start = len(transport.log)
        answers(server, [Request((Message("system", f"Own {i}."),)) for i in range(40)])
        assert len({host for _, host, _ in transport.log[start:]}) == 3
        transport.down.update({"one", "two"})
        assert len(answers(server, calls(30))) == 90
        assert transport.log[-1][1] == "three"


def test_saturated_servers_share_the_load_of_one_beginning():
    transport = MemoryServer(FakeModel(), delay=1.0)
    with virtual(transport, "http://one,http://two", concurrency=4) as server:
        answers(server, calls(1))
        start = len(transport.log)
        answers(server, [Request((Message("system", "Shared."), Message("user", str(i)))) for i in range(80)])
        hosts = [host for _, host, _ in transport.log[start:]]
    assert min(hosts.count("one"), hosts.count("two")) >= 32


def test_429_storms_cut_the_concurrency_and_honour_retry_after(fault_free):
    limits = []

    def fault(number: int, path: str) -> str | None:
        limits.append(server._fleet.servers[0].limiter.limit)
        return "429" if 40 <= number < 140 else None

    transport = MemoryServer(FakeModel(), fault=fault)
    transport.retry_after = "20"
    with virtual(transport, concurrency=32) as server:
        assert answers(server, calls(100)) == fault_free
        assert limits[0] == 32
        assert min(limits) <= 25
        assert server.stats()["breaker_opened"] == 0
    storm = [when for when, _, _ in transport.log[40:140]]
    assert storm[-1] - storm[0] >= 20


@pytest.mark.parametrize("fault", ["half-json", "html", "no-choices", "wrong-model"])
def test_rubbish_is_retried_three_times_then_malformed(fault):
    transport = MemoryServer(FakeModel())
    with virtual(transport) as server:
        answers(server, calls(1))
        start = len(transport.log)
        transport.fault = lambda number, path: fault
        with pytest.raises(MalformedOutput, match="http://one/v1"):
            server.generate([Request(chat(1))])
        assert len(transport.log) - start == 4
        assert server.stats()["malformed"] == 4
        transport.fault = lambda number, path: fault if number < start + 7 else None
        assert server.generate([Request(chat(1))])[0].text
        assert server.stats()["breaker_opened"] == 0


def test_a_refused_key_stops_at_once():
    transport = MemoryServer(FakeModel(), fault=lambda number, path: "401")
    with virtual(transport, api_key="very-secret") as server:
        with pytest.raises(BackboneConfigError, match="API key") as caught:
            server.generate([Request(chat(1))])
        assert len(transport.log) == 1
    assert "very-secret" not in str(caught.value)


# ---- real sockets ----------------------------------------------------------------------------------------------------

QUICK = RetryPolicy(base_s=0.01, deadline_s=30)


def test_concurrent_requests_keep_order_and_the_limit_and_overlap():
    gate = threading.Barrier(16, timeout=30)

    def before(path, body):
        if path == "/v1/chat/completions":
            gate.wait()  # passes only when 16 requests are in the server at the same time

    requests = [Request(chat(i), temperature=0.5, seed=i) for i in range(64)]
    with SocketServer(FakeModel(), before) as fake, ServerBackbone(fake.url, concurrency=16, policy=QUICK) as server:
        texts = [answer.text for answer in server.generate(requests)]
        assert fake.most_in_flight == 16
    alone = MemoryServer(FakeModel(), delay=0.0)
    with ServerBackbone("http://one", transport=alone) as server:
        assert texts == [server.generate([request])[0].text for request in requests]


def test_connections_cut_in_the_middle_of_a_body_are_retried():
    cuts = iter([b"", b'HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n{"model": "toy"', b"HTTP/1.1 200 OK\r\n"])

    def before(path, body):
        return next(cuts, None) if path == "/v1/chat/completions" else None

    with SocketServer(FakeModel(), before) as fake, ServerBackbone(fake.url, policy=QUICK) as server:
        assert server.generate([Request(chat(1))])[0].text
        assert server.stats()["retries"] == 3


def test_a_server_stopped_and_restarted_on_its_port_is_found_again():
    fake = SocketServer(FakeModel())
    port = fake.port
    with ServerBackbone(fake.url, policy=RetryPolicy(base_s=0.2, deadline_s=30), concurrency=4) as server:
        before = [answer.text for answer in server.generate([Request(chat(i)) for i in range(8)])]
        fake.stop()
        future = server.submit(Request(chat(3)))
        threading.Event().wait(0.2)
        with SocketServer(FakeModel(), port=port):
            assert future.result(timeout=30).text == before[3]


def test_an_unreachable_address_ends_in_server_away_with_the_address():
    with SocketServer(FakeModel()) as fake:
        url = fake.url
    policy = RetryPolicy(base_s=0.001, transient_tries=3, deadline_s=5)
    with (
        ServerBackbone(url, policy=policy, timeouts=Timeouts(connect=1)) as server,
        pytest.raises(ServerAway, match=url),
    ):
        _ = server.fingerprint


def test_interrupting_a_batch_cancels_it_and_the_backbone_closes():
    release = threading.Event()

    def before(path, body):
        if path == "/v1/chat/completions":
            release.wait(20)

    with SocketServer(FakeModel(), before) as fake:
        server = ServerBackbone(fake.url, concurrency=2, policy=QUICK)
        _ = server.fingerprint
        futures = submitted(server, [Request(chat(i)) for i in range(10)])

        class Interrupted:
            def result(self):
                raise KeyboardInterrupt

            def cancel(self):
                return True

        with pytest.raises(KeyboardInterrupt):
            server._wait([Interrupted(), *futures])
        assert all(future.cancelled() for future in futures)
        server.close()
        assert not server._background._thread.is_alive()
        release.set()
        assert sum(path == "/v1/chat/completions" for path in fake.served) <= 2
