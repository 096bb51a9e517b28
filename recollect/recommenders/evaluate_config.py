"""Options of an evaluation: one frozen dataclass, read by the command line, the YAML file and the Python call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recollect.errors import ConfigError

PRIMARY_CUT = 10
"""Models are compared, and baselines chosen on validation, by NDCG at this cut (the largest smaller one without it)."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Which models are fitted on which data, and how they are compared."""

    data: str = "harbor"
    """Bundled world, registered data set, or path (see `recollect data list`)."""

    models: tuple[str, ...] = ("pop", "markov", "ease", "sasrec")
    """Rows of the table: names of models, sections of the --config file, or path:DIR of a saved model."""

    protocol: Literal["loo", "gts"] = "loo"
    """Leave-one-out (comparable with most papers) or one global cut in time (no model knows the future)."""

    target: Literal["successive", "last", "first", "random", "all"] = "successive"
    """Under gts, which events after the cut are predicted: each one from all before it, the last, the first, …"""

    quantile: float = 0.9
    """Under gts, the share of events before the cut."""

    core: int = 5
    """Drop users and items with fewer events until none is left; 0 or 1 = keep all."""

    k: tuple[int, ...] = (1, 5, 10, 20)
    """Cut-offs of the metrics."""

    history: Literal["train+val", "train"] = "train+val"
    """What a test case shows the model: everything before the target, or training events only."""

    mask: Literal["history", "none", "train"] = "history"
    """Items that are not recommended again: those of the history, none, or the user's training items."""

    tie: Literal["expectation", "optimistic", "pessimistic", "index"] = "expectation"
    """How equal scores rank: exactly in expectation; the others are for parity with other libraries."""

    tie_shuffles: int = 0
    """Also evaluate so many random orders of events with equal times (the target of such a case is arbitrary)."""

    attributes: tuple[str, ...] = ()
    """User attributes the primary metric is also split by, e.g. gender,age, beside activity and head share."""

    refit: bool = False
    """Fit once more on training and validation events before the test (models that are selected on validation keep
    the number of epochs found)."""

    seeds: int = 1
    """Repetitions of every model that draws random numbers, with seeds --seed, --seed + 1, …"""

    grid: str | None = None
    """YAML file of values to tune with, ROW: {OPTION: [VALUE, …]}: every combination is fitted once with the first
    seed, the one that is best on validation is the row; every row with options gets equally many."""

    unequal_budgets: bool = False
    """Let a grid give rows different numbers of points; the report then warns of it."""

    batch_size: int = 256
    """Cases scored at once."""

    save_models: bool = True
    """Keep the fitted models in the run folder (ease: 4 bytes times items squared)."""

    out: str | None = None
    """Run folder; default: the first free runs/evaluate-DATA-N."""

    resume: bool = False
    """Continue the run in --out: finished (model, seed) pairs are kept, further models and seeds may be added."""

    overwrite: bool = False
    """Replace what is in --out."""

    dry_run: bool = False
    """Print the plan (what is fitted, cases, memory, disk) and stop."""

    seed: int = 0
    """Seed of every random stream."""

    def __post_init__(self) -> None:
        for name, low in (("core", 0), ("tie_shuffles", 0), ("seeds", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)!r}")
        if not self.models:
            raise ConfigError("models is empty; name at least one model")
        doubled = sorted({name for name in self.models if self.models.count(name) > 1})
        if doubled:
            raise ConfigError(f"models names {', '.join(map(repr, doubled))} more than once")
        taken = sorted({"activity", "head share"} & set(self.attributes))
        if taken:
            raise ConfigError(f"attributes names {taken[0]!r}, a partition that is always there; leave it out")
        if not self.k or min(self.k) < 1:
            raise ConfigError(f"k must be cut-offs of at least 1, got {list(self.k)!r}")
        if not 0 < self.quantile < 1:
            raise ConfigError(f"quantile must lie between 0 and 1, got {self.quantile!r}")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other; give one")

    @property
    def primary_cut(self) -> int:
        """The cut-off of the primary metric and of the list metrics."""
        return max((cut for cut in self.k if cut <= PRIMARY_CUT), default=min(self.k))

    @property
    def primary_metric(self) -> str:
        """The metric that models are compared by."""
        return f"ndcg@{self.primary_cut}"

    def identity(self) -> dict[str, object]:
        """The options that decide what a finished (model, seed) pair found, beside the data and the model's own."""
        decisive = ["protocol", "core", "k", "history", "mask", "tie", "refit"]
        if self.protocol == "gts":
            decisive += ["target", "quantile"]
        values = {name: getattr(self, name) for name in decisive}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
