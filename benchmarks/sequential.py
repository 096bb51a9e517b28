"""Training and full-ranking evaluation of SASRec with full softmax, side by side with RecBole's, and how cost grows.

    python benchmarks/sequential.py --recbole PYTHON [--quick] [--out benchmarks/results/sequential.jsonl]

PYTHON is the interpreter of an environment of its own with recbole 1.2.1 (README.md says how to make it).

Both sides run on the same cores with the same number of threads, data (5-core, leave-one-out), width, blocks, heads,
dropout, loss and longest history, turn by turn. A sample is a (prefix, target) pair: we predict every position of a
sequence in one pass, RecBole makes a row of each prefix. A batch of ours has 256 sequences; RecBole is measured at 256
rows and at its default of 2048, and the ratio is to the better of the two. Beside seconds on the wall stand seconds of
the processor, which other work on the machine disturbs less; they set the length of a turn, and are comparable at one
thread only, which is the default.

* speed: training samples a second; users a second of its own full-ranking evaluation (ours also keeps lists, three more
  cut-offs and the leak check).
* quality: NDCG@10 of both after the same processor seconds of training, by one rule (full ranking, the whole history
  masked).
* growth: our cost in processor seconds with the number of items and with the length of the history, on synthetic logs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rows import Rows

from recollect.data.examples import held_out_cases
from recollect.data.filters import k_core
from recollect.data.registry import load_dataset
from recollect.data.splits import leave_one_out
from recollect.eval.ranking import evaluate_ranker
from recollect.recommenders.configs import SASRecConfig
from recollect.recommenders.sasrec import SASRec
from recollect.rng import stream
from recollect.types import Catalog, Dataset, Interactions, Split, Users

SECTIONS = ("speed", "quality", "growth")
WIDTH, BLOCKS, HEADS, DROPOUT, BATCH = 64, 2, 1, 0.1, 256
PEER_BATCHES = (256, 2048)


@dataclass(frozen=True)
class Size:
    """How much is measured: processor seconds of a training turn, turns, those of the quality race, synthetic sizes."""

    seconds: float
    repetitions: int
    race: float
    items: tuple[int, ...]
    lengths: tuple[int, ...]


FULL = Size(6.0, 3, 60.0, (12_000, 50_000, 200_000), (50, 100, 200, 400))
QUICK = Size(2.0, 1, 10.0, (12_000, 50_000), (50, 200))


def main() -> None:
    """Parse the command line and run the sections."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recbole", type=Path, help="interpreter of an environment with recbole 1.2.1")
    parser.add_argument("--data", nargs="+", default=["ml-100k", "ml-1m"])
    parser.add_argument("--length", type=int, default=50, help="longest history of both sides")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smaller run, some two minutes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    if options.recbole is None and {"speed", "quality"} & set(options.only):
        parser.error("--recbole is needed, or choose --only growth; see benchmarks/README.md")
    import torch

    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else FULL
    with Rows("sequential", options.out) as rows:
        rows.model = f"SASRec, full softmax, width {WIDTH}, {BLOCKS} blocks, dropout {DROPOUT}"
        for name in options.data if {"speed", "quality"} & set(options.only) else ():
            rows.note = f"length {options.length}, {options.threads} threads"
            side_by_side(rows, name, options, size)
        if "growth" in options.only:
            rows.note = f"{options.threads} threads"
            growth_section(rows, size)
        rows.say("done")


def config_of(length: int, **more: Any) -> SASRecConfig:
    """Ours: no validation and no early end inside a measurement."""
    return SASRecConfig(
        hidden=WIDTH,
        blocks=BLOCKS,
        heads=HEADS,
        dropout=DROPOUT,
        max_length=length,
        batch_size=BATCH,
        patience=None,
        **more,
    )


def side_by_side(rows: Rows, name: str, options: argparse.Namespace, size: Size) -> None:
    """Both libraries on one data set, turn by turn."""
    dataset = k_core(load_dataset(name), 5)
    split = leave_one_out(dataset)
    rows.data = f"{name}, 5-core: {dataset.n_users} users, {dataset.n_items} items"
    with tempfile.TemporaryDirectory() as folder:
        if "speed" in options.only:
            speed(rows, dataset, split, options, size, Path(folder))
        if "quality" in options.only and name == options.data[0]:
            quality(rows, dataset, split, options, size, Path(folder))


# ---- speed -------------------------------------------------------------------------------------------------------


