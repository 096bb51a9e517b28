"""Options of `recollect continual`: one frozen dataclass for command line, YAML file and Python call."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from recollect.continual.trace_tasks import STANDARD_ORDER, trace_tasks
from recollect.errors import ConfigError

LOOSE = frozenset(
    {"method", "seeds", "set", "out", "resume", "overwrite", "dry_run", "ability", "diagnostics", "diagnostic_examples"}
)
"""Options a continued run may change: further methods and seeds, and what no number depends on."""

ONLY_TRACE = (
    "mode",
    "general_examples",
    "max_prompt",
    "max_answer",
    "truncation",
    "template",
    "loss_on",
    "temperature",
    "max_new_tokens",
    "similarity_backend",
    "sari_source",
    "ability",
    "diagnostics",
    "diagnostic_examples",
)
ONLY_DOMAINS = ("period", "holdout", "max_history", "keep_layers", "item_vectors")
PERIODS = ("month", "quarter")
MOST_SLICES = 100


@dataclass(frozen=True)
class ContinualConfig:
    """Which tasks are learnt in which order, by which methods; the defaults suit a first look on two CPU cores."""

    data: str = "trace"
    """trace: folder of the task folders, each with train.json, eval.json and test.json. domains: an interaction log, a
    dataset folder or a known name such as harbor or amazon-arts-office."""

    benchmark: Literal["trace", "domains"] = "trace"
    """What is learnt: trace = the tasks of TRACE, in words; domains = to recommend the next item in one domain, or in
    one period of time, after another."""

    method: tuple[str, ...] = ("seq-lora",)
    """Methods, comma separated; the first is what the report is about, the others stand beside it."""

    tasks: tuple[str, ...] = STANDARD_ORDER
    """Tasks in the order of training; of domains, names of domains or periods of the log, all of them unless given."""

    backbone: str = "smollm2"
    """Decoder that is tuned: smollm2, hf:ID, path:DIR or a folder."""

    train_examples: int = 200
    """Training examples per task at most; 0 = all. Of domains, stretches of users' histories."""

    test_examples: int = 100
    """Test examples per task at most; 0 = all. Of domains, users, each with one item to find."""

    mode: Literal["official", "clean"] = "official"
    """official = the files as they are; clean = one row a prompt, and no training row that a test repeats."""

    epochs: int | None = 2
    """Passes over each task (MH-MoE's study of small models: 2); none = TRACE's own number for each task."""

    seeds: int = 1
    """Repetitions of everything with seeds --seed, --seed + 1, …; the examples stay the same."""

    evaluation: Literal["cheap", "triangle", "square"] = "triangle"
    """triangle = every task met so far after each; cheap = each task after its own training and at the end, which is
    all OP and BWT need (forgetting needs more); square = every task after each."""

    untouched: bool = False
    """Also evaluate every task before any training."""

    ability: bool = False
    """Also answer the small set of general questions before and after."""

    diagnostics: bool = False
    """After each task also look at what routed experts do with old tasks (collisions, probes, gradients, spectra), by
    passes over --diagnostic-examples of each task learnt so far."""

    diagnostic_examples: int = 32
    """Training examples of each task that the diagnostics look at, at most."""

    learning_rate: float = 1e-4
    """Peak learning rate of AdamW (betas .9 and .95, torch's eps of 1e-8); 0 = train without changing anything, a
    check."""

    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate: constant, or half a cosine to 0 in each task; a method that keeps one optimiser through all
    tasks (seq-lora) has one cosine through all."""

    weight_decay: float = 0.0
    """Decoupled weight decay; SD-LoRA-MoE's common pairs are spared."""

    batch_size: int = 8
    """Rows in a batch."""

    accumulation: int = 1
    """Batches whose mean gradient makes one optimiser step."""

    clip_norm: float | None = None
    """Largest gradient norm; none = no clipping."""

    match_budget: bool = False
    """Give every method the ranks that match the parameters of LoRAMoE within 5 % after the last task, where --set
    gives none, and print them; methods that add experts or pairs task by task get smaller ones."""

    budget: Literal["trained", "activated"] = "trained"
    """What --match-budget makes equal: trained = all that is kept after the last task; activated = what a token uses.
    Both leave routers out."""

    general_examples: int | None = None
    """Instructions of Lima that replay may mix in, at most; 0 = none; none = in proportion to train_examples, as many
    as the benchmark has (1 030 beside 5 000)."""

    max_prompt: int = 1024
    """Tokens of a prompt at most; longer ones lose part of their text, never what they ask (with truncation body)."""

    max_answer: int = 512
    """Tokens of an answer at most."""

    truncation: Literal["body", "official_left"] = "body"
    """official_left = drop ids from the left as the benchmark's own code does, the instruction first."""

    template: Literal["none", "chat"] = "none"
    """none = prompt and answer as they are; chat = the model's chat template, in training and testing."""

    loss_on: Literal["answer", "all"] = "answer"
    """Tokens that are learnt."""

    temperature: float = 0.0
    """Of the answers: 0 = greedy; the benchmark's own code samples at 0.1."""

    max_new_tokens: int | None = None
    """Ceiling of every answer's length; none = each task's own."""

    similarity_backend: Literal["difflib", "levenshtein"] = "difflib"
    """How matching characters are counted in code."""

    sari_source: Literal["prompt", "paragraph"] = "prompt"
    """What a simplification is compared with: the whole prompt as in the benchmark, or the paragraph."""

    eval_batch: int | None = None
    """Questions answered at a time; none = 50 on a CPU, 128 on a GPU. Another may change an answer by rounding."""

    period: str | None = None
    """domains: cut the log in time instead, at every month or quarter (UTC), or into so many slices of equal time;
    none = tasks are the log's domains."""

    holdout: Literal["last", "time"] = "last"
    """domains: last = each user's last event of a task is the test; time = the last event after the task's 0.9
    quantile of time, nothing of the task after that moment is learnt."""

    max_history: int = 50
    """domains: most recent items the model reads."""

    keep_layers: int | None = 8
    """domains: keep the decoder's first so many blocks and the final norm; none = all."""

    item_vectors: str = "words"
    """domains: what an item is to the model, from its text: words = the mean of the decoder's own word vectors, or an
    embedder such as minilm."""

    checkpoint_every: int = 20
    """Optimiser steps between checkpoints inside a task."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the decoder; auto = bf16 where that is faster."""

    set: tuple[str, ...] = ()
    """Options of methods, each METHOD.NAME=VALUE; the values of a list are joined by +, as in
    o-lora.target_modules=q_proj+v_proj."""

    out: str | None = None
    """Run folder; default: the first free runs/continual-DATA-N."""

    resume: bool = False
    """Continue the run in --out; what is finished is kept, further methods and seeds may be added."""

    overwrite: bool = False
    """Replace what is in --out."""

    dry_run: bool = False
    """Print the plan (rows, tokens, steps, evaluations, disk) and stop."""

    seed: int = 0
    """Seed of every random stream."""

    def __post_init__(self) -> None:
        self._check_benchmark()
        if not self.method:
            raise ConfigError("no method given; name at least one, e.g. seq-lora")
        twice = [name for at, name in enumerate(self.method) if name in self.method[:at]]
        if twice:
            raise ConfigError(f"method {twice[0]!r} is given twice")
        positive = (
            "seeds",
            "batch_size",
            "accumulation",
            "max_prompt",
            "max_answer",
            "max_history",
            "checkpoint_every",
            "diagnostic_examples",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        for name in ("epochs", "max_new_tokens", "eval_batch", "keep_layers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1 or none, got {getattr(self, name)!r}")
        for name in ("train_examples", "test_examples", "seed", "general_examples"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)!r}")
        for name in ("learning_rate", "weight_decay", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a number not below 0, got {getattr(self, name)!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm must be positive or none, got {self.clip_norm!r}")
        if self.budget != "trained" and not self.match_budget:
            raise ConfigError(f"budget {self.budget!r} says what match_budget makes equal; give --match-budget, too")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other; give one")

    def _check_benchmark(self) -> None:
        """Tasks of the benchmark, and no option that it does not know."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in sorted(self.foreign):
            if getattr(self, name) != defaults[name]:
                other = "trace" if self.benchmark == "domains" else "domains"
                raise ConfigError(f"{name} is an option of --benchmark {other}, not of {self.benchmark}; leave it out")
        if self.benchmark == "trace":
            trace_tasks(self.tasks)
            return
        if self.tasks == STANDARD_ORDER:
            object.__setattr__(self, "tasks", ())
        twice = [name for at, name in enumerate(self.tasks) if name in self.tasks[:at]]
        if twice:
            raise ConfigError(f"task {twice[0]!r} is given twice; a sequence visits each task once")
        if self.epochs is None:
            raise ConfigError("epochs none is TRACE's own number for each task; give a number for domains")
        if self.period is not None and self.period not in PERIODS and not 2 <= self.n_slices <= MOST_SLICES:
            raise ConfigError(
                f"period must be {', '.join(PERIODS)} or a number of slices from 2 to {MOST_SLICES}, got "
                f"{self.period!r}"
            )
        if not self.item_vectors:
            raise ConfigError("item_vectors must be words or the name of an embedder, e.g. minilm")

    @property
    def n_slices(self) -> int:
        """Slices of equal time that `period` asks for; 0 where it asks for none."""
        return int(self.period) if self.period is not None and self.period.isdecimal() else 0

    @property
    def foreign(self) -> frozenset[str]:
        """Options that this benchmark does not know."""
        return frozenset(ONLY_DOMAINS if self.benchmark == "trace" else ONLY_TRACE)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Seeds of the repetitions."""
        return tuple(range(self.seed, self.seed + self.seeds))
