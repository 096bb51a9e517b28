"""Fitted links from scores to decisions: `ChoiceLayer` (one of a slate) and `AcceptLayer` (yes or no).

The agent supplies preference; the fitted layer supplies weights and base rates, from the training log alone. Fitted on
other features (popularity, text similarity) it is also the logistic yardstick beside every agent. Report with and
without. For ratings see `recollect.eval.rating_layer`.

Source: sim_validation 7 (our design).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from recollect.errors import InputError
from recollect.eval.fitting import one_step_bootstrap, require_enough, sigmoid, sums_by_cluster
from recollect.eval.statistics import RESAMPLES, Interval, cluster_codes
from recollect.eval.user_effects import fit_with_user_effects, user_effect_intervals
from recollect.rng import stream

PENALTIES = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
FOLDS = 5


def _softmax(utility: np.ndarray) -> np.ndarray:
    shifted = np.exp(utility - utility.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _loss_and_gradient(
    beta: np.ndarray, features: np.ndarray, target: np.ndarray, penalty: float
) -> tuple[float, np.ndarray]:
    """Summed negative log-likelihood plus penalty/2 |beta|^2, and its gradient."""
    utility = features @ beta  # (C, S)
    top = utility.max(axis=1)
    log_sum = top + np.log(np.exp(utility - top[:, None]).sum(axis=1))
    rows = np.arange(len(target))
    loss = float((log_sum - utility[rows, target]).sum()) + 0.5 * penalty * float(beta @ beta)
    probability = np.exp(utility - log_sum[:, None])
    probability[rows, target] -= 1.0
    return loss, probability.ravel() @ features.reshape(-1, len(beta)) + penalty * beta


def _fit_coefficients(features: np.ndarray, target: np.ndarray, penalty: float, start: np.ndarray) -> np.ndarray:
    from scipy.optimize import minimize

    # Divided by the number of cases, so that the optimiser's tolerances mean the same for every size of log.
    scale = 1.0 / len(target)

    def objective(beta: np.ndarray) -> tuple[float, np.ndarray]:
        loss, slope = _loss_and_gradient(beta, features, target, penalty)
        return loss * scale, slope * scale

    options = {"maxiter": 500, "ftol": 1e-15, "gtol": 1e-9}
    return minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x


@dataclass(frozen=True)
class ChoiceLayer:
    """Conditional logit: P(s | slate) is proportional to exp(sum_f coefficient_f * (x_f - mean_f) / scale_f).

    names: of the F features.  mean, scale: of the training features.  coefficients: per standard deviation.
    low, high: 95 % cluster-bootstrap bounds.  penalty: L2 weight on the summed log-likelihood.
    """

    names: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray
    low: np.ndarray
    high: np.ndarray
    penalty: float
    n_cases: int
    n_users: int

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        target: np.ndarray,
        users: np.ndarray,
        names: Sequence[str],
        *,
        l2: float | None = None,
        seed: int = 0,
        resamples: int = RESAMPLES,
    ) -> ChoiceLayer:
        """Maximum penalised likelihood on training cases.

        Args:
            features: (C, S, F) of every candidate.
            target: (C,) which candidate was chosen.
            users: (C,) whose choice it was; folds and intervals keep users whole.
            l2: penalty; None chooses among `PENALTIES` by cross-validated likelihood over users.

        Raises:
            InputError: too few cases or users, a feature that is not finite, or shapes that disagree.
        """
        features = np.asarray(features, dtype=np.float64)
        target = np.asarray(target, dtype=np.int64)
        if features.ndim != 3 or features.shape[0] != len(target) or features.shape[2] != len(names):
            raise InputError(
                f"features must be (cases, candidates, {len(names)}) for {len(target)} targets, got {features.shape}"
            )
        codes, n_users = cluster_codes(users)
        require_enough("a choice layer", len(target), n_users, len(names))
        bad = [name for f, name in enumerate(names) if not np.isfinite(features[:, :, f]).all()]
        if bad:
            raise InputError(f"features must be finite numbers; these are not: {', '.join(bad)}")
        mean = features.mean(axis=(0, 1))
        spread = features.std(axis=(0, 1))
        # A constant feature tells candidates nothing; with scale 1 it becomes 0 everywhere.
        scale = np.where(spread > 1e-12 * np.maximum(np.abs(mean), 1.0), spread, 1.0)
        standard = (features - mean) / scale
        penalty = _choose_penalty(standard, target, codes, n_users, seed) if l2 is None else float(l2)
        beta = _fit_coefficients(standard, target, penalty, np.zeros(len(names)))
        intervals = _coefficient_intervals(beta, standard, target, codes, n_users, penalty, resamples, seed)
        return cls(
            names=tuple(names),
            mean=mean,
            scale=scale,
            coefficients=beta,
            low=np.array([interval.low for interval in intervals]),
            high=np.array([interval.high for interval in intervals]),
            penalty=penalty,
            n_cases=len(target),
            n_users=n_users,
        )

    def utilities(self, features: np.ndarray) -> np.ndarray:
        """(C, S) scores of candidates with features (C, S, F); a ranker's scores."""
        return ((np.asarray(features, dtype=np.float64) - self.mean) / self.scale) @ self.coefficients

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """(C, S) choice probabilities; rows sum to 1."""
        return _softmax(self.utilities(features))

    def log_loss(self, features: np.ndarray, target: np.ndarray) -> np.ndarray:
        """(C,) nats of surprise at each choice."""
        return -np.log(self.probabilities(features)[np.arange(len(target)), target])

    def coefficient_entries(self) -> dict[str, dict[str, Any]]:
        """{feature: {"value", "ci95", "n"}}, per standard deviation."""
        return _entries(self)

    def to_json(self) -> dict[str, Any]:
        """JSON values; floats survive exactly."""
        arrays = {name: getattr(self, name).tolist() for name in ("mean", "scale", "coefficients", "low", "high")}
        counts = {"penalty": self.penalty, "n_cases": self.n_cases, "n_users": self.n_users}
        return {"names": list(self.names), **arrays, **counts}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ChoiceLayer:
        """Inverse of `to_json`."""
        arrays = {
            name: np.array(value[name], dtype=np.float64) for name in ("mean", "scale", "coefficients", "low", "high")
        }
        return cls(
            names=tuple(value["names"]),
            **arrays,
            penalty=float(value["penalty"]),
            n_cases=int(value["n_cases"]),
            n_users=int(value["n_users"]),
        )


