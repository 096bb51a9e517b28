"""Parallel = one by one = interrupted and resumed: the same bytes in the log, and nothing paid twice (oracle 5)."""

import collections
import json

import pytest
from support.agent_worlds import InProcess, no_report, play, polite_text, reader

import recollect
from recollect.backbones.protocol import call_key
from recollect.backbones.scripted import ScriptedBackbone
from recollect.data import HarborConfig, build_harbor

WORLD = HarborConfig(n_users=7, n_domains=2, items_per_domain=24, min_events=7, max_events=9, shock_items=2)
LANGUAGE = {"writer": "llm", "decision": "generate", "ranking": "listwise", "max_failed": 1.0}
VARIANTS = {
    "structured": {},
    "written": LANGUAGE,
    "base": {"method": "agentcf"},
    "pairwise": {"ranking": "pairwise", "candidates": 4, "method": "agentcf++-no-group"},
}


@pytest.fixture(scope="module")
def world():
    return build_harbor(WORLD, seed=4).dataset


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """{variant: the run in a plain loop over its steps}."""
    return {
        name: play(world, tmp_path_factory.mktemp(name), reader(), one_by_one=True, **small(**options))
        for name, options in VARIANTS.items()
    }


def small(**options):
    return {"interactions_per_user": 3, "held_out": 1, **options}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("concurrency", [1, 8, 64])
def test_any_concurrency_with_late_and_unordered_answers_gives_the_same_bytes(
    world, alone, tmp_path, variant, concurrency
):
    backbone = reader(latency=0.0005, concurrency=concurrency)
    played = play(world, tmp_path, backbone, concurrency=concurrency, **small(**VARIANTS[variant]))
    backbone.close()
    assert played.log == alone[variant].log
    if concurrency > 1:
        assert backbone.max_in_flight > 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_an_in_process_model_gives_the_same_bytes_in_any_batches(world, alone, tmp_path, variant, batch_size):
    played = play(world, tmp_path, InProcess(reader()), batch_size=batch_size, **small(**VARIANTS[variant]))
    assert played.log == alone[variant].log


class Dies(Exception):
    """Stands for anything that ends a process."""


def dying(after, error, paid):
    """A reader that dies on its call number `after`; notes the calls it answered in `paid`."""
    whole = reader()

    def count(call):
        if len(paid) >= after:
            raise error("the machine went down")
        paid.append(call_key("paid", call))

    def generate(request):
        count(request)
        return polite_text(request)

    def choose(choice):
        count(choice)
        return whole._choose(choice)

    def score(scoring):
        count(scoring)
        return whole._score(scoring)

    # The fingerprint is that of the whole reader: it is the same model, on a machine that dies.
    found = ScriptedBackbone(generate, choose, score, name="x")
    found._name = whole._name
    return found


