"""Options of `recollect prompt-rank`: one frozen dataclass, read by the command line and the Python call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recollect.errors import ConfigError

RERANKERS = ("cp", "poppen", "xquad", "mmr", "quota", "softmax")
DRAWN_SHARE = {"retrieval": 0.0, "mixed": 0.5}
"""Share of drawn niche items in a candidate set."""
ATTRIBUTES = ("gender", "age", "occupation")


@dataclass(frozen=True)
class PromptRankConfig:
    """How to rank candidates by prompting, and against what to hold it."""

    data: str = "ml-100k"
    """Bundled world, registered data set, or path (see `recollect data list`)."""

    preset: tuple[str, ...] = ("base", "fairlrm")
    """Prompt presets: base, diversity, debias, item, user, fairlrm, fairlrm-without-I1 (… -U3), anti; or all."""

    controls: bool = True
    """With fairlrm, also ask with another user's profile (shuffled-U) and with two class tags swapped."""

    attributes: tuple[str, ...] = ()
    """User attributes whose effect on the base lists is measured, one at a time: gender, age, occupation."""

    backbone: str = "smollm2"
    """Language model: smollm2, hf:ID, path:DIR, openai:URL#MODEL, vllm:ID, each with +adapter=PATH."""

    backend: Literal["label_logits", "title_loglik", "yes_no", "generate"] = "label_logits"
    """How answers are read: label logits, title likelihood, a yes or no per candidate, or a written list."""

    generator: str = "ease"
    """Conventional model that proposes candidates, by the name `recollect evaluate` knows it."""

    compare: tuple[str, ...] = ("pop", "markov")
    """Further conventional models as rows, over the full catalogue, e.g. pop,markov,sasrec; none for no row."""

    candidate_set: Literal["retrieval", "mixed", "full"] = "retrieval"
    """Top of the generator, half of it with as many drawn niche items, or the whole catalogue (not by labels)."""

    mix: tuple[float, ...] = ()
    """Shares of drawn niche items among the candidates, e.g. 0.25,0.5,0.75, at which base and fairlrm are asked once
    more each, for a curve over the mix; none by default."""

    candidates: int = 20
    """Candidates per user; with the full catalogue, how many of its best are kept."""

    k: int = 10
    """Length of the judged lists."""

    users: int | None = None
    """How many test users, drawn by seed; default: all."""

    permutations: int = 4
    """Seeded orders of the candidates that are asked and averaged; each is also judged alone."""

    orders: Literal["shuffled", "retrieval"] = "shuffled"
    """Order of the candidates in a prompt: shuffled, or as retrieved (with one permutation)."""

    calibrate: bool = False
    """Subtract what the same prompt says without any user (label_logits, yes_no)."""

    insert_target: bool = False
    """Put the target among the candidates; every metric is then named ~inserted."""

    protocol: Literal["loo", "gts"] = "loo"
    """Leave-one-out, or global temporal split with the last event as target."""

    history: Literal["train", "train+val"] = "train"
    """What prompts and the generator see of a test user: training events only, or the validation event too."""

    core: int = 5
    """Users and items with fewer events are dropped, repeatedly; 1 keeps all."""

    convention: Literal["items20", "mass80"] = "items20"
    """Popular items: the most counted fifth of the items, or those that hold 80 % of the events."""

    history_length: int = 20
    """Most recent events a prompt shows."""

    categories: bool = True
    """Show categories behind titles."""

    years: bool = False
    """Show the year of release behind titles; it tells the order of release."""

    deciles: bool = False
    """Add the popularity decile to the class tags."""

    locale: Literal["en", "de"] = "en"
    """Language of the prompts."""

    token_limit: int = 4096
    """Estimated tokens a prompt may have; the oldest history entries are dropped to keep it."""

    max_tokens: int = 256
    """Length of a written list, in tokens (generate)."""

    rerankers: tuple[str, ...] = RERANKERS
    """Post-hoc re-rankers drawn beside the prompts: cp, poppen, xquad, mmr, quota, softmax; none for no curve."""

    resamples: int = 1000
    """Bootstrap resamples of the users behind every interval."""

    concurrency: int = 64
    """Calls in flight at a server; in-process models answer in fixed batches instead."""

    batch_size: int = 64
    """Calls per in-process batch; part of the run's identity, since it can move the last bits of a float."""

    server_patience: float = 600.0
    """Seconds to wait for a server that went away before stopping with exit code 75."""

    out: str | None = None
    """Run folder; default: the first free runs/prompt-rank-DATA-N."""

    resume: bool = False
    """Continue the run in --out."""

    overwrite: bool = False
    """Replace what is in --out."""

    dry_run: bool = False
    """Print the plan (users, calls, estimated tokens) and stop."""

    seed: int = 0
    """Seed of every random stream."""

    def __post_init__(self) -> None:
        for name, low in (
            ("candidates", 2),
            ("k", 1),
            ("permutations", 1),
            ("core", 1),
            ("history_length", 1),
            ("token_limit", 64),
            ("max_tokens", 1),
            ("resamples", 1),
            ("concurrency", 1),
            ("batch_size", 1),
        ):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)!r}")
        if self.users is not None and self.users < 1:
            raise ConfigError(f"users must be at least 1, got {self.users!r}")
        if self.k > self.candidates:
            raise ConfigError(f"k must be at most the number of candidates {self.candidates!r}, got {self.k!r}")
        if not self.preset:
            raise ConfigError("preset must name at least one prompt; use base, fairlrm or all")
        for name in self.rerankers:
            if name not in RERANKERS:
                raise ConfigError(f"rerankers must be among {', '.join(RERANKERS)}, got {name!r}")
        for name in self.attributes:
            if name not in ATTRIBUTES:
                raise ConfigError(f"attributes must be among {', '.join(ATTRIBUTES)}, got {name!r}")
        if self.candidate_set == "full" and self.backend not in ("title_loglik", "yes_no"):
            raise ConfigError(
                f"no prompt can list the whole catalogue for {self.backend!r}; use backend title_loglik or yes_no, "
                "or candidate_set retrieval or mixed"
            )
        for share in self.mix:
            if not 0 <= share <= 1:
                raise ConfigError(f"mix must hold shares between 0 and 1, got {share!r}")
        if len(set(self.mix)) != len(self.mix):
            raise ConfigError(f"mix names a share more than once: {', '.join(f'{share:g}' for share in self.mix)}")
        if self.mix and self.candidate_set == "full":
            raise ConfigError("the full catalogue is not mixed; leave mix out, or use candidate_set retrieval or mixed")
        if self.candidate_set == "full" and self.insert_target:
            raise ConfigError("the full catalogue already holds the target; leave insert_target out")
        if self.orders == "retrieval" and self.permutations != 1:
            raise ConfigError(f"there is one retrieval order; use permutations 1 with it, got {self.permutations!r}")
        if self.calibrate and self.backend not in ("label_logits", "yes_no"):
            raise ConfigError(f"calibrate subtracts label scores; the back-end {self.backend!r} has none")
        if not self.server_patience >= 0:
            raise ConfigError(f"server_patience must be 0 or more seconds, got {self.server_patience!r}")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other; give one")

    def identity(self) -> dict[str, object]:
        """The options a resumed run must share.

        Answers are kept by what was asked, so a resumed run may add users, presets, controls, attributes and candidate
        mixes, and judge otherwise.
        """
        asked_more = {"users", "preset", "controls", "attributes", "mix", "rerankers", "resamples", "k", "compare"}
        loose = {"concurrency", "server_patience", "out", "resume", "overwrite", "dry_run"}
        return {name: value for name, value in vars(self).items() if name not in asked_more | loose}
