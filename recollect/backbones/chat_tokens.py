"""Chats to token ids, such that no text inside a message can become structure.

The model's own template is rendered once per tuple of roles with placeholders for the contents. Control tokens are
recognised in the template's text only; every run of plain text between two of them (template and contents joined) is
then tokenised by a copy of the tokenizer that knows no control token. For harmless text the ids are exactly those of
`apply_chat_template`; a message that holds `<|im_start|>` yields its letters.
Not covered: tools, images, and templates that compute with the contents beyond trimming them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from recollect.backbones.plain_tokens import PlainTokenizer
from recollect.backbones.protocol import Chat
from recollect.errors import InputError, ModelFileError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PLACEHOLDER = re.compile("( ?)\ue000(\\d+)\ue001( ?)")
# Templates that print today's date or think aloud take these; the others ignore them. Fixed, so that a prompt
# depends on its messages alone.
_TEMPLATE_VALUES: dict[str, Any] = {"date_string": "26 Jul 2024", "enable_thinking": False}


class ChatTokenizer:
    """Turns chats and texts into token ids with a Hugging Face fast tokenizer.

    Raises:
        ModelFileError: the tokenizer has no chat template, or is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._text = PlainTokenizer(tokenizer)
        if not tokenizer.chat_template:
            raise ModelFileError("the model has no chat template; use an instruction-tuned model or add the template")
        self.tokenizer = tokenizer
        self.control_ids = self._text.control_ids
        self.control_tokens = self._text.control_tokens
        self._skeletons: dict[tuple[str, ...], list[str | tuple[int, bool, bool]]] = {}

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text (a continuation, a piece of a message): never a control token."""
        return self._text.encode(text)

    def encode_chat(self, messages: Chat) -> list[int]:
        """Token ids of a chat, up to where the assistant's answer begins.

        Raises:
            InputError: the model's template refuses these roles or leaves a message out.
        """
        roles = tuple(message.role for message in messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._skeleton(roles)
        ids: list[int] = []
        run = ""
        for part in self._skeletons[roles]:
            if isinstance(part, tuple):
                index, keeps_left, keeps_right = part
                content = messages[index].content
                content = content if keeps_left else content.lstrip()
                run += content if keeps_right else content.rstrip()
            elif part in self.control_ids:
                ids += self.encode_text(run) if run else []
                ids.append(self.control_ids[part])
                run = ""
            else:
                run += part
        return ids + (self.encode_text(run) if run else [])

    def _skeleton(self, roles: tuple[str, ...]) -> list[str | tuple[int, bool, bool]]:
        """The rendered template as control tokens, texts and slots (message, keeps left blanks, keeps right blanks)."""
        from jinja2.exceptions import TemplateError

        marked = [{"role": role, "content": f" \ue000{index}\ue001 "} for index, role in enumerate(roles)]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                marked, tokenize=False, add_generation_prompt=True, **_TEMPLATE_VALUES
            )
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses the roles {roles!r}: {error}") from error
        parts: list[str | tuple[int, bool, bool]] = []
        at = 0
        for match in _PLACEHOLDER.finditer(text):
            parts += self._text.split(text[at : match.start()])
            parts.append((int(match[2]), bool(match[1]), bool(match[3])))
            at = match.end()
        parts += self._text.split(text[at:])
        slots = [part[0] for part in parts if isinstance(part, tuple)]
        if slots != list(range(len(roles))):
            raise InputError(f"the model's chat template drops or moves messages for the roles {roles!r}: {slots!r}")
        return parts