def speed(rows: Rows, dataset: Dataset, split: Split, options: Any, size: Size, folder: Path) -> None:
    """Training samples and evaluated users a second."""
    training: dict[str, list[Rate]] = {}
    evaluation: dict[str, list[Rate]] = {}
    epochs = epochs_for(size.seconds, dataset, split, options.length)
    with peers(options, dataset, split, folder) as others:
        for repetition in range(size.repetitions):
            sides = ["ours", *others] if repetition % 2 == 0 else [*others, "ours"]
            for side in sides:
                if side == "ours":
                    model, rate = trained(dataset, split, options.length, epochs, seed=repetition)
                    training.setdefault(side, []).append(rate)
                    evaluation.setdefault(side, []).append(evaluated(model, dataset, split))
                else:
                    found = others[side].ask("train", seconds=size.seconds)
                    training.setdefault(side, []).append(Rate(found["samples"], found["seconds"], found["cpu_seconds"]))
                    found = others[side].ask("evaluate")
                    evaluation.setdefault(side, []).append(Rate(found["users"], found["seconds"], found["cpu_seconds"]))
            rows.say(f"{rows.data}: speed, repetition {repetition}")
    add_rates(rows, "speed/training", "samples", training)
    add_rates(rows, "speed/evaluation", "users", evaluation)


def add_rates(rows: Rows, name: str, thing: str, rates: dict[str, list[Rate]]) -> None:
    """Rates of every side, and ours over the best of RecBole's, repetition by repetition."""
    for metric in (f"{thing}_per_s", f"{thing}_per_cpu_s"):
        values = {side: [rate.per(metric) for rate in found] for side, found in rates.items()}
        for side, found in values.items():
            rows.add_median(name, side, metric, found)
        best = max((np.median(found), side) for side, found in values.items() if side != "ours")[1]
        ratio = [ours / theirs for ours, theirs in zip(values["ours"], values[best], strict=True)]
        rows.add_median(name, "ours over the better RecBole", metric, ratio)


@dataclass(frozen=True)
class Rate:
    """How many things in how many seconds, on the wall and of the processor."""

    n: int
    seconds: float
    cpu_seconds: float

    def per(self, metric: str) -> float:
        """Things per second; of the processor where the metric says so."""
        return self.n / (self.cpu_seconds if metric.endswith("_per_cpu_s") else self.seconds)


@contextmanager
def timed(n: int) -> Iterator[list[Rate]]:
    """Appends the rate of the block to the list it gives."""
    found: list[Rate] = []
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    found.append(Rate(n, time.perf_counter() - wall, time.process_time() - cpu))


def evaluated(model: SASRec, dataset: Dataset, split: Split) -> Rate:
    """Cases a second of the whole evaluation."""
    with timed(len(split.test_row)) as found:
        evaluate_ranker(model, dataset, split)
    return found[0]


def epochs_for(seconds: float, dataset: Dataset, split: Split, length: int) -> int:
    """Epochs of ours that take about that long, from two first short runs, which also warm the libraries."""
    first, second = (trained(dataset, split, length, epochs, seed=0)[1] for epochs in (1, 2))
    return max(1, round(seconds / min(first.cpu_seconds, second.cpu_seconds / 2)))


def trained(dataset: Dataset, split: Split, length: int, epochs: int, seed: int) -> tuple[SASRec, Rate]:
    """A fitted model, and the samples it saw with the time of its whole `fit`."""
    model = SASRec(config_of(length, epochs=epochs, seed=seed))
    with timed(samples_per_epoch(dataset, split, length) * epochs) as found:
        model.fit(dataset, rows=split.train)
    return model, found[0]


def samples_per_epoch(dataset: Dataset, split: Split, length: int) -> int:
    """Positions with a target in the last `length` inputs of every training sequence."""
    events = np.bincount(dataset.interactions.user[split.train], minlength=dataset.n_users)
    return int(np.minimum(np.maximum(events - 1, 0), length).sum())


# ---- quality -----------------------------------------------------------------------------------------------------


def quality(rows: Rows, dataset: Dataset, split: Split, options: Any, size: Size, folder: Path) -> None:
    """NDCG@10 on test after the same processor seconds of training."""
    epochs = epochs_for(size.race, dataset, split, options.length)
    model, ours = trained(dataset, split, options.length, epochs, seed=0)
    add_race(rows, "ours", evaluate_ranker(model, dataset, split).mean("ndcg@10"), ours)
    with peers(options, dataset, split, folder) as others:
        for side, peer in others.items():
            found = peer.ask("train", seconds=ours.cpu_seconds)
            rate = Rate(found["samples"], found["seconds"], found["cpu_seconds"])
            add_race(rows, side, peer.ask("quality")["ndcg@10"], rate)
            rows.say(f"{rows.data}: quality of {side}")


def add_race(rows: Rows, side: str, score: float, rate: Rate) -> None:
    """One line of the race."""
    for metric, value in (("ndcg@10", score), ("samples", rate.n), ("s", rate.seconds), ("cpu_s", rate.cpu_seconds)):
        rows.add("quality after equal processor seconds", side, metric, value, seconds=rate.seconds)


# ---- RecBole -----------------------------------------------------------------------------------------------------


