"""Tokenizers by name: which there are, their options, and how one is opened at a size.

A name leads to a class and a config dataclass that are imported only when asked for; no config imports torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recollect.config import from_text, options_of, read_options
from recollect.errors import ConfigError, UnknownName
from recollect.tokenize.variants import split_row

if TYPE_CHECKING:
    from recollect.tokenize.protocol import ItemTokenizer


def _levels_of_codes(levels: int, codebook_size: int) -> dict[str, Any]:
    return {"levels": levels, "codebook_size": codebook_size}


def _one_level(levels: int, codebook_size: int) -> dict[str, Any]:
    """One codebook of K codes: K^L of them could not be stored."""
    return {"codebook_size": codebook_size}


def _scalars(levels: int, codebook_size: int) -> dict[str, Any]:
    """Scalars of 8 values (the last of 4 or 16) with as many bits as L levels of K codes."""
    bits = max(2, round(levels * math.log2(max(2, codebook_size))))
    eights, rest = divmod(bits, 3)
    if rest == 1:
        return {"counts": (8,) * (eights - 1) + (16,)}
    return {"counts": (8,) * eights + ((4,) if rest else ())}


@dataclass(frozen=True)
class MethodSpec:
    """One method of the table.

    class_home, config_home: "module:name" below `recollect.tokenize`.  sized: how L levels of K codes read among its
    options.  defaults: options that make it what its name says.
    """

    name: str
    class_home: str
    config_home: str
    summary: str
    sized: Callable[[int, int], dict[str, Any]] = _levels_of_codes
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokenizer_class(self) -> Any:
        """The class, imported now."""
        return _imported(self.class_home)

    @property
    def config_class(self) -> Any:
        """The dataclass of its options, imported now."""
        return _imported(self.config_home)

    def options(self, values: Mapping[str, Any], source: str, *, levels: int, codebook_size: int) -> Any:
        """Its config: `values` over its defaults over the size.

        Raises:
            ConfigError: unknown key, wrong type or illegal value, or a seed (the command gives seeds).
        """
        if "seed" in values:
            raise ConfigError(f"'seed' in {source} is not an option of a method; use --seed and --seeds")
        known = options_of(self.config_class)
        read = read_options(known, {**self.defaults, **values}, source)
        return self.config_class(**{**self.sized(levels, codebook_size), **read})

    def open(self, options: Any, *, seed: int) -> ItemTokenizer:
        """An unfitted tokenizer."""
        return self.tokenizer_class(dataclasses.replace(options, seed=seed))


def _imported(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(importlib.import_module(f"recollect.tokenize.{module}"), name)


def _gmm(covariance: str, summary: str) -> MethodSpec:
    name = f"rq-gmm-{covariance.replace('_', '-')}"
    plain = {"covariance": covariance, "annealing": "none"}
    return MethodSpec(name, "rq_gmm:RQGMM", "gmm_config:RQGMMConfig", summary, defaults=plain)


_SPECS = (
    MethodSpec(
        "rq-gmm", "rq_gmm:RQGMM", "gmm_config:RQGMMConfig", "residual Gaussian mixtures: one variance, annealed"
    ),
    _gmm("diag", "a variance per code and dimension (the paper)"),
    _gmm("spherical", "a variance per code"),
    _gmm("tied_diag", "a variance per dimension, shared by the codes"),
    _gmm("tied_spherical", "one variance, not annealed"),
    MethodSpec("rq-kmeans", "rq_kmeans:RQKMeans", "baseline_options:RQKMeansConfig", "residual k-means (faiss)"),
    MethodSpec(
        "balanced-rq-kmeans",
        "balanced:BalancedRQKMeans",
        "baseline_options:BalancedConfig",
        "codes filled evenly, centre by centre (OneRec)",
    ),
    MethodSpec(
        "constrained-rq-kmeans",
        "balanced:BalancedRQKMeans",
        "baseline_options:BalancedConfig",
        "k-means with sizes within one of N/K (MiniOneRec)",
        defaults={"balancing": "constrained"},
    ),
    MethodSpec(
        "prq-kmeans",
        "prq_kmeans:PRQKMeans",
        "baseline_options:PRQKMeansConfig",
        "residuals by projection; no reconstruction",
    ),
    MethodSpec("rq-vae", "rq_vae:RQVAE", "neural_config:RQVAEConfig", "trained encoder, residual codes (TIGER)"),
    MethodSpec("letter", "letter:LETTER", "neural_config:LETTERConfig", "RQ-VAE drawn to behaviour vectors"),
    MethodSpec("vq-vae", "vq_vae:VQVAE", "neural_config:VQVAEConfig", "trained encoder, one level", _one_level),
    MethodSpec("vq", "rq_kmeans:VQ", "baseline_options:VQConfig", "one codebook", _one_level),
    MethodSpec("pq", "product:PQ", "baseline_options:PQConfig", "a codebook per block of dimensions"),
    MethodSpec("opq", "product:OPQ", "baseline_options:OPQConfig", "PQ after the best rotation"),
    MethodSpec("fsq", "fsq:FSQ", "neural_config:FSQConfig", "trained encoder, rounded scalars", _scalars),
    MethodSpec(
        "random", "random_codes:RandomCodes", "baseline_options:RandomCodesConfig", "a draw per item: the floor"
    ),
)
METHODS = {spec.name: spec for spec in _SPECS}


def method_spec(name: str) -> MethodSpec:
    """The method called `name`.

    Raises:
        UnknownName: there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise UnknownName("method", name, list(METHODS))
    return METHODS[name]


