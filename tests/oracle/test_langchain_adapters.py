"""LangChain on both sides of the protocol: our backbones as chat models, chat models as backbones."""

import asyncio
import json
import math

import numpy as np
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import BaseModel
from support.tool_following import tool_following_backbone

from recollect.backbones.langchain import LangChainBackbone
from recollect.backbones.protocol import Choice, Completion, Message, Request, Scoring
from recollect.backbones.scripted import ScriptedBackbone
from recollect.errors import BackboneError, ConfigError, InputError, MalformedOutput
from recollect.integrations.langchain import RecollectChatModel, RecollectEmbeddings
from recollect.integrations.langchain_messages import chat_of, read_tool_answer

CHAT = (Message("system", "Be brief."), Message("user", "A or B?"))


class Answering(FakeListChatModel):
    """A chat model that notes its call arguments and answers with log-probabilities, or by votes."""

    seen: list = []  # noqa: RUF012 - a pydantic field
    answers: dict = {}  # noqa: RUF012

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.seen.append(([(message.type, message.content) for message in messages], stop, kwargs))
        text = self.answers.get(kwargs.get("seed"), self.responses[0])
        top = [{"token": "A", "logprob": math.log(0.5)}, {"token": "B", "logprob": math.log(0.125)}]
        message = AIMessage(
            text,
            usage_metadata={"input_tokens": 7, "output_tokens": 3, "total_tokens": 10},
            response_metadata={"finish_reason": "length", "logprobs": {"content": [{"top_logprobs": top}]}},
        )
        return ChatResult(generations=[ChatGeneration(message=message)])


def test_requests_reach_a_langchain_model_in_order_with_their_parameters():
    model = Answering(responses=["hello"], seen=[])
    backbone = LangChainBackbone(model, concurrency=1)
    requests = [Request(CHAT, max_tokens=5, stop=("x",)), Request(CHAT, max_tokens=9, temperature=0.5, seed=3)]
    assert backbone.generate(requests) == [Completion("hello", 7, 3, "length")] * 2
    assert model.seen[0][0] == [("system", "Be brief."), ("human", "A or B?")]
    assert model.seen[0][1] == ["x"]
    assert model.seen[0][2] == {"max_tokens": 5, "temperature": 0.0}
    assert model.seen[1][2] == {"max_tokens": 9, "temperature": 0.5, "seed": 3}


def test_choose_reads_log_probabilities_where_the_model_gives_them():
    chosen = LangChainBackbone(Answering(responses=["A"]), logprobs=True).choose([Choice(CHAT, ("B", "A"))])[0]
    np.testing.assert_allclose(np.exp(chosen.log_probs), [0.2, 0.8])
    with pytest.raises(BackboneError, match="'C' is not among"):
        LangChainBackbone(Answering(responses=["A"]), logprobs=True).choose([Choice(CHAT, ("A", "C"))])


def test_choose_by_votes_estimates_the_share_of_each_option():
    class Split(Answering):
        def _generate(self, messages, stop=None, run_manager=None, **kwargs):
            self.responses = ["A" if kwargs["seed"] % 4 else " B "]
            return super()._generate(messages, stop, run_manager, **kwargs)

    backbone = LangChainBackbone(Split(responses=["A"]), votes=200, concurrency=1)
    shares = np.exp(backbone.choose([Choice(CHAT, ("A", "B"))])[0].log_probs)
    assert shares.sum() == pytest.approx(1.0)
    assert abs(shares[0] - 0.75) < 0.1
    with pytest.raises(MalformedOutput, match="none of 10 answers"):
        LangChainBackbone(Answering(responses=["neither"]), votes=10).choose([Choice(CHAT, ("A", "B"))])


def test_what_a_langchain_model_cannot_do_is_refused_with_the_alternative():
    backbone = LangChainBackbone(Answering(responses=["A"]))
    with pytest.raises(BackboneError, match="votes=30"):
        backbone.choose([Choice(CHAT, ("A", "B"))])
    with pytest.raises(BackboneError, match="in-process or server"):
        backbone.score([Scoring(CHAT, ("A",))])
    with pytest.raises(BackboneError, match="embeddings="):
        backbone.embed(["a"])
    with pytest.raises(ConfigError, match="excludes"):
        LangChainBackbone(Answering(responses=["A"]), votes=3, logprobs=True)


