"""Options of `recollect tokenize` and `recollect tokenize-bench`: frozen dataclasses, free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from recollect.errors import ConfigError
from recollect.tokenize.variants import joined_rows

Preprocessing = Literal["l2", "centre", "pca", "direction"]
Collisions = Literal[
    "none",
    "suffix",
    "variable_suffix",
    "sinkhorn",
    "constrained",
    "capacity",
    "hash_last",
    "neighbour_repair",
    "zcr",
]
Weighting = Literal["none", "popularity"]
NOT_IDENTITY = frozenset({"out", "resume", "overwrite", "dry_run", "set"})


@dataclass(frozen=True)
class ItemOptions:
    """Which items are tokenized, by which vectors; both commands have these options."""

    data: str = "harbor"
    """Bundled world, registered data set or path (see `recollect data list`), or an .npy file of item vectors."""

    levels: int = 3
    """Codes per item, L."""

    codebook_size: int = 256
    """Codes per level, K."""

    preprocess: tuple[Preprocessing, ...] | None = None
    """Steps before quantising, in order: l2, centre, pca, direction; none = the vectors as they are."""

    pca_dimension: int = 0
    """Principal directions kept by pca; 0 = all."""

    whiten: bool = False
    """Give every principal direction the variance 1 (with pca)."""

    embedder: str = "minilm"
    """What embeds title, categories and text of an item: minilm, hf:ID, path:DIR, openai:URL#MODEL, smollm2."""

    vectors: str | None = None
    """An .npy file of item vectors in place of the embedder; a row per item, named by --item-ids or else in the order
    of DATA's catalogue (item_ids.txt of a run folder)."""

    item_ids: str | None = None
    """A text file with the item id of each row of an .npy file, one a line; default: row numbers, or the catalogue."""

    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where methods with that option compute; methods trained by gradient take a GPU where there is one."""

    weight: Weighting = "none"
    """What an item counts while fitting: the same for all, or 1 + its training events."""

    hold_out_cold: bool = False
    """Fit on items with a training event only; the others are only encoded."""

    def __post_init__(self) -> None:
        for name, low in (("levels", 1), ("codebook_size", 1), ("pca_dimension", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)!r}")
        if self.is_file:
            if self.vectors is not None:
                raise ConfigError(f"{self.data!r} is the file of vectors already; leave --vectors out")
            if self.hold_out_cold or self.weight != "none":
                raise ConfigError("--hold-out-cold and --weight need a log; an .npy file has none")
        elif self.vectors is not None and not self.vectors.endswith(".npy"):
            raise ConfigError(f"vectors must be an .npy file, got {self.vectors!r}")
        elif self.vectors is None and self.item_ids is not None:
            raise ConfigError("--item-ids names the rows of an .npy file; give one as DATA or --vectors")
        if "pca" not in (self.preprocess or ()) and (self.pca_dimension or self.whiten):
            raise ConfigError("--pca-dimension and --whiten need the step pca; add it to --preprocess")

    @property
    def is_file(self) -> bool:
        """Whether `data` names an .npy file in place of a data set."""
        return self.data.endswith(".npy")

    def identity(self) -> dict[str, Any]:
        """The options a resumed run must share, JSON values."""
        values = {key: value for key, value in vars(self).items() if key not in NOT_IDENTITY}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(frozen=True)
class TokenizeConfig(ItemOptions):
    """How one catalogue is turned into semantic IDs."""

    method: str = "rq-gmm"
    """Method; the list is above."""

    set: tuple[str, ...] = ()
    """Options of the method as NAME=VALUE, e.g. covariance=tied_spherical; or a section of the --config file."""

    collaborative: str | None = None
    """Behaviour vectors for letter (.npy, a row per item); default: singular vectors of the training matrix."""

    beam: int = 1
    """Partial codes kept per item while encoding; 1 = greedy."""

    collisions: Collisions = "none"
    """How items with equal codes are told apart: none (click models), zcr (generative models: last digits change where
    that costs least), suffix, …; hash_last takes domain and categories."""

    core: int = 0
    """Drop users and items with fewer events until none is left; 0 or 1 = keep all."""

    out: str | None = None
    """Run folder; default: the first free runs/tokenize-DATA-N."""

    resume: bool = False
    """Continue the run in --out: stored vectors and finished levels are kept."""

    overwrite: bool = False
    """Replace what is in --out."""

    dry_run: bool = False
    """Print the plan (items, method, bits) and stop."""

    seed: int = 0
    """Seed of every random stream."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("beam", 1), ("core", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)!r}")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other; give one")


@dataclass(frozen=True)
class BenchConfig(ItemOptions):
    """Which tokenizers are compared on one catalogue."""

    methods: tuple[str, ...] = ("random", "rq-kmeans", "rq-gmm", "opq", "prq-kmeans", "rq-vae")
    """Rows of the table: names of methods, or sections of the --config file that hold `method: NAME` and options; a row
    may have options of its own, as NAME:OPTION=VALUE,OPTION=VALUE with lists joined by +."""

    against: str = "rq-kmeans"
    """The row every other one is compared with, if it is in the table."""

    seeds: int = 3
    """Repetitions with seeds --seed, --seed + 1, …; the same for every method."""

    downstream: bool = True
    """Also train a small click model that sees items through their codes (needs a log)."""

    fields: Literal["levels", "prefixes", "both"] = "both"
    """Fields of that model: a code per level, prefixes of codes, or both."""

    probe_cases: int = 100_000
    """Training clicks of that model, the same for every method."""

    probe_epochs: int = 6
    """Its epochs, the same for every method; the best on validation counts."""

    generative: bool = False
    """Also train a small model that writes codes and rank the catalogue with it: HR and NDCG beside popularity and a
    Markov chain (needs a log; a minute or two of one core per method and seed on 60,000 events)."""

    generative_epochs: int = 24
    """Its epochs at most, the same for every method; the best on validation counts."""

    generative_history: int = 20
    """Last items of a history that it reads."""

    beams: int = 20
    """Codes its beam search keeps per step, at least 10."""

    resamples: int = 1000
    """Bootstrap resamples behind every interval over users."""

    core: int = 5
    """Drop users and items with fewer events until none is left; 0 or 1 = keep all."""

    out: str | None = None
    """Run folder; default: the first free runs/tokenize-bench-DATA-N."""

    resume: bool = False
    """Continue the run in --out: finished (method, seed) pairs are kept, further ones may be added."""

    overwrite: bool = False
    """Replace what is in --out."""

    dry_run: bool = False
    """Print the plan and stop."""

    seed: int = 0
    """First seed, and seed of the cases and intervals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"seeds": 1, "core": 0, "seed": 0, "probe_cases": 1, "probe_epochs": 1, "resamples": 1}
        least |= {"generative_epochs": 1, "generative_history": 1, "beams": 10}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)!r}")
        object.__setattr__(self, "methods", joined_rows(self.methods))
        object.__setattr__(self, "against", next(iter(joined_rows((self.against,))), ""))
        if not self.methods:
            raise ConfigError("methods is empty; name at least one")
        doubled = sorted({name for name in self.methods if self.methods.count(name) > 1})
        if doubled:
            raise ConfigError(f"methods names {', '.join(map(repr, doubled))} more than once")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other; give one")

    def identity(self) -> dict[str, Any]:
        """As of the base, less what may be added to or changed in a finished comparison.

        The generator's options are compared with those of each finished generator instead.
        """
        loose = {"methods", "against", "seeds", "resamples"}
        loose |= {"generative", "generative_epochs", "generative_history", "beams"}
        return {key: value for key, value in super().identity().items() if key not in loose}
