"""VQ-VAE: one learned codebook between an encoder and a decoder (arXiv 1711.00937); RQ-VAE with one level."""

from __future__ import annotations

from typing import ClassVar

from recollect.tokenize.neural_config import VQVAEConfig
from recollect.tokenize.rq_vae import RQVAE


class VQVAE(RQVAE):
    """One level of `RQVAE`; the codebook is learned by gradient, not by averages as in some implementations."""

    name = "vq-vae"
    config_class: ClassVar[type] = VQVAEConfig
