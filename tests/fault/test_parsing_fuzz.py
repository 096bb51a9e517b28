"""D6: the parser is total. Grammar-random texts and mutated answers of small models; a seed replays each input."""

import logging
import os
import random
import statistics
import time

import pytest

from recollect.errors import MalformedOutput
from recollect.prompts.parsing import parse_json, parse_numbered
from recollect.prompts.schemas import SCHEMAS, ranking_schema

SEED = int(os.environ.get("RECOLLECT_FUZZ_SEED", "20261122"))
logger = logging.getLogger(__name__)
ALL_SCHEMAS = [*SCHEMAS.values(), ranking_schema(10)]
# The kinds of answers that models of 135M to 3B give to these prompts, rebuilt by hand.
CORPUS = [
    '{"choice": "A", "explanation": "The user likes dark stories."}',
    '{"choice": "B", "explanation": "Because \\"Dune\\" fits, it\'s long"}',
    '{"choice": A, "explanation": none}',
    "{'choice': 'A', 'explanation': 'single quotes'}",
    '{"choice": "A or B", "explanation": "at most 50 words"}',
    'Choice: A\nExplanation: it is better.',
    'The answer is A.',
    '```json\n{\n  "choice": "A",\n  "explanation": "ok"\n}\n```',
    'Sure! Here is the JSON:\n{"choice": "A", "explanation": "ok"}\nLet me know.',
    '{"choice": "A", "explanation": "ok",}',
    '{"choice": "A", "explanation": "line\nbreak\tand tab"}',
    '{"choice": "A", "explanation": "cut off in the mid',
    '{"negative": "For users who like slow plots.", "positive": "For users who like battles."}',
    '{"negative": "x"}{"positive": "y"}',
    '{"negative": {"text": "x"}, "positive": ["y"]}',
    '["jazz", "slow cinema", "northern noir"]',
    '["jazz", "jazz", "jazz", "jazz", "jazz", "jazz", "jazz", "jazz"]',
    '1. jazz\n2. cinema\n3. noir',
    '[3, 1, 2, 5, 4]',
    '[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]',
    '["1", "2"]',
    '[1.5, -1, 1e400, NaN, Infinity, -Infinity, null, true]',
    '<think>Let me see {"choice": "B"}</think>{"choice": "A", "explanation": "ok"}',
    '<|im_start|>assistant\n{"choice": "A", "explanation": "ok"}<|im_end|>',
    "I'm sorry, as a language model I cannot buy things.",
    '{"choice": "A", "explanation": "' + "very " * 300 + 'good"}',
    '{"type": "object", "properties": {"choice": {"enum": ["A", "B"]}}}',
    '"A"',
    "",
]  # fmt: skip
SCRAPS = [
    "{",
    "}",
    "[",
    "]",
    '"',
    "'",
    ",",
    ":",
    "\\",
    "\\u",
    "\\ud800",
    "\\udc00",
    "null",
    "true",
    "NaN",
    "-",
    "1e999",
]
SCRAPS += [
    "9" * 30,
    "0.1",
    " ",
    "\n",
    "\t",
    "\x00",
    "\x1f",
    "\x7f",
    "\u2028",
    "\ufeff",
    "\ud800",
    "\udfff",
    "é",
    "日",
    "😀",
]
SCRAPS += [
    "```",
    "</think>",
    "choice",
    "explanation",
    "positive",
    "negative",
    '"A"',
    "//",
    "/*",
    "[[[[",
    "{{{{",
    '{"a":',
]
SHAPES = ("string", "number", "object", "array", "literal")


def grammar_random(generator, shape="", depth=0):
    """A text of a JSON-like grammar, wrong in places; of any shape unless one is named."""
    if not shape and generator.random() < 0.08:
        return generator.choice(SCRAPS)
    shape = shape or generator.choice(SHAPES if depth < 12 else SHAPES[:2])
    if shape == "string":
        word = generator.choice(["A", "B", "", "ok", "x" * 50, "é", "\\n", "\\ud83d\\ude00", generator.choice(SCRAPS)])
        return f'"{word}"'
    if shape == "number":
        return generator.choice(["0", "1", "7", "-1", "10", "11", "1.0", "1e5", "1e999", "-0", "00", "9" * 25])
    if shape == "literal":
        return generator.choice(["true", "false", "null", "NaN", "None", "Infinity"])
    n = generator.randrange(0, 5)
    if shape == "array":
        return "[" + ", ".join(grammar_random(generator, "", depth + 1) for _ in range(n)) + "]"
    names = ["choice", "explanation", "positive", "negative", "a", ""]
    members = (f'"{generator.choice(names)}": {grammar_random(generator, "", depth + 1)}' for _ in range(n))
    return "{" + ", ".join(members) + "}"


