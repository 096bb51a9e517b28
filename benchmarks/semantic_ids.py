"""Fitting, encoding and decoding semantic IDs beside scikit-learn, faiss and transformers, and how cost grows.

    python benchmarks/semantic_ids.py [--quick] [--out benchmarks/results/semantic_ids.jsonl]

(No file here may be called tokenize.py: a script's folder is searched before the standard library, whose `tokenize`
every script's imports need.)

Each measurement runs in a process of its own, so its peak memory is its own; the memory after loading libraries and
data is told apart from it. Both sides run with the same number of threads on the same rows, turn by turn.

* mixture: one level of RQ-GMM against scikit-learn's GaussianMixture, diagonal covariance, in float32: from the same
  means (k-means), variances and weights, for the same number of EM steps with every safeguard of ours off, so both must
  reach the same log-likelihood, to `LIKELIHOOD_TOLERANCE` of it, or the run ends; and both with the defaults of one
  start, which is scikit-learn's default number of them (n_init=1); `recollect tokenize` makes more and keeps the best.
* kmeans: RQ-KMeans against a chain of faiss.Kmeans and against faiss.ResidualQuantizer: seconds, and relative squared
  error of the same rows, coded by the nearest centroid level by level. Ours begins at k-means++ seeds, faiss at random
  rows, so at as many iterations the errors differ; beside them stand two iterations of ours, and 25 from random rows.
* growth: seconds, encoded items a second and peak memory of RQ-GMM at the same number of EM steps from few to many
  items, read from a memory-mapped file.
* decoding: one step of a beam over a large catalogue, against transformers' `prefix_allowed_tokens_fn` over a
  dictionary of prefixes: the logits processors alone (same masks), and whole searches over given logits (same best
  IDs), where ours looks at children of live nodes and theirs at the whole vocabulary. No model is run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rows import Rows
from semantic_ids_decoding import decoding_mask, decoding_search
from semantic_ids_fits import (
    growth_ours,
    kmeans_faiss,
    kmeans_ours,
    kmeans_quantizer,
    mixture_ours,
    mixture_sklearn,
)

from recollect.rng import stream

SECTIONS = ("mixture", "kmeans", "growth", "decoding")
VOCABULARIES = {"a vocabulary for IDs alone": 3, "a language model's vocabulary": 32_000}
"""Tokens beside those of the codes."""

LIKELIHOOD_TOLERANCE = 1e-4
"""Share of the log-likelihood by which two fits from one start may differ: ours computes in part in float32."""


@dataclass(frozen=True)
class Size:
    """How much is measured. Repetitions draw their own data."""

    items: int
    dimension: int
    codes: int
    levels: int
    em_steps: int
    repetitions: int
    growth_items: tuple[int, ...]
    growth_steps: int
    catalogue: int
    beam: int
    requests: int
    decoding_rounds: int


FULL = Size(20_000, 384, 256, 3, 20, 3, (10_000, 100_000, 1_000_000), 4, 1_000_000, 20, 16, 20)
QUICK = Size(1_500, 32, 16, 2, 5, 1, (2_000, 4_000), 2, 20_000, 20, 2, 2)


def main() -> None:
    """Parse the command line and run the sections."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller run, some two minutes; its ratios mean little")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the rows to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    size = QUICK if options.quick else FULL
    sections = {"mixture": mixture, "kmeans": kmeans, "growth": growth, "decoding": decoding}
    with Rows("semantic_ids", options.out) as rows, tempfile.TemporaryDirectory() as folder:
        rows.note = f"{options.threads} thread{'s' if options.threads > 1 else ''}"
        for name in SECTIONS:
            if name in options.only:
                sections[name](rows, size, options.threads, Path(folder))
        rows.say("done")


# ---- processes ---------------------------------------------------------------------------------------------------


