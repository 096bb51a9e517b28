"""The code metrics reproduce the known figures of published semantic IDs (semantic_ids O12)."""

import gzip

import numpy as np
import pytest
from support.published_ids import published_ids, published_sequences

from recollect.tokenize.behaviour import prefix_alignment
from recollect.tokenize.quality import CollisionCounts, code_metrics, perplexity
from recollect.tokenize.text_form import codes_of

# items, distinct IDs, items in colliding groups, ICR, largest group, used codes, used prefixes, perplexity of the first
# level, Gini of the first level and of full IDs
KNOWN = {
    "letter/Beauty":
        (12101, 12088, 24, 0.99909, 3, (197, 256, 256, 256), (197, 7931, 11696, 12088), 82.72, 0.6839, 0.0011),
    "letter/Instruments":
        (9922, 9897, 48, 0.99768, 3, (150, 256, 256, 256), (150, 6702, 9608, 9897), 71.61, 0.6439, 0.0025),
    "letter/Yelp": (20033, 19201, 1247, 0.97839, 65, (256,) * 4, (256, 15879, 19145, 19201), 237.47, 0.2137, 0.0410),
    "minionerec/industrial": (3686, 3670, 31, 0.99591, 3, (48, 256, 256), (48, 2295, 3670), 40.72, 0.3108, 0.0043),
    "minionerec/office": (3459, 3444, 30, 0.99564, 2, (88, 256, 256), (88, 2488, 3444), 70.83, 0.3637, 0.0043),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_published_codes_have_the_known_statistics(shared_data, name):
    ids = published_ids(shared_data, name)
    n, n_ids, n_shared, icr, largest, used, prefixes, first_perplexity, first_gini, full_gini = KNOWN[name]
    counts = CollisionCounts.of(ids.codes)
    assert (counts.n_items, counts.n_ids, counts.n_shared_items, counts.largest) == (n, n_ids, n_shared, largest)
    found = code_metrics(ids.codes, ids.codebook_sizes)
    assert round(found["icr"], 5) == icr
    assert found["unique_rate"] == n_ids / n
    assert found["collision_rate"] == 1 - n_ids / n
    assert found["items_in_collision"] == n_shared / n
    assert found["max_group"] == largest
    assert found["tokens_per_item"] == ids.n_levels
    for level, (n_codes, n_prefixes) in enumerate(zip(used, prefixes, strict=True)):
        assert found[f"utilization/level_{level}"] == n_codes / 256
        assert found[f"used_prefixes/level_{level}"] == n_prefixes
        assert found[f"prefix_utilization/level_{level}"] == n_prefixes / 256.0 ** (level + 1)
    assert round(perplexity(ids.codes[:, 0]), 2) == first_perplexity
    assert found["perplexity/level_0"] == pytest.approx(first_perplexity / 256, abs=3e-5)
    assert round(found["prefix_gini/level_0"], 4) == first_gini
    assert round(found["prefix_gini"], 4) == full_gini


def test_first_codes_of_neighbours_in_beauty_histories_agree_as_known(shared_data):
    ids = published_ids(shared_data, "letter/Beauty")
    log = published_sequences(shared_data / "recsys" / "amazon_beauty" / "sequences.txt.gz", first_item=1)
    first, *deeper = prefix_alignment(ids.codes, log)
    assert round(first.adjacent, 4) == 0.2017
    assert round(first.random, 3) == 0.018
    assert [step.adjacent for step in deeper] == sorted((step.adjacent for step in deeper), reverse=True)
    shifted = prefix_alignment(np.roll(ids.codes, 1, axis=0), log)[0]  # the joining rule off by one
    assert shifted.adjacent < 0.1


def test_first_codes_of_neighbours_in_yelp_histories_agree_as_known(shared_data):
    ids = published_ids(shared_data, "letter/Yelp")
    log = published_sequences(shared_data / "sid" / "iclrec" / "Yelp.sequences.txt.gz", first_item=1)
    # .058 is known; that is the value over each user's first twenty pairs, over all pairs it is .0557
    early = np.flatnonzero(log.time < 21)
    assert round(prefix_alignment(ids.codes, log.take(early))[0].adjacent, 3) == 0.058
    assert round(prefix_alignment(ids.codes, log)[0].adjacent, 4) == 0.0557


@pytest.mark.parametrize(
    ("table", "n_ids"),
    [("rkmeans_native", 10527), ("rqvae_native", 11499), ("letter_native", 12015), ("quasid_native", 12064),
     ("letter_zcr", 12101), ("mql4grec", 12101)],
)  # fmt: skip
def test_published_texts_are_read_and_counted(shared_data, table, n_ids):
    path = shared_data / "recsys" / "amazon_beauty" / "published_sids" / f"{table}.tsv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        texts = ["".join(line.split()[1:]) for line in handle]
    codes = np.array([codes_of(text) for text in texts], dtype=np.int32)
    assert codes.shape == (12101, 4)
    assert CollisionCounts.of(codes).n_ids == n_ids
