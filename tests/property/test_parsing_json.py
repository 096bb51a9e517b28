"""The parser finds what is there, refuses what is not allowed, and the ladder asks three times at most."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.backbones.protocol import Chosen, Completion, Message, Request
from recollect.errors import ConfigError, MalformedOutput
from recollect.prompts.parsing import MalformedAnswer, ask_json, parse_json, parse_numbered
from recollect.prompts.schemas import SCHEMAS, complaint, ranking_schema, schema_text

CHOICE, ITEMS, TAGS = SCHEMAS["choice_explain"], SCHEMAS["reflect_items"], SCHEMAS["tags"]
GOOD = '{"choice": "A", "explanation": "likes dunes"}'
VALUE = {"choice": "A", "explanation": "likes dunes"}


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Sure! Here you go:\n\n{GOOD}\nHope this helps {{smile}}.",
        f"<think>maybe {{\"choice\": \"B\", \"explanation\": \"x\"}}</think>\n{GOOD}",
        f"I weigh {{taste}} and {{price}}. {GOOD}",
        f"[{GOOD}]",
        GOOD.encode(),
        b"\xff\xfe" + GOOD.encode(),
    ],
)  # fmt: skip
def test_json_is_found_inside_chatter(text):
    assert parse_json(text, CHOICE) == VALUE


@pytest.mark.parametrize(
    ("text", "schema", "message"),
    [
        ("", CHOICE, "no JSON object"),
        ("A", CHOICE, "no JSON object"),
        ('{"choice": "A"', CHOICE, "incomplete or has a syntax error"),
        ('{"choice": "A"}', CHOICE, 'must have "explanation"'),
        ('{"choice": "C", "explanation": "x"}', CHOICE, 'must be one of ["A", "B"]'),
        ('{"choice": "A", "explanation": "x", "mood": 1}', CHOICE, "may have only"),
        ('{"choice": "A", "choice": "B", "explanation": "x"}', CHOICE, "appears twice"),
        ('{"choice": "A", "explanation": 3}', CHOICE, "must be text"),
        ('{"choice": "A", "explanation": ""}', CHOICE, "at least 1 characters"),
        ('{"choice": "A", "explanation": "\\ud800"}', CHOICE, "surrogate"),
        ('{"choice": NaN, "explanation": "x"}', CHOICE, "NaN is not JSON"),
        ('{"choice": 1e999, "explanation": "x"}', CHOICE, "too large"),
        ('{"choice": ' + "9" * 5000 + "}", CHOICE, "syntax error"),
        ("[" * 5000, TAGS, "nested deeper"),
        ("[" * 12 + "]" * 12, TAGS, "nested"),
        ("x" * 20_001, CHOICE, "longer than 20000"),
        ("[]", TAGS, "at least 1 entries"),
        ('["a","b","c","d","e","f","g"]', TAGS, "at most 6 entries"),
        ('["a", 2]', TAGS, "entry 2 of the answer must be text"),
        ("[true]", ranking_schema(3), "whole number"),
        ("[0]", ranking_schema(3), "at least 1"),
        ("[1.0]", ranking_schema(3), "whole number"),
    ],
)
def test_what_is_refused_says_why(text, schema, message):
    found = parse_json(text, schema)
    assert isinstance(found, MalformedOutput)
    assert message in str(found)


def test_control_characters_inside_strings_are_accepted():
    assert parse_json('{"choice": "A", "explanation": "a\nb\x01"}', CHOICE)["explanation"] == "a\nb\x01"


def test_an_unknown_schema_keyword_is_an_error_not_a_hole():
    with pytest.raises(ConfigError, match="'pattern'"):
        complaint("x", {"type": "string", "pattern": "y"})
    with pytest.raises(ConfigError, match="'tuple'"):
        complaint("x", {"type": "tuple"})


kinds = st.recursive(
    st.sampled_from([{"type": "string", "maxLength": 5}, {"type": "integer", "minimum": 0, "maximum": 9}])
    | st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "number"}, {"type": "string", "enum": ["A"]}]),
    lambda inner: (
        st.builds(lambda s: {"type": "array", "items": s, "maxItems": 3}, inner)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(
            lambda p: {"type": "object", "properties": p, "required": sorted(p), "additionalProperties": False}
        )
    ),
    max_leaves=6,
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 12) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("AB\u00e9", max_size=7),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@given(kinds, values)
@settings(max_examples=600, deadline=None)
def test_the_validator_agrees_with_jsonschema(schema, value):
    jsonschema = pytest.importorskip("jsonschema")
    # jsonschema counts 1.0 as an integer, we do not: a rating "4.0" is not what was asked for.
    if any(isinstance(leaf, float) and leaf.is_integer() for leaf in leaves(value)):
        return
    assert (complaint(value, schema) == "") == jsonschema.Draft202012Validator(schema).is_valid(value)


def leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for entry in value for leaf in leaves(entry)] if isinstance(value, list) else [value]


def test_numbered_lists_are_strict():
    assert parse_numbered("1. Dune\n\n 2) Emma \n3. 1984\n") == ("Dune", "Emma", "1984")
    for text in ("", "Dune", "1. Dune\n3. Emma", "Here:\n1. Dune", "1. Dune\nthanks", "1. \ud800", "1." + "x" * 30_000):
        assert isinstance(parse_numbered(text), MalformedOutput)


REQUEST = Request(
    (Message("system", "be a shopper"), Message("user", "A or B?")),
    temperature=0.7,
    seed=5,
    schema=schema_text(CHOICE),
    site="choice_explain",
)


def climb(texts, request=REQUEST, **options):
    """Play a model that says `texts` in turn; returns the requests seen and the result."""
    asking = ask_json(request, **options)
    seen = [next(asking)]
    for text in texts:
        try:
            seen.append(asking.send([Completion(text, 10, 3)]))
        except StopIteration as stop:
            return [calls[0] for calls in seen], stop.value
    raise AssertionError("asked more often than answered")


def test_a_good_answer_costs_one_call():
    requests, (value, tokens_in, tokens_out) = climb([GOOD])
    assert (requests, value, tokens_in, tokens_out) == ([REQUEST], VALUE, 10, 3)


def test_the_ladder_quotes_the_complaint_and_ends_greedily():
    requests, (value, tokens_in, tokens_out) = climb(["hm", '{"choice": "A"}', GOOD])
    assert value == VALUE
    assert (tokens_in, tokens_out) == (30, 9)
    assert [request.temperature for request in requests] == [0.7, 0.7, 0.0]
    for request, quoted in zip(requests[1:], ("holds no JSON object", 'must have "explanation"'), strict=True):
        assert request.messages[0] == REQUEST.messages[0]
        assert request.messages[1].content.startswith("A or B?\n")
        assert quoted in request.messages[1].content
        assert request.schema == REQUEST.schema
        assert request.site == REQUEST.site


def test_three_bad_answers_become_a_record_and_never_a_default():
    requests, (value, *_) = climb(["x", "y", "z"])
    assert len(requests) == 3
    assert value == MalformedAnswer("the answer holds no JSON object", ("x", "y", "z"))


def test_the_world_may_refuse_what_the_schema_allows():
    requests, (value, *_) = climb(
        [GOOD, GOOD, '{"choice": "B", "explanation": "x"}'],
        validate=lambda answer: "A is sold out" if answer["choice"] == "A" else "",
    )
    assert value["choice"] == "B"
    assert "A is sold out" in requests[1].messages[1].content


def test_a_greedy_question_is_not_repeated_word_for_word():
    greedy = Request(REQUEST.messages, schema=REQUEST.schema)
    requests, (value, *_) = climb(["x", "y"], request=greedy)
    assert len(requests) == 2
    assert isinstance(value, MalformedAnswer)


def test_a_cut_answer_is_told_to_be_shorter():
    asking = ask_json(REQUEST)
    next(asking)
    (again,) = asking.send([Completion('{"choice": "A", "expl', 1, 1, "length")])
    assert "be shorter" in again.messages[-1].content


def test_another_kind_of_answer_is_a_programming_error():
    asking = ask_json(REQUEST)
    next(asking)
    with pytest.raises(TypeError, match="Chosen"):
        asking.send([Chosen((-0.1, -2.0), 3)])


def test_parsed_values_survive_a_round_trip():
    text = json.dumps({"negative": "é\u2028", "positive": "日本"})
    assert json.loads(json.dumps(parse_json(text, ITEMS))) == json.loads(text)
