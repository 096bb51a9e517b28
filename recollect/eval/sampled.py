"""Metrics against sampled negatives, under names that say so, and why not to use them.

With m uniform negatives drawn with replacement, a target of full rank r among n items has a sampled rank of
1 + Binomial(m, (r-1)/(n-1)): a model whose targets are all outside its true top 10 can have a sampled hit rate of 1.
These columns are only for comparison with published numbers and are called "hr@10~uni100", never "hr@10".

`corrected` columns ("~uni100~corrected") estimate the full metric from the sampled rank; they trade bias for variance
and do not replace full ranking.
Source: recsys_evaluation 3.4 and 4.5 (Krichene & Rendle 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from recollect.errors import ConfigError, InputError
from recollect.eval.case_table import next_item_metrics
from recollect.eval.ranking import as_scores, scores_of
from recollect.eval.setting import KS, Mask, evaluation_setting
from recollect.rng import stream
from recollect.types import Dataset, Ranker, Split

if TYPE_CHECKING:
    from recollect.data.examples import History, Part

Sampling = Literal["uni", "pop"]
SAMPLINGS: tuple[Sampling, ...] = ("uni", "pop")


def expected_sampled_metrics(
    rank: np.ndarray, n_items: int, n_negatives: int, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """{"hr@k", "ndcg@k" per k: (C,)} that uniform sampling with replacement gives on average, in closed form.

    Args:
        rank: (C,) full rank of each target, 1..n_items, without ties.
    """
    from scipy.stats import binom

    rank = np.asarray(rank, dtype=np.float64)
    if n_items < 2 or n_negatives < 1 or (rank < 1).any() or (rank > n_items).any():
        raise InputError(f"ranks must lie in 1..{n_items} with at least 2 items and 1 negative, got {n_negatives!r}")
    beaten = (rank - 1.0) / (n_items - 1.0)
    table = {}
    for k in ks:
        place = np.arange(min(k, n_negatives + 1))  # how many negatives stand above the target
        probability = binom.pmf(place[None, :], n_negatives, beaten[:, None])
        table[f"hr@{k}"] = probability.sum(axis=1)
        table[f"ndcg@{k}"] = probability @ (1.0 / np.log2(place + 2.0))
    return table


def draw_negatives(
    allowed: np.ndarray, weight: np.ndarray | None, n_negatives: int, generator: np.random.Generator, *, distinct: bool
) -> np.ndarray:
    """(m,) items of `allowed` (A,), uniformly or by `weight` (A,); all of them where fewer are asked to be distinct.

    Raises:
        InputError: nothing can be drawn.
    """
    if weight is not None:
        allowed, weight = allowed[weight > 0], weight[weight > 0]
    if not len(allowed):
        raise InputError("no negative can be drawn: every other item is masked or has no training event")
    if distinct and n_negatives >= len(allowed):
        return allowed
    if weight is None and not distinct:
        return allowed[generator.integers(len(allowed), size=n_negatives)]
    share = None if weight is None else weight / weight.sum()
    return generator.choice(allowed, size=n_negatives, replace=not distinct, p=share)


def sampled_columns(
    model: Ranker,
    dataset: Dataset,
    split: Split,
    *,
    n_negatives: int = 100,
    sampling: Sampling = "uni",
    distinct: bool = False,
    corrected: bool = False,
    part: Part = "test",
    history: History = "train+val",
    mask: Mask = "history",
    ks: Sequence[int] = KS,
    rows: np.ndarray | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Columns {"hr@k~uni100", …: (C,)} of a model against sampled negatives, for `CaseTable.with_columns`.

    Args:
        sampling: "uni" = every allowed item alike; "pop" = by training events. The target and masked items are never
            drawn. Draws depend on (seed, case) alone.
        distinct: draw without replacement; said in the name ("~uni100-distinct").
        corrected: also "…~corrected", for uniform sampling with replacement.

    Raises:
        ConfigError: an illegal option, or a correction of anything but uniform sampling with replacement.
        InputError: several targets per case, NaN scores.
    """
    if sampling not in SAMPLINGS:
        raise ConfigError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    if n_negatives < 1:
        raise ConfigError(f"n_negatives must be at least 1, got {n_negatives!r}")
    if corrected and (sampling != "uni" or distinct):
        raise ConfigError("only uniform sampling with replacement can be corrected")
    setting = evaluation_setting(dataset, split, part=part, history=history, mask=mask, ks=ks, rows=rows)
    if not setting.is_next_item:
        raise InputError(f"sampled metrics are for one target per case; {split.rule} has several")
    n_cases = len(setting.cases)
    greater, equal = (np.zeros(n_cases, dtype=np.int64) for _ in range(2))
    for start in range(0, n_cases, batch_size):
        stop = min(start + batch_size, n_cases)
        scores = as_scores(scores_of(model, setting, start, stop))[0]
        blocked = np.zeros((stop - start, setting.n_items), dtype=bool)
        blocked[:, setting.absent] = True
        blocked[setting.masked(start, stop)] = True
        blocked[np.arange(stop - start), setting.target[start:stop]] = True
        for case in range(start, stop):
            allowed = np.flatnonzero(~blocked[case - start])
            weight = setting.popularity[allowed] if sampling == "pop" else None
            generator = stream(seed, "sampled-negatives", sampling, case)
            drawn = draw_negatives(allowed, weight, n_negatives, generator, distinct=distinct)
            row = scores[case - start]
            of_target, of_drawn = row[setting.target[case]], row[drawn]
            if np.isnan(of_target) or np.isnan(of_drawn).any():
                raise InputError(f"NaN scores in {setting.who(case)}; NaN has no rank")
            greater[case] = np.count_nonzero(of_drawn > of_target)
            equal[case] = np.count_nonzero(of_drawn == of_target)
    suffix = f"~{sampling}{n_negatives}" + ("-distinct" if distinct else "")
    columns = {f"{name}{suffix}": column for name, column in next_item_metrics(greater, equal, setting.ks).items()}
    if corrected:
        rank = np.arange(1, setting.n_items - len(setting.absent) + 1, dtype=np.float64)
        for k in setting.ks:
            for name, gain in (("hr", np.ones_like(rank)), ("ndcg", 1.0 / np.log2(rank + 1.0))):
                prefix = np.r_[0.0, np.cumsum(corrected_values(n_negatives, np.where(rank <= k, gain, 0.0)))]
                columns[f"{name}@{k}{suffix}~corrected"] = (prefix[greater + equal + 1] - prefix[greater]) / (equal + 1)
    return columns


