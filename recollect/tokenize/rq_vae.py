"""RQ-VAE: codes of an autoencoder's latent by residual quantisation (TIGER, arXiv 2305.05065).

With z = encoder(x), r_1 = z, e_l the code of level l nearest to r_l, and sg the stop-gradient,

    loss = ||x - decoder(e_1 + … + e_L)||^2 + sum_l ( ||sg[r_l] - e_l||^2 + beta ||r_l - sg[e_l]||^2 ),

each norm summed over its dimensions (options change that, see trap 1), the mean taken over items, r_{l+1} = r_l - e_l.
The gradient passes the sum of the codes as if it were z (straight-through), or by the rotation trick
(arXiv 2410.06424). Codes start as k-means centres of the latents of a first large batch; codes that no item used for a
while are placed on residuals of the batch [our design].

Two traps, both kept as options so that they can be shown. (1) Averaging the reconstruction over the D input dimensions
while summing the quantisation over the d code dimensions makes the latter D times as heavy, and the codes collapse.
(2) Handing on r - ST(r), ST(r) = r + sg[e - r], has the right value but no gradient to r: only the first level's
commitment reaches the encoder. Handing on r - sg[e], the default, lets every level's reach it.

Not covered: Gumbel-softmax codes; codes moved by averages in place of gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from recollect.rng import call_seed, stream
from recollect.tokenize.autoencoder import BLOCK_ROWS, Autoencoder, AutoencoderTokenizer, Quantised, reduced
from recollect.tokenize.nearest import ranked, settled_argmax
from recollect.tokenize.neural_config import RQVAEConfig
from recollect.tokenize.rows import ArrayRows, spans
from recollect.tokenize.training_rows import TrainingRows

ROUNDING = 1e-12  # bound of a float64 score's rounding error, relative to the squared lengths in it
KMEANS_ITERATIONS = 25


class ResidualQuantiser(nn.Module):
    """L codebooks (K, d), each on what the ones before it left; a `Quantiser`.

    uses: (L, K) items per code since unused codes were last looked for.  reseeded: (L,) codes placed anew so far.
    step: () batches seen in training. These are buffers, so that a checkpoint holds them.
    """

    uses: Tensor
    reseeded: Tensor
    step: Tensor

    def __init__(self, config: RQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.sizes = (config.codebook_size,) * config.levels
        self.codebooks = nn.ParameterList(torch.zeros(size, config.code_dim) for size in self.sizes)
        self.register_buffer("uses", torch.zeros(config.levels, config.codebook_size, dtype=torch.int64))
        self.register_buffer("reseeded", torch.zeros(config.levels, dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def initialise(self, latent: Tensor, weight: np.ndarray | None) -> None:
        """Codes = k-means centres of the residuals, level by level, of latents (n, d) with weights (n,)."""
        residual = latent
        for level, codebook in enumerate(self.codebooks):
            seed = call_seed(self.config.seed, "initial codes", level)
            with torch.no_grad():
                codebook.copy_(kmeans_centres(residual, len(codebook), weight, seed))
                residual = residual - codebook[nearest(residual, codebook)]

    def forward(self, latent: Tensor) -> Quantised:
        """Quantise latents (B, d) in training; counts the uses of codes and places unused ones anew when it is time."""
        config = self.config
        residual, total = latent, torch.zeros_like(latent)
        penalty = latent.new_zeros(len(latent))
        codes = []
        is_time = self._is_time_to_reseed()
        for level, codebook in enumerate(self.codebooks):
            if is_time:
                self._reseed(level, residual.detach())
            code = nearest(residual.detach(), codebook.detach())
            vector = codebook[code]
            penalty = penalty + reduced(residual.detach() - vector, config.quantisation_reduction)
            pull = reduced(residual - vector.detach(), config.quantisation_reduction)
            penalty = penalty + config.commitment * pull
            if self.training:
                self.uses[level] += torch.bincount(code, minlength=len(codebook))
            codes.append(code)
            total = total + vector.detach()
            residual = handed_on(residual, vector, config.residual_gradient)
        if self.training:
            self.step += 1
        passed = rotated(latent, total) if config.estimator == "rotation" else straight_through(latent, total)
        return Quantised(passed, penalty, torch.stack(codes, dim=1))

    def _is_time_to_reseed(self) -> bool:
        every = self.config.reseed_every
        return self.training and every is not None and int(self.step) > 0 and int(self.step) % every == 0

    def _reseed(self, level: int, residual: Tensor) -> None:
        """Place the unused codes of a level on as many different residuals (B, d) of the batch, drawn at random."""
        unused = torch.nonzero(self.uses[level] == 0)[:, 0]
        chosen = torch.randperm(len(residual), device=residual.device)[: len(unused)]
        with torch.no_grad():
            self.codebooks[level][unused[: len(chosen)]] = residual[chosen]
        self.reseeded[level] += len(unused[: len(chosen)])
        self.uses[level] = 0

    def codes_of(self, latent: Tensor, beam: int) -> Tensor:
        """(B, L) codes of latents (B, d), greedily or keeping the `beam` partial tuples with the least error."""
        n, dimension = latent.shape
        residual = latent[:, None]  # (B, b, d)
        codes = torch.zeros(n, 1, 0, dtype=torch.int64)
        for codebook in self.codebooks:
            width, size = residual.shape[1], min(beam, len(codebook))
            flat = residual.reshape(n * width, dimension)
            proposed = nearest_codes(flat, codebook, size)  # (B b, m)
            left = (flat[:, None] - codebook[proposed]).reshape(n, width * size, dimension)
            kept = left.square().sum(-1).argsort(dim=1, stable=True)[:, :beam, None]  # (B, b', 1)
            residual = left.gather(1, kept.expand(-1, -1, dimension))
            longer = torch.cat([codes.repeat_interleave(size, dim=1), proposed.reshape(n, width * size, 1)], dim=2)
            codes = longer.gather(1, kept.expand(-1, -1, longer.shape[2]))
        return codes[:, 0]

    def alternatives(self, latent: Tensor, codes: Tensor, count: int) -> Tensor:
        """(B, L, count) nearest codes of each level's residual, given `codes` (B, L) above it."""
        residual, found = latent, []
        for level, codebook in enumerate(self.codebooks):
            found.append(nearest_codes(residual, codebook, count))
            residual = residual - codebook[codes[:, level]]
        return torch.stack(found, dim=1)

    def vectors(self, codes: Tensor) -> Tensor:
        """(B, d) sum of the code vectors of codes (B, l <= L)."""
        total = self.codebooks[0].new_zeros(len(codes), self.config.code_dim)
        for level in range(codes.shape[1]):
            total = total + self.codebooks[level][codes[:, level]]
        return total

    def codebook_arrays(self) -> dict[str, np.ndarray]:
        """`codebook.{level}` (K, d) float32."""
        return {f"codebook.{level}": codebook.detach().float().numpy() for level, codebook in enumerate(self.codebooks)}

    def take_codebooks(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `codebook_arrays`."""
        for level, codebook in enumerate(self.codebooks):
            codebook.copy_(torch.from_numpy(np.array(arrays[f"codebook.{level}"], dtype=np.float32)))


def straight_through(source: Tensor, target: Tensor) -> Tensor:
    """`target` (B, d) in value, with the gradient of `source` (B, d)."""
    return source + (target - source).detach()


def rotated(source: Tensor, target: Tensor) -> Tensor:
    """`target` (B, d) in value, with the gradient of `source` turned and stretched to it.

    With u and q the directions of source and target, R the rotation in their plane that takes u to q, and
    s = |target| / |source|, the value is s R source, with s and R constants. R x = x - 2 (x.w) w + 2 (x.u) q for the
    unit w along u + q: a reflection at w followed by one that undoes it in the plane.

    Source: arXiv 2410.06424, section 4.2.
    """
    tiny = torch.finfo(source.dtype).tiny
    length, goal = source.detach().norm(dim=-1, keepdim=True), target.detach().norm(dim=-1, keepdim=True)
    u, q = source.detach() / length.clamp(min=tiny), target.detach() / goal.clamp(min=tiny)
    between = u + q
    w = between / between.norm(dim=-1, keepdim=True).clamp(min=tiny)
    along_w, along_u = (source * w).sum(-1, keepdim=True), (source * u).sum(-1, keepdim=True)
    turned = (source - 2 * along_w * w + 2 * along_u * q) * (goal / length.clamp(min=tiny))
    turned = torch.where(length > 0, turned, source)  # nothing to turn: as straight-through
    return straight_through(turned, target)  # takes away the rounding


def handed_on(residual: Tensor, vector: Tensor, mode: str) -> Tensor:
    """What the next level sees of residuals (B, d) coded as `vector` (B, d): equal values, see trap 2."""
    if mode == "straight_through":
        return residual - straight_through(residual, vector)
    return residual - vector.detach()


def nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    """(B,) int64 nearest code of rows (B, d) among (K, d)."""
    return (0.5 * codebook.square().sum(1) - rows @ codebook.T).argmin(dim=1)


def nearest_codes(rows: Tensor, codebook: Tensor, count: int) -> Tensor:
    """(B, count) int64 nearest codes of rows (B, d) float64, nearest first; equal codes go to the lower number."""
    half_squares = 0.5 * codebook.square().sum(1)
    scores = rows @ codebook.T - half_squares
    slack = ROUNDING * (rows.square().sum(1) + 2 * half_squares.max())
    first = settled_argmax(scores, slack, lambda row, code: -0.5 * (rows[row] - codebook[code]).square().sum(1))
    return first[:, None] if count == 1 else ranked(scores, first, count)


def kmeans_centres(rows: Tensor, count: int, weight: np.ndarray | None, seed: int) -> Tensor:
    """(count, d) float32 centres of rows (n, d): k-means++ and Lloyd steps on one thread, so that bits repeat."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    kmeans = KMeans(count, init="k-means++", n_init=1, max_iter=KMEANS_ITERATIONS, random_state=seed)
    with threadpool_limits(1), warnings.catch_warnings():
        # Fewer different rows than centres leave some centres doubled: reported as unused codes, or placed anew.
        warnings.simplefilter("ignore", ConvergenceWarning)
        kmeans.fit(rows.numpy(), sample_weight=weight)
    return torch.from_numpy(kmeans.cluster_centers_.astype(np.float32))


class RQVAE(AutoencoderTokenizer):
    """RQ-VAE; see the module's text and `RQVAEConfig`."""

    name = "rq-vae"
    config_class: ClassVar[type] = RQVAEConfig

    def quantiser(self) -> ResidualQuantiser:
        """L codebooks of zeros, until they are placed by a first batch."""
        return ResidualQuantiser(self.config)

    def place_codes(self, module: Autoencoder, data: TrainingRows) -> None:
        """K-means on the latents of a first large batch, as the untrained encoder gives them."""
        count = min(len(data), self.config.initial_rows)
        chosen = np.sort(stream(self.config.seed, self.name, "initial rows").permutation(len(data))[:count])
        with torch.no_grad():
            blocks = [module.encoder(data.take(chosen[start:stop]).rows) for start, stop in spans(count, BLOCK_ROWS)]
        module.quantiser.initialise(torch.cat(blocks), None if data.weights is None else data.weights[chosen])

    @property
    def latent_dim(self) -> int:
        """Dimension of the codes."""
        return self.config.code_dim

    def latents(self, embeddings: np.ndarray) -> np.ndarray:
        """(N, d) float64 latents of rows (N, D): what the code vectors of all levels add up to, nearly.

        Raises:
            InputError: as `encode`.
        """
        self.check_rows(embeddings)
        source = ArrayRows(embeddings, None, self.preprocess.apply)
        return torch.cat([latent for _, latent in self._latents(source, 1)]).numpy()
