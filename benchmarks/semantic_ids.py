"""Fitting, encoding and decoding semantic IDs beside scikit-learn, faiss and transformers, and how cost grows.

    python benchmarks/semantic_ids.py [--quick] [--out benchmarks/results/semantic_ids.jsonl]

(No file here may be called tokenize.py: a script's folder is searched before the standard library, whose `tokenize`
every script's imports need.)

Each measurement runs in a process of its own, so its peak memory is its own; the memory after loading libraries and
data is told apart from it. Both sides run with the same number of threads on the same rows, turn by turn.

* mixture: one level of RQ-GMM against scikit-learn's GaussianMixture, diagonal covariance, from the same means,
  variances and weights, for the same number of EM steps with every safeguard of ours off, so both must reach the same
  log-likelihood, to `LIKELIHOOD_TOLERANCE` of it, or the run ends; and both with the defaults of one start, which is
  scikit-learn's default number of them (n_init=1); `recollect tokenize` makes more and keeps the best.
* kmeans: RQ-KMeans against a chain of faiss.Kmeans and against faiss.ResidualQuantizer: seconds, and relative squared
  error of the same rows, coded by the nearest centroid level by level.
* growth: seconds, encoded items a second and peak memory of RQ-GMM at the same number of EM steps from few to many
  items, read from a memory-mapped file.
* decoding: one step of a beam over a large catalogue, against transformers' `prefix_allowed_tokens_fn` over a
  dictionary of prefixes: the logits processors alone (same masks), and whole searches over given logits (same best
  IDs), where ours looks at children of live nodes and theirs at the whole vocabulary. No model is run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rows import Rows

from recollect.rng import stream

SECTIONS = ("mixture", "kmeans", "growth", "decoding")
VOCABULARIES = {"a vocabulary for IDs alone": 3, "a language model's vocabulary": 32_000}
"""Tokens beside those of the codes."""

END_TOKEN = 2

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
        rows.note = f"{options.threads} threads"
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


def memory_mb() -> float:
    """Highest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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