def corrected_values(n_negatives: int, gain: np.ndarray, *, trade_off: float = 0.1) -> np.ndarray:
    """(m + 1,) what a sampled rank 1..m+1 is worth, so that its mean estimates the full metric.

    Minimises, averaged over full ranks r uniform on 1..n, (E[value | r] - gain_r)^2 + t Var[value | r]; that is the
    solution of ((1-t) A'A + t diag(c)) value = A'gain with A_rs = P(s | r) and c_s = sum_r A_rs.

    Args:
        n_negatives: m, drawn uniformly with replacement.
        gain: (n,) the metric of full rank 1..n, e.g. 1 up to k and 0 after it.
        trade_off: t in (0, 1]; 0 would be the least biased and wildly variable estimator.

    Source: Krichene & Rendle 2020, bias-variance trade-off, re-derived; the uniform prior and t = .1 are our defaults.
    """
    from scipy.stats import binom

    if not 0 < trade_off <= 1:
        raise ConfigError(f"trade_off must lie in (0, 1], got {trade_off!r}")
    n_items, place = len(gain), np.arange(n_negatives + 1)
    gram, right, mass = np.zeros((len(place), len(place))), np.zeros(len(place)), np.zeros(len(place))
    for first in range(1, n_items + 1, 20_000):
        rank = np.arange(first, min(first + 20_000, n_items + 1), dtype=np.float64)
        probability = binom.pmf(place[None, :], n_negatives, ((rank - 1.0) / max(n_items - 1.0, 1.0))[:, None])
        gram += probability.T @ probability
        right += probability.T @ gain[first - 1 : first - 1 + len(rank)]
        mass += probability.sum(axis=0)
    return np.linalg.solve((1.0 - trade_off) * gram + trade_off * np.diag(mass), right)
