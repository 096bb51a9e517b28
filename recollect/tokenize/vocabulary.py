"""Semantic IDs as words of a language model: one new token per (level, code), and where its vector begins.

New vectors keep the geometry of the codebooks: centred codebook vectors are mapped into the embedding space by a
random projection (equal scalar products in expectation) or by a least-squares map fitted on the items' own words, then
shifted and scaled so that the new rows have the mean and the total variance of the model's rows. A head of its own gets
its rows the same way from its own statistics; a tied head shares them. Old rows are not touched, so nothing the model
said before changes.
Source: generative_recommendation 2.2 (levels as single tokens, three initialisations); the projection is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from recollect.errors import ConfigError, InputError
from recollect.rng import stream
from recollect.tokenize.text_form import level_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recollect.types import SemanticIDs

Start = Literal["projection", "least-squares", "mean"]

STARTS: tuple[Start, ...] = ("projection", "least-squares", "mean")
SAMPLED_ROWS = 8192  # rows of the model's matrix from which projection directions are mixed
NOISE = 0.02  # standard deviation of the start "mean"
RIDGE = 1e-2  # of the least-squares map, relative to the mean squared length of the items' vectors
LEVEL_SHARE = 0.5  # of a row's variance: what tells its level, the rest tells its code


@dataclass(frozen=True)
class SemanticVocabulary:
    """The token of every code in some decoder's vocabulary.

    token_ids: per level (K_l,) int64, ids of the codes 0..K_l-1; levels may share ids.  end_token: the id that ends an
    answer.
    """

    token_ids: tuple[np.ndarray, ...]
    end_token: int

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_0..K_{L-1}."""
        return tuple(len(ids) for ids in self.token_ids)

    def check_sizes(self, codebook_sizes: Sequence[int]) -> None:
        """Refuse IDs of other codebooks than this vocabulary has tokens for.

        Args:
            codebook_sizes: K_0..K_{L-1} of the IDs, a collision digit included.

        Raises:
            InputError: another number of levels, or a level of another size.
        """
        if self.codebook_sizes != tuple(codebook_sizes):
            raise InputError(
                f"the vocabulary has tokens for codebooks {self.codebook_sizes}, the IDs are of codebooks "
                f"{tuple(codebook_sizes)}; call add_to(tokenizer, model, …) with these IDs"
            )

    @classmethod
    def consecutive(cls, codebook_sizes: Sequence[int], first: int, end_token: int) -> SemanticVocabulary:
        """Levels one after the other from id `first`, for decoders made for IDs alone."""
        starts = first + np.r_[0, np.cumsum(codebook_sizes)]
        ids = tuple(np.arange(starts[level], starts[level + 1]) for level in range(len(codebook_sizes)))
        return cls(ids, end_token)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, codebook_sizes: Sequence[int]) -> SemanticVocabulary:
        """The tokens a tokenizer already has.

        Raises:
            InputError: one of them is missing, or the tokenizer has no end token.
        """
        known = tokenizer.get_vocab()
        ids = []
        for tokens in level_tokens(codebook_sizes):
            missing = [token for token in tokens if token not in known]
            if missing:
                raise InputError(f"the tokenizer has no token {missing[0]!r}; call add_to(tokenizer, model, …) first")
            ids.append(np.array([known[token] for token in tokens], dtype=np.int64))
        return cls(tuple(ids), _end_token(tokenizer))


