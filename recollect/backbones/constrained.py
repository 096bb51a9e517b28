"""JSON-schema-constrained generation: which tokens may come next, and which must.

Built on `llguidance`. Compact JSON (no free blanks), because a small model left free to indent never stops. What comes
out is legal for the grammar, not for the world: callers still validate values, and an answer cut at `max_tokens` is
incomplete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class JsonConstraints:
    """Compiles schemas for one tokenizer; the vocabulary is analysed once, at the first schema (about a second)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, n_vocabulary: int, end_tokens: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._n_vocabulary = n_vocabulary
        self._end_tokens = end_tokens
        self._wrapped: Any = None
        self._grammars: dict[str, str] = {}

    def start(self, schema: str) -> Constraint:
        """A fresh matcher for a schema given as JSON text.

        Raises:
            InputError: the schema is not JSON, or uses what `llguidance` cannot enforce; the message says what.
        """
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        if self._wrapped is None:
            self._wrapped = from_tokenizer(
                self._tokenizer, n_vocab=self._n_vocabulary, eos_token=list(self._end_tokens)
            )
        if schema not in self._grammars:
            try:
                grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
            except ValueError as error:
                raise InputError(f"not a JSON schema: {schema[:200]!r}: {error}") from error
            problem = LLMatcher.validate_grammar(grammar, self._wrapped)
            if problem and not problem.startswith("WARNING"):
                raise InputError(f"JSON schema {schema[:200]!r} cannot be enforced: {problem}")
            self._grammars[schema] = grammar
        return Constraint(LLMatcher(self._wrapped, self._grammars[schema]), self._n_vocabulary)


class Constraint:
    """The state of one constrained answer."""

    def __init__(self, matcher: Any, n_vocabulary: int) -> None:
        self._matcher = matcher
        self._n_vocabulary = n_vocabulary

    def allowed(self) -> np.ndarray:
        """(V,) bool: tokens that may come next; the end token only where the JSON is complete."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: self._n_vocabulary].astype(bool)
        if len(allowed) < self._n_vocabulary:  # vocabularies padded beyond the tokenizer's
            allowed = np.pad(allowed, (0, self._n_vocabulary - len(allowed)))
        return allowed

    def accept(self, token: int) -> list[int]:
        """Take a sampled token; returns the tokens that the grammar forces after it (already taken)."""
        if not self._matcher.consume_token(token):
            raise InputError(f"the JSON constraint refused its own token: {self._matcher.get_error()}")
        forced: list[int] = []
        while ahead := self._matcher.compute_ff_tokens():
            taken = self._matcher.try_consume_tokens(ahead)
            forced += ahead[:taken]
            if taken < len(ahead):
                break
        return forced

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())
