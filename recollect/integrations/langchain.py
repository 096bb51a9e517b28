"""Every backbone as a LangChain chat model and embedder.

    from recollect.integrations.langchain import RecollectChatModel, RecollectEmbeddings
    model = RecollectChatModel(backbone="smollm2")
    model.invoke("Which film tonight?")

Tool calls and structured output are constrained generation: the backbone is asked for JSON of a schema made from the
tools, so they work with any backbone that honours `Request.schema`. Needs the extra `langchain`.
Not covered: images, audio and files (refused); token-by-token streaming (an answer arrives in one chunk, for
backbones answer whole requests); another model per call (one backbone is one model).
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Literal, cast

from recollect.backbones.protocol import Backbone, Completion, ConcurrentBackbone, Request
from recollect.errors import ConfigError, MissingExtra
from recollect.io import canonical_json

try:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.embeddings import Embeddings
    from langchain_core.language_models import BaseChatModel, LanguageModelInput
    from langchain_core.language_models.chat_models import LangSmithParams
    from langchain_core.messages import (
        AIMessage,
        AIMessageChunk,
        BaseMessage,
        SystemMessage,
    )
    from langchain_core.messages.ai import UsageMetadata
    from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
    from langchain_core.tools import BaseTool
    from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
    from langchain_core.utils.pydantic import is_basemodel_subclass
    from pydantic import ConfigDict, Field, PrivateAttr

    from recollect.integrations.langchain_messages import (
        chat_of,
        plain_schema,
        read_tool_answer,
        tool_call_schema,
        tool_instructions,
        tools_in_force,
    )
except ImportError as error:  # pragma: no cover - the test environment has it
    raise MissingExtra("langchain-core", "langchain", "recollect.integrations.langchain") from error

# Arguments a call may carry. The last four change nothing here: schemas are always strict, calls come one at a time,
# and the format is for tracers.
_CALL_ARGUMENTS = (
    "temperature", "max_tokens", "top_p", "seed", "tools", "tool_choice", "response_schema", "model", "strict",
    "parallel_tool_calls", "ls_structured_output_format",
)  # fmt: skip


class RecollectChatModel(BaseChatModel):
    """A LangChain chat model over a `Backbone`.

    Args:
        backbone: an opened backbone, or a model string such as "smollm2" or "openai:http://127.0.0.1:8000/v1"
            (opened at first use).
        temperature, top_p, max_tokens, stop, seed: of every request unless a call says otherwise.
        streaming: accepted for LangChain's sake; an answer always arrives in one chunk.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    backbone: Any = Field(exclude=True, repr=False)
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    seed: int = 0
    streaming: bool = False

    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    def __init__(self, **values: Any) -> None:
        if "stop" in values:
            values["stop_sequences"] = values.pop("stop")
        super().__init__(**values)

    @property
    def model_name(self) -> str:
        """Fingerprint of the backbone, or the model string while it is not opened."""
        return self.backbone if isinstance(self.backbone, str) else self.backbone.fingerprint

    @property
    def _llm_type(self) -> str:
        return "recollect"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {
            "model_name": self.model_name,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "stop": self.stop,
            "seed": self.seed,
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        # No question is put to a server just to name it in a trace.
        name = self.backbone if isinstance(self.backbone, str) else type(self.backbone).__name__
        params = LangSmithParams(
            ls_provider="recollect",
            ls_model_type="chat",
            ls_model_name=kwargs.get("model", name),
            ls_temperature=kwargs.get("temperature", self.temperature),
            ls_max_tokens=kwargs.get("max_tokens", self.max_tokens),
        )
        if stops := stop or self.stop:
            params["ls_stop"] = stops
        return params

    # ---- answering -----------------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._result(self._ask(self._request(messages, stop, kwargs)), kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request = self._request(messages, stop, kwargs)
        if isinstance(self._opened, ConcurrentBackbone):
            answer = cast(Completion, await asyncio.wrap_future(self._opened.submit(request)))
        else:
            answer = await asyncio.to_thread(self._ask, request)
        return self._result(answer, kwargs)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        chunk = _as_chunk(self._generate(messages, stop, **kwargs))
        if run_manager is not None:
            run_manager.on_llm_new_token(chunk.text, chunk=chunk)
        yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        chunk = _as_chunk(await self._agenerate(messages, stop, **kwargs))
        if run_manager is not None:
            await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
        yield chunk

    @property
    def _opened(self) -> Backbone:
        if isinstance(self.backbone, str):
            from recollect.backbones.resolve import open_backbone

            with self._lock:
                if isinstance(self.backbone, str):
                    self.backbone = open_backbone(self.backbone)
        return self.backbone

    def _ask(self, request: Request) -> Completion:
        backbone = self._opened
        if isinstance(backbone, ConcurrentBackbone):
            return cast(Completion, backbone.submit(request).result())
        with self._lock:  # LangChain batches through threads; in-process engines answer one batch at a time
            return backbone.generate([request])[0]

    def _request(self, messages: list[BaseMessage], stop: list[str] | None, given: dict[str, Any]) -> Request:
        if unknown := sorted(set(given) - set(_CALL_ARGUMENTS)):
            raise ConfigError(f"unknown argument {unknown[0]!r} of a chat call; known: {', '.join(_CALL_ARGUMENTS)}")
        if given.get("model") not in (None, self.model_name):
            raise ConfigError(f"model {given['model']!r} cannot be chosen per call; this one is {self.model_name!r}")
        chat = chat_of(messages)
        schema = given.get("response_schema", "")
        tools, choice = tools_in_force(given)
        if tools:
            schema = canonical_json(tool_call_schema(tools, choice))
            chat = chat_of([SystemMessage(tool_instructions(tools, choice)), *messages])
        temperature, max_tokens = given.get("temperature"), given.get("max_tokens")
        return Request(
            chat,
            max_tokens=self.max_tokens if max_tokens is None else max_tokens,
            temperature=self.temperature if temperature is None else temperature,
            top_p=given.get("top_p") or self.top_p,
            stop=tuple(stop or self.stop or ()),
            schema=schema,
            seed=given.get("seed", self.seed),
            site="langchain",
        )

    def _result(self, answer: Completion, given: dict[str, Any]) -> ChatResult:
        tools, _ = tools_in_force(given)
        content, calls, invalid = read_tool_answer(answer.text, tools) if tools else (answer.text, [], [])
        metadata = {"model_name": self.model_name, "model_provider": "recollect", "finish_reason": answer.finish_reason}
        message = AIMessage(
            content=content,
            tool_calls=calls,
            invalid_tool_calls=invalid,
            response_metadata=metadata,
            usage_metadata=UsageMetadata(
                input_tokens=answer.prompt_tokens,
                output_tokens=answer.completion_tokens,
                total_tokens=answer.prompt_tokens + answer.completion_tokens,
            ),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    # ---- tools and structure -------------------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Offer tools; the answer is then text or one tool call.

        `tool_choice`: None or "auto" (text or a call), "any", "required" or True (a call), "none" (text), or a name.
        """
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], tool_choice=tool_choice, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers as `schema` (a pydantic class gives its instances, anything else dicts).

        "json_schema" and "json_mode" constrain the answer itself, "function_calling" goes through a tool call.
        With `include_raw` the answer is {"raw", "parsed", "parsing_error"} and nothing is raised.
        """
        if method == "function_calling":
            return super().with_structured_output(schema, include_raw=include_raw, **kwargs)
        if method not in ("json_schema", "json_mode"):
            raise ConfigError(f"method must be 'json_schema', 'function_calling' or 'json_mode', got {method!r}")
        if kwargs:
            raise ConfigError(f"unknown argument {sorted(kwargs)[0]!r} of with_structured_output")
        json_schema = convert_to_json_schema(schema)
        model = self.bind(
            response_schema=canonical_json(plain_schema(json_schema)),
            ls_structured_output_format={"kwargs": {"method": method}, "schema": json_schema},
        )
        is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
        parser: Any = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()  # type: ignore[arg-type]
        if not include_raw:
            return model | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        unparsed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | parsed.with_fallbacks([unparsed], exception_key="parsing_error")


class RecollectEmbeddings(Embeddings):
    """LangChain embeddings over anything with `embed(texts)`: a backbone, an embedder, or a model string ("minilm")."""

    def __init__(self, embedder: Any = "minilm") -> None:
        self._embedder = embedder
        self._lock = threading.Lock()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One unit vector per text, in order."""
        with self._lock:
            if isinstance(self._embedder, str):
                from recollect.backbones.resolve import open_embedder

                self._embedder = open_embedder(self._embedder)
            return self._embedder.embed(texts).tolist() if texts else []

    def embed_query(self, text: str) -> list[float]:
        """The same vector a document of this text has."""
        return self.embed_documents([text])[0]


def _as_chunk(result: ChatResult) -> ChatGenerationChunk:
    """A whole answer as the only chunk of a stream."""
    message = cast(AIMessage, result.generations[0].message)
    calls = [
        {
            "name": call["name"],
            "args": json.dumps(call["args"]),
            "id": call["id"],
            "index": index,
            "type": "tool_call_chunk",
        }
        for index, call in enumerate(message.tool_calls)
    ]
    return ChatGenerationChunk(
        message=AIMessageChunk(
            content=message.content,
            tool_call_chunks=calls,  # type: ignore[arg-type]
            response_metadata=message.response_metadata,
            usage_metadata=message.usage_metadata,
            chunk_position="last",
        )
    )
