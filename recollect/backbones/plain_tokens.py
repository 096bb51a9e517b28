"""Text to token ids such that no text can become structure.

A copy of the tokenizer that knows no control token reads the text, so `<|im_end|>` in a message, a transcript or a line
of code yields its letters.
Not covered: chats; see `recollect.backbones.chat_tokens`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from recollect.errors import InputError, ModelFileError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PlainTokenizer:
    """Turns text into token ids with a Hugging Face fast tokenizer, leaving its control tokens out.

    control_ids: text of each control token and its id.  control_tokens: their texts, sorted.

    Raises:
        ModelFileError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        from tokenizers import Tokenizer

        if not tokenizer.is_fast:
            raise ModelFileError("the model's tokenizer has no tokenizer.json (a fast tokenizer); convert it first")
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
        # What the vocabulary itself writes for a word it lacks is no structure.
        vocabulary = definition["model"]
        unknown = {vocabulary.get("unk_id"), self.control_ids.get(vocabulary.get("unk_token") or "")}
        self._forbidden = frozenset(self.control_ids.values()) - unknown

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: never a control token, nothing put before or after.

        Raises:
            InputError: the text spells a control token whatever it is cut into.
        """
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

    def split(self, text: str) -> list[str]:
        """`text` cut into control tokens and what lies between them, empty pieces left out."""
        parts = self._control.split(text) if self._control is not None else [text]
        return [part for part in parts if part]