@pytest.mark.parametrize("variant", ["structured", "written"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Dies])
@pytest.mark.parametrize("form", ["server", "in-process"])
def test_a_run_killed_again_and_again_ends_with_the_same_bytes_and_pays_nothing_twice(
    world, alone, tmp_path, variant, error, form
):
    total = len({call_key("paid", call) for _, call in alone[variant].prompts})
    every = max(7, total // 9)
    recorded, kills = [], 0
    while True:
        paid = []
        backbone = dying(every, error, paid)
        given = backbone if form == "server" else InProcess(backbone)
        try:
            played = play(world, tmp_path, given, batch_size=3, resume=kills > 0, **small(**VARIANTS[variant]))
        except (Dies, KeyboardInterrupt):
            kills += 1
            assert kills < 60, "the run does not get on"
            continue
        finally:
            recorded.append(paid)
            backbone.close()
        break
    assert kills >= 4
    assert played.log == alone[variant].log
    if form == "server":  # every answer that came in was recorded before anything else happened
        assert played.ledger["requests"] == total
        asked = collections.Counter(key for session in recorded for key in session)
        repeated = sum(count - 1 for count in asked.values())
        assert repeated <= kills * 64, "more than what was in flight at the kills was asked again"


def test_what_was_recorded_is_never_asked_again(world, alone, tmp_path):
    """With one batch of one call at a time nothing is in flight at a kill, so not one call is paid twice."""
    sessions, kills = [], 0
    while True:
        paid = []
        backbone = dying(11, Dies, paid)
        try:
            played = play(world, tmp_path, InProcess(backbone), batch_size=1, resume=kills > 0, **small())
        except Dies:
            kills += 1
            continue
        finally:
            sessions.append(paid)
        break
    asked = collections.Counter(key for session in sessions for key in session)
    assert kills > 5
    assert set(asked.values()) == {1}
    assert played.ledger["requests"] == len(asked)
    assert played.log == alone["structured"].log


@pytest.mark.parametrize("variant", ["structured", "written"])
def test_a_run_stopped_before_any_step_resumes_to_the_same_bytes(world, alone, tmp_path, variant):
    steps = len(alone[variant].plan.steps)

    class Stop(Exception):
        pass

    for number in range(0, steps, max(1, steps // 8)):

        def before(agents, step, number=number):
            if step.number == number:
                raise Stop

        folder = tmp_path / str(number)
        with pytest.raises(Stop):
            play(world, folder, reader(), one_by_one=True, before_step=before, **small(**VARIANTS[variant]))
        assert play(world, folder, reader(), resume=True, **small(**VARIANTS[variant])).log == alone[variant].log


def test_a_step_resumed_between_two_of_its_calls_asks_only_the_rest(world, alone, tmp_path):
    """Killed at every single call of a written run, one after the other."""
    total, sessions, log = 0, [], b""
    for kill in range(10_000):
        paid = []
        backbone = dying(1 + kill % 3, Dies, paid)
        try:
            log = play(world, tmp_path, InProcess(backbone), batch_size=1, resume=kill > 0, **small(**LANGUAGE)).log
        except Dies:
            sessions.append(paid)
            total += len(paid)
            if kill > 40:  # enough kills inside steps; finish
                log = play(world, tmp_path, InProcess(reader()), batch_size=1, resume=True, **small(**LANGUAGE)).log
                break
            continue
        break
    assert log == alone["written"].log
    asked = collections.Counter(key for session in sessions for key in session)
    assert total > 40
    assert set(asked.values()) == {1}


def test_two_runs_of_the_whole_pipeline_write_equal_events_whatever_the_concurrency(world, tmp_path):
    files = []
    with no_report():
        for concurrency in (1, 32):
            backbone = reader(latency=0.0003, concurrency=concurrency)
            recollect.simulate(
                world,
                backbone=backbone,
                embedder=backbone,
                out=str(tmp_path / str(concurrency)),
                concurrency=concurrency,
                **small(),
            )
            backbone.close()
            files.append((tmp_path / str(concurrency) / "events.jsonl").read_bytes())
    assert files[0] == files[1]
    steps = [json.loads(line)["step"] for line in files[0].splitlines()]
    assert steps == sorted(steps)


def test_the_seed_changes_the_run(world, alone, tmp_path):
    assert play(world, tmp_path, reader(), seed=1, **small()).log != alone["structured"].log


def test_hash_seed_and_order_of_users_in_sets_do_not_matter(tmp_path):
    """The event log of a child process is the same under any PYTHONHASHSEED."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    tests = Path(__file__).resolve().parents[1]
    program = (
        "import sys, hashlib, pathlib\n"
        "from support.agent_worlds import play, reader\n"
        "from recollect.data import HarborConfig, build_harbor\n"
        "world = build_harbor(HarborConfig(n_users=6, n_domains=2, items_per_domain=24, min_events=7, max_events=8,"
        " shock_items=2), seed=4).dataset\n"
        "played = play(world, pathlib.Path(sys.argv[1]), reader(), interactions_per_user=2, held_out=1)\n"
        "print(hashlib.sha256(played.log).hexdigest())\n"
    )
    found = set()
    for seed in ("1", "2"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / seed)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    assert len(found) == 1


def test_a_run_with_the_retrieval_index_is_resumed_to_the_same_bytes(world, tmp_path):
    """The index is derived: killed between any two barriers, it is brought back from the journal."""
    options = small(recall=True, users=4)
    expected = play(world, tmp_path / "alone", InProcess(reader()), one_by_one=True, **options)
    assert any(any(event["evidence"]["recalled_memory"]) for event in expected.of("rank", "test")), (
        "nothing was ever recalled"
    )
    assert play(world, tmp_path / "server", reader(latency=0.0005), **options).log == expected.log
    folder, paid = tmp_path / "killed", []
    for kill in range(30):
        try:
            played = play(world, folder, dying(9, Dies, paid := []), resume=kill > 0, **options)
        except Dies:
            continue
        break
    assert kill >= 3
    assert paid is not None
    assert played.log == expected.log
