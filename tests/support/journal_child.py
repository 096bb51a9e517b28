"""Fault harness: a warm process that forks players of a scripted world and stops them in every unkind way.

    python -m support.journal_child MODE FOLDER key=value …      (the repository and `tests` on the path)

Prints one JSON line with what happened. Modes: `kill` (SIGKILL after random times until a player ends), `boundaries`
(SIGKILL at every boundary of a write, one after the other), `full` (the disk refuses at growing sizes), `race` (two
processes open one run at once), `signal` (SIGINT or SIGTERM after random times), `play` (one player, no fault).
Forking spares the imports, so that several kills fit into a second; nothing here runs threads before a fork.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from support.journal_world import BatchModel, Paid, ServedModel, World, play

from recollect.errors import JournalLocked, StorageRefused
from recollect.journal import Journal, hooks

INTERNAL, FULL, INTERRUPTED = 1, 74, 130


class Harness:
    """One world, one folder per try."""

    def __init__(self, options: dict[str, str]) -> None:
        self.agents = int(options.get("agents", 12))
        self.steps = int(options.get("steps", 120))
        self.served = options.get("model", "batch") == "served"
        self.concurrency = int(options.get("concurrency", 8))
        self.delay = float(options.get("delay", 0))
        self.random = random.Random(int(options.get("seed", 0)))
        self.kills = int(options.get("kills", 60))
        self.longest = float(options.get("longest", 0.1))
        self.barrier_every = int(options.get("barrier_every", 37))
        self.signal = signal.Signals[options.get("signal", "SIGINT")]

    def player(self, folder: Path, prepare: Callable[[], None] = lambda: None) -> int:
        """Play in a forked process; its pid. Exit codes as the command line's."""
        pid = os.fork()
        if pid:
            return pid
        code = INTERNAL
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paid = Paid(folder / "paid")
            paid.write(f"life {_recorded(folder)}")
            prepare()
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # the command line turns it into an exception too
            model = (
                ServedModel(paid, concurrency=self.concurrency, delay=self.delay)
                if self.served
                else BatchModel(paid, delay=self.delay)
            )
            play(folder, model, World(self.agents, self.steps, barrier_every=self.barrier_every), resume=True)
            code = 0
        except StorageRefused:
            code = FULL
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(code)

    def play(self, folder: Path, prepare: Callable[[], None] = lambda: None) -> int:
        """Exit code of a player that nobody disturbs."""
        return os.waitstatus_to_exitcode(os.waitpid(self.player(folder, prepare), 0)[1])


def _recorded(folder: Path) -> int:
    """Calls recorded so far; reading creates nothing."""
    if not (folder / "journal.sqlite").exists():
        return 0
    connection = sqlite3.connect(folder / "journal.sqlite")
    try:
        return connection.execute("SELECT COALESCE(MAX(rowid), 0) FROM calls").fetchone()[0]
    except sqlite3.OperationalError:  # killed before the tables were made
        return 0
    finally:
        connection.close()


def outcome(folder: Path) -> dict:
    """What a finished folder holds, and what was paid for more than once."""
    journal = Journal.open(folder / "journal.sqlite", config={}, resume=True, read_only=True)
    try:
        problems = journal.problems()
        journal.fold_check()
        ledger, digest, n_committed = journal.ledger(), journal.digest, journal.n_committed
    finally:
        journal.close()
    connection = sqlite3.connect(folder / "journal.sqlite")
    rows = {
        key: (number, call, answer)
        for number, key, call, answer in connection.execute("SELECT rowid, key, call, answer FROM calls")
    }
    connection.close()
    again, known = 0, 0
    paid: Counter[str] = Counter()
    for line in (folder / "paid").read_text().splitlines():
        if line.startswith("life "):
            known = int(line.split()[1])
        elif not line.startswith("embed:"):
            paid[line] += 1
            again += line in rows and rows[line][0] <= known
    return {
        "events": (folder / "events.jsonl").read_text(),
        "calls": sorted((key, call, answer.decode()) for key, (_, call, answer) in rows.items()),
        "digest": digest,
        "n_committed": n_committed,
        "requests": ledger["requests"],
        "problems": problems,
        "paid": sum(paid.values()),
        "twice": sum(n - 1 for n in paid.values()),
        "recorded_paid_again": again,
    }


def compared(folder: Path, undisturbed: dict) -> dict:
    """The figures of `folder`, and whether log and calls are those of the undisturbed run."""
    found = outcome(folder)
    return {
        "same_events": found.pop("events") == undisturbed["events"],
        "same_calls": found.pop("calls") == undisturbed["calls"],
        "same_digest": found.pop("digest") == undisturbed["digest"],
        **found,
    }


