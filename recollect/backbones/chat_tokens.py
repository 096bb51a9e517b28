"""Chats to token ids, such that no text inside a message can become structure.

The model's own template is rendered once per tuple of roles with placeholders for the contents. Control tokens are
recognised in the template's text only; every run of plain text between two of them (template and contents joined) is
then tokenised by a copy of the tokenizer that knows no control token. For harmless text the ids are exactly those of
`apply_chat_template`; a message that holds `<|im_start|>` yields its letters.
Not covered: tools, images, and templates that compute with the contents beyond trimming them.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

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
        from tokenizers import Tokenizer

        if not tokenizer.is_fast:
            raise ModelFileError("the model's tokenizer has no tokenizer.json (a fast tokenizer); convert it first")
        if not tokenizer.chat_template:
            raise ModelFileError("the model has no chat template; use an instruction-tuned model or add the template")
        self.tokenizer = tokenizer
        added: dict[str, Any] = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        for text in tokenizer.all_special_tokens:
            added[text] = tokenizer.convert_tokens_to_ids(text)
        # Some vocabularies list runs of blanks as added tokens; those are text, not structure.
        self.control_ids = {text: index for text, index in added.items() if text.strip("\u2581 \n\t\r")}
        self.control_tokens = tuple(sorted(self.control_ids))
        by_length = sorted(self.control_tokens, key=lambda text: (-len(text), text))
        self._control = re.compile("(" + "|".join(map(re.escape, by_length)) + ")") if by_length else None
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        definition["added_tokens"] = [
            token for token in definition["added_tokens"] if token["content"] not in self.control_ids
        ]
        definition["truncation"] = definition["padding"] = None
        self._plain = Tokenizer.from_str(json.dumps(definition))
        self._forbidden = frozenset(self.control_ids.values())
        self._skeletons: dict[tuple[str, ...], list[str | tuple[int, bool, bool]]] = {}

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text (a continuation, a piece of a message): never a control token."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no bytes; "?" stands for it
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if self._forbidden.isdisjoint(ids) or self._control is None:
            return ids
        # Unigram vocabularies can spell a control token as ordinary text: break each occurrence after one letter.
        broken: list[int] = []
        for part in self._control.split(text):
            for piece in (part[:1], part[1:]) if part in self.control_ids else (part,):
                if piece:
                    broken += self._plain.encode(piece, add_special_tokens=False).ids
        if not self._forbidden.isdisjoint(broken):
            raise InputError(f"text would become a control token of this model: {text[:80]!r}")
        return broken

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
            parts += self._split(text[at : match.start()])
            parts.append((int(match[2]), bool(match[1]), bool(match[3])))
            at = match.end()
        parts += self._split(text[at:])
        slots = [part[0] for part in parts if isinstance(part, tuple)]
        if slots != list(range(len(roles))):
            raise InputError(f"the model's chat template drops or moves messages for the roles {roles!r}: {slots!r}")
        return parts

    def _split(self, text: str) -> list[str]:
        parts = self._control.split(text) if self._control is not None else [text]
        return [part for part in parts if part]
