"""A backbone that does what it is told: fills any JSON schema from the question, so that tool tests have a model."""

import json
import re

from recollect.backbones.protocol import Request
from recollect.backbones.scripted import ScriptedBackbone


def fill(schema: dict, question: str):
    """The simplest value of `schema`: numbers and quoted text are taken from the question."""
    if "anyOf" in schema:
        return fill(schema["anyOf"][0], question)
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            return {name: fill(part, question) for name, part in schema.get("properties", {}).items()}
        case "array":
            return [fill(schema.get("items", {}), question)]
        case "integer" | "number":
            numbers = re.findall(r"-?\d+", question)
            return int(numbers[0]) if numbers else 0
        case "boolean":
            return True
        case "null":
            return None
    quoted = re.findall(r"'([^']+)'", question)
    return quoted[0] if quoted else "cats"


def answer(request: Request) -> str:
    question = request.messages[-1].content
    if not request.schema:
        return f"You said: {question[:40]} and I answer with a few words."
    schema = json.loads(request.schema)
    is_after_tool = "of tool " in question
    for shape in schema.get("anyOf", []):
        if is_after_tool and "answer" in shape.get("properties", {}):
            return json.dumps({"answer": "The tool says so."})
    return json.dumps(fill(schema, question), ensure_ascii=False)


def tool_following_backbone() -> ScriptedBackbone:
    return ScriptedBackbone(answer, name="tool-following")