def asked(task: str, threads: int, **arguments: Any) -> dict[str, Any]:
    """Run a task in a process of its own; what it found, with its memory in MiB."""
    command = [sys.executable, __file__, "--worker", json.dumps({"task": task, "threads": threads, **arguments})]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{task} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def work(arguments: dict[str, Any]) -> None:
    """The child's side: load, note the memory, do the task, print what was found."""
    import torch

    torch.set_num_threads(arguments.pop("threads"))
    task = arguments.pop("task")
    sys.stdout.write(json.dumps(TASKS[task](**arguments)) + "\n")


def clustered(path: Path, items: int, dimension: int, seed: int) -> None:
    """Write (items, dimension) float32 rows of a two-level tree of clusters, block by block."""
    generator = stream(seed, "benchmark", "clusters", dimension)
    coarse = generator.normal(size=(64, dimension)) * 2.0
    fine = generator.normal(size=(512, dimension))
    whole = np.lib.format.open_memmap(path, "w+", dtype=np.float32, shape=(items, dimension))
    for start in range(0, items, 16_384):
        count = min(16_384, items - start)
        rows = coarse[generator.integers(64, size=count)] + fine[generator.integers(512, size=count)]
        whole[start : start + count] = rows + 0.7 * generator.normal(size=(count, dimension))
    whole.flush()


# ---- one mixture -------------------------------------------------------------------------------------------------


def mixture(rows: Rows, size: Size, threads: int, folder: Path) -> None:
    """Seconds and log-likelihood of one level, ours and scikit-learn's."""
    rows.data = f"{size.items:,} x {size.dimension}, {size.codes} components"
    for start in ("same start", "defaults, one start"):
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "scikit-learn": []}
        for repetition in range(size.repetitions):
            path = folder / f"mixture-{repetition}.npy"
            if not path.is_file():
                clustered(path, size.items, size.dimension, repetition)
            sides = list(found) if repetition % 2 == 0 else list(found)[::-1]
            for side in sides:
                task = "mixture_ours" if side == "ours" else "mixture_sklearn"
                steps = size.em_steps if start == "same start" else 0
                found[side].append(asked(task, threads, path=str(path), codes=size.codes, steps=steps, seed=repetition))
            rows.say(f"mixture, {start}, repetition {repetition}")
        if start == "same start":
            check_likelihoods(found["ours"], found["scikit-learn"])
        name = f"one mixture/{start}"
        for side, results in found.items():
            for metric in ("seconds", "log_likelihood", "iterations", "mb_above_start"):
                rows.add_median(name, side, metric, [result[metric] for result in results])
        ratio = [
            theirs["seconds"] / ours["seconds"]
            for ours, theirs in zip(found["ours"], found["scikit-learn"], strict=True)
        ]
        rows.add_median(name, "ours over scikit-learn", "speed", ratio)


