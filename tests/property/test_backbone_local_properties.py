"""Segment plans, chat tokens, schemas and names hold for any input."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.backbones.chat_tokens import ChatTokenizer
from recollect.backbones.prefix_tree import add_wants, level_batches, plan_segments
from recollect.backbones.protocol import Message, Request
from recollect.backbones.resolve import open_backbone, open_embedder, parse_model_name
from recollect.backbones.scripted import ScriptedBackbone
from recollect.errors import ConfigError, InputError, ModelFileError, UnknownName


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def chats(tokenizer):
    return ChatTokenizer(tokenizer)


def path_of(segments, end):
    tokens = ()
    while end >= 0:
        tokens = tuple(segments[end].tokens) + tokens
        end = segments[end].parent
    return tokens


prefixes = st.lists(st.integers(0, 3), min_size=0, max_size=90).map(tuple)
families = st.lists(
    st.tuples(st.sampled_from([(), (1,) * 60, (1,) * 60 + (2,) * 70, (3,) * 1500]), prefixes).map(
        lambda two: two[0] + (9,) + two[1]
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(families)
def test_every_sequence_is_the_path_to_its_segment_and_shared_parts_are_read_once(sequences):
    segments, ends = plan_segments(sequences)
    assert [path_of(segments, end) for end in ends] == sequences
    assert all(segment.parent < index for index, segment in enumerate(segments))
    assert sum(len(segment.tokens) for segment in segments) <= sum(map(len, sequences))
    done = set()
    for batch in level_batches(segments, 256):
        assert all(segments[index].parent in done or segments[index].parent == -1 for index in batch)
        done.update(batch)
    assert done == set(range(len(segments)))
    with_answers = [(*sequence, 5) for sequence in sequences]
    for number, (sequence, end) in enumerate(zip(with_answers, ends, strict=True)):
        add_wants(segments, end, sequence, 1, number)
    wanted = [[] for _ in sequences]
    for segment in segments:
        for position, token, number, place in segment.wants:
            assert with_answers[number][segment.start + position + 1] == token
            wanted[number].append(place)
    assert [sorted(places) for places in wanted] == [list(range(len(sequence) - 1)) for sequence in with_answers]


plain_text = st.text(st.characters(codec="utf-8"), max_size=60).filter(lambda text: "<" not in text)


@settings(max_examples=150, deadline=None)
@given(plain_text, plain_text)
def test_harmless_chats_tokenise_as_the_template_does(tokenizer, chats, system, user):
    messages = (Message("system", system), Message("user", user))
    turns = [{"role": role, "content": content} for role, content in messages]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert chats.encode_chat(messages) == list(expected)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_message_can_add_a_control_token(chats, data):
    pieces = st.sampled_from(
        [*chats.control_tokens, "\n", "system", "user", " ", "<|", "|>", "x", "\ud800", "\ue0000\ue001"]
    )
    content = "".join(data.draw(st.lists(pieces, max_size=8)))
    harmless = chats.encode_chat((Message("user", "x"), Message("assistant", "y"), Message("user", "z")))
    hostile = chats.encode_chat((Message("user", content), Message("assistant", content), Message("user", content)))
    control = set(chats.control_ids.values())
    assert [token for token in hostile if token in control] == [token for token in harmless if token in control]


def test_control_tokens_are_read_from_the_tokenizer(chats):
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"} <= set(chats.control_tokens)
    assert chats.encode_text("<|im_end|>") != [chats.control_ids["<|im_end|>"]]


SCHEMAS = [
    {
        "type": "object",
        "properties": {"mood": {"enum": ["glad", "sad"]}, "rating": {"type": "integer", "minimum": 1, "maximum": 5}},
        "required": ["mood", "rating"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_schema_constrained_answers_parse_even_at_high_temperature(smollm2_dir, schema):
    from recollect.backbones.transformers_engine import TransformersBackbone

    backbone = TransformersBackbone(smollm2_dir, dtype="bfloat16")
    ask = (Message("user", "Describe your evening."),)
    text = json.dumps(schema)
    answers = backbone.generate(
        [Request(ask, max_tokens=80, temperature=2.0, schema=text, seed=seed) for seed in range(16)]
    )
    finished = [json.loads(answer.text) for answer in answers if answer.finish_reason == "stop"]
    assert len(finished) >= 12
    for value in finished:
        if isinstance(value, dict):
            assert value["mood"] in ("glad", "sad")
            assert 1 <= value["rating"] <= 5
        else:
            assert 1 <= len(value) <= 3
            assert all(len(part) <= 12 for part in value)
    with pytest.raises(InputError, match="cannot be enforced"):
        backbone.generate([Request(ask, schema='{"type": "nonsense"}')])
    with pytest.raises(InputError, match="window of 8192"):
        backbone.generate([Request((Message("user", "word " * 9000),))])


def test_model_names_parse_or_are_refused_by_name():
    assert parse_model_name("smollm2") == ("smollm2", "", None)
    assert parse_model_name("hf:Qwen/Qwen3-0.6B+adapter=./a")[:2] == ("hf", "Qwen/Qwen3-0.6B")
    assert parse_model_name("openai:http://127.0.0.1:8000/v1#qwen3").target.endswith("#qwen3")
    with pytest.raises(UnknownName, match=r"'gpt-9'.*hf:ID.*openai:URL#MODEL.*smollm2"):
        parse_model_name("gpt-9")
    for bad in ("hf:", "openai:127.0.0.1", "smollm2+adapter=", "openai:http://h/v1#m+adapter=x"):
        with pytest.raises(ConfigError):
            parse_model_name(bad)
    with pytest.raises(ModelFileError, match="no-such-folder"):
        open_backbone("path:no-such-folder")
    with pytest.raises(ModelFileError, match="no-such-adapter"):
        open_backbone("smollm2+adapter=no-such-adapter")
    with pytest.raises(InputError, match="only embeds"):
        open_backbone("minilm")


def test_open_objects_pass_through():
    backbone = ScriptedBackbone()
    assert open_backbone(backbone) is backbone
    assert open_embedder(backbone) is backbone