def _choose_penalty(standard: np.ndarray, target: np.ndarray, codes: np.ndarray, n_users: int, seed: int) -> float:
    """The penalty of least held-out loss over folds of users; the larger one on a tie."""
    fold = stream(seed, "choice-layer-folds").permutation(n_users) % FOLDS
    fold_of_case = fold[codes]
    losses = []
    for penalty in PENALTIES:
        loss = 0.0
        for held_out in range(FOLDS):
            inside = fold_of_case != held_out
            beta = _fit_coefficients(standard[inside], target[inside], penalty, np.zeros(standard.shape[2]))
            loss += _loss_and_gradient(beta, standard[~inside], target[~inside], 0.0)[0]
        losses.append(loss)
    best = min(losses)
    return max(penalty for penalty, loss in zip(PENALTIES, losses, strict=True) if loss <= best + 1e-9 * abs(best))


def _coefficient_intervals(
    beta: np.ndarray,
    standard: np.ndarray,
    target: np.ndarray,
    codes: np.ndarray,
    n_users: int,
    penalty: float,
    resamples: int,
    seed: int,
) -> list[Interval]:
    n_features = len(beta)
    probability = _softmax(standard @ beta)  # (C, S)
    average = np.einsum("cs,csf->cf", probability, standard)
    slope = average - standard[np.arange(len(target)), target]  # (C, F)
    bend = np.einsum("cs,csf,csg->cfg", probability, standard, standard, optimize=True)
    bend -= average[:, :, None] * average[:, None, :]
    gradient = sums_by_cluster(codes, n_users, slope)
    curvature = sums_by_cluster(codes, n_users, bend)
    return one_step_bootstrap(
        beta, gradient, curvature, np.full(n_features, penalty), n_rows=len(target), n=resamples, seed=seed
    )


