"""Recommenders by name: which there are, their options, how one is opened, and how a saved one is found again.

A name leads to a class and a config dataclass that are imported only when asked for; no config imports torch.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recollect.config import build
from recollect.errors import ConfigError, InputError, ModelFileError, UnknownName
from recollect.io import read_json
from recollect.recommenders.protocol import Recommender


@dataclass(frozen=True)
class ModelSpec:
    """One model of the table.

    class_home, config_home: "module:name" below `recollect.recommenders`.  is_trained: fitted by gradient steps from a
    seed and selected on validation; the others are deterministic.  reads_text: it embeds item text and takes a cache
    folder.  defaults: options that make it what its name says.
    """

    name: str
    class_home: str
    config_home: str
    summary: str
    is_trained: bool = False
    reads_text: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_class(self) -> Any:
        """The class, imported now."""
        return _imported(self.class_home)

    @property
    def config_class(self) -> Any:
        """The dataclass of its options, imported now."""
        return _imported(self.config_home)

    def options(self, values: Mapping[str, Any], source: str) -> Any:
        """Its config from `values` over the defaults.

        Raises:
            ConfigError: unknown key, wrong type or illegal value, or a seed (the evaluation gives seeds).
        """
        if self.is_trained and "seed" in values:
            raise ConfigError(f"'seed' in {source} is not an option of a row; use --seed and --seeds")
        return build(self.config_class, {**self.defaults, **values}, source)

    def open(self, options: Any, *, seed: int = 0, cache: str | Path | None = None) -> Recommender:
        """An unfitted model; `cache` keeps text vectors."""
        if self.is_trained:
            options = dataclasses.replace(options, seed=seed)
        return self.model_class(options, cache=cache) if self.reads_text else self.model_class(options)


def _imported(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(importlib.import_module(f"recollect.recommenders.{module}"), name)


def _trained(name: str, home: str, config: str, summary: str, **more: Any) -> ModelSpec:
    return ModelSpec(name, home, f"configs:{config}", summary, is_trained=True, **more)


_SPECS = (
    ModelSpec("pop", "popularity:Popularity", "popularity:PopularityConfig", "training counts"),
    ModelSpec("markov", "markov:Markov", "markov:MarkovConfig", "what followed the last item in training"),
    ModelSpec("ease", "ease:Ease", "ease:EaseConfig", "linear item-item model in closed form"),
    ModelSpec("itemknn", "itemknn:ItemKNN", "itemknn:ItemKNNConfig", "cosine neighbours of the history's items"),
    _trained("bpr", "bpr:BPR", "BPRConfig", "matrix factorisation, pairwise loss"),
    _trained("sasrec", "sasrec:SASRec", "SASRecConfig", "causal self-attention, full softmax"),
    _trained(
        "gsasrec",
        "sasrec:SASRec",
        "SASRecConfig",
        "SASRec with generalised BCE and 256 negatives",
        defaults={"loss": "gbce", "negatives": 256},
    ),
    _trained("gru4rec", "gru4rec:GRU4Rec", "GRU4RecConfig", "recurrent network, full softmax"),
    _trained("bert4rec", "bert4rec:BERT4Rec", "BERT4RecConfig", "bidirectional self-attention, masked items"),
    _trained("lrurec", "lrurec:LRURec", "LRURecConfig", "linear recurrent units"),
    _trained("hstu", "hstu:HSTU", "HSTUConfig", "pointwise gated attention"),
    ModelSpec(
        "minilm",
        "text:TextSimilarity",
        "text:TextSimilarityConfig",
        "items whose text is nearest to the last items' texts",
        reads_text=True,
    ),
    ModelSpec(
        "sasrec-text",
        "sasrec_text:SASRecText",
        "text:SASRecTextConfig",
        "SASRec whose item vectors are an id vector plus projected text",
        is_trained=True,
        reads_text=True,
    ),
)
MODELS = {spec.name: spec for spec in _SPECS}


def model_spec(name: str) -> ModelSpec:
    """The model called `name`.

    Raises:
        UnknownName: there is none; the message lists those there are.
    """
    if name not in MODELS:
        raise UnknownName("model", name, list(MODELS), "A saved model is path:DIR")
    return MODELS[name]


def load_recommender(folder: str | Path) -> Recommender:
    """The model a folder of `save_pretrained` holds, whatever its kind.

    Raises:
        ModelFileError: the folder holds no model, or one of an unknown kind.
    """
    try:
        content = read_json(Path(folder) / "config.json")
    except InputError as error:
        raise ModelFileError(f"{folder} holds no model: {error}") from error
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind not in MODELS:
        raise ModelFileError(f"{folder} holds a model of kind {kind!r}; known: {', '.join(sorted(MODELS))}")
    return MODELS[kind].model_class.from_pretrained(folder)
