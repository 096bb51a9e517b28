"""D9: an embedded store whose writer is killed at random instants always comes back right, and nobody else dies."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("chromadb")

SEED = 20261122
ROOT = Path(__file__).resolve().parents[2]

# Opens the index from the journal (one JSON line a row), compares it with the exact index, says so, then writes:
# first to the journal, then to the index, until it is killed.
WRITER = """
import itertools, json, os, sys
import numpy as np
from recollect.agents.chroma_index import ChromaIndex
from recollect.agents.memory_index import ExactIndex, IndexRow

folder, journal, threshold, writes = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "write"
DIMENSION, ROWS = 8, 2500

def row(number, version):
    vector = np.random.default_rng([number, version]).normal(size=DIMENSION)
    return IndexRow(f"m{number}", f"memory {number}.{version}", vector, {"owner": f"u{number % 5}", "version": version})

def recorded():
    with open(journal, "rb") as lines:
        for line in lines:
            if line.endswith(b"\\n"):  # a torn last line was never acknowledged
                yield from (("memories", row(*pair)) for pair in json.loads(line))

exact = ExactIndex()
rows = {found.id: found for _, found in recorded()}
if rows:
    exact.upsert("memories", list(rows.values()))
index = ChromaIndex(folder, recorded, sync_threshold=threshold)
queries = np.random.default_rng(len(rows)).normal(size=(12, DIMENSION))
for where in (None, {"owner": "u1"}, {"owner": "u2", "version": 0}):
    found, wanted = (target.query("memories", queries, 5, where) for target in (index, exact))
    assert found == wanted, (where, found, wanted)
assert index.count("memories") == len(rows)
stored = index._store.candidates("memories", queries[:1], len(rows) or 1, None, len(rows)) if rows else [[]]
assert sorted(stored[0]) == sorted(rows), "every row is reached"
print(json.dumps({"rebuilt": index.rebuilt, "rows": len(rows)}), flush=True)
if not writes:
    index.close()
    raise SystemExit(0)
start = sum(1 for _ in recorded())
handle = open(journal, "ab")
for number in itertools.count(start, 20):
    pairs = [(n % ROWS, n // ROWS) for n in range(number, number + 20)]
    handle.write(json.dumps(pairs).encode() + b"\\n")
    handle.flush()
    os.fsync(handle.fileno())
    index.upsert("memories", [row(*pair) for pair in pairs])
"""


def start(folder, journal, threshold, mode):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(journal), str(threshold), mode],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def kill_and_recover(tmp_path, threshold, n_kills, record):
    """Kill `n_kills` writers, three of four while they write and one of four while they open."""
    generator = random.Random(SEED + threshold)
    folder, journal = tmp_path / "index", tmp_path / "journal"
    journal.touch()
    rebuilt = rows = 0
    for number in range(n_kills):
        writer = start(folder, journal, threshold, "write")
        try:
            if number % 4 == 3:
                time.sleep(generator.uniform(0.3, 2.0))
            else:
                line = writer.stdout.readline()
                assert line, f"kill {number} (seed {SEED}): {writer.stderr.read().decode()[-2000:]}"
                said = json.loads(line)
                rebuilt, rows = rebuilt + said["rebuilt"], said["rows"]
                time.sleep(generator.uniform(0.02, 0.6))
            assert writer.poll() is None, f"kill {number} (seed {SEED}): {writer.stderr.read().decode()[-2000:]}"
        finally:
            if writer.poll() is None:
                os.kill(writer.pid, signal.SIGKILL)
            writer.communicate()
        assert writer.returncode == -signal.SIGKILL
        torn = journal.read_bytes()
        journal.write_bytes(torn[: torn.rfind(b"\n") + 1])  # what a journal does on opening
    reader = start(folder, journal, threshold, "read")
    out, err = reader.communicate(timeout=120)
    assert reader.returncode == 0, err.decode()[-2000:]
    said = json.loads(out)
    record(f"threshold {threshold}: {n_kills} kills, {rebuilt + said['rebuilt']} rebuilds, {said['rows']} rows")
    assert said["rows"] >= rows > 0
    return said


@pytest.mark.parametrize("threshold", [50, 1000])
def test_a_killed_store_recovers_with_every_row(tmp_path, threshold, caplog):
    caplog.set_level("INFO")
    kill_and_recover(tmp_path, threshold, 5, log)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("threshold", [50, 1000])
def test_a_store_killed_a_hundred_times_recovers_with_every_row(tmp_path, threshold):
    kill_and_recover(tmp_path, threshold, 100, log)


def log(text):
    import logging

    logging.getLogger(__name__).info(text)
