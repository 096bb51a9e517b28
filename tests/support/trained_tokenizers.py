"""Small item embeddings and options for tests of the tokenizers trained by gradient."""

import numpy as np

from recollect.rng import stream
from recollect.tokenize.fsq import FSQ
from recollect.tokenize.letter import LETTER
from recollect.tokenize.rq_vae import RQVAE
from recollect.tokenize.vq_vae import VQVAE

CODE_DIM = 8
METHODS = {"rq-vae": RQVAE, "vq-vae": VQVAE, "letter": LETTER, "fsq": FSQ}


def unit_embeddings(n=300, dimension=24, directions=8, seed=0):
    """(n, dimension) float32 rows of length 1 near a random subspace."""
    generator = stream(seed, "unit embeddings")
    inside = generator.normal(size=(n, directions)) * np.linspace(2, 0.5, directions)
    rows = inside @ generator.normal(size=(directions, dimension)) + 0.3 * generator.normal(size=(n, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def behaviour_vectors(n=300, dimension=CODE_DIM, seed=0):
    """(n, dimension) float32 rows of length 1 that have nothing to do with the embeddings."""
    rows = stream(seed, "behaviour").normal(size=(n, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def small_config(name, **options):
    """Options with which a fit takes about a tenth of a second."""
    values = {"hidden": (16,), "steps": 20, "batch_size": 64}
    if name != "fsq":
        values |= {"code_dim": CODE_DIM, "codebook_size": 16, "reseed_every": 8}
    if name in ("rq-vae", "letter"):
        values["levels"] = 3
    if name == "letter":
        values |= {"diversity_clusters": 4, "regroup_every": 15}
    return METHODS[name].config_class(**(values | options))


def small_tokenizer(name, **options):
    """An unfitted tokenizer."""
    return METHODS[name](small_config(name, **options))


def fitted(name, embeddings, *, collaborative=None, mask=None, weight=None, checkpoint=None, **options):
    """A fitted tokenizer; LETTER gets behaviour vectors where none are given."""
    if name == "letter" and collaborative is None:
        collaborative = behaviour_vectors(len(embeddings))
    return small_tokenizer(name, **options).fit(
        embeddings, mask=mask, weight=weight, collaborative=collaborative, checkpoint=checkpoint
    )
