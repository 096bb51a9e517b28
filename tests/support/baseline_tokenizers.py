"""Small item embeddings and quickly fitted tokenizers of the comparison, for the tests that hold for all of them."""

import numpy as np

from recollect.rng import stream
from recollect.tokenize.balanced import BalancedRQKMeans
from recollect.tokenize.product import OPQ, PQ
from recollect.tokenize.prq_kmeans import PRQKMeans
from recollect.tokenize.random_codes import RandomCodes
from recollect.tokenize.rq_kmeans import VQ, RQKMeans

METHODS = {
    "rq-kmeans": (RQKMeans, {}),
    "rq-kmeans-unit": (RQKMeans, {"normalize_residuals": True}),
    "balanced": (BalancedRQKMeans, {}),
    "constrained": (BalancedRQKMeans, {"balancing": "constrained", "rounds": 20}),
    "prq-kmeans": (PRQKMeans, {"iterations": 8}),
    "vq": (VQ, {"levels": 1}),
    "pq": (PQ, {}),
    "opq": (OPQ, {"rotation_iterations": 5}),
    "random": (RandomCodes, {}),
}
NOT_SEARCHED = {"random"}


def clustered(n: int = 240, dimension: int = 10, seed: int = 0) -> np.ndarray:
    """(n, dimension) float32 rows around 30 centres."""
    generator = stream(seed, "clustered rows")
    centres = generator.normal(0.2, 1, (30, dimension))
    return (centres[generator.integers(30, size=n)] + generator.normal(0, 0.3, (n, dimension))).astype(np.float32)


def unfitted(method: str, **options):
    """A tokenizer of 3 levels x 12 codes (VQ: 1 level)."""
    kind, own = METHODS[method]
    return kind(kind.config_class(**{"levels": 3, "codebook_size": 12, **own, **options}))
