"""LangChain messages and tools as our chats and JSON schemas, and back. Pure functions; imported by `langchain`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
)
from langchain_core.utils.json_schema import dereference_refs

from recollect.backbones.protocol import Chat, Message, Role
from recollect.errors import ConfigError, InputError
from recollect.io import canonical_json, sha256_text

ToolChoice = Literal["auto", "any", "none"]


def chat_of(messages: Sequence[BaseMessage]) -> Chat:
    """LangChain messages as a chat; neighbours of one role are joined, for many templates refuse two in a row.

    Tool calls and tool results become text, as no protocol of ours carries them.

    Raises:
        InputError: a message has a part that is not text.
    """
    chat: list[Message] = []
    for message in messages:
        role, text = _role_and_text(message)
        if chat and chat[-1].role == role:
            chat[-1] = Message(role, f"{chat[-1].content}\n\n{text}")
        else:
            chat.append(Message(role, text))
    return tuple(chat)


def _role_and_text(message: BaseMessage) -> tuple[Role, str]:
    text = _text_of(message)
    if isinstance(message, SystemMessage):
        return "system", text
    if isinstance(message, AIMessage):
        calls = [canonical_json({"name": call["name"], "arguments": call["args"]}) for call in message.tool_calls]
        return "assistant", "\n".join(part for part in (text, *calls) if part)
    if isinstance(message, ToolMessage):
        outcome = "Error" if message.status == "error" else "Result"
        return "user", f"{outcome} of tool {message.name or message.tool_call_id}: {text}"
    if isinstance(message, HumanMessage):
        return "user", text
    raise InputError(f"message of type {message.type!r} is not supported; use system, human, ai or tool messages")


def _text_of(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    parts = []
    for block in message.content:
        kind = "text" if isinstance(block, str) else block.get("type")
        if kind == "text":
            parts.append(block if isinstance(block, str) else block["text"])
        elif not (isinstance(message, AIMessage) and kind in ("tool_use", "tool_call", "thinking", "reasoning")):
            raise InputError(f"a {message.type} message holds a part of type {kind!r}; backbones read text only")
    return "\n".join(parts)


def tools_in_force(given: dict[str, Any]) -> tuple[list[dict[str, Any]], ToolChoice]:
    """The tools the model may call here (their functions) and whether it has to."""
    functions = [tool["function"] for tool in given.get("tools") or []]
    choice = given.get("tool_choice")
    if isinstance(choice, dict):
        choice = choice.get("function", choice).get("name")
    if choice == "none" or not functions:
        return [], "none"
    if choice in (None, False, "auto"):
        return functions, "auto"
    if choice in (True, "any", "required"):
        return functions, "any"
    named = [function for function in functions if function["name"] == choice]
    if not named:
        names = ", ".join(sorted(function["name"] for function in functions))
        raise ConfigError(f"tool_choice {choice!r} is none of the tools bound: {names}")
    return named, "any"


def plain_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without references, so that it can be placed inside another."""
    resolved = dereference_refs(schema) if "$defs" in schema or "definitions" in schema else schema
    return {key: value for key, value in resolved.items() if key not in ("$defs", "definitions")}


def tool_call_schema(functions: Sequence[dict[str, Any]], choice: ToolChoice) -> dict[str, Any]:
    """JSON schema of one call to one of `functions`, or (choice "auto") of a text answer."""
    shapes = [
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [function["name"]]},
                "arguments": plain_schema(function.get("parameters") or {"type": "object", "properties": {}}),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    if choice == "auto":
        answer = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
        shapes.append(answer | {"additionalProperties": False})
    return shapes[0] if len(shapes) == 1 else {"anyOf": shapes}


def tool_instructions(functions: Sequence[dict[str, Any]], choice: ToolChoice) -> str:
    lines = [canonical_json(function) for function in functions]
    call = 'To use a tool, answer with JSON {"name": "<tool>", "arguments": {...}}.'
    other = ' Otherwise answer with JSON {"answer": "<text>"}.' if choice == "auto" else ""
    return "You can use these tools:\n" + "\n".join(lines) + f"\n{call}{other}"


def read_tool_answer(
    text: str, functions: Sequence[dict[str, Any]]
) -> tuple[str, list[ToolCall], list[InvalidToolCall]]:
    """(content, tool calls, invalid tool calls) of an answer to `tool_call_schema`; at most one call.

    Total: text that is neither an answer nor a call of a known tool becomes an invalid call that says why.
    """
    identity = f"call_{sha256_text(text)[:24]}"
    try:
        value = json.loads(text, strict=False)
        if isinstance(value, dict) and isinstance(value.get("answer"), str) and "name" not in value:
            return value["answer"], [], []
        name, arguments = value["name"], value["arguments"]
        if name not in {function["name"] for function in functions} or not isinstance(arguments, dict):
            raise ValueError(f"no tool {name!r} with these arguments")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        return text, [], [InvalidToolCall(name=None, args=text, id=identity, error=reason, type="invalid_tool_call")]
    return "", [ToolCall(name=name, args=arguments, id=identity, type="tool_call")], []
