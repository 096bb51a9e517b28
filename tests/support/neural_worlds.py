"""Worlds and small options for tests of the models trained by gradient."""

import numpy as np
from support.recommender_worlds import small_log

from recollect.recommenders.bert4rec import BERT4Rec
from recollect.recommenders.bpr import BPR
from recollect.recommenders.gru4rec import GRU4Rec
from recollect.recommenders.hstu import HSTU
from recollect.recommenders.lrurec import LRURec
from recollect.recommenders.sasrec import SASRec

# name -> (class, options that differ from the class's own)
VARIANTS = {
    "sasrec": (SASRec, {}),
    "sasrec-two-heads": (SASRec, {"heads": 2, "blocks": 1}),
    "sasrec-bce": (SASRec, {"loss": "bce", "negatives": 2}),
    "sasrec-gbce": (SASRec, {"loss": "gbce", "negatives": 8}),
    "gru4rec": (GRU4Rec, {"recurrent": 24}),
    "bert4rec": (BERT4Rec, {"mask_probability": 0.4}),
    "lrurec": (LRURec, {}),
    "hstu": (HSTU, {}),
    "hstu-sampled": (HSTU, {"l2_normalise": True, "loss": "sampled", "negatives": 8}),
    "bpr": (BPR, {}),
}
CAUSAL = [name for name in VARIANTS if name not in ("bert4rec", "bpr")]
SEQUENTIAL = [name for name in VARIANTS if name != "bpr"]


def small_model(variant, **options):
    """An unfitted model of 16 units and two epochs, but for `options`."""
    kind, own = VARIANTS[variant]
    small = {"hidden": 16, "max_length": 12, "batch_size": 32, "learning_rate": 5e-3, "epochs": 2}
    return kind(kind.config_class(**(small | own | options)))


def markov_log(n_users=150, n_items=30, length=10, seed=0, faithful=0.9):
    """The next item is a fixed permutation of the last one with probability `faithful`, else any item."""
    generator = np.random.default_rng(seed)
    follows = generator.permutation(n_items)
    sequences = []
    for _ in range(n_users):
        items = [int(generator.integers(n_items))]
        while len(items) < length:
            keeps = generator.random() < faithful
            items.append(int(follows[items[-1]] if keeps else generator.integers(n_items)))
        sequences.append(items)
    return small_log(sequences, n_items)
