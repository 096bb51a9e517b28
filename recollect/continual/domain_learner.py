"""The LLM recommender as a learner of a stream of domains: a decoder that reads item vectors and scores a catalogue.

The form of `recollect.recommenders.llm_module` (E4SRec): item vectors in place of words, the last hidden state against
one vector per item, no vocabulary head, nothing generated, one pass ranks the whole catalogue.  Other than there, the
vectors on both sides are frozen (`domain_items`), so that all that is learnt is in the adapters of a continual method:
what a method protects is then everything, and a new domain needs no new parameters.
A score is 20 · cos(h + u / 2, item vector): h is the direction of the last hidden state, u that of the mean vector of
the last five items, which goes around the blocks.  Without it a decoder starts from noise, with it from about what item
texts alone give (which is why that is among the floors), and adapters learn the difference.  20 is the temperature of
.05 of HSTU's published settings.
Source: llmd4rec 3.2; recsys_evaluation 8 (temperature); frozen vectors and u are [our design].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from recollect.continual.domain_items import ItemVectors, ItemVocabulary
from recollect.continual.domain_ranking import AROUND, LAST_ITEMS, SCALE, Ranked, rank_cases
from recollect.continual.domain_tasks import Case, DomainTask
from recollect.continual.learner import Precision, best_precision, products_in, token_batch
from recollect.recommenders.llm_module import load_trunk

NOT_OFFERED = -1e4  # probability exactly 0 in float32, and no NaN in a difference of two of them


class DomainDecoder(nn.Module):
    """A decoder over the ids of an `ItemVocabulary`, called as a causal language model of transformers is.

    Args:
        trunk: the decoder without its vocabulary head.
    """

    inputs: Tensor
    outputs: Tensor
    offered: Tensor

    def __init__(self, trunk: nn.Module, vectors: ItemVectors, vocabulary: ItemVocabulary) -> None:
        super().__init__()
        self.trunk: Any = trunk
        self.config = trunk.config
        self.first_catalogue = vocabulary.first_catalogue
        self.register_buffer("inputs", torch.from_numpy(vectors.inputs), persistent=False)  # (V, D)
        self.register_buffer("outputs", torch.from_numpy(vectors.outputs), persistent=False)  # (N, D)
        self.register_buffer("offered", torch.from_numpy(vectors.offered), persistent=False)  # (catalogues, N)

    def get_input_embeddings(self) -> nn.Embedding:
        """What the ids stand for, frozen; methods that attend with a prompt (SAPT) read it."""
        return nn.Embedding.from_pretrained(self.inputs, freeze=True)

    def prompt_tokens(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) bool: instruction and catalogue, which stand before the items in training and in testing alike."""
        is_word = input_ids >= len(self.outputs)
        return is_word if attention_mask is None else is_word & attention_mask.bool()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool = False,
    ) -> Any:
        """Scores (B, `logits_to_keep` or T, N) float32 as `.logits`; items outside a row's catalogue get NOT_OFFERED.

        Args:
            input_ids: (B, T); every row names its catalogue.
            use_cache: nothing is ever cached.
        """
        from transformers.modeling_outputs import CausalLMOutput

        kind = next(self.trunk.parameters()).dtype
        hidden = self.trunk(
            inputs_embeds=self.inputs[input_ids].to(kind),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        if logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        around = self._around(input_ids, attention_mask)[:, -hidden.shape[1] :]
        with torch.autocast(hidden.device.type, enabled=False):
            around = AROUND * nn.functional.normalize(around, dim=-1)
            query = around + nn.functional.normalize(hidden.float(), dim=-1)
            logits = SCALE * nn.functional.normalize(query, dim=-1) @ self.outputs.T
        catalogue = input_ids.amax(dim=1) - self.first_catalogue  # catalogues have the highest ids
        logits = logits.masked_fill(~self.offered[catalogue][:, None], NOT_OFFERED)
        return CausalLMOutput(logits=logits)  # type: ignore[arg-type]  # a tensor of any kind

    def _around(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Sum of the vectors of the last items up to each position, (B, T, D); zeros before the first item."""
        n_items = len(self.outputs)
        is_item = input_ids < n_items
        if attention_mask is not None:
            is_item = is_item & attention_mask.bool()
        own = self.outputs[input_ids.clamp_max(n_items - 1)] * is_item[..., None]
        total = own
        for back in range(1, LAST_ITEMS):
            total = total + nn.functional.pad(own, (0, 0, back, 0))[:, : own.shape[1]]
        return total


class DomainLearner:
    """The network and what is asked of it; see `benchmark.OpenedLearner`."""

    def __init__(
        self,
        model: DomainDecoder,
        vocabulary: ItemVocabulary,
        max_history: int,
        arithmetic: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.model: Any = model
        self.vocabulary, self.max_history = vocabulary, max_history
        self.arithmetic: Literal["fp32", "bf16"] = arithmetic

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def rank(
        self,
        task: DomainTask,
        catalogue: int,
        batch_size: int,
        after_batch: Callable[[int], None] | None = None,
    ) -> Ranked:
        """Rank a task's catalogue, number `catalogue` of the stream, for its test cases."""

        def score(cases: Sequence[Case]) -> np.ndarray:
            questions = [self.vocabulary.question(catalogue, case.history[-self.max_history :]) for case in cases]
            batch = token_batch(questions, range(len(questions)), self.vocabulary.pad_id)
            inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask", "position_ids")}
            with torch.no_grad(), products_in(self.arithmetic, self.device):
                logits = self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, 0]
            return logits.cpu().numpy()[:, task.catalogue]

        was_training = self.model.training
        self.model.eval()
        try:
            return rank_cases(score, task.cases, task.catalogue, batch_size=batch_size, after_batch=after_batch)
        finally:
            self.model.train(was_training)


def word_table(folder: Path) -> np.ndarray:
    """The decoder's word vectors (words, D) float32.

    Raises:
        ModelFileError: the decoder cannot be loaded.
    """
    trunk, _ = load_trunk(folder, 1)
    embedding: Any = trunk.get_input_embeddings()
    return embedding.weight.detach().numpy().copy()


def open_domain_learner(
    folder: Path,
    vectors: ItemVectors,
    vocabulary: ItemVocabulary,
    *,
    keep_layers: int | None,
    max_history: int,
    precision: Precision,
) -> DomainLearner:
    """The decoder of a folder with frozen weights, on the GPU where there is one.

    Args:
        precision: bf16 = weights in bf16 on a GPU, products rounded to bf16 on a CPU; auto = where that is faster.

    Raises:
        ConfigError: the decoder has fewer blocks than are to be kept.
        ModelFileError: the weights cannot be loaded.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    best = best_precision(precision, device)
    on_gpu = device.type == "cuda"
    trunk: Any = load_trunk(folder, keep_layers)[0]
    # The words' vectors are never read, and are much of a small model.
    trunk.set_input_embeddings(nn.Embedding.from_pretrained(torch.zeros(1, vectors.inputs.shape[1])))
    trunk = trunk.to(torch.bfloat16) if on_gpu and best == "bf16" else trunk
    model = DomainDecoder(trunk.requires_grad_(False), vectors, vocabulary).to(device)
    return DomainLearner(model.eval(), vocabulary, max_history, "fp32" if on_gpu else best)
