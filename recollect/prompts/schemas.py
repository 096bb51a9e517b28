"""JSON schemas of the call sites that answer in JSON, and a small validator for exactly the keywords they use.

A subset of JSON Schema 2020-12: type, properties, required, additionalProperties (always false), items, enum,
minLength, maxLength, minItems, maxItems, minimum, maximum. A keyword outside it is an error, never ignored.
Complaints name places and what the schema allows, never words of the model, so they may be quoted back to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from recollect.errors import ConfigError
from recollect.io import canonical_json

MAX_TAGS = 6

_TEXT = {"type": "string", "minLength": 1, "maxLength": 600}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "choice_explain": _object(choice={"type": "string", "enum": ["A", "B"]}, explanation=_TEXT),
        "reflect_items": _object(negative=_TEXT, positive=_TEXT),
        "tags": {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": 40},
            "minItems": 1,
            "maxItems": MAX_TAGS,
        },
    }
)


def ranking_schema(n_candidates: int) -> dict[str, Any]:
    """Schema of `rank_list`: numbers 1..n_candidates, at most n of them; repeats and gaps are the caller's to judge."""
    if n_candidates < 1:
        raise ConfigError(f"a ranking needs at least one candidate, got {n_candidates!r}")
    return {
        "type": "array",
        "items": {"type": "integer", "minimum": 1, "maximum": n_candidates},
        "minItems": 1,
        "maxItems": n_candidates,
    }


def schema_text(schema: Mapping[str, Any]) -> str:
    """A schema as `Request.schema` takes it."""
    return canonical_json(schema)


_KEYWORDS = frozenset(
    {"type", "properties", "required", "additionalProperties", "items", "enum", "minLength", "maxLength"}
    | {"minItems", "maxItems", "minimum", "maximum", "title", "description"}
)
_NAMES = {"object": "an object", "array": "a list", "string": "text", "integer": "a whole number"}
_NAMES |= {"number": "a number", "boolean": "true or false", "null": "null"}


def complaint(value: Any, schema: Mapping[str, Any], place: str = "the answer") -> str:
    """What is wrong with a JSON value, "" when the schema allows it.

    Raises:
        ConfigError: the schema uses a keyword outside the subset.
    """
    if unknown := sorted(set(schema) - _KEYWORDS):
        raise ConfigError(f"schema keyword {unknown[0]!r} is not supported; use {', '.join(sorted(_KEYWORDS))}")
    kind = schema.get("type")
    if kind is not None and not _is_of(value, kind):
        return f"{place} must be {_NAMES[kind]}"
    if "enum" in schema and not any(type(value) is type(allowed) and value == allowed for allowed in schema["enum"]):
        return f"{place} must be one of {json.dumps(schema['enum'])}"
    match value:
        case str():
            return _outside(len(value), schema, "minLength", "maxLength", f"{place} must have {{}} characters")
        case bool():
            return ""
        case int() | float():
            return _outside(value, schema, "minimum", "maximum", f"{place} must be {{}}")
        case list():
            wrong = _outside(len(value), schema, "minItems", "maxItems", f"{place} must have {{}} entries")
            entries = schema.get("items", {})
            found = (complaint(entry, entries, f"entry {n} of {place}") for n, entry in enumerate(value, 1))
            return wrong or next((text for text in found if text), "")
        case dict():
            return _members(value, schema, place)
    return ""


def _is_of(value: Any, kind: str) -> bool:
    match kind:
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
    raise ConfigError(f"schema type {kind!r} is not supported; use {', '.join(_NAMES)}")


def _outside(size: float, schema: Mapping[str, Any], low: str, high: str, message: str) -> str:
    if low in schema and size < schema[low]:
        return message.format(f"at least {schema[low]}")
    if high in schema and size > schema[high]:
        return message.format(f"at most {schema[high]}")
    return ""


def _members(value: dict[str, Any], schema: Mapping[str, Any], place: str) -> str:
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            return f"{place} must have {json.dumps(name)}"
    for name, member in value.items():
        if name in properties:
            if wrong := complaint(member, properties[name], json.dumps(name)):
                return wrong
        elif schema.get("additionalProperties") is False:
            return f"{place} may have only {', '.join(map(json.dumps, properties))}"
    return ""