def add_to(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    ids: SemanticIDs,
    codebooks: Sequence[np.ndarray | None] | None = None,
    *,
    start: Start = "projection",
    item_texts: Sequence[str] | None = None,
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
) -> SemanticVocabulary:
    """Teach a model's tokenizer and matrices the tokens of every code, in place.

    Calling it again changes nothing: rows of tokens that were there are left as they are. `save_pretrained` of both
    then keeps everything.

    Args:
        tokenizer, model: any causal or encoder-decoder model of transformers with its tokenizer.
        ids: whose codebook sizes name the tokens; its codes are read by the start "least-squares" alone.
        codebooks: per level (K_l, d) float, or None for a level without geometry (a collision digit); None: no level
            has any. Levels without geometry start at random with the model's mean and covariance.
        start: "projection", "least-squares" (needs `item_texts`), or "mean" (mean row plus noise).
        item_texts: one text per item, in the order of `ids`.
        pad_to_multiple_of: rows of the matrices become a multiple of it.
        seed: of the projection and the noise.

    Returns:
        The ids of the tokens.

    Raises:
        ConfigError: an unknown start, or one whose inputs are missing.
        InputError: codebooks of other sizes; a tokenizer that does not keep the tokens whole, or without an end token;
            a head that is tied by the config alone.
    """
    import torch

    _check(ids, codebooks, start, item_texts)
    _check_head(model)
    names = level_tokens(ids.codebook_sizes)
    flat = [name for level in names for name in level]
    known = tokenizer.get_vocab()
    n_old_tokens = len(tokenizer)
    fresh = [name for name in flat if name not in known]
    if fresh:
        from tokenizers import AddedToken

        # Not "special": those are dropped from decoded text and matched by no server grammar.
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in fresh])
    _check_whole(tokenizer, names)
    vocabulary = SemanticVocabulary.of(tokenizer, ids.codebook_sizes)

    n_old_rows = _n_rows(model)
    n_old = min(n_old_rows, n_old_tokens)  # rows that mean something; a model may hold spare ones
    is_new = {name: known.get(name, n_old_rows) >= n_old_rows for name in flat}
    needed = max(n_old_rows, len(tokenizer))
    if needed > n_old_rows or (pad_to_multiple_of and n_old_rows % pad_to_multiple_of):
        with torch.random.fork_rng(devices=[]):  # fills what is about to be overwritten
            model.resize_token_embeddings(needed, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
    new_codes = [np.flatnonzero([is_new[name] for name in level]) for level in names]
    if not any(len(codes) for codes in new_codes) and _n_rows(model) == n_old_rows:
        return vocabulary
    for place, module in _matrices(model).items():
        rows = module.weight
        with torch.no_grad():
            old = rows[:n_old].float()
            rows[n_old_rows:] = old.mean(0).to(rows.dtype)  # spare rows of the padding stay there
            starts = _start_rows(place, old, ids, codebooks, start, item_texts, tokenizer, seed)
            for level, codes in enumerate(new_codes):
                if len(codes):
                    where = torch.from_numpy(vocabulary.token_ids[level][codes]).to(rows.device)
                    rows[where] = starts[level][codes].to(rows.dtype)
            bias = getattr(module, "bias", None)
            if bias is not None:
                bias[n_old_rows:] = bias[:n_old].mean()
    return vocabulary


def _check(
    ids: SemanticIDs,
    codebooks: Sequence[np.ndarray | None] | None,
    start: Start,
    item_texts: Sequence[str] | None,
) -> None:
    if start not in STARTS:
        raise ConfigError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    if codebooks is not None:
        sizes = [None if book is None else len(book) for book in codebooks]
        fits = len(sizes) == ids.n_levels and all(
            size in (None, wanted) for size, wanted in zip(sizes, ids.codebook_sizes, strict=True)
        )
        if not fits:
            raise InputError(f"codebooks have {sizes} rows where the IDs use {list(ids.codebook_sizes)}")
    if start == "least-squares":
        if item_texts is None or codebooks is None:
            raise ConfigError("start 'least-squares' needs item_texts and codebooks; use start 'projection' without")
        if len(item_texts) != len(ids):
            raise ConfigError(f"item_texts has {len(item_texts)} texts for {len(ids)} items")


def _check_head(model: PreTrainedModel) -> None:
    """Resizing ties what the config calls tied, which would overwrite a head that has become different."""
    if model.config.get_text_config().tie_word_embeddings and len(_matrices(model)) > 1:
        raise InputError(
            f"the config of this {type(model).__name__} says that head and embedding are tied, but they differ; "
            "set model.config.tie_word_embeddings = False first"
        )


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError("the tokenizer has no end token; set tokenizer.eos_token")
    return int(end)


def _check_whole(tokenizer: PreTrainedTokenizerBase, names: list[list[str]]) -> None:
    """Each token is one id between neighbours, after a word and before one."""
    chosen = [level[index] for index in (0, -1) for level in names if level]
    text = "x" + "".join(chosen) + "y " + " ".join(chosen)
    found = list(tokenizer.encode(text, add_special_tokens=False))
    for token in dict.fromkeys(chosen):
        if found.count(tokenizer.convert_tokens_to_ids(token)) != 2 * chosen.count(token):
            raise InputError(
                f"{type(tokenizer).__name__} does not keep {token!r} whole between other text; use a fast tokenizer"
            )


def _matrices(model: PreTrainedModel) -> dict[str, Any]:
    """The modules whose rows belong to tokens: the input embedding, and the head where it has its own rows."""
    found = {"input": model.get_input_embeddings()}
    head = model.get_output_embeddings()
    if head is not None and head.weight is not found["input"].weight:
        found["head"] = head
    return found


def _n_rows(model: PreTrainedModel) -> int:
    rows: Any = model.get_input_embeddings().weight
    return len(rows)


def _start_rows(
    place: str,
    old: torch.Tensor,
    ids: SemanticIDs,
    codebooks: Sequence[np.ndarray | None] | None,
    start: Start,
    item_texts: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> list[torch.Tensor]:
    """First rows (K_l, H) float32 of every level, for a matrix whose old rows are `old` (V, H)."""
    import torch

    mean = old.mean(0)
    if start == "mean":
        noise = [stream(seed, "vocabulary", place, level) for level in range(ids.n_levels)]
        return [
            mean + torch.from_numpy(NOISE * draw.standard_normal((size, old.shape[1]), dtype=np.float32)).to(old)
            for draw, size in zip(noise, ids.codebook_sizes, strict=True)
        ]
    books = [None] * ids.n_levels if codebooks is None else list(codebooks)
    width = max((book.shape[1] for book in books if book is not None), default=0)
    centred = (old - mean)[torch.from_numpy(_sampled(len(old), seed)).to(old.device)]
    spread = float((old - mean).square().sum(1).mean())

    def directions(n: int, *names: str | int) -> torch.Tensor:
        """(n, H): random vectors with the covariance of the model's rows."""
        mix = stream(seed, "vocabulary", *names).standard_normal((n, len(centred)), dtype=np.float32)
        return torch.from_numpy(mix).to(old) @ centred / len(centred) ** 0.5

    if start == "least-squares":
        assert item_texts is not None  # `_check` refused it
        linear = _text_map(old, mean, ids, books, item_texts, tokenizer)
    else:
        linear = directions(width, "codes")
    rows = []
    for level, (book, size) in enumerate(zip(books, ids.codebook_sizes, strict=True)):
        if book is None:
            rows.append(mean + directions(size, "no geometry", level))
            continue
        vectors = torch.from_numpy(np.array(book, dtype=np.float32)).to(old)
        code_part = (vectors - vectors.mean(0)) @ linear[: vectors.shape[1]]
        code_part = _scaled(code_part, (1 - LEVEL_SHARE) * spread)
        level_part = _scaled(directions(1, "level", level), LEVEL_SHARE * spread)
        rows.append(mean + level_part + code_part)
    return rows


def _sampled(n: int, seed: int) -> np.ndarray:
    if n <= SAMPLED_ROWS:
        return np.arange(n)
    return np.sort(stream(seed, "vocabulary", "rows").choice(n, SAMPLED_ROWS, replace=False))


def _scaled(rows: torch.Tensor, wanted: float) -> torch.Tensor:
    """`rows` (n, H) with mean squared length `wanted` (left alone where all are zero)."""
    found = float(rows.square().sum(1).mean())
    return rows * (wanted / found) ** 0.5 if found > 0 else rows


def _text_map(
    old: torch.Tensor,
    mean: torch.Tensor,
    ids: SemanticIDs,
    books: Sequence[np.ndarray | None],
    item_texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> torch.Tensor:
    """(d, H): ridge regression from the sum of an item's codebook vectors to the mean row of its text's tokens."""
    import torch

    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in item_texts]
    item = torch.from_numpy(np.repeat(np.arange(len(tokens)), [len(found) for found in tokens]))
    token = torch.tensor([one for found in tokens for one in found], dtype=torch.int64)
    is_old = token < len(old)
    item, token = item[is_old].to(old.device), token[is_old].to(old.device)
    count = torch.bincount(item, minlength=len(tokens))
    words = torch.zeros(len(tokens), old.shape[1], device=old.device).index_add_(0, item, old[token] - mean)
    has_words = (count > 0).cpu().numpy()
    if not has_words.any():
        raise InputError("no item text has a token of the model; use start 'projection'")
    width = max(book.shape[1] for book in books if book is not None)
    vectors = np.zeros((len(ids), width), dtype=np.float64)
    for level, book in enumerate(books):
        if book is not None:
            present = ids.codes[:, level] >= 0
            vectors[present, : book.shape[1]] += book[ids.codes[present, level]]
    vectors -= vectors.mean(axis=0)
    inputs = torch.from_numpy(vectors[has_words]).to(old.device)
    targets = (words[count > 0] / count[count > 0, None]).double()
    gram = inputs.T @ inputs
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    solved = torch.linalg.solve(
        gram + ridge * torch.eye(width, dtype=gram.dtype, device=gram.device), inputs.T @ targets
    )
    return solved.float()
