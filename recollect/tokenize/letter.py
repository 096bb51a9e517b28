"""LETTER: RQ-VAE whose codes also follow behaviour and spread over the codebook (arXiv 2405.07314).

    loss = RQ-VAE's + alpha collaborative + beta diversity.

Collaborative: each item's quantised latent must find its own frozen behaviour vector h (a sequential recommender's
item vector, of the code dimension) among those of the batch: cross-entropy of the products z_i . h_j against j = i.
Diversity: the codes of each level are grouped into clusters of bounded size; the code of an item is pulled to a random
other code of its cluster, by cross-entropy of its products with all codes but itself.

Constants (alpha .01, beta 1e-4, mu .25, 10 clusters, temperature 1) are the authors' code's. Ours: the bounds of a
cluster (K / 2C to 2 K / C codes), when codes are grouped anew, RQ-VAE's summed reductions and r - sg[e] (the authors'
code hands on r - ST(r), see `rq_vae`), and that items without a behaviour vector (all zeros) take no part in the
collaborative loss.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from recollect.errors import InputError, MissingExtra
from recollect.rng import call_seed
from recollect.tokenize.autoencoder import Autoencoder, Batch, reduced
from recollect.tokenize.neural_config import LETTERConfig
from recollect.tokenize.rq_vae import RQVAE, ResidualQuantiser

GROUPING_ITERATIONS = 10


class GroupedQuantiser(ResidualQuantiser):
    """A residual quantiser that knows which codes belong together; groups: (L, K) cluster of each code."""

    groups: Tensor

    def __init__(self, config: LETTERConfig) -> None:
        super().__init__(config)
        self.register_buffer("groups", torch.zeros(config.levels, config.codebook_size, dtype=torch.int64))

    def regroup(self, config: LETTERConfig) -> None:
        """Cluster every level's codes anew."""
        for level, codebook in enumerate(self.codebooks):
            seed = call_seed(config.seed, "groups", level, int(self.step))
            n_groups = min(config.diversity_clusters, len(codebook) // 2)  # a code needs a companion
            labels = constrained_groups(codebook.detach().cpu().numpy(), n_groups, seed)
            self.groups[level] = torch.from_numpy(labels).to(self.groups.device)


class LETTER(RQVAE):
    """LETTER; `fit` needs `collaborative` (N, code_dim), a zero row standing for an item without behaviour."""

    name = "letter"
    config_class: ClassVar[type] = LETTERConfig
    uses_collaborative = True

    def quantiser(self) -> GroupedQuantiser:
        """As RQ-VAE's, with groups."""
        return GroupedQuantiser(self.config)

    def check_fit(self, rows: np.ndarray, n_items: int, collaborative: np.ndarray | None) -> None:
        """Refuse a fit without behaviour vectors of every item in the code dimension."""
        needed = self.config.code_dim
        if collaborative is None:
            raise InputError(
                f"letter needs behaviour vectors: give collaborative of shape ({n_items}, {needed}), one row per item; "
                "rq-vae does without"
            )
        if collaborative.ndim != 2 or len(collaborative) != n_items:
            raise InputError(f"collaborative is {collaborative.shape} where there are {n_items} items")
        if collaborative.shape[1] != needed:
            raise InputError(
                f"behaviour vectors have dimension {collaborative.shape[1]} where code_dim is {needed}; "
                f"set code_dim to {collaborative.shape[1]}"
            )
        finite = np.isfinite(collaborative[rows]).all(axis=1)
        if not finite.all():
            item = int(rows[np.flatnonzero(~finite)[0]])
            raise InputError(
                f"the behaviour vector of item {item} holds NaN or infinity; give zeros where there is none"
            )
        if self.config.diversity_weight > 0:
            _import_constrained_kmeans()

    def row_losses(self, module: Autoencoder, batch: Batch) -> Tensor:
        """(B,) RQ-VAE's loss plus the two alignments."""
        config, quantiser = self.config, module.quantiser
        if config.diversity_weight > 0 and int(quantiser.step) % config.regroup_every == 0:
            quantiser.regroup(config)
        quantised = quantiser(module.encoder(batch.rows))
        loss = quantised.penalty + reduced(
            batch.rows - module.decoder(quantised.vector), config.reconstruction_reduction
        )
        assert batch.behaviour is not None
        if config.collaborative_weight > 0:
            loss = loss + config.collaborative_weight * collaborative_loss(quantised.vector, batch.behaviour)
        if config.diversity_weight > 0:
            for level, codebook in enumerate(quantiser.codebooks):
                diversity = diversity_loss(codebook, quantised.codes[:, level], quantiser.groups[level])
                loss = loss + config.diversity_weight * diversity
        return loss


def collaborative_loss(vector: Tensor, behaviour: Tensor) -> Tensor:
    """(B,) cross-entropy of finding each item's behaviour (B, d) among the batch's from its `vector` (B, d).

    Items whose behaviour is all zeros have loss 0 and are no candidates.
    """
    known = torch.nonzero(behaviour.any(dim=1))[:, 0]
    logits = vector[known] @ behaviour[known].T
    losses = nn.functional.cross_entropy(logits, torch.arange(len(known), device=logits.device), reduction="none")
    return vector.new_zeros(len(vector)).index_put((known,), losses)


def diversity_loss(codebook: Tensor, codes: Tensor, groups: Tensor) -> Tensor:
    """(B,) cross-entropy of a random other code of the same group, by products of code vectors.

    Args:
        codebook: (K, d).
        codes: (B,) the items' codes; a code is never its own candidate.
        groups: (K,) group of each code, two codes at least in each.

    Draws from torch's global generator.
    """
    same = groups[:, None] == groups[None, :]
    same.fill_diagonal_(False)  # (K, K)
    target = torch.multinomial(same[codes].float(), 1)[:, 0]
    logits = codebook[codes] @ codebook.T
    logits = logits.scatter(1, codes[:, None], -torch.inf)
    return nn.functional.cross_entropy(logits, target, reduction="none")


def constrained_groups(codebook: np.ndarray, n_groups: int, seed: int) -> np.ndarray:
    """(K,) int64 groups of codes (K, d): k-means whose clusters have between K / 2C (2 at least) and 2 K / C codes.

    Raises:
        MissingExtra: k-means-constrained is not installed.
    """
    size = len(codebook)
    kmeans = _import_constrained_kmeans()(
        n_clusters=n_groups,
        size_min=max(2, size // (2 * n_groups)),
        size_max=min(size, math.ceil(2 * size / n_groups)),
        n_init=1,
        max_iter=GROUPING_ITERATIONS,
        random_state=seed,
    )
    return kmeans.fit_predict(codebook.astype(np.float64)).astype(np.int64)


def _import_constrained_kmeans() -> type:
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError as error:
        raise MissingExtra("k-means-constrained", "tokenize", "the diversity loss of letter") from error
    return KMeansConstrained
