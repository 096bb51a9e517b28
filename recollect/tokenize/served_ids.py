"""Semantic IDs from a model server: answers that can only be an item's ID, and beams over valid IDs.

Three ways, by what the server can do:

* `id_schema`: a JSON schema for `Request.schema`, obeyed by every backbone here and by OpenAI-compatible servers
  (`response_format`). The answer is `{"item": "<a_1><b_2>"}`; `read_answer` reads it.
* `vllm_fields`: vLLM's own request fields. `structured_outputs.choice` confines the *text* to the catalogue; with a
  vocabulary, `allowed_token_ids` confines the *tokens* to those of the codes, so that `<a_1>` cannot be spelt letter by
  letter. Together they are the prefix tree. Checked with vLLM 0.32: its server ignores both under `use_beam_search`.
* `score_beams`: beam search on this side over exact scores (`Backbone.score`), for any backbone and any catalogue.

The first two send the whole catalogue with every request and have the server compile it: 0.05 s for 500 IDs, 0.25 s
for 5,000, 21 s for 11,700 (xgrammar 0.2.8, one core [measured]); beyond `MAX_LISTED` they are refused. OpenAI's own
service stops at `OPENAI_ENUM` values.
Not covered: sampling without replacement on the server; grammars of a part of the catalogue per request.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recollect.backbones.protocol import Backbone, Chat, Scoring
from recollect.errors import InputError, MalformedOutput
from recollect.io import canonical_json
from recollect.tokenize.constrained import Beams
from recollect.tokenize.groups import tuple_ids
from recollect.tokenize.text_form import codes_of, texts_of, token_text
from recollect.tokenize.trie import PrefixTrie
from recollect.tokenize.vocabulary import SemanticVocabulary
from recollect.types import SemanticIDs

MAX_LISTED = 5_000
OPENAI_ENUM = 1_000
VLLM_ALLOWED_TOKENS = 1_024  # of one request; vLLM's bound on GPUs

_FIELD = "item"


def listed_ids(ids: SemanticIDs) -> list[str]:
    """The distinct IDs as text, in lexicographic order of their codes.

    Raises:
        InputError: more than `MAX_LISTED`.
    """
    numbers = tuple_ids(ids.codes)
    n_ids = int(numbers.max(initial=-1)) + 1
    if n_ids > MAX_LISTED:
        raise InputError(
            f"{n_ids} semantic IDs are too many to send with every request (at most {MAX_LISTED}); "
            "use score_beams, or generate in process with TrieLogitsProcessor"
        )
    first = np.unique(numbers, return_index=True)[1]
    return texts_of(ids.codes[first]).tolist()


def id_schema(ids: SemanticIDs) -> str:
    """The JSON schema of an answer that names one ID, as `Request.schema` takes it.

    Raises:
        InputError: the catalogue is too large (see `listed_ids`).
    """
    schema = {
        "type": "object",
        "properties": {_FIELD: {"enum": listed_ids(ids)}},
        "required": [_FIELD],
        "additionalProperties": False,
    }
    return canonical_json(schema)


def read_answer(text: str) -> tuple[int, ...]:
    """The codes in an answer to `id_schema` (or in the bare text of an ID).

    Raises:
        MalformedOutput: it is neither; a server that ignored the schema, or an answer that was cut.
    """
    found = text.strip()
    try:
        if not found.startswith("<"):
            found = json.loads(found)[_FIELD]
        return codes_of(found)
    except (ValueError, KeyError, TypeError, InputError) as error:
        raise MalformedOutput(f"the answer is not a semantic ID: {text[:80]!r}") from error


def vllm_fields(ids: SemanticIDs, vocabulary: SemanticVocabulary | None = None) -> dict[str, Any]:
    """Fields to merge into the body of vLLM's `/v1/chat/completions` or `/v1/completions`.

    Args:
        ids: the catalogue.
        vocabulary: of the served model, where it has the tokens (`vocabulary.add_to`); without it the same texts come
            out of ordinary tokens.

    Raises:
        InputError: the catalogue is too large, or its codes in use are more tokens than a request may allow; a
            vocabulary of other codebooks than the catalogue's.
    """
    if vocabulary is not None:
        vocabulary.check_sizes(ids.codebook_sizes)
    fields: dict[str, Any] = {
        "structured_outputs": {"choice": listed_ids(ids)},
        "max_tokens": ids.n_levels + 1 if vocabulary is not None else 16 * ids.n_levels,
    }
    if vocabulary is not None:
        allowed = {vocabulary.end_token}
        for tokens, codes in zip(vocabulary.token_ids, ids.codes.T, strict=True):
            allowed.update(tokens[codes[codes >= 0]].tolist())
        if len(allowed) > VLLM_ALLOWED_TOKENS:
            raise InputError(
                f"{len(allowed)} tokens are in use where a request may allow {VLLM_ALLOWED_TOKENS}; leave `vocabulary` "
                "out (the text is confined all the same) or use score_beams"
            )
        fields["allowed_token_ids"] = sorted(allowed)
    return fields


def score_beams(backbone: Backbone, chats: Sequence[Chat], trie: PrefixTrie, n_beams: int) -> Beams:
    """Beam search for the ID that answers each chat, over the backbone's exact scores of the IDs' text.

    Step by step every legal continuation of every beam is scored behind the chat, so no ID outside the tree can come
    up and no structured output is needed. A score is the log-probability (nats) of the ID's text as the assistant's
    answer, the end of the answer not included. Ties go to the smaller ID. Costs, per chat, the tree's first codes plus
    n_beams times the children per node at each further level; shared prefixes are computed once.

    Args:
        backbone: any; a model with the tokens of the codes reads one token per code.
        chats: one per request.
        trie: of the catalogue.
        n_beams: width; as wide as the catalogue has IDs it is exhaustive.

    Raises:
        InputError: n_beams < 1, or IDs of different lengths, whose scores do not compare without their end.
        BackboneError: as `Backbone.score`.
    """
    if n_beams < 1:
        raise InputError(f"n_beams must be at least 1, got {n_beams!r}")
    if trie.has_short_ids:
        raise InputError("score_beams needs IDs of one length; resolve collisions with another strategy")
    nodes = [trie.roots(1) for _ in chats]
    texts: list[list[str]] = [[""] for _ in chats]
    totals = [torch.zeros(1) for _ in chats]
    for depth in range(trie.n_levels):
        scorings = []
        for request, chat in enumerate(chats):
            edges = trie.step(depth, nodes[request])
            rows, codes = edges.row.tolist(), edges.code.tolist()
            texts[request] = [
                texts[request][row] + token_text(depth, code) for row, code in zip(rows, codes, strict=True)
            ]
            nodes[request] = edges.child
            scorings.append(Scoring(chat, tuple(texts[request]), site="semantic-ids"))
        for request, scored in enumerate(backbone.score(scorings)):
            found = torch.tensor(scored.log_probs, dtype=torch.float32)
            kept = found.sort(descending=True, stable=True).indices[:n_beams]
            if depth + 1 < trie.n_levels:
                kept = kept.sort().values  # ascending nodes, so that equal scores keep the order of the IDs
            totals[request] = found[kept]
            nodes[request] = nodes[request][kept]
            texts[request] = [texts[request][at] for at in kept.tolist()]
    return _padded(nodes, totals, trie, n_beams)


def _padded(nodes: list[torch.Tensor], totals: list[torch.Tensor], trie: PrefixTrie, n_beams: int) -> Beams:
    leaves = torch.full((len(nodes), n_beams), -1, dtype=torch.int64)
    scores = torch.full((len(nodes), n_beams), -torch.inf)
    for request, (found, total) in enumerate(zip(nodes, totals, strict=True)):
        leaves[request, : len(found)] = found
        scores[request, : len(found)] = total
    codes = trie.codes_at(trie.n_levels, leaves.clamp(min=0).flatten()).view(*leaves.shape, -1)
    return Beams(leaves, codes.masked_fill(leaves[..., None] < 0, -1), scores)