def kill(harness: Harness, folder: Path, number: int = signal.SIGKILL) -> dict:
    """Stop players after random times until `kills` were stopped, then let one end."""
    assert harness.play(folder / "undisturbed") == 0
    stopped, codes, finished = 0, Counter(), False
    while stopped < harness.kills and not finished:
        pid = harness.player(folder / "run")
        time.sleep(harness.random.uniform(0.002, harness.longest))
        os.kill(pid, number)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        codes[code] += 1
        finished = code == 0
        stopped += not finished
    last = harness.play(folder / "run")
    return {"stopped": stopped, "codes": dict(codes), "last": last} | compared(
        folder / "run", outcome(folder / "undisturbed")
    )


def boundaries(harness: Harness, folder: Path) -> dict:
    """SIGKILL at the n-th boundary, for every n there is."""
    reached: list[str] = []
    names = folder / "names"

    def watch(stop_at: int) -> Callable[[], None]:
        def prepare() -> None:
            descriptor = os.open(names, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            count = 0

            def trigger(name: str) -> None:
                nonlocal count
                os.write(descriptor, f"{name}\n".encode())
                count += 1
                if count == stop_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            def around(name: str, function: Callable) -> Callable:
                def wrapped(*arguments, **options):
                    trigger(f"{name}:before")
                    value = function(*arguments, **options)
                    trigger(f"{name}:after")
                    return value

                return wrapped

            hooks.trigger = trigger
            os.fsync, os.replace = around("fsync", os.fsync), around("replace", os.replace)

        return prepare

    assert harness.play(folder / "undisturbed", watch(-1)) == 0
    reached = names.read_text().splitlines()
    expected = outcome(folder / "undisturbed")
    wrong: list[tuple] = []
    killed_at: list[str] = []
    twice = again = 0
    for place in range(1, len(reached) + 1):
        run = folder / "run"
        first = harness.play(run, watch(place))
        if first == -signal.SIGKILL:
            killed_at.append(names.read_text().splitlines()[-1])
        second = harness.play(run)
        found = compared(run, expected)
        twice = max(twice, found["twice"])
        again += found["recorded_paid_again"]
        if (
            first not in (-signal.SIGKILL, 0)
            or second != 0
            or not (found["same_events"] and found["same_calls"])
            or found["problems"]
        ):
            wrong.append((place, reached[place - 1], first, second, found))
        shutil.rmtree(run)
    return {
        "n": len(reached),
        "n_killed": len(killed_at),
        "names": sorted(set(killed_at)),
        "wrong": wrong,
        "most_twice": twice,
        "recorded_paid_again": again,
    }


def full(harness: Harness, folder: Path) -> dict:
    """A file-size limit stands in for a full disk; it grows until the run fits."""
    assert harness.play(folder / "undisturbed") == 0
    codes = []
    limit = 12_000
    while True:

        def prepare(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        codes.append(harness.play(folder / "run", prepare))
        if codes[-1] != FULL:
            break
        limit = int(limit * 1.12)
    return {"codes": codes} | compared(folder / "run", outcome(folder / "undisturbed"))


def race(harness: Harness, folder: Path) -> dict:
    """Two processes open one run at the same instant, again and again."""
    tallies: Counter[str] = Counter()
    for number in range(harness.kills):
        path = folder / f"{number % 3}" / "journal.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        go_read, go_write = os.pipe()
        told_read, told_write = os.pipe()
        pids = []
        for _ in range(2):
            pid = os.fork()
            if pid:
                pids.append(pid)
                continue
            os.close(go_write)
            os.read(go_read, 1)  # both wake when the pipe is closed
            try:
                journal = Journal.open(path, config={}, resume=True)
            except JournalLocked as error:
                os.write(told_write, f"refused {os.getpid()} {error}\n".encode())
                os._exit(0)
            os.write(told_write, f"wrote {os.getpid()}\n".encode())
            time.sleep(0.03)
            journal.count("cached")
            if number % 4:  # otherwise it dies with its lock, as a killed writer does
                journal.close()
            os._exit(0)
        os.close(go_read)
        os.close(told_write)
        os.close(go_write)
        for pid in pids:
            os.waitpid(pid, 0)
        told = b""
        while part := os.read(told_read, 4096):
            told += part
        os.close(told_read)
        lines = told.decode().splitlines()
        writers = [line.split()[1] for line in lines if line.startswith("wrote")]
        refused = [line for line in lines if line.startswith("refused")]
        named = len(writers) == 1 and len(refused) == 1 and f"process {writers[0]};" in refused[0]
        tallies["one wrote, the other named it" if named else f"wrong: {lines}"] += 1
    return dict(tallies)


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    harness = Harness(dict(word.split("=", 1) for word in sys.argv[3:]))
    folder.mkdir(parents=True, exist_ok=True)
    match mode:
        case "play":
            found = {"code": harness.play(folder), "events": (folder / "events.jsonl").read_text()}
        case "kill":
            found = kill(harness, folder)
        case "signal":
            found = kill(harness, folder, harness.signal)
        case "boundaries":
            found = boundaries(harness, folder)
        case "full":
            found = full(harness, folder)
        case "race":
            found = race(harness, folder)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
