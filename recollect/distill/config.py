"""Options of a distillation: one frozen dataclass, read by the command line, the YAML file and the Python call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from recollect.errors import ConfigError, UnknownName

Method = Literal[
    "llmd4rec",
    "static",
    "round-start",
    "crossfit",
    "no-update",
    "down-only",
    "up-only",
    "self",
    "labels-only",
    "mutual",
    "popularity",
    "label-smoothing",
    "dllm2rec",
    "llm-srec",
]
METHODS: tuple[str, ...] = get_args(Method)
SUMMARIES = {
    "llmd4rec": "both sides teach each other in rounds, weights by ranks under the models in training (the paper)",
    "static": "the same with every weight 1",
    "round-start": "the same with ranks taken at the start of each half-round",
    "crossfit": "the same with ranks under models that were not fitted on the sample",
    "no-update": "the same without taking the student's new item vectors into the LLM",
    "down-only": "the conventional model teaches the LLM",
    "up-only": "the LLM, trained alone, teaches the conventional model",
    "self": "another seed of the conventional model teaches it: does the LLM matter at all?",
    "labels-only": "the same half-rounds without a teacher: what more training alone gives",
    "mutual": "two conventional models teach each other at once, in one training as long as all rounds",
    "popularity": "a teacher that only knows how often each item occurs",
    "label-smoothing": "a teacher that knows nothing",
    "dllm2rec": "DLLM2Rec: the LLM's weighted top list and its item vectors, in one training as long as all rounds",
    "llm-srec": "LLM-SRec: small heads on the frozen LLM learn the conventional model's users",
}
STUDENTS = ("sasrec", "gsasrec", "gru4rec", "lrurec", "hstu")
LONG_HISTORIES = 50
"""Median training length above which the conventional model reads 200 items (the MovieLens convention), else 50."""


@dataclass(frozen=True)
class DistillConfig:
    """Who teaches whom on which data; the defaults suit two CPU cores."""

    data: str = "harbor"
    """Bundled world, registered data set, or path (see `recollect data list`)."""

    student: str = "sasrec"
    """Conventional model: sasrec, gsasrec, gru4rec, lrurec or hstu."""

    teacher: str = "smollm2"
    """Decoder of the LLM recommender: smollm2, hf:ID, path:DIR or a folder."""

    method: Method = "llmd4rec"
    """What student_distilled and teacher_distilled are: llmd4rec, static, crossfit, down-only, up-only, no-update,
    round-start, self, labels-only, mutual, popularity, label-smoothing, dllm2rec or llm-srec."""

    compare: tuple[str, ...] = ("static", "crossfit", "down-only", "up-only")
    """Further methods as rows of the table; "all" for every one, "none" for none. Both models alone, their ensemble,
    self and labels-only (its LLM only where another row trains one) are always there."""

    rounds: int = 3
    """Rounds of downward and upward teaching (paper: 3 to 5)."""

    seeds: int = 3
    """Repetitions of everything, with seeds --seed, --seed + 1, …"""

    workers: int = 1
    """Processes that train models of the run side by side, each with its share of the threads and a copy of the
    decoder in memory; on a CPU, one per core is fastest where there are several seeds."""

    protocol: Literal["loo", "gts"] = "loo"
    """Leave-one-out, or one global cut in time."""

    core: int = 5
    """Drop users and items with fewer events until none is left; 0 or 1 = keep all."""

    k: tuple[int, ...] = (1, 5, 10, 20)
    """Cut-offs of the metrics."""

    temperature_down: float = 2.0
    """Temperature of the conventional teacher's distribution."""

    temperature_up: float = 2.0
    """Temperature of the LLM teacher's distribution."""

    strength_down: float = 0.5
    """Lambda: weight of the teacher's distribution in the LLM's loss."""

    strength_up: float = 0.5
    """Lambda: weight of the teacher's distribution in the conventional model's loss."""

    t_squared: bool = True
    """Multiply the divergence by T squared, so that lambda means about the same for every T."""

    folds: int = 2
    """Folds over users of cross-fitted ranks; 5 where time allows."""

    student_length: int | None = None
    """Items the conventional model reads; default: 200 where histories are long (median over 50), else 50."""

    student_hidden: int = 64
    """Width of the conventional model's item vectors."""

    student_loss: Literal["ce", "bce", "gbce"] | None = None
    """Loss of the conventional model alone (default: its own); half-rounds use the full softmax."""

    student_epochs: int = 200
    """Most epochs of the conventional model alone."""

    student_batch: int = 64
    """Sequences in a batch of the conventional model."""

    student_learning_rate: float = 1e-3
    """Of the conventional model; half of it from round 2 on."""

    student_dropout: float = 0.3
    """Of the conventional model."""

    patience: int = 10
    """Validations without improvement before the conventional model alone stops."""

    round_epochs: int = 10
    """Most epochs of an upward half-round."""

    round_patience: int = 3
    """Validations without improvement before an upward half-round stops."""

    keep_layers: int | None = 4
    """Blocks of the decoder that are kept; none = all (the paper)."""

    supervision: Literal["last", "dense"] = "dense"
    """Train the LLM on one sample a pass (last, the paper) or on every position of a history (dense)."""

    teacher_length: int = 50
    """Items the LLM reads (E4SRec: 50)."""

    teacher_batch: int = 16
    """Rows in a batch of the LLM (E4SRec: 16)."""

    teacher_learning_rate: float = 1e-3
    """Of the LLM, cosine (E4SRec: 3e-4 at one sample a row)."""

    teacher_epochs: int = 3
    """Epochs of the LLM alone."""

    teacher_round_epochs: int = 1
    """Epochs of a downward half-round."""

    teacher_start: Literal["fresh", "alone"] = "fresh"
    """The LLM enters round 1 untrained (the paper; equal budget with the LLM alone) or as trained alone."""

    text: str | None = None
    """Embedder whose item text vectors join the LLM's input, e.g. minilm; none = ids only (the paper)."""

    semantic_init: str | None = None
    """Embedder whose item text vectors start the LLM's output layer; none = random."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the decoder."""

    out: str | None = None
    """Run folder; default: the first free runs/distill-DATA-N."""

    resume: bool = False
    """Continue the run in --out; finished half-rounds are kept, further seeds and methods may be added."""

    overwrite: bool = False
    """Replace what is in --out."""

    dry_run: bool = False
    """Print the plan (half-rounds, samples, disk) and stop."""

    seed: int = 0
    """Seed of every random stream."""

    def __post_init__(self) -> None:
        if self.student not in STUDENTS:
            raise UnknownName("student", self.student, STUDENTS, "It must predict every position of a history")
        for method in (self.method, *self.compare):
            if method not in METHODS and method not in ("all", "none"):
                raise UnknownName("method", method, METHODS)
        positive: tuple[str, ...] = (
            "rounds",
            "seeds",
            "workers",
            "student_epochs",
            "patience",
            "round_epochs",
            "round_patience",
        )
        positive += ("teacher_length", "teacher_batch", "teacher_epochs", "teacher_round_epochs", "student_batch")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.folds < 2:
            raise ConfigError(f"folds must be at least 2, got {self.folds!r}")
        if self.core < 0 or self.seed < 0:
            raise ConfigError(f"core and seed must not be negative, got {self.core!r} and {self.seed!r}")
        for name in ("temperature_down", "temperature_up"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        for name in ("strength_down", "strength_up"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be 0 or a positive number, got {getattr(self, name)!r}")
        if not self.k or min(self.k) < 1:
            raise ConfigError(f"k must be cut-offs of at least 1, got {list(self.k)!r}")
        if self.student_loss is not None and self.student == "hstu":
            raise ConfigError("student_loss does not apply to hstu; leave it out")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other; give one")

    @property
    def rows(self) -> tuple[str, ...]:
        """Methods to run: the main one, the controls every table has, then those compared, each once."""
        compared = METHODS if "all" in self.compare else tuple(name for name in self.compare if name != "none")
        return tuple(dict.fromkeys((self.method, "self", "labels-only", *compared)))

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.seeds))

    @property
    def reads_text(self) -> bool:
        """Some model of the run reads what is said of the items."""
        return self.text is not None or self.semantic_init is not None

    @property
    def primary_metric(self) -> str:
        """What models are chosen (on validation) and compared by."""
        return f"ndcg@{max((cut for cut in self.k if cut <= 10), default=min(self.k))}"