def test_a_failing_provider_is_a_backbone_error_with_its_cause():
    class Broken(Answering):
        def _generate(self, *args, **kwargs):
            raise ZeroDivisionError("provider bug")

    with pytest.raises(BackboneError, match="Broken failed: ZeroDivisionError: provider bug") as caught:
        LangChainBackbone(Broken(responses=["x"])).generate([Request(CHAT)])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_embeddings_are_unit_rows():
    backbone = LangChainBackbone(Answering(responses=["A"]), DeterministicFakeEmbedding(size=16))
    rows = backbone.embed(["a", "b", "a"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(rows[0], rows[2])


def test_a_backbone_seen_through_langchain_and_back_answers_the_same():
    inner = ScriptedBackbone(name="round-trip")
    outer = LangChainBackbone(RecollectChatModel(backbone=inner), RecollectEmbeddings(inner))
    requests = [Request((Message("user", f"question {i}"),), max_tokens=20 + i % 2) for i in range(6)]
    expected = [Request(r.messages, r.max_tokens, site="langchain") for r in requests]
    assert outer.generate(requests) == inner.generate(expected)
    np.testing.assert_allclose(outer.embed(["x", "y"]), inner.embed(["x", "y"]), atol=1e-6)


def test_schemas_survive_the_round_trip():
    outer = LangChainBackbone(RecollectChatModel(backbone=tool_following_backbone()))
    schema = json.dumps({"type": "object", "properties": {"rating": {"type": "integer"}}, "required": ["rating"]})
    answer = outer.generate([Request((Message("user", "I give it 4 stars"),), max_tokens=17, schema=schema)])[0]
    assert json.loads(answer.text) == {"rating": 4}
    assert answer.prompt_tokens > 0
    rubbish = LangChainBackbone(RecollectChatModel(backbone=ScriptedBackbone(lambda request: "no JSON")))
    with pytest.raises(MalformedOutput, match="does not fit the schema"):
        rubbish.generate([Request(CHAT, schema=schema)])


def test_parameters_reach_the_model_beside_a_schema():
    seen = []

    def note(request):
        seen.append((request.max_tokens, request.temperature, request.seed))
        return '{"rating": 1}'

    outer = LangChainBackbone(RecollectChatModel(backbone=ScriptedBackbone(note)))
    schema = json.dumps({"type": "object", "properties": {"rating": {"type": "integer"}}})
    outer.generate([Request(CHAT, max_tokens=17, temperature=0.5, seed=9, schema=schema)])
    assert seen == [(17, 0.5, 9)]


def test_async_calls_of_concurrent_backbones_overlap():
    inner = ScriptedBackbone(latency=0.05, concurrency=8)
    model = RecollectChatModel(backbone=inner)

    async def ask() -> list:
        return await asyncio.gather(*(model.ainvoke(f"question {i}") for i in range(8)))

    assert len(asyncio.run(ask())) == 8
    assert inner.max_in_flight > 1


def test_messages_become_alternating_text():
    call = {"name": "adder", "args": {"a": 1}, "id": "1", "type": "tool_call"}
    messages = [
        SystemMessage("one"),
        SystemMessage("two"),
        HumanMessage([{"type": "text", "text": "hello"}, "there"]),
        AIMessage("", tool_calls=[call]),
        ToolMessage("3", name="adder", tool_call_id="1"),
        ToolMessage("broken", name="adder", tool_call_id="2", status="error"),
    ]
    assert chat_of(messages) == (
        Message("system", "one\n\ntwo"),
        Message("user", "hello\nthere"),
        Message("assistant", '{"arguments":{"a":1},"name":"adder"}'),
        Message("user", "Result of tool adder: 3\n\nError of tool adder: broken"),
    )
    with pytest.raises(InputError, match="image_url"):
        chat_of([HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        "{}",
        '{"name": "other", "arguments": {}}',
        '{"name": "adder", "arguments": 3}',
        "[" * 9999,
    ],
)
def test_rubbish_tool_answers_become_invalid_calls(text):
    content, calls, invalid = read_tool_answer(text, [{"name": "adder"}])
    assert (content, calls) == (text, [])
    assert invalid[0]["args"] == text
    assert invalid[0]["error"]


def test_structured_output_with_raw_reports_what_could_not_be_parsed():
    class Rating(BaseModel):
        stars: int

    model = RecollectChatModel(backbone=ScriptedBackbone(lambda request: "no JSON at all"))
    outcome = model.with_structured_output(Rating, include_raw=True).invoke("rate")
    assert outcome["parsed"] is None
    assert outcome["parsing_error"] is not None
    assert outcome["raw"].content == "no JSON at all"
    good = RecollectChatModel(backbone=tool_following_backbone()).with_structured_output(Rating, include_raw=True)
    assert good.invoke("5 stars")["parsed"] == Rating(stars=5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"tempreature": 1.0}, "unknown argument 'tempreature'"), ({"model": "gpt"}, "cannot be chosen per call")],
)
def test_unknown_call_arguments_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        RecollectChatModel(backbone=ScriptedBackbone()).invoke("hi", **arguments)
    with pytest.raises(ConfigError, match="none of the tools bound: adder"):
        RecollectChatModel(backbone=ScriptedBackbone()).bind_tools(
            [{"title": "adder", "description": "adds", "type": "object", "properties": {}}], tool_choice="multiplier"
        ).invoke("hi")