class Peer:
    """A worker process in RecBole's environment; it sits still between commands."""

    def __init__(self, python: Path, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("recbole_worker.py")), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "log.txt").open("w"),
            text=True,
            env=environment,
        )
        self._log = folder / "log.txt"
        self._answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command, one answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("RecBole's process ended: " + self._log.read_text()[-2000:])
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@contextmanager
def peers(options: Any, dataset: Dataset, split: Split, folder: Path) -> Iterator[dict[str, Peer]]:
    """One worker for each of RecBole's batch sizes, on the same log."""
    others: dict[str, Peer] = {}
    try:
        for batch in PEER_BATCHES:
            place = folder / f"batch-{batch}"
            write_for_recbole(place, dataset, split, options, batch)
            others[f"RecBole, batch {batch}"] = Peer(options.recbole, place)
        yield others
    finally:
        for peer in others.values():
            peer.close()


def write_for_recbole(folder: Path, dataset: Dataset, split: Split, options: Any, batch: int) -> None:
    """The log in RecBole's format (positions as times, so that its order is ours), its options and the test cases."""
    log = dataset.interactions
    (folder / "bench").mkdir(parents=True, exist_ok=True)
    place = np.arange(len(log))
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    lines += [f"{u}\t{i}\t{t}" for u, i, t in zip(log.user.tolist(), log.item.tolist(), place.tolist(), strict=True)]
    (folder / "bench" / "bench.inter").write_text("\n".join(lines) + "\n")
    peer_options = {
        "threads": options.threads,
        "seed": 0,
        "hidden_size": WIDTH,
        "inner_size": WIDTH,
        "n_layers": BLOCKS,
        "n_heads": HEADS,
        "hidden_act": "relu",
        "hidden_dropout_prob": DROPOUT,
        "attn_dropout_prob": DROPOUT,
        "learning_rate": config_of(options.length).learning_rate,
        "MAX_ITEM_LIST_LENGTH": options.length,
        "train_batch_size": batch,
    }
    (folder / "options.json").write_text(json.dumps(peer_options))
    cases = held_out_cases(dataset, split)
    if not np.array_equal(cases.user, np.arange(dataset.n_users)):
        raise RuntimeError("a user has too short a history for leave-one-out; RecBole would count other users")
    histories = cases.histories()
    np.savez(
        folder / "cases.npz",
        items=np.concatenate(histories),
        starts=np.r_[0, np.cumsum([len(history) for history in histories])],
        target=cases.target,
        n_items=dataset.n_items,
    )


# ---- growth ------------------------------------------------------------------------------------------------------

GROWTH_USERS, GROWTH_CASES, GROWTH_POSITIONS = 128, 512, 12_800


def growth_section(rows: Rows, size: Size) -> None:
    """Our training and evaluation rates against the number of items, and the training rate against the length."""
    for n_items in size.items:
        dataset, split = synthetic(n_items, length=50)
        rows.data = "synthetic, every item occurs, length 50"
        few = replace(split, train=split.train & (dataset.interactions.user < GROWTH_USERS))
        asked = replace(few, test_row=split.test_row[:GROWTH_CASES], test_end=None)
        training, evaluation = [], []
        for repetition in range(1 + size.repetitions):
            model, rate = trained(dataset, few, 50, 1, seed=repetition)
            training.append(rate)
            evaluation.append(evaluated(model, dataset, asked))
        for metric, found in (("samples_per_cpu_s", training), ("users_per_cpu_s", evaluation)):
            rates = [rate.per(metric) for rate in found[1:]]
            rows.add_median("growth with items", f"{n_items:,} items", metric, rates)
        rows.say(f"growth: {n_items} items")
    for length in size.lengths:
        dataset, split = synthetic(12_000, length=length)
        rows.data = "synthetic, 12,000 items, 12,800 positions a batch"
        few = replace(split, train=split.train & (dataset.interactions.user < GROWTH_POSITIONS // length))
        found = [trained(dataset, few, length, 1, seed=repetition)[1] for repetition in range(1 + size.repetitions)]
        rates = [rate.per("samples_per_cpu_s") for rate in found[1:]]
        rows.add_median("growth with length", f"length {length}", "samples_per_cpu_s", rates)
        rows.say(f"growth: length {length}")


def synthetic(n_items: int, length: int) -> tuple[Dataset, Split]:
    """A log in which every item occurs and every user has `length` inputs besides validation and test."""
    per_user = length + 3
    n_users = max(-(-n_items // per_user), GROWTH_CASES, GROWTH_POSITIONS // length)
    generator = stream(0, "benchmark", "growth", n_items, length)
    item = np.r_[np.arange(n_items), generator.integers(0, n_items, n_users * per_user - n_items)]
    user = np.repeat(np.arange(n_users), per_user)
    log = Interactions(
        user=user,
        item=generator.permutation(item),
        time=np.arange(len(user)),
        row=np.arange(len(user)),
    )
    names = np.array([str(index) for index in range(n_items)], dtype=object)
    no_text = np.full(n_items, None, dtype=object)
    catalog = Catalog(names, names, np.zeros(n_items, dtype=np.int16), [()] * n_items, no_text)
    people = Users(np.array([str(index) for index in range(n_users)], dtype=object))
    dataset = Dataset("synthetic", log, catalog, people, ("things",), {"clock": "unix"})
    return dataset, leave_one_out(dataset)


if __name__ == "__main__":
    main()
