"""What `semantic_ids.py` has done in a process of its own: one fit by ours, scikit-learn or faiss, with its cost."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
from memory import peak_mb


def _first_parameters(rows: np.ndarray, codes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means (K, D): k-means; variances (K, D): of all rows around their means; weights: shares of the rows.

    From single rows as means some components end on one row, whose variance scikit-learn rounds below zero in float32.
    """
    from sklearn.cluster import KMeans

    found = KMeans(codes, n_init=1, max_iter=25, random_state=seed).fit(rows)
    means = found.cluster_centers_.astype(np.float64)
    variance = np.broadcast_to(((rows - means[found.labels_]) ** 2).mean(axis=0), means.shape).copy()
    return means, variance, np.bincount(found.labels_, minlength=codes) / len(rows)


def mixture_ours(path: str, codes: int, steps: int, seed: int) -> dict[str, Any]:
    """One start of one level of RQ-GMM; `steps` EM steps with the safeguards off, or else the defaults.

    The covariance is scikit-learn's, diagonal.
    """
    import torch

    from recollect.tokenize.gmm import Mixture
    from recollect.tokenize.gmm_config import RQGMMConfig
    from recollect.tokenize.gmm_fit import fit_mixture
    from recollect.tokenize.rows import ArrayRows

    rows = np.load(path)
    source = ArrayRows(rows)
    start = None
    config = RQGMMConfig(covariance="diag", seed=seed)
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
    before = peak_mb()
    began = time.perf_counter()
    found = fit_mixture(source, codes, config, start=start)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "log_likelihood": found.report["log_likelihood"],
        "iterations": found.report["iterations"],
        "mb_above_start": peak_mb() - before,
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
        first = {"means_init": means, "precisions_init": 1 / variance, "weights_init": weight}
        options |= {
            name: values.astype(rows.dtype) for name, values in first.items()
        }  # float64 would make all of it so
        options |= {"tol": 0.0, "max_iter": steps, "reg_covar": 1e-6}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        GaussianMixture(2, covariance_type="diag", max_iter=1).fit(rows[:256])  # loads what it needs
        before = peak_mb()
        began = time.perf_counter()
        model = GaussianMixture(**options).fit(rows)
    seconds = time.perf_counter() - began
    peak = peak_mb() - before
    return {
        "seconds": seconds,
        "log_likelihood": float(model.score(rows)),
        "iterations": int(model.n_iter_),
        "mb_above_start": peak,
    }


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


def kmeans_ours(
    path: str, codes: int, levels: int, seed: int, iterations: int, seeding: str = "k-means++"
) -> dict[str, Any]:
    """RQ-KMeans; one run of `iterations` Lloyd steps a level from such seeds, or the defaults where 0."""
    from recollect.tokenize.baseline_options import RQKMeansConfig
    from recollect.tokenize.rq_kmeans import RQKMeans

    rows = np.load(path)
    config = RQKMeansConfig(levels=levels, codebook_size=codes, seed=seed)
    if iterations:
        config = replace(config, restarts=1, iterations=iterations, tolerance=0.0, seeding=seeding)
    RQKMeans(RQKMeansConfig(levels=1, codebook_size=2)).fit(rows[:256])  # loads what it needs
    tokenizer = RQKMeans(config)
    before = peak_mb()
    began = time.perf_counter()
    tokenizer.fit(rows)
    seconds = time.perf_counter() - began
    peak = peak_mb() - before
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
    before = peak_mb()
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
    peak = peak_mb() - before
    error, rate = _coded(rows, books)
    return {"seconds": seconds, "relative_mse": error, "encode_items_per_s": rate, "mb_above_start": peak}


def kmeans_quantizer(path: str, codes: int, levels: int, seed: int) -> dict[str, Any]:
    """faiss's own residual quantiser with its training defaults and a greedy beam."""
    import faiss

    rows = np.load(path)
    before = peak_mb()
    began = time.perf_counter()
    quantizer = faiss.ResidualQuantizer(rows.shape[1], levels, int(np.log2(codes)))
    quantizer.max_beam_size = 1
    quantizer.cp.seed = seed
    quantizer.cp.max_points_per_centroid = len(rows)
    quantizer.train(rows)
    seconds = time.perf_counter() - began
    peak = peak_mb() - before
    books = faiss.vector_to_array(quantizer.codebooks).reshape(levels, codes, rows.shape[1])
    error, _ = _coded(rows, list(books))
    began = time.perf_counter()
    quantizer.compute_codes(rows)
    rate = len(rows) / (time.perf_counter() - began)
    return {"seconds": seconds, "relative_mse": error, "encode_items_per_s": rate, "mb_above_start": peak}


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
    before = peak_mb()
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
        "peak_gib": peak_mb() / 1024,
        "peak_gib_above_start": (peak_mb() - before) / 1024,
    }
