"""The methods of a run with their options, from names, sections of a file and METHOD.NAME=VALUE; torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recollect.config import Option, from_text, options_of, read_options, to_dict
from recollect.continual.adapters.config import MoELoraConfig, config_to_dict
from recollect.continual.methods.config import MethodConfig, ReplayConfig
from recollect.continual.methods.registry import MethodSpec, method_spec
from recollect.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """One method of a run; the seeds in its options are replaced by the run's.

    given: names of the options the user chose.
    """

    spec: MethodSpec
    options: MethodConfig
    adapter: MoELoraConfig
    given: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Of the method."""
        return self.spec.name

    @property
    def reads_general_rows(self) -> bool:
        """Whether it trains on rows of no task where there are some."""
        return isinstance(self.options, ReplayConfig) and self.options.general

    def describe(self) -> dict[str, Any]:
        """What must be equal for finished rounds to be kept, JSON-ready."""
        options, adapter = to_dict(self.options), config_to_dict(self.adapter)
        for values in (options, adapter):
            values.pop("seed", None)
        return {
            "method": self.name,
            "options": options,
            "adapter": {
                "kind": self.adapter.kind,
                **{key: list(value) if isinstance(value, tuple) else value for key, value in adapter.items()},
            },
        }

    def seeded(self, seed: int) -> Entry:
        """The same with the seed of a repetition."""
        return replace(self, options=replace(self.options, seed=seed), adapter=replace(self.adapter, seed=seed))


def make_entries(
    methods: Sequence[str], sections: Mapping[str, Mapping[str, Any]], assignments: Sequence[str]
) -> list[Entry]:
    """The methods of a run in order.

    Args:
        sections: {method: options of the method and of its adapters}.
        assignments: "METHOD.NAME=VALUE", over the sections.

    Raises:
        UnknownName: no such method.
        ConfigError: an unknown option, an illegal value, or options of a method that is not in the run.
    """
    specs = [method_spec(name) for name in methods]
    given: dict[str, dict[str, Any]] = {spec.name: {} for spec in specs}
    for name, values in sections.items():
        if name not in given:
            raise ConfigError(f"options are given for {name!r}, which is not among the methods {', '.join(methods)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"the options of {name!r} must be a mapping, got {values!r}")
        given[name] |= read_options(_known(method_spec(name)), values, f"the options of {name}")
    for text in assignments:
        name, key, value = _assignment(text, given)
        given[name][key] = value
    return [_entry(spec, given[spec.name]) for spec in specs]


def _entry(spec: MethodSpec, values: Mapping[str, Any]) -> Entry:
    own = {option.name for option in options_of(spec.config_class)} - {"seed"}
    options = spec.options(
        {name: value for name, value in values.items() if name in own}, f"the options of {spec.name}"
    )
    rest = {name: value for name, value in values.items() if name not in own}
    adapter = spec.adapter_options(rest, f"the adapters of {spec.name}")
    return Entry(spec, options, adapter, frozenset(values))


def _known(spec: MethodSpec) -> tuple[Option, ...]:
    both = (*options_of(spec.config_class), *options_of(spec.adapter_class))
    return tuple(option for option in both if option.name != "seed")


def _assignment(text: str, given: Mapping[str, Any]) -> tuple[str, str, Any]:
    place, sign, value = text.partition("=")
    name, dot, key = place.strip().rpartition(".")
    key = key.replace("-", "_")
    if not sign or not dot or name not in given:
        raise ConfigError(f"--set {text!r} is not METHOD.NAME=VALUE with a method of this run: {', '.join(given)}")
    known = {option.name: option for option in _known(method_spec(name))}
    if key not in known:
        raise ConfigError(f"--set {text!r}: {name} has no option {key!r}; known: {', '.join(sorted(known))}")
    option = known[key]
    if option.kind is bool:
        words = {"true": True, "yes": True, "false": False, "no": False}
        if value.lower() not in words:
            raise ConfigError(f"--set {text!r} must be true or false")
        return name, key, words[value.lower()]
    return name, key, from_text(option, value.replace("+", ",") if option.is_list else value)