def check_likelihoods(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Refuse to compare the speed of fits that did not arrive at one place.

    Raises:
        RuntimeError: a pair of log-likelihoods differs by more than the tolerance.
    """
    for repetition, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        one, two = mine["log_likelihood"], other["log_likelihood"]
        if abs(one - two) > LIKELIHOOD_TOLERANCE * abs(two):
            raise RuntimeError(
                f"repetition {repetition}: log-likelihood {one!r} of ours, {two!r} of scikit-learn from the same "
                "start; the fits differ, so their speeds cannot be compared"
            )


# ---- residual k-means --------------------------------------------------------------------------------------------


def kmeans(rows: Rows, size: Size, threads: int, folder: Path) -> None:
    """Seconds and error of L levels, ours and faiss's."""
    rows.data = f"{size.items:,} x {size.dimension}, {size.levels} x {size.codes} codes"
    sides = {
        "ours, defaults": ("kmeans_ours", {"iterations": 0}),
        "ours, 25 iterations": ("kmeans_ours", {"iterations": 25}),
        "ours, 2 iterations": ("kmeans_ours", {"iterations": 2}),
        "ours, random rows, 25 iterations": ("kmeans_ours", {"iterations": 25, "seeding": "random"}),
        "chain of faiss.Kmeans, 25 iterations": ("kmeans_faiss", {}),
        "faiss.ResidualQuantizer": ("kmeans_quantizer", {}),
    }
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for repetition in range(size.repetitions):
        path = folder / f"mixture-{repetition}.npy"
        if not path.is_file():
            clustered(path, size.items, size.dimension, repetition)
        order = list(sides) if repetition % 2 == 0 else list(sides)[::-1]
        for side in order:
            task, more = sides[side]
            shared = {"path": str(path), "codes": size.codes, "levels": size.levels, "seed": repetition}
            found[side].append(asked(task, threads, **shared, **more))
        rows.say(f"kmeans, repetition {repetition}")
    for side, results in found.items():
        for metric in ("seconds", "relative_mse", "encode_items_per_s", "mb_above_start"):
            rows.add_median("residual k-means", side, metric, [result[metric] for result in results])
    for mine, side in itertools.product(list(sides)[1:4], list(sides)[4:]):
        pairs = list(zip(found[mine], found[side], strict=True))
        ratio = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
        error = [ours["relative_mse"] / theirs["relative_mse"] for ours, theirs in pairs]
        rows.add_median("residual k-means", f"{mine}, over {side}", "speed", ratio)
        rows.add_median("residual k-means", f"{mine}, over {side}", "error", error)


# ---- growth ------------------------------------------------------------------------------------------------------


def growth(rows: Rows, size: Size, threads: int, folder: Path) -> None:
    """Cost of RQ-GMM with the number of items at a fixed number of EM steps."""
    rows.data = f"{size.dimension} dimensions, {size.levels} x {size.codes} codes, {size.growth_steps} EM steps a level"
    for items in size.growth_items:
        path = folder / "growth.npy"
        clustered(path, items, size.dimension, 0)
        found = asked(
            "growth_ours",
            threads,
            path=str(path),
            codes=size.codes,
            levels=size.levels,
            steps=size.growth_steps,
        )
        for metric, value in found.items():
            rows.add("growth with items", f"{items:,} items", metric, value, seconds=found["fit_s"])
        rows.say(f"growth: {items} items")
        path.unlink()


# ---- constrained decoding ----------------------------------------------------------------------------------------


def decoding(rows: Rows, size: Size, threads: int, folder: Path) -> None:
    """Milliseconds a step over a beam: the mask alone, and the whole search without a model."""
    shared = {"items": size.catalogue, "codes": size.codes, "beam": size.beam, "requests": size.requests}
    shared["rounds"] = size.decoding_rounds
    for vocabulary, other_tokens in VOCABULARIES.items():
        rows.data = (
            f"{size.catalogue:,} items, 3 x {size.codes} codes, {size.requests} requests x beam {size.beam}, "
            f"{vocabulary} of {other_tokens + 3 * size.codes:,} tokens"
        )
        for task in ("decoding_mask", "decoding_search"):
            found: dict[str, list[dict[str, Any]]] = {"ours": [], "prefix_allowed_tokens_fn": []}
            for repetition in range(size.repetitions):
                for side in list(found) if repetition % 2 == 0 else list(found)[::-1]:
                    more = {"side": side, "seed": repetition, "other_tokens": other_tokens}
                    found[side].append(asked(task, threads, **shared, **more))
                rows.say(f"{task}, {vocabulary}, repetition {repetition}")
            for one, other in zip(*found.values(), strict=True):
                if one["check"] != other["check"]:
                    raise RuntimeError(f"the two sides of {task} differ: {one['check']} and {other['check']}")
            name = task.replace("_", ", ")
            for side, results in found.items():
                for metric in ("ms_per_step", "build_s", "mb_above_start"):
                    rows.add_median(name, side, metric, [result[metric] for result in results])
            pairs = zip(found["ours"], found["prefix_allowed_tokens_fn"], strict=True)
            ratio = [theirs["ms_per_step"] / ours["ms_per_step"] for ours, theirs in pairs]
            rows.add_median(name, "ours over prefix_allowed_tokens_fn", "speed", ratio)


TASKS = {
    function.__name__: function
    for function in (
        mixture_ours,
        mixture_sklearn,
        kmeans_ours,
        kmeans_faiss,
        kmeans_quantizer,
        growth_ours,
        decoding_mask,
        decoding_search,
    )
}

if __name__ == "__main__":
    main()