def _first_parameters(rows: np.ndarray, codes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means (K, D): distinct rows; variances (K, D): those of all rows; equal weights."""
    means = rows[stream(seed, "benchmark", "first means").choice(len(rows), codes, replace=False)].astype(np.float64)
    variance = np.broadcast_to(rows.var(axis=0, dtype=np.float64), means.shape).copy()
    return means, variance, np.full(codes, 1.0 / codes)


def mixture_ours(path: str, codes: int, steps: int, seed: int) -> dict[str, Any]:
    """One start of one level of RQ-GMM; `steps` EM steps with the safeguards off, or the defaults where 0."""
    import torch

    from recollect.tokenize.gmm import Mixture
    from recollect.tokenize.gmm_config import RQGMMConfig
    from recollect.tokenize.gmm_fit import fit_mixture
    from recollect.tokenize.rows import ArrayRows

    rows = np.load(path)
    source = ArrayRows(rows)
    start = None
    config = RQGMMConfig(seed=seed)
    if steps:
        config = RQGMMConfig(
            covariance="diag",
            shrinkage=0,
            variance_floor=0,
            minimum_points=0,
            tolerance=0,
            max_iterations=steps,
            seed=seed,
        )
        means, variance, weight = (torch.from_numpy(part) for part in _first_parameters(rows, codes, seed))
        start = Mixture(means, variance, weight.log())
    fit_mixture(ArrayRows(rows[:256]), 2, RQGMMConfig(max_iterations=1))  # loads what it needs
    before = memory_mb()
    began = time.perf_counter()
    found = fit_mixture(source, codes, config, start=start)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "log_likelihood": found.report["log_likelihood"],
        "iterations": found.report["iterations"],
        "mb_above_start": memory_mb() - before,
    }


def mixture_sklearn(path: str, codes: int, steps: int, seed: int) -> dict[str, Any]:
    """scikit-learn's GaussianMixture on the same rows, start and number of steps."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    rows = np.load(path)
    options: dict[str, Any] = {
        "n_components": codes,
        "covariance_type": "diag",
        "n_init": 1,
        "random_state": seed,
    }
    if steps:
        means, variance, weight = _first_parameters(rows, codes, seed)
        options |= {"means_init": means, "precisions_init": 1 / variance, "weights_init": weight}
        options |= {"tol": 0.0, "max_iter": steps, "reg_covar": 1e-6}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        GaussianMixture(2, covariance_type="diag", max_iter=1).fit(rows[:256])  # loads what it needs
        before = memory_mb()
        began = time.perf_counter()
        model = GaussianMixture(**options).fit(rows)
    seconds = time.perf_counter() - began
    peak = memory_mb() - before
    return {
        "seconds": seconds,
        "log_likelihood": float(model.score(rows)),
        "iterations": int(model.n_iter_),
        "mb_above_start": peak,
    }


# ---- residual k-means --------------------------------------------------------------------------------------------


def kmeans(rows: Rows, size: Size, threads: int, folder: Path) -> None:
    """Seconds and error of L levels, ours and faiss's."""
    rows.data = f"{size.items:,} x {size.dimension}, {size.levels} x {size.codes} codes"
    sides = {
        "ours, defaults": ("kmeans_ours", {"iterations": 0}),
        "ours, 25 iterations": ("kmeans_ours", {"iterations": 25}),
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
    ours = found["ours, 25 iterations"]
    for side in list(sides)[2:]:
        ratio = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(ours, found[side], strict=True)]
        error = [mine["relative_mse"] / theirs["relative_mse"] for mine, theirs in zip(ours, found[side], strict=True)]
        rows.add_median("residual k-means", f"ours, 25 iterations, over {side}", "speed", ratio)
        rows.add_median("residual k-means", f"ours, 25 iterations, over {side}", "error", error)


def _coded(rows: np.ndarray, books: list[np.ndarray]) -> tuple[float, float]:
    """Relative squared error of greedy codes, and items coded a second, with faiss's exact search."""
    import faiss

    left = rows.copy()
    began = time.perf_counter()
    for book in books:
        index = faiss.IndexFlatL2(book.shape[1])
        index.add(np.ascontiguousarray(book, dtype=np.float32))
        left -= book[index.search(left, 1)[1][:, 0]]
    seconds = time.perf_counter() - began
    total = float(((rows - rows.mean(axis=0, dtype=np.float64)) ** 2).sum(dtype=np.float64))
    return float((left.astype(np.float64) ** 2).sum()) / total, len(rows) / seconds


def kmeans_ours(path: str, codes: int, levels: int, seed: int, iterations: int) -> dict[str, Any]:
    """RQ-KMeans; one run of `iterations` Lloyd steps a level, or the defaults where 0."""
    from recollect.tokenize.baseline_options import RQKMeansConfig
    from recollect.tokenize.rq_kmeans import RQKMeans

    rows = np.load(path)
    config = RQKMeansConfig(levels=levels, codebook_size=codes, seed=seed)
    if iterations:
        config = RQKMeansConfig(
            levels=levels, codebook_size=codes, seed=seed, restarts=1, iterations=iterations, tolerance=0.0
        )
    RQKMeans(RQKMeansConfig(levels=1, codebook_size=2)).fit(rows[:256])  # loads what it needs
    tokenizer = RQKMeans(config)
    before = memory_mb()
    began = time.perf_counter()
    tokenizer.fit(rows)
    seconds = time.perf_counter() - began
    peak = memory_mb() - before
    arrays = tokenizer.arrays()
    error, _ = _coded(rows, [arrays[f"codebook.{level}"] for level in range(levels)])
    began = time.perf_counter()
    tokenizer.encode(rows)
    rate = len(rows) / (time.perf_counter() - began)
    return {"seconds": seconds, "relative_mse": error, "encode_items_per_s": rate, "mb_above_start": peak}


def kmeans_faiss(path: str, codes: int, levels: int, seed: int) -> dict[str, Any]:
    """A chain of faiss.Kmeans on residuals, all rows used."""
    import faiss

    rows = np.load(path)
    before = memory_mb()
    began = time.perf_counter()
    left, books = rows.copy(), []
    for level in range(levels):
        model = faiss.Kmeans(
            rows.shape[1], codes, niter=25, seed=seed * 100 + level, max_points_per_centroid=len(rows), verbose=False
        )
        model.train(left)
        books.append(model.centroids)
        left -= model.centroids[model.index.search(left, 1)[1][:, 0]]
    seconds = time.perf_counter() - began
    peak = memory_mb() - before
    error, rate = _coded(rows, books)
    return {"seconds": seconds, "relative_mse": error, "encode_items_per_s": rate, "mb_above_start": peak}


def kmeans_quantizer(path: str, codes: int, levels: int, seed: int) -> dict[str, Any]:
    """faiss's own residual quantiser with its training defaults and a greedy beam."""
    import faiss

    rows = np.load(path)
    before = memory_mb()
    began = time.perf_counter()
    quantizer = faiss.ResidualQuantizer(rows.shape[1], levels, int(np.log2(codes)))
    quantizer.max_beam_size = 1
    quantizer.cp.seed = seed
    quantizer.cp.max_points_per_centroid = len(rows)
    quantizer.train(rows)
    seconds = time.perf_counter() - began
    peak = memory_mb() - before
    books = faiss.vector_to_array(quantizer.codebooks).reshape(levels, codes, rows.shape[1])
    error, _ = _coded(rows, list(books))
    began = time.perf_counter()
    quantizer.compute_codes(rows)
    rate = len(rows) / (time.perf_counter() - began)
    return {"seconds": seconds, "relative_mse": error, "encode_items_per_s": rate, "mb_above_start": peak}


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


def growth_ours(path: str, codes: int, levels: int, steps: int) -> dict[str, Any]:
    """RQ-GMM with its default covariance on a memory-mapped file."""
    from recollect.tokenize.gmm_config import RQGMMConfig
    from recollect.tokenize.rq_gmm import RQGMM

    rows = np.load(path, mmap_mode="r")
    config = RQGMMConfig(
        levels=levels,
        codebook_size=codes,
        max_iterations=steps,
        tolerance=0,
        lloyd_steps=steps,
        reseed_rounds=0,
        restarts=1,  # what is measured is how one fit grows
    )
    RQGMM(RQGMMConfig(levels=1, codebook_size=2, max_iterations=1)).fit(rows[:256])  # loads what it needs
    before = memory_mb()
    tokenizer = RQGMM(config)
    began = time.perf_counter()
    tokenizer.fit(rows)
    fitted = time.perf_counter()
    tokenizer.encode(rows)
    encoded = time.perf_counter()
    return {
        "fit_s": fitted - began,
        "fit_us_per_item": 1e6 * (fitted - began) / len(rows),
        "encode_items_per_s": len(rows) / (encoded - fitted),
        "peak_gib": memory_mb() / 1024,
        "peak_gib_above_start": (memory_mb() - before) / 1024,
    }


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


class _Constraint:
    """One side's way to keep a beam on items: `trie` and `vocabulary` are ours, `processor` either side's."""

    def __init__(self, side: str, table: np.ndarray, codes: int, beam: int, other_tokens: int) -> None:
        from transformers import PrefixConstrainedLogitsProcessor

        from recollect.tokenize.constrained import TrieLogitsProcessor
        from recollect.tokenize.trie import PrefixTrie
        from recollect.tokenize.vocabulary import SemanticVocabulary

        self.offsets = other_tokens + codes * np.arange(3)
        before = memory_mb()
        began = time.perf_counter()
        self.processor: Any
        if side == "ours":
            self.vocabulary = SemanticVocabulary.consecutive((codes,) * 3, other_tokens, END_TOKEN)
            self.trie = PrefixTrie(table, (codes,) * 3)
            self.processor = TrieLogitsProcessor(self.trie, self.vocabulary, 1)
        else:
            children: dict[tuple[int, ...], set[int]] = {}
            for row in (table + self.offsets).tolist():
                for depth in range(3):
                    children.setdefault(tuple(row[:depth]), set()).add(row[depth])
            allowed_after = {prefix: sorted(tokens) for prefix, tokens in children.items()}
            self.processor = PrefixConstrainedLogitsProcessor(
                lambda _, written: allowed_after.get(tuple(written[1:].tolist()), [END_TOKEN]), beam
            )
        self.costs = {"build_s": time.perf_counter() - began, "mb_above_start": memory_mb() - before}


def _catalogue(items: int, codes: int, seed: int) -> np.ndarray:
    """(items, 3) int32 random codes; what a code means does not matter to a tree."""
    return stream(seed, "benchmark", "decoding", items).integers(codes, size=(items, 3)).astype(np.int32)


def decoding_mask(
    items: int, codes: int, beam: int, requests: int, rounds: int, other_tokens: int, side: str, seed: int
) -> dict[str, Any]:
    """The logits processor of one side at every depth; `check` counts the tokens it left."""
    import torch

    table = _catalogue(items, codes, seed)
    constraint = _Constraint(side, table, codes, beam, other_tokens)
    generator = stream(seed, "benchmark", "decoding", "prefixes")
    offsets = torch.from_numpy(constraint.offsets)
    scores = torch.zeros(requests * beam, other_tokens + 3 * codes)
    seconds, counted = 0.0, 0
    for number in range(rounds + 1):  # the first round warms up
        for depth in range(3):
            chosen = torch.from_numpy(table[generator.integers(items, size=requests * beam), :depth].astype(np.int64))
            written = torch.cat([torch.zeros(len(chosen), 1, dtype=torch.int64), chosen + offsets[:depth]], dim=1)
            began = time.perf_counter()
            masked = constraint.processor(written, scores)
            if number:
                seconds += time.perf_counter() - began
                counted += int((masked > -torch.inf).sum())
    return {"ms_per_step": 1000 * seconds / (3 * rounds), "check": counted, **constraint.costs}


class _GivenLogits:
    """A decoder whose logits are drawn beforehand, so that only the search costs anything."""

    def __init__(self, logits: list[Any], requests: int) -> None:
        self._logits = logits
        self._requests = requests
        self._step = 0

    def start(self) -> Any:
        self._step = 0
        return self._logits[0][: self._requests]

    def advance(self, parents: Any, tokens: Any) -> Any:
        self._step += 1
        return self._logits[self._step][: len(tokens)]


def decoding_search(
    items: int, codes: int, beam: int, requests: int, rounds: int, other_tokens: int, side: str, seed: int
) -> dict[str, Any]:
    """A whole beam search over given logits; `check` is the sum of the codes of the best ID of every request.

    Logits of a step do not depend on the beam, so both sides rank the same sums whatever order they keep beams in.
    """
    import torch

    from recollect.tokenize.constrained import beam_search

    table = _catalogue(items, codes, seed)
    constraint = _Constraint(side, table, codes, beam, other_tokens)
    torch_generator = torch.Generator().manual_seed(seed)
    one = [torch.randn(1, other_tokens + 3 * codes, generator=torch_generator) for _ in range(3)]
    logits = [row.repeat(requests * beam, 1) for row in one]
    seconds = 0.0
    for number in range(rounds + 1):  # the first round warms up
        began = time.perf_counter()
        if side == "ours":
            decoder = _GivenLogits(logits, requests)
            best = beam_search(decoder, constraint.trie, constraint.vocabulary, beam).codes[:, 0]
        else:
            best = _masked_search(constraint.processor, logits, requests, beam) - torch.from_numpy(constraint.offsets)
        if number:
            seconds += time.perf_counter() - began
    return {"ms_per_step": 1000 * seconds / (3 * rounds), "check": int(best.sum()), **constraint.costs}


def _masked_search(processor: Any, logits: list[Any], requests: int, beam: int) -> Any:
    """(requests, 3) tokens of the best beam, as transformers searches: log-softmax, mask, top of beams x vocabulary."""
    import torch

    written = torch.zeros(requests * beam, 1, dtype=torch.int64)
    totals = torch.full((requests, beam), -1e9)
    totals[:, 0] = 0.0  # at first all beams of a request are the same one
    for step in logits:
        scores = processor(written, torch.log_softmax(step, dim=-1)) + totals.reshape(-1, 1)
        n_tokens = scores.shape[1]
        totals, place = scores.view(requests, beam * n_tokens).topk(beam, dim=1)
        parents = torch.arange(requests)[:, None] * beam + place // n_tokens
        written = torch.cat([written[parents.flatten()], (place % n_tokens).view(-1, 1)], dim=1)
    return written.view(requests, beam, -1)[:, 0, 1:]


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
