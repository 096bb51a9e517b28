"""Does the model use what the prompt says? The controls of fairlrm 9.9 and 9.15, and what attributes change.

`shuffled-U` tells every user's prompt another user's profile. A model that uses the user side must lose by it; if the
two cannot be told apart, the report says so in words. `swapped-labels` exchanges the class tags of two candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recollect.eval.statistics import cluster_bootstrap, entry
from recollect.eval.user_groups import rank_agreement
from recollect.recommenders.prompt_cases import PromptCases, requests_of, swapped_labels
from recollect.recommenders.prompt_metrics import Judge, Lists, jaccard, kendall_tau, sign_test
from recollect.recommenders.prompted import RankingResponse

NOT_USED = "user-side facts not used by this model"
USED = "user-side facts are used by this model"
HARMFUL = "user-side facts change this model's lists for the worse"


def user_side_verdict(judge: Judge, true: Lists, shuffled: Lists, *, resamples: int, seed: int) -> dict[str, Any]:
    """Whether the true profile serves better than another user's.

    Used: NDCG@k higher or MRMC@k lower with a 95 % interval (paired, users resampled) that excludes zero. For the
    worse: the other way round on one of them and better on neither. Not used: both intervals hold zero.

    Returns:
        {"verdict", "ndcg", "mrmc": paired differences fairlrm - shuffled-U, "jaccard": mean overlap of the lists,
        "kendall_tau": mean agreement of the whole rankings}.
    """
    ndcg, mrmc = (
        judge.difference(judge.name(metric), true.items, shuffled.items, resamples=resamples, seed=seed)
        for metric in ("ndcg", "mrmc")
    )
    better = _bounds(ndcg)[0] > 0 or _bounds(mrmc)[1] < 0
    worse = _bounds(ndcg)[1] < 0 or _bounds(mrmc)[0] > 0
    overlap = jaccard(true.items[:, : judge.k], shuffled.items[:, : judge.k])
    taus = np.array([kendall_tau(*pair) for pair in zip(true.items, shuffled.items, strict=True)])
    return {
        "verdict": USED if better else HARMFUL if worse else NOT_USED,
        "ndcg": ndcg,
        "mrmc": mrmc,
        "jaccard": entry(cluster_bootstrap(overlap, judge.users, n=resamples, seed=seed)),
        "kendall_tau": entry(cluster_bootstrap(taus, judge.users, n=resamples, seed=seed)),
    }


def _bounds(difference: Mapping[str, Any]) -> tuple[float, float]:
    low, high = difference["difference"]["ci95"]
    return (0.0, 0.0) if low is None or high is None else (low, high)  # one user: nothing can be told


def verdict_text(found: Mapping[str, Any], names: tuple[str, str]) -> str:
    """The verdict as the report prints it."""
    parts = []
    for name, key in zip(names, ("ndcg", "mrmc"), strict=True):
        difference = found[key]["difference"]
        low, high = difference["ci95"]
        bounds = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
        parts.append(f"{name} {difference['value']:+.4f}{bounds}")
    return (
        f"Verdict of the shuffled-U control: {found['verdict']}. With the true profile instead of another user's "
        f"({found['jaccard']['n']} users): "
        f"{'; '.join(parts)}. Lists share {found['jaccard']['value']:.0%} of their items (Jaccard), whole rankings "
        f"agree with Kendall tau {found['kendall_tau']['value']:.2f}."
    )


def label_sensitivity(
    cases: PromptCases,
    labels: tuple[str, ...],
    k: int,
    true: Sequence[RankingResponse | None],
    swapped: Sequence[RankingResponse | None],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """How the score of the popular candidate minus that of the niche one changes when their tags are exchanged.

    Returns:
        {"change": entry, "p_sign": two-sided sign test, "positive", "negative": counts, "n"}; `change` below zero means
        that the tag "popular" itself raises a score. None for `change` where no set holds both classes.
    """
    places = swapped_labels(requests_of(cases, labels, k), cases.popularity, seed)
    changes, users = [], []
    for user, (place, before, after) in enumerate(zip(places, true, swapped, strict=True)):
        if place is None or before is None or after is None:
            continue
        _, popular, niche = place
        gap = [response.scores[popular] - response.scores[niche] for response in (before, after)]
        changes.append(gap[1] - gap[0])
        users.append(user)
    values = np.array(changes)
    return {
        "change": entry(cluster_bootstrap(values, np.array(users), n=resamples, seed=seed)) if changes else None,
        "p_sign": sign_test(values),
        "positive": int((values > 0).sum()),
        "negative": int((values < 0).sum()),
        "n": len(changes),
    }


def attribute_stability(
    judge: Judge, base: Lists, told: Mapping[str, Lists], *, resamples: int, seed: int
) -> dict[str, Any]:
    """{attribute: {"jaccard", "prag", "ndcg"}}: overlap at k of the lists with and without it, the share of ordered
    pairs of the list without that the list with keeps (PRAG*), and the change of NDCG."""
    found = {}
    for name, lists in told.items():
        tops = base.items[:, : judge.k], lists.items[:, : judge.k]
        found[name] = {
            "jaccard": entry(cluster_bootstrap(jaccard(*tops), judge.users, n=resamples, seed=seed)),
            "prag": entry(cluster_bootstrap(rank_agreement(*tops), judge.users, n=resamples, seed=seed)),
            "ndcg": judge.difference(judge.name("ndcg"), lists.items, base.items, resamples=resamples, seed=seed),
        }
    return found


def position_bias(responses: Sequence[RankingResponse], users: np.ndarray, *, resamples: int, seed: int) -> Any:
    """Mean Kendall tau between the rankings under the first two orders of the candidates; None with one order.

    1 = the order of the candidates does not matter.
    """
    if responses[0].orders.shape[0] < 2:
        return None
    taus = np.array([kendall_tau(response.orders[0], response.orders[1]) for response in responses])
    return entry(cluster_bootstrap(taus, users, n=resamples, seed=seed))


def written_lists(responses: Sequence[RankingResponse]) -> dict[str, Any] | None:
    """Rates of what written lists held; None for back-ends that write none.

    invalid_rate, duplicate_rate: of the entries.  missing_rate: of the candidates asked for.  filled: users whose list
    was completed in backbone order.
    """
    if not any(response.texts for response in responses):
        return None
    entries = sum(response.entries for response in responses)
    asked = sum(len(response.texts) * len(response.order) for response in responses)
    return {
        "entries": entries,
        "invalid_rate": sum(response.invalid for response in responses) / max(entries, 1),
        "duplicate_rate": sum(response.duplicates for response in responses) / max(entries, 1),
        "missing_rate": sum(response.missing for response in responses) / max(asked, 1),
        "filled": sum(bool(response.fill) for response in responses),
        "fill": "backbone" if any(response.fill for response in responses) else "",
    }
