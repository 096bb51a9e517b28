"""Options of a simulation: one frozen dataclass, read by the command line, the YAML file and the Python call.

Defaults follow AgentCF++ (arXiv 2502.13843) where the paper or its code says so, and the constraints of a 135M
model elsewhere; each option says which.
"""

import math
from dataclasses import dataclass
from typing import Literal

from recollect.errors import ConfigError

Method = Literal["agentcf++", "agentcf", "agentcf+dual", "agentcf+shared", "agentcf++-no-group"]


@dataclass(frozen=True)
class SimulateConfig:
    """How to simulate users on a log and check them against what the real users did."""

    data: str = "harbor"
    """Bundled world, registered data set, or path (see `recollect data list`)."""

    method: Method = "agentcf++"
    """AgentCF++, base AgentCF, or an ablation of the paper (dual memory only, shared memory only, no tag groups)."""

    users: int | None = None
    """How many users to simulate, drawn by seed; default: 36 of harbor, 100 of any other data."""

    interactions_per_user: int = 6
    """Training interactions each agent predicts and learns from; earlier ones are read as plain history."""

    held_out: int = 3
    """At most so many of a user's last interactions are test cases, and as many before them fit the choice layer."""

    backbone: str = "smollm2"
    """Language model: smollm2, hf:ID, path:DIR, openai:URL#MODEL, vllm:ID, each with +adapter=PATH."""

    embedder: str = "minilm"
    """Text embedding model: minilm, or a backbone that embeds."""

    writer: Literal["llm", "structured"] = "structured"
    """Who writes memories: the model (3B and more) or weighted likes and dislikes rendered as text."""

    decision: Literal["choose", "generate"] = "choose"
    """Training decision: label probabilities (any model) or a generated choice with explanation (as the paper)."""

    order: Literal["both", "paper"] = "both"
    """Candidate order of a decision: both averaged in logit space, or the negative first as the paper prints it."""

    decision_memory: Literal["paper", "code"] = "paper"
    """What a training decision reads: private, fused and group memory (paper) or fused memory alone (official code)."""

    fusion: Literal["two_step", "one_call", "none"] = "two_step"
    """Fused memory: extract then fuse (paper), one call over all private memories (official code), or none."""

    tag_source: Literal["fused", "private"] = "fused"
    """Which memories interest tags are read from: fused (paper) or private (official code)."""

    groups: int = 10
    """Interest groups kept (official code: 10)."""

    clusters: int = 384
    """Upper bound on tag clusters (official code: 384 at full data); never more than a quarter of the distinct tags."""

    group_by: Literal["coverage", "occurrences"] = "coverage"
    """Rank clusters by new users covered (ours) or by tag occurrences (official code)."""

    group_window: int = 5
    """Recent member interactions a group shows per domain (official code: 5)."""

    groups_read: int = 3
    """Groups whose recent interactions a prompt shows, best group first (paper: every group the user is in)."""

    update_negative: bool | None = None
    """Also write the negative item's memory; default: yes for AgentCF++ and its ablations, no for base AgentCF."""

    negatives: Literal["auto", "uniform", "popularity", "matched"] = "auto"
    """Training negatives: uniform in the domain (AgentCF++), by popularity (AgentCF), matched, or the method's own."""

    ranking: Literal["pmi", "pairwise", "listwise"] = "pmi"
    """How the model ranks a slate: title likelihood relative to a neutral reader, all pairs, or a generated list."""

    candidates: int = 10
    """Items on a test slate, the real one included."""

    matching: Literal["matched", "uniform"] = "matched"
    """Slate negatives matched on seen-ness and popularity, or uniform (comparable with published tables)."""

    recall: bool = True
    """Let ranking look up the user's most similar past memory (the paper's B+R) in the index."""

    temperature: float = 0.7
    """Sampling temperature of generated texts (official code: 0.7)."""

    concurrency: int = 16
    """Calls in flight at a server; in-process models answer in fixed batches instead."""

    batch_size: int = 16
    """Calls per in-process batch; part of the run's identity, since it can move the last bits of a float."""

    chroma: str | None = None
    """URL of a Chroma server for the retrieval index; default: an embedded store in the run folder."""

    max_failed: float = 0.005
    """Share of steps that may fail for malformed output before the run itself fails."""

    server_patience: float = 600.0
    """Seconds to wait for a server that went away before stopping with exit code 75."""

    out: str | None = None
    """Run folder; default: the first free runs/simulate-DATA-N."""

    resume: bool = False
    """Continue the run in --out."""

    overwrite: bool = False
    """Replace what is in --out."""

    replay: str | None = None
    """Re-execute the run in this folder from its journal, without any model."""

    dry_run: bool = False
    """Print the plan (steps, calls, tokens, disk) and stop."""

    seed: int = 0
    """Seed of every random stream."""

    def __post_init__(self) -> None:
        for name, low in (
            ("interactions_per_user", 1),
            ("held_out", 1),
            ("groups", 1),
            ("clusters", 2),
            ("group_window", 1),
            ("groups_read", 1),
            ("candidates", 2),
            ("concurrency", 1),
            ("batch_size", 1),
        ):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)!r}")
        if self.users is not None and self.users < 1:
            raise ConfigError(f"users must be at least 1, got {self.users!r}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be a finite number, 0 or more, got {self.temperature!r}")
        if not self.server_patience >= 0:
            raise ConfigError(f"server_patience must be 0 or more seconds, got {self.server_patience!r}")
        if not 0 <= self.max_failed <= 1:
            raise ConfigError(f"max_failed must be a share between 0 and 1, got {self.max_failed!r}")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other; give one")
        if self.replay and (self.resume or self.overwrite):
            raise ConfigError("replay reads a finished run; it goes with neither resume nor overwrite")

    @property
    def variant(self) -> "Variant":
        """The parts of the method that are switched on."""
        return Variant(
            dual=self.method in ("agentcf++", "agentcf+dual", "agentcf++-no-group"),
            groups={
                "agentcf++": "tags",
                "agentcf+shared": "tags",
                "agentcf++-no-group": "history",
            }.get(self.method, "none"),  # type: ignore[arg-type]
            fusion=self.fusion if self.method in ("agentcf++", "agentcf+dual", "agentcf++-no-group") else "none",
            update_negative=self.method != "agentcf" if self.update_negative is None else self.update_negative,
            negatives=self.negatives
            if self.negatives != "auto"
            else ("popularity" if self.method == "agentcf" else "uniform"),
        )

    def identity(self) -> dict[str, object]:
        """The options that decide the events; a run resumes only under the same ones."""
        loose = {"concurrency", "chroma", "server_patience", "out", "resume", "overwrite", "replay", "dry_run"}
        return {name: value for name, value in vars(self).items() if name not in loose}


@dataclass(frozen=True)
class Variant:
    """A method as its switches: memory per domain, where groups come from, how memories fuse."""

    dual: bool
    groups: Literal["tags", "history", "none"]
    fusion: Literal["two_step", "one_call", "none"]
    update_negative: bool
    negatives: Literal["uniform", "popularity", "matched"]
