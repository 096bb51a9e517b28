"""What a fleet serves and can do, each asked once: model identity, tokenisation, scoring, structured outputs.

Probes ask for something whose answer shows whether the field was obeyed; a server that ignores a field is found out
here, never in the results.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from recollect.backbones import scoring, wire
from recollect.backbones.fleet import Fleet, Server
from recollect.backbones.protocol import Chat, Message, Request
from recollect.errors import BackboneConfigError, BackboneError, ServerAway
from recollect.io import canonical_json, sha256_text

Result = TypeVar("Result")
Value = TypeVar("Value")

# Structure of the template families in use (ChatML, Llama 2-4, Mistral, Gemma, Phi, DeepSeek, GPT-OSS, Zephyr); what
# the served template itself writes is added from `/tokenize`.
CONTROL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>",
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<start_of_turn>", "<end_of_turn>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>",
    "<|call|>", "<|begin▁of▁sentence|>", "<|end▁of▁sentence|>", "<|User|>", "<|Assistant|>", "<think>", "</think>",
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<repo_name>", "<file_sep>",
)  # fmt: skip

_CHATS_KEPT = 1024
_TEXTS_KEPT = 16384


class SharedAnswers:
    """The latest `size` answers to questions that always have the same answer, each asked once for all who wait.

    A failure is not kept, and a waiter that is cancelled does not stop the question for the others.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._asked: OrderedDict[Hashable, asyncio.Task[Any]] = OrderedDict()

    async def get(self, key: Hashable, ask: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """The answer under `key`, from `ask()` where it is not known."""
        task = self._asked.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._asked[key] = asyncio.ensure_future(ask())
        self._asked.move_to_end(key)
        while len(self._asked) > self._size:
            self._asked.popitem(last=False)
        return await asyncio.shield(task)


@dataclass(frozen=True)
class Identity:
    """The model as `/v1/models` and `/version` describe it. `parent` is the base model of a served adapter."""

    model: str
    root: str
    parent: str
    max_model_len: int | None
    engine: str
    version: str
    serves_adapters: bool

    @property
    def is_vllm(self) -> bool:
        return self.engine == "vllm"

    @property
    def fingerprint(self) -> str:
        """Name of everything that determines the answers; the address is not part of it."""
        named = [self.model, self.root, self.parent, self.max_model_len, self.engine, self.version]
        return f"server:{self.model}:{sha256_text(canonical_json(named))[:32]}"


class ServedModel:
    """The one model that every server of `fleet` serves.

    Args:
        asked: its served name; None takes the only base model.
    """

    def __init__(self, fleet: Fleet, asked: str | None) -> None:
        self._fleet = fleet
        self._asked = asked
        self._facts = SharedAnswers(8)
        self._chats = SharedAnswers(_CHATS_KEPT)
        self._texts = SharedAnswers(_TEXTS_KEPT)

    async def identity(self) -> Identity:
        """Who answers.

        Raises:
            BackboneConfigError: the model is not served, or two servers differ.
        """
        return await self._facts.get("identity", self._learn_identity)

    async def scoring_ways(self) -> scoring.ScoringWays | None:
        """How to score here; None where the server does not tokenise."""
        return await self._facts.get("scoring", self._learn_scoring_ways)

    async def control_tokens(self) -> tuple[str, ...]:
        """`CONTROL_TOKENS` and whatever bracketed tokens the served template writes."""
        return await self._facts.get("template", self._learn_control_tokens)

    async def require_schema(self) -> None:
        """Make sure structured outputs are obeyed.

        Raises:
            BackboneConfigError: `response_format` is ignored or refused.
        """
        await self._facts.get("schema", self._check_schema)

    async def tokenize_chat(self, messages: Chat) -> list[int]:
        """Token ids of a chat up to where the assistant's answer begins, as the server renders it."""

        async def ask() -> list[int]:
            fields = {"messages": wire.messages_json(messages), "add_generation_prompt": True}
            return await self._tokenize(fields, beginning_of(messages))

        return await self._chats.get(messages, ask)

    async def tokenize_text(self, text: str, affinity: str) -> list[int]:
        """Token ids of a continuation."""

        async def ask() -> list[int]:
            return await self._tokenize({"prompt": wire.sendable(text), "add_special_tokens": False}, affinity)

        return await self._texts.get(text, ask)

    async def _tokenize(self, fields: dict[str, Any], affinity: str) -> list[int]:
        body = await self._tokenize_body(fields)
        return await self._fleet.call("/tokenize", body, lambda value: wire.parse_tokens(value)[0], affinity=affinity)

    async def _tokenize_body(self, fields: dict[str, Any]) -> dict[str, Any]:
        identity = await self.identity()
        if "messages" in fields and identity.is_vllm:
            fields = fields | {"chat_template_kwargs": wire.TEMPLATE_VALUES}
        return {"model": identity.model, **fields}

    # ---- asked once ----------------------------------------------------------------------------------------------

    async def _learn_identity(self) -> Identity:
        found = [await self._describe(server) for server in self._fleet.servers]
        for server, identity in zip(self._fleet.servers, found, strict=True):
            if identity.fingerprint != found[0].fingerprint:
                raise BackboneConfigError(
                    f"{self._fleet.servers[0].api} and {server.api} do not serve the same model: "
                    f"{found[0]!r} and {identity!r}"
                )
        self._fleet.model = found[0].model
        return found[0]

    async def _describe(self, server: Server) -> Identity:
        cards = await self._fleet.call("/v1/models", None, wire.parse_models, only=server)
        names = [str(card["id"]) for card in cards]
        bases = [str(card["id"]) for card in cards if not card.get("parent")]
        model = self._asked or (bases[0] if len(bases) == 1 else "")
        if model not in names:
            asked = f"model {self._asked!r} is not served" if self._asked else "name one of the several models served"
            raise BackboneConfigError(f"{asked} by {server.api}; it serves: {', '.join(sorted(names))}")
        card = cards[names.index(model)]
        version = await self._optional("/version", None, wire.parse_version, only=server)
        length = card.get("max_model_len")
        return Identity(
            model=model,
            root=str(card.get("root") or ""),
            parent=str(card.get("parent") or ""),
            max_model_len=int(length) if length else None,
            engine=str(card.get("owned_by") or ""),
            version=version or "",
            serves_adapters=any(card.get("parent") for card in cards),
        )

    async def _learn_control_tokens(self) -> tuple[str, ...]:
        fields = {"messages": [{"role": "user", "content": "a"}], "return_token_strs": True}
        tokens = await self._optional("/tokenize", await self._tokenize_body(fields), wire.parse_tokens)
        texts = tokens[1] if tokens is not None else []
        found = {text for text in texts if len(text) > 2 and text[0] + text[-1] in ("<>", "[]")}
        return tuple(sorted(found.union(CONTROL_TOKENS)))

    async def _learn_scoring_ways(self) -> scoring.ScoringWays | None:
        identity = await self.identity()
        fields = {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": True}
        tokenised = await self._optional("/tokenize", await self._tokenize_body(fields), wire.parse_tokens)
        if tokenised is None:
            return None
        prompt = tokenised[0]
        wanted = sorted(set(prompt))[:2]
        next_token = await self._optional(
            "/v1/completions",
            wire.next_token_body(identity.model, [prompt], wanted),
            lambda value: wire.parse_next_token(value, 1, wanted),
        )
        can_next = next_token is not None
        if identity.serves_adapters:
            return scoring.ScoringWays(can_next, "")
        body = wire.prompt_log_probs_body(identity.model, [prompt], echo=False)
        parse = wire.prompt_log_probs_parser([prompt], [1], echo=False)
        if await self._optional("/v1/completions", body, parse) is not None:
            return scoring.ScoringWays(can_next, "prompt")
        body = wire.prompt_log_probs_body(identity.model, [prompt], echo=True)
        parse = wire.prompt_log_probs_parser([prompt], [1], echo=True)
        has_echo = await self._optional("/v1/completions", body, parse) is not None
        return scoring.ScoringWays(can_next, "echo" if has_echo else "")

    async def _check_schema(self) -> None:
        identity = await self.identity()
        schema = canonical_json(wire.PROBE_SCHEMA)
        request = Request((Message("user", "Say hello in French."),), max_tokens=64, schema=schema)
        body = wire.chat_body(identity.model, request, is_vllm=identity.is_vllm)
        parse = wire.completion_parser(request)
        if await self._optional("/v1/chat/completions", body, parse) is None:
            raise BackboneConfigError(
                f"{self._fleet.where} ignores or refuses response_format json_schema; "
                "use a server with structured outputs (vLLM >= 0.30) or an in-process model"
            )

    async def _optional(
        self,
        path: str,
        body: dict[str, Any] | None,
        parse: Callable[[Any], Value],
        *,
        only: Server | None = None,
    ) -> Value | None:
        """Ask something a server need not have; None where it refuses or does otherwise, in four answers of four."""
        try:
            return await self._fleet.call(path, body, parse, only=only, is_optional=True)
        except ServerAway:
            raise
        except BackboneError:
            return None


def beginning_of(messages: Chat) -> str:
    """What requests that share a prompt prefix have in common: the first message."""
    return messages[0].content if messages else ""
