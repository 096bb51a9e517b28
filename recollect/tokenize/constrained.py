"""Decoding that can only end in an item: the prefix tree as a mask of a `generate` call, and as a beam search.

`TrieLogitsProcessor` goes into `model.generate(..., logits_processor=[...])` of any transformers model. It keeps no
state: the node of every beam is found again from the tokens written so far, so beams may be re-ordered at will.
`beam_search` is the search itself over any `Decoder`; it looks at the children of live nodes alone, where a mask
touches the whole vocabulary.

Scores are log-softmax over the full vocabulary, summed over the ID's tokens: the model's joint probability of the ID.
With `renormalise` each step is divided by the mass of the legal continuations; the two orders differ, never mix them.
Ties go to the smaller ID, then to the smaller item row. Where IDs differ in length (an absent last digit), the end
token that closes a short one is scored; where all have L codes no end token is.
Not covered: sampling without replacement, lazy or diffusion decoders.
Source: generative_recommendation 3.1-3.2.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from recollect.errors import InputError
from recollect.tokenize.trie import PrefixTrie
from recollect.tokenize.vocabulary import SemanticVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DENSE_BYTES = 2**25
"""Largest table with a row per node of a depth that a logits processor makes; deeper depths are searched."""
HUGE_PAGES_FROM = 2**22  # bytes: NumPy asks for huge pages from here on


class _TokenTables:
    """Code <-> token id per level, as tensors; the end token is code -1."""

    def __init__(self, trie: PrefixTrie, vocabulary: SemanticVocabulary) -> None:
        vocabulary.check_sizes(trie.codebook_sizes)
        self.end = vocabulary.end_token
        self.tokens = []  # per level (K + 1,): the end token, then the tokens of the codes
        self.codes = []  # per level (largest token + 2,): code of each token, -2 = none of this level
        largest = max(self.end, *(int(ids.max(initial=0)) for ids in vocabulary.token_ids))
        for ids in vocabulary.token_ids:
            tokens = torch.tensor([self.end, *ids.tolist()], dtype=torch.int64)
            codes = torch.full((largest + 2,), -2, dtype=torch.int64)
            codes[tokens] = torch.arange(-1, len(ids))
            self.tokens.append(tokens.to(trie.device))
            self.codes.append(codes.to(trie.device))

    def token_of(self, level: int, codes: torch.Tensor) -> torch.Tensor:
        """Token ids of codes >= -1 (code -2, no edge, gives some legal index)."""
        return self.tokens[level][(codes + 1).clamp(min=0)]


class _DepthTables:
    """What may follow the nodes of one depth, looked up by place = node + 1; place 0 is off the tree.

    columns: of this level's tokens in the vocabulary, a slice where they are neighbours.
    forbidden: (nodes + 1, K + 1) bool, the end token first; off the tree it alone is allowed.
    edges: (largest token + 2,) int32, code + 2 of every token, 1 for the end token, 0 for none of this level's.
    places: ((nodes + 1) (K + 2),) int32, the place every edge of every place leads to.
    forbidden and places are None where one would have more than `DENSE_BYTES`.
    """

    def __init__(self, trie: PrefixTrie, tables: _TokenTables, depth: int) -> None:
        tokens = tables.tokens[depth][1:]
        first, n_codes, n_nodes = int(tokens[0]), len(tokens), trie.n_nodes[depth]
        is_run = bool((tokens == torch.arange(first, first + n_codes, device=tokens.device)).all())
        self.columns = slice(first, first + n_codes) if is_run else tokens
        self.n_edges = n_codes + 2
        self.edges = (tables.codes[depth] + 2).int()
        self.forbidden, self.places = None, None
        nodes = torch.arange(n_nodes, device=trie.device)
        if (n_nodes + 1) * (n_codes + 1) <= DENSE_BYTES:
            self.forbidden = _forbidden(trie, depth, torch.cat([nodes.new_full((1,), -1), nodes]))
        if depth + 1 < trie.n_levels and 4 * (n_nodes + 1) * self.n_edges <= DENSE_BYTES:
            leads = trie.step(depth, nodes)
            self.places = torch.zeros((n_nodes + 1) * self.n_edges, dtype=torch.int32, device=trie.device)
            self.places[(leads.row + 1) * self.n_edges + leads.code + 2] = (leads.child + 1).int()


def _forbidden(trie: PrefixTrie, depth: int, nodes: torch.Tensor) -> torch.Tensor:
    """(B, K + 1) bool: whether the end token and each code may not follow `nodes` (B,); -1 is followed by the end."""
    edges = trie.step(depth, nodes)
    forbidden = torch.ones(len(nodes), trie.codebook_sizes[depth] + 1, dtype=torch.bool, device=nodes.device)
    forbidden[edges.row, edges.code + 1] = False
    forbidden[:, 0] &= nodes >= 0
    return forbidden


def _nothing_allowed(scores: torch.Tensor) -> torch.Tensor:
    """-inf in the form of `scores`.

    Large results on the CPU are NumPy's memory, which comes in huge pages where the system has them: the first touch
    of ordinary pages costs more than everything else a step does.
    """
    if scores.device.type == "cpu" and scores.nbytes >= HUGE_PAGES_FROM:
        memory = torch.from_numpy(np.empty(scores.nbytes, dtype=np.uint8))
        return memory.view(scores.dtype).view(scores.shape).fill_(-torch.inf)
    return torch.full_like(scores, -torch.inf)


class TrieLogitsProcessor:
    """Sets to -inf every token that no item's ID continues with; after a full ID only the end token is left.

    Rows that left the tree (finished rows being padded, and beams without any legal continuation, whose score is -inf
    already) may write the end token alone. Depths with few nodes are looked up in tables (`DENSE_BYTES`: 17 MB in all
    for 1e6 items on three levels of 256), the others in the tree itself.

    Args:
        trie: of the catalogue, on the device of the logits.
        vocabulary: the token of every code, and the end token (the model's `eos_token_id`).
        prompt_length: tokens before the first generated one: `input_ids.shape[1]` of a decoder-only model, 1 (the
            start token) of an encoder-decoder.
    """

    def __init__(self, trie: PrefixTrie, vocabulary: SemanticVocabulary, prompt_length: int) -> None:
        self._trie = trie
        self._end = vocabulary.end_token
        tables = _TokenTables(trie, vocabulary)
        self._depths = [_DepthTables(trie, tables, depth) for depth in range(trie.n_levels)]
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` (B, V) with -inf at illegal tokens, given `input_ids` (B, prompt + t)."""
        written = input_ids[:, self._prompt_length :]
        masked, depth, end = _nothing_allowed(scores), written.shape[1], self._end
        if depth >= self._trie.n_levels:
            masked[:, end] = scores[:, end]
            return masked
        tables, places = self._depths[depth], self._places(written)
        if tables.forbidden is not None:
            forbidden = tables.forbidden.index_select(0, places)
        else:
            forbidden = _forbidden(self._trie, depth, places.long() - 1)
        masked[:, tables.columns] = scores[:, tables.columns].masked_fill(forbidden[:, 1:], -torch.inf)
        masked[:, end] = scores[:, end].masked_fill(forbidden[:, 0], -torch.inf)
        return masked

    def _places(self, written: torch.Tensor) -> torch.Tensor:
        """(B,) int32 places the tokens `written` (B, l < L) lead to."""
        places = torch.ones(len(written), dtype=torch.int32, device=written.device)
        for level in range(written.shape[1]):
            tables = self._depths[level]
            edge = tables.edges.index_select(0, written[:, level].clamp(max=len(tables.edges) - 1))
            if tables.places is not None:
                places = tables.places.index_select(0, edge.add(places, alpha=tables.n_edges))
            else:
                places = self._trie.advance(level, places.long() - 1, edge.long() - 2).int() + 1
        return places


class Decoder(Protocol):
    """What a beam search asks of a model: logits (rows, V) of the next token, any float dtype."""

    def start(self) -> torch.Tensor:
        """Logits (B, V) of the first token, one row per request."""
        ...

    def advance(self, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) after row `parents[r]` of the call before has written `tokens[r]`; both (R,) int64."""
        ...


@dataclass(frozen=True)
class Beams:
    """The IDs found per request, best first.

    leaves: (B, b) int64 nodes of the tree's last depth, -1 where fewer than b IDs exist.  codes: (B, b, L) int64.
    scores: (B, b) float32 log-probability in nats, -inf where there is no ID.
    """

    leaves: torch.Tensor
    codes: torch.Tensor
    scores: torch.Tensor


def beam_search(
    decoder: Decoder,
    trie: PrefixTrie,
    vocabulary: SemanticVocabulary,
    n_beams: int,
    *,
    renormalise: bool = False,
    allowed: torch.Tensor | None = None,
) -> Beams:
    """The `n_beams` IDs a beam of that width finds; every one of them is the ID of an item.

    Args:
        decoder: of B requests.
        trie: on the decoder's device.
        vocabulary: the token of every code.
        n_beams: width; as wide as the catalogue has IDs it is exhaustive.
        renormalise: scores conditional on the legal continuations, step by step.
        allowed: (B, N) bool, the items each request may get; equal to a tree of those items alone.

    Raises:
        InputError: n_beams < 1, or a vocabulary of other codebooks than the tree's.
    """
    if n_beams < 1:
        raise InputError(f"n_beams must be at least 1, got {n_beams!r}")
    tables = _TokenTables(trie, vocabulary)
    is_open = None if allowed is None else trie.open_nodes(allowed)
    logits = decoder.start()
    n_requests = len(logits)
    nodes = trie.roots(n_requests)[:, None]  # (B, b), ascending, so that equal scores keep the order of the IDs
    totals = torch.zeros(n_requests, 1, device=nodes.device)
    has_ended = torch.zeros(n_requests, 1, dtype=torch.bool, device=nodes.device)
    for depth in range(trie.n_levels):
        width = nodes.shape[1]
        child, code = trie.children(depth, nodes.flatten())  # (B b, C)
        token = tables.token_of(depth, code)
        logits = logits.float()
        step = logits.gather(1, token) - logits.logsumexp(dim=1, keepdim=True)
        step = torch.where(has_ended.view(-1, 1), 0.0, step)  # the end was scored when it was written
        is_legal = child >= 0
        if is_open is not None:
            request = torch.arange(n_requests, device=nodes.device).repeat_interleave(width)[:, None]
            is_legal &= is_open[depth + 1][request, child.clamp(min=0)]
        step = step.masked_fill(~is_legal, -torch.inf)
        if renormalise:
            mass = step.logsumexp(dim=1, keepdim=True)
            step = torch.where(mass > -torch.inf, step - mass, step)
        candidates = (totals.view(-1, 1) + step).view(n_requests, -1)  # (B, b C)
        totals, place = candidates.sort(dim=1, descending=True, stable=True)
        totals, place = totals[:, :n_beams], place[:, :n_beams]
        nodes = child.view(n_requests, -1).gather(1, place).masked_fill(totals == -torch.inf, -1)
        nodes, order = nodes.sort(dim=1, stable=True)
        totals, place = totals.gather(1, order), place.gather(1, order)
        has_ended = code.view(n_requests, -1).gather(1, place) == -1
        if depth + 1 < trie.n_levels:
            parents = torch.arange(n_requests, device=nodes.device)[:, None] * width + place // child.shape[1]
            written = token.view(n_requests, -1).gather(1, place)
            logits = decoder.advance(parents.flatten(), written.flatten())
    scores, order = totals.sort(dim=1, descending=True, stable=True)
    missing = (0, n_beams - nodes.shape[1])
    leaves = torch.nn.functional.pad(nodes.gather(1, order), missing, value=-1)
    scores = torch.nn.functional.pad(scores, missing, value=-torch.inf)
    codes = trie.codes_at(trie.n_levels, leaves.clamp(min=0).flatten()).view(*leaves.shape, -1)
    return Beams(leaves, codes.masked_fill(leaves[..., None] < 0, -1), scores)


def ranked_items(
    beams: Beams, trie: PrefixTrie, k: int, *, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `k` items (B, k) int64 of the IDs found and their ID's score (B, k) float32; -1 and -inf where none.

    Items that share an ID share its score and stand in the order of their rows; `allowed` as given to the search.
    """
    n_requests, width = beams.leaves.shape
    slot, item = trie.leaf_items(beams.leaves.flatten())
    request = slot // width
    score = beams.scores.flatten()[slot]
    if allowed is not None:
        is_kept = allowed.to(item.device)[request, item]
        request, item, score = request[is_kept], item[is_kept], score[is_kept]
    order = item.sort(stable=True).indices
    order = order[score[order].sort(stable=True, descending=True).indices]
    order = order[request[order].sort(stable=True).indices]
    request, item, score = request[order], item[order], score[order]
    counts = torch.bincount(request, minlength=n_requests)
    rank = torch.arange(len(item), device=item.device) - (counts.cumsum(0) - counts)[request]
    items = torch.full((n_requests, k), -1, dtype=torch.int64, device=item.device)
    scores = torch.full((n_requests, k), -torch.inf, device=item.device)
    is_listed = rank < k
    items[request[is_listed], rank[is_listed]] = item[is_listed]
    scores[request[is_listed], rank[is_listed]] = score[is_listed]
    return items, scores


class CausalDecoder:
    """A decoder-only transformers model behind prompts (B, T), left-padded where `attention_mask` is 0."""

    def __init__(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> None:
        self._model = model
        self._input_ids = input_ids
        self._mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        known = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in known
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._cache: Any = None

    def start(self) -> torch.Tensor:
        self._cache = None
        return self._read(self._input_ids, (self._mask.cumsum(1) - 1).clamp(min=0))

    def advance(self, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        self._cache.reorder_cache(parents)
        self._mask = torch.nn.functional.pad(self._mask[parents], (0, 1), value=1)
        return self._read(tokens[:, None], self._mask.sum(1, keepdim=True) - 1)

    def _read(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        extra = self._last_only | ({"position_ids": positions} if self._takes_positions else {})
        with torch.inference_mode():
            output = self._model(
                input_ids=ids, attention_mask=self._mask, past_key_values=self._cache, use_cache=True, **extra
            )
        self._cache = output.past_key_values
        return output.logits[:, -1]


class Seq2SeqDecoder:
    """An encoder-decoder transformers model behind encoder inputs (B, T), padded where `attention_mask` is 0."""

    def __init__(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> None:
        self._model = model
        self._mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with torch.inference_mode():
            self._encoded = model.get_encoder()(input_ids=input_ids, attention_mask=self._mask).last_hidden_state
        start = model.config.decoder_start_token_id
        if start is None:
            raise InputError(f"{type(model).__name__} has no decoder_start_token_id in its config; set it")
        self._start_ids = torch.full((len(input_ids), 1), int(start), dtype=torch.int64, device=input_ids.device)
        self._cache: Any = None

    def start(self) -> torch.Tensor:
        self._cache = None
        return self._read(self._start_ids)

    def advance(self, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        self._cache.reorder_cache(parents)
        self._encoded, self._mask = self._encoded[parents], self._mask[parents]
        return self._read(tokens[:, None])

    def _read(self, ids: torch.Tensor) -> torch.Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        with torch.inference_mode():
            output = self._model(
                encoder_outputs=BaseModelOutput(last_hidden_state=self._encoded),
                attention_mask=self._mask,
                decoder_input_ids=ids,
                past_key_values=self._cache,
                use_cache=True,
            )
        self._cache = output.past_key_values
        return output.logits[:, -1]


def decoder_of(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> CausalDecoder | Seq2SeqDecoder:
    """The decoder of a transformers model, by whether it has an encoder."""
    kind = Seq2SeqDecoder if model.config.is_encoder_decoder else CausalDecoder
    return kind(model, input_ids, attention_mask)