SlotForm = Literal["level", "linear"]


@dataclass(frozen=True)
class AcceptLayer:
    """Yes or no: P(accept) = sigmoid(intercept + score coefficients + slot effect + effect of the user).

    names: of all P coefficients, "intercept" first, then the scores (per standard deviation), then the slot: one "slot"
    per unit (linear) or "slot=k" relative to the lowest slot.  user_variance: of the users' random effects (log-odds
    squared).  user_effects: {user label: effect}.  slot_mean: average slot effect in training, used where no slot is
    given, so that position plays no part.
    """

    names: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray
    low: np.ndarray
    high: np.ndarray
    slot_form: SlotForm | None
    slot_levels: tuple[int, ...]
    slot_mean: float
    user_variance: float
    user_effects: Mapping[Any, float]
    n_cases: int

    @classmethod
    def fit(
        cls,
        scores: np.ndarray,
        accepted: np.ndarray,
        users: np.ndarray,
        *,
        slots: np.ndarray | None = None,
        slot_form: SlotForm = "level",
        names: Sequence[str] = ("score",),
        l2: float = 1.0,
        seed: int = 0,
        resamples: int = RESAMPLES,
    ) -> AcceptLayer:
        """Penalised logistic regression with a Gaussian effect per user, its variance by expectation-maximisation.

        Args:
            scores: (T,) or (T, F) what the agent said, for example log-odds of yes.
            accepted: (T,) bool what people did.
            users: (T,) whose decision; intervals resample users.
            slots: (T,) int place on the page, None where there was none.
            l2: penalty on the score and slot coefficients (summed log-likelihood); the intercept is free.

        Raises:
            InputError: too few cases or users, only one answer seen, or a score that is not finite.
        """
        scores = _score_table(scores, len(names))
        accepted = np.asarray(accepted, dtype=np.float64)
        codes, n_users = cluster_codes(users)
        levels = tuple(np.unique(slots).tolist()) if slots is not None else ()
        form = slot_form if slots is not None else None
        slot_names = {None: [], "linear": ["slot"], "level": [f"slot={level}" for level in levels[1:]]}[form]
        all_names = ("intercept", *names, *slot_names)
        require_enough("an accept layer", len(accepted), n_users, len(all_names))
        if not np.isfinite(scores).all() or not 0 < accepted.mean() < 1:
            raise InputError(
                f"an accept layer needs finite scores and both answers; {int((~np.isfinite(scores)).sum())} scores are "
                f"not finite and {accepted.mean():.0%} of the answers are yes"
            )
        mean, spread = scores.mean(axis=0), scores.std(axis=0)
        scale = np.where(spread > 1e-12 * np.maximum(np.abs(mean), 1.0), spread, 1.0)
        place = _slot_design(slots, form, levels, len(accepted))
        design = np.column_stack([np.ones(len(accepted)), (scores - mean) / scale, place])
        penalty = np.full(design.shape[1], float(l2))
        penalty[0] = 0.0
        beta, effect, variance = fit_with_user_effects(design, accepted, codes, n_users, penalty)
        intervals = user_effect_intervals(design, accepted, codes, beta, effect, variance, penalty, resamples, seed)
        return cls(
            names=all_names,
            mean=mean,
            scale=scale,
            coefficients=beta,
            low=np.array([interval.low for interval in intervals]),
            high=np.array([interval.high for interval in intervals]),
            slot_form=form,
            slot_levels=levels,
            slot_mean=float((place @ beta[1 + len(names) :]).mean()),
            user_variance=variance,
            user_effects=dict(zip(np.unique(users).tolist(), effect.tolist(), strict=True)),
            n_cases=len(accepted),
        )

    def probabilities(
        self, scores: np.ndarray, *, slots: np.ndarray | None = None, users: np.ndarray | None = None
    ) -> np.ndarray:
        """(T,) probability of yes.

        Args:
            slots: None gives every decision the average slot effect.
            users: known users get their own effect; for unknown ones, and for None, the effect is averaged out
                (logistic-normal approximation with factor 1 / sqrt(1 + 0.346 variance)).

        Raises:
            InputError: a slot was never seen in the fit.
        """
        n_scores = len(self.mean)
        scores = _score_table(scores, n_scores)
        log_odds = self.coefficients[0] + ((scores - self.mean) / self.scale) @ self.coefficients[1 : 1 + n_scores]
        if slots is None or self.slot_form is None:
            log_odds = log_odds + self.slot_mean
        else:
            place = _slot_design(slots, self.slot_form, self.slot_levels, len(log_odds))
            log_odds = log_odds + place @ self.coefficients[1 + n_scores :]
        labels = [None] * len(log_odds) if users is None else np.asarray(users).tolist()
        known = np.array([label in self.user_effects for label in labels], dtype=bool)
        effect = np.array([self.user_effects.get(label, 0.0) for label in labels])
        averaged = log_odds / np.sqrt(1.0 + 0.346 * self.user_variance)
        return sigmoid(np.where(known, log_odds + effect, averaged))

    def coefficient_entries(self) -> dict[str, dict[str, Any]]:
        """{coefficient: {"value", "ci95", "n"}} in log-odds."""
        return _entries(self)

    def to_json(self) -> dict[str, Any]:
        """JSON values; floats survive exactly."""
        return {
            "names": list(self.names),
            **{name: getattr(self, name).tolist() for name in ("mean", "scale", "coefficients", "low", "high")},
            "slot_form": self.slot_form,
            "slot_levels": list(self.slot_levels),
            "slot_mean": self.slot_mean,
            "user_variance": self.user_variance,
            "user_effects": [[label, effect] for label, effect in self.user_effects.items()],
            "n_cases": self.n_cases,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> AcceptLayer:
        """Inverse of `to_json`."""
        arrays = {
            name: np.array(value[name], dtype=np.float64) for name in ("mean", "scale", "coefficients", "low", "high")
        }
        return cls(
            names=tuple(value["names"]),
            **arrays,
            slot_form=value["slot_form"],
            slot_levels=tuple(value["slot_levels"]),
            slot_mean=float(value["slot_mean"]),
            user_variance=float(value["user_variance"]),
            user_effects={label: float(effect) for label, effect in value["user_effects"]},
            n_cases=int(value["n_cases"]),
        )


def _entries(layer: ChoiceLayer | AcceptLayer) -> dict[str, dict[str, Any]]:
    rows = zip(layer.names, layer.coefficients.tolist(), layer.low.tolist(), layer.high.tolist(), strict=True)
    return {name: {"value": value, "ci95": [low, high], "n": layer.n_cases} for name, value, low, high in rows}


def _score_table(scores: np.ndarray, n_scores: int) -> np.ndarray:
    table = np.asarray(scores, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or table.shape[1] != n_scores:
        raise InputError(f"scores must be (T, {n_scores}), got {np.shape(scores)}")
    return table


def _slot_design(slots: np.ndarray | None, form: SlotForm | None, levels: tuple[int, ...], n_rows: int) -> np.ndarray:
    """(T, 0), (T, 1) or (T, levels - 1) columns of the slot."""
    if slots is None or form is None:
        return np.zeros((n_rows, 0))
    slots = np.asarray(slots)
    if form == "linear":
        return slots.astype(np.float64)[:, None]
    strange = sorted(set(np.unique(slots).tolist()) - set(levels))
    if strange:
        raise InputError(f"slots {strange!r} were never seen in the fit, which knows {list(levels)!r}")
    return (slots[:, None] == np.array(levels[1:])).astype(np.float64)
