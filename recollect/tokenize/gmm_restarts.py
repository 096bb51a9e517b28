"""The likeliest of several fits of one level's mixture, each from first means of its own.

EM ends at a local optimum that depends on where it begins, as k-means does; a comparison of the two is fair only when
both may begin equally often. The fit with the highest mean log-likelihood of its final parameters is kept (the earliest
of equals, up to rounding): the criterion EM itself climbs, not the squared error, which another method minimises.
Source: our design; the sources do not say how often they began.
Not covered: fits that are given up early because another is ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.progress import Progress, SilentProgress
from recollect.tokenize.gmm import Mixture
from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.gmm_fit import MixtureFit, SavedState, SaveState, fit_mixture
from recollect.tokenize.rows import RowSource

_EQUAL = 1e-9  # share of a log-likelihood below which two fits are one, told apart by rounding
_BEST = "best."
_PARTS = ("means", "variance", "log_weight")


def fit_best(
    source: RowSource,
    k: int,
    config: RQGMMConfig,
    *,
    level: int = 0,
    weight: np.ndarray | None = None,
    start: Mixture | Tensor | None = None,
    device: torch.device | None = None,
    progress: Progress = SilentProgress(),  # noqa: B008 - stateless
    save: SaveState | None = None,
    saved: SavedState | None = None,
) -> MixtureFit:
    """The likeliest of `config.restarts` fits; of one where `start` says where EM begins.

    Args:
        source, k, config, level, weight, start, device, progress: see `fit_mixture`.
        save: called as by `fit_mixture`, with the restart in progress and the best one before it.
        saved: a state to go on from.

    Returns:
        The fit; its report also has `restarts` (the mean log-likelihood of each, nats) and `kept` (which one).

    Raises:
        InputError, TrainingDiverged: see `fit_mixture`.
    """
    device = torch.device("cpu") if device is None else device
    first = 0
    best: MixtureFit | None = None
    found: list[float] = []
    if saved is not None:
        saved, first, best, found = _unpacked(saved, device)
    for restart in range(first, 1 if start is not None else config.restarts):
        fit = fit_mixture(
            source,
            k,
            config,
            level=level,
            restart=restart,
            weight=weight,
            start=start,
            device=device,
            progress=progress,
            save=None if save is None else _saving(save, restart, best, found),
            saved=saved,
        )
        saved = None
        found = [*found, fit.report["log_likelihood"]]
        if best is None or found[-1] > found[best.report["kept"]] + _EQUAL * abs(found[-1]):
            best = MixtureFit(fit.mixture, {**fit.report, "kept": restart})
    assert best is not None  # restarts >= 1
    return MixtureFit(best.mixture, {**best.report, "restarts": found})


def _saving(save: SaveState, restart: int, best: MixtureFit | None, found: list[float]) -> SaveState:
    """`save` that also keeps the restarts before this one."""
    before: dict[str, Any] = {"number": restart, "log_likelihoods": found, "best": None}
    kept: dict[str, np.ndarray] = {}
    if best is not None:
        before["best"] = best.report
        kept = {_BEST + name: getattr(best.mixture, name).cpu().numpy() for name in _PARTS}

    def save_both(arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> None:
        save({**arrays, **kept}, {**notes, "restart": before})

    return save_both


def _unpacked(saved: SavedState, device: torch.device) -> tuple[SavedState, int, MixtureFit | None, list[float]]:
    """What `_saving` kept: the state of the restart in progress, its number, the best before it, all before it."""
    notes = dict(saved[1])
    before = notes.pop("restart")
    arrays = {name: array for name, array in saved[0].items() if not name.startswith(_BEST)}
    best = None
    if before["best"] is not None:
        parts = (torch.from_numpy(saved[0][_BEST + name].copy()).to(device) for name in _PARTS)
        best = MixtureFit(Mixture(*parts), before["best"])
    return (arrays, notes), before["number"], best, before["log_likelihoods"]