def nearly_right(generator, schema):
    """A text that the schema allows, but for a slip every now and then."""
    if generator.random() < 0.06:
        return grammar_random(generator, "", 8)
    match schema["type"]:
        case "object":
            names = list(schema["properties"])
            generator.shuffle(names)
            if generator.random() < 0.1:
                names += generator.choice((["extra"], names[:1]))
            members = (f'"{n}": {nearly_right(generator, schema["properties"].get(n, {"type": "x"}))}' for n in names)
            return "{" + generator.choice((", ", ",\n  ")).join(members) + "}"
        case "array":
            n = generator.randrange(1, schema["maxItems"] + 2)
            return "[" + ", ".join(nearly_right(generator, schema["items"]) for _ in range(n)) + "]"
        case "integer":
            return str(generator.randrange(schema["minimum"], schema["maximum"] + 2))
        case "string":
            some = generator.choice(
                ["fine", "zwölf", "\\u00e9", "a\nb", "\\ud83d\\ude00", "w " * 15, "w " * 400, "\x00"]
            )
            return f'"{generator.choice(schema.get("enum", [some]))}"'
    return "0"


def mutated(generator, text):
    """A corpus text after a few random edits."""
    for _ in range(generator.randrange(1, 5)):
        at = generator.randrange(len(text) + 1)
        match generator.randrange(6):
            case 0:
                text = text[:at] + generator.choice(SCRAPS) + text[at:]
            case 1:
                text = text[:at] + text[at + generator.randrange(1, 6) :]
            case 2:
                text = text[:at]
            case 3:
                text = text[at:] + generator.choice(CORPUS)
            case 4:
                code = generator.choice((0x20, 0x100, 0xD800, 0x2028, 0x1F600, generator.randrange(0x3000)))
                text = text[:at] + chr(code) + text[at:]
            case 5:
                text = text[:at] + text[at : at + 4] * generator.randrange(2, 8) + text[at + 4 :]
    return text


def one_input(seed, number):
    """Input `number` of a seed and the schema it is read with: text or bytes."""
    generator = random.Random(seed * 1_000_003 + number)
    schema = ALL_SCHEMAS[number % len(ALL_SCHEMAS)]
    match number // len(ALL_SCHEMAS) % 10:
        case 0 | 1:
            return grammar_random(generator, schema["type"]), schema
        case 2 | 3 | 4:
            before, after = generator.choice(
                (("", ""), ("Here: ", " Bye."), ("```json\n", "\n```"), ("<think>{", "</think>"))
            )
            return before + nearly_right(generator, schema) + after, schema
        case 5 | 6:
            return mutated(generator, nearly_right(generator, schema)), schema
        case 7:
            return mutated(generator, generator.choice(CORPUS)), schema
        case 8:
            return "".join(generator.choice(SCRAPS) for _ in range(generator.randrange(40))), schema
    return generator.randbytes(generator.randrange(80)), schema


def is_allowed(value, schema):
    """Written apart from the validator under test."""
    kind = schema["type"]
    if kind == "object":
        names = schema["required"]
        return type(value) is dict and sorted(value) == sorted(names) and all(
            is_allowed(value[name], schema["properties"][name]) for name in names
        )  # fmt: skip
    if kind == "array":
        sized = type(value) is list and schema["minItems"] <= len(value) <= schema["maxItems"]
        return sized and all(is_allowed(entry, schema["items"]) for entry in value)
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if "enum" in schema:
        return value in schema["enum"] and type(value) is str
    return type(value) is str and schema["minLength"] <= len(value) <= schema["maxLength"]


def fuzz(n_inputs):
    """(seconds per parse of the inputs that hold the bracket looked for, slowest parse, values found)."""
    times, slowest, n_values = [], 0.0, 0
    for number in range(n_inputs):
        text, schema = one_input(SEED, number)
        started = time.perf_counter()
        try:
            value = parse_json(text, schema)
        except Exception as error:
            raise AssertionError(f"seed {SEED} input {number}: {text!r}") from error
        taken = time.perf_counter() - started
        slowest = max(slowest, taken)
        bracket = "{" if schema["type"] == "object" else "["
        if isinstance(text, str):
            parse_numbered(text)
            if bracket in text:
                times.append(taken)
        if isinstance(value, MalformedOutput):
            assert str(value), f"seed {SEED} input {number}"
            continue
        assert is_allowed(value, schema), f"seed {SEED} input {number}: {text!r} gave {value!r}"
        str(value).encode("utf-8")
        n_values += 1
    return times, slowest, n_values


def check(n_inputs):
    times, slowest, n_values = fuzz(n_inputs)
    logger.info(
        "%d inputs, %d with a bracket, %d valid; median %.1f us over those with a bracket, slowest %.0f us",
        n_inputs, len(times), n_values, 1e6 * statistics.median(times), 1e6 * slowest,
    )  # fmt: skip
    # Guards against a generator that tests nothing; this one reaches the decoder with 74 % and is valid in 14 %.
    assert len(times) > 0.7 * n_inputs
    assert 0.1 < n_values / n_inputs < 0.6


def test_a_hundred_thousand_hostile_answers_give_a_value_or_a_typed_error():
    check(100_000)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_hostile_answers_give_a_value_or_a_typed_error():
    check(1_000_000)


def test_the_fuzzer_notices_a_value_outside_the_schema(monkeypatch):
    monkeypatch.setattr("recollect.prompts.parsing.complaint", lambda value, schema: "")
    with pytest.raises(AssertionError, match="gave"):
        fuzz(2000)