def tokenizer_class(name: str) -> Any:
    """The class of the method called `name`, e.g. one named in a manifest.

    Raises:
        UnknownName: there is none; the message lists those there are.
    """
    return method_spec(name).tokenizer_class


def assignments(spec: MethodSpec, pairs: Sequence[str], source: str = "--set") -> dict[str, Any]:
    """Options written as NAME=VALUE; a dash in a name or a closed choice may stand for its underscore.

    Raises:
        ConfigError: no "=", an unknown name, or a value that is not legal; the message names the `source`.
    """
    known = {option.name: option for option in options_of(spec.config_class)}
    found = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not sign or name not in known:
            listed = ", ".join(sorted(set(known) - {"seed"}))
            raise ConfigError(f"{source} {pair!r} is not NAME=VALUE with an option of {spec.name}: {listed}")
        option = known[name]
        if option.kind is bool:
            words = {"true": True, "yes": True, "false": False, "no": False}
            if text.lower() not in words:
                raise ConfigError(f"{source} {pair!r} must be true or false")
            found[name] = words[text.lower()]
            continue
        if option.choices and text.replace("-", "_") in option.choices:
            text = text.replace("-", "_")
        try:
            found[name] = from_text(option, text.replace("+", ",") if option.is_list else text)
        except ConfigError as error:
            raise ConfigError(f"{source} {pair!r}: {error}") from error
    return found


@dataclass(frozen=True)
class Entry:
    """One row: a method with options under a label."""

    label: str
    spec: MethodSpec
    options: Any

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_0..K_{L-1} that the options ask for."""
        counts = getattr(self.options, "counts", None)  # of FSQ, whose scalars differ
        return (self.options.codebook_size,) * self.options.levels if counts is None else tuple(counts)

    def describe(self) -> dict[str, Any]:
        """What must be equal for a finished result to be kept, JSON-ready."""
        values = dataclasses.asdict(self.options)
        values.pop("seed", None)
        shown = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {"method": self.spec.name, "options": shown}


def make_entries(
    labels: Sequence[str],
    sections: Mapping[str, Mapping[str, Any]],
    *,
    levels: int,
    codebook_size: int,
    device: str = "cpu",
) -> list[Entry]:
    """The rows that names and sections of options describe.

    Args:
        labels: names of methods, or of sections that hold `method: NAME`; with options behind them (`variants`), which
            win over those of the section.
        sections: {label: options}.
        levels, codebook_size, device: of every row that has such an option and does not say otherwise.

    Raises:
        UnknownName: a name is neither a method nor a section.
        ConfigError: a section holds an illegal option, hides a method, or belongs to no row.
    """
    entries = []
    for label in labels:
        base, pairs = split_row(label)
        section = dict(sections.get(base, {}))
        name = section.pop("method", base)
        if not isinstance(name, str):
            raise ConfigError(f"'method' in section {base!r} must be the name of a method, got {name!r}")
        if name != base and (not base.replace("-", "").replace("_", "").isalnum() or not base.isascii()):
            raise ConfigError(f"the section {base!r} must be named by letters, digits, '-' and '_'")
        if name != base and base in METHODS:
            raise ConfigError(f"the section {base!r} has the name of a method but holds method: {name}; rename it")
        spec = method_spec(name)
        section |= assignments(spec, pairs, f"methods: in {label!r},")
        if "device" not in section and any(option.name == "device" for option in options_of(spec.config_class)):
            section["device"] = device
        options = spec.options(section, f"the options of {label!r}", levels=levels, codebook_size=codebook_size)
        entries.append(Entry(label, spec, options))
    unused = sorted(set(sections) - {split_row(label)[0] for label in labels})
    if unused:
        raise ConfigError(f"options are given for {', '.join(map(repr, unused))}, which no row of this run has")
    return entries
