"""Collision handling of the real tokenizers: what is priced is what the methods themselves minimise."""

import numpy as np
import pytest

from recollect.errors import InputError
from recollect.tokenize.catalogue import relabel
from recollect.tokenize.collisions import resolve_collisions
from recollect.tokenize.digit_costs import LastDigitCosts, ReconstructionCosts
from recollect.tokenize.groups import sizes_of, tuple_ids
from recollect.tokenize.methods import method_spec

EXTRAS = {"rq-kmeans": "faiss", "pq": "faiss", "opq": "faiss", "constrained-rq-kmeans": "k_means_constrained"}
SMALL_NETWORK = {"hidden": (8,), "code_dim": 4, "steps": 30, "batch_size": 64}
OPTIONS = {
    "rq-gmm": {"max_iterations": 5},
    "rq-kmeans": {"restarts": 1},
    "pq": {"restarts": 1},
    "opq": {"restarts": 1, "rotation_iterations": 2},
    "balanced-rq-kmeans": {"rounds": 5},
    "rq-vae": SMALL_NETWORK,
    "random": {},
}
STEPS = {"preprocess": ("centre", "pca"), "pca_dimension": 5, "whiten": True}


def items(n=160):
    generator = np.random.default_rng(0)
    return (generator.normal(size=(n, 8)) * np.linspace(2, 0.3, 8)).astype(np.float32)


@pytest.fixture(scope="module", params=[*OPTIONS, "rq-gmm whitened"])
def fitted(request):
    name, _, variant = request.param.partition(" ")
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name], reason=f"{EXTRAS[name]} is not installed")
    spec = method_spec(name)
    values = OPTIONS[name] | (STEPS if variant else {})
    return spec.open(spec.options(values, "test", levels=2, codebook_size=16), seed=0).fit(items())


def test_a_digit_costs_what_the_method_says_of_the_tuple(fitted):
    rows = items()
    encoding = fitted.encode(rows)
    costs = LastDigitCosts(fitted, rows)
    table = costs.table(np.arange(len(rows)), encoding.codes)
    emitted = table[np.arange(len(rows)), encoding.codes[:, -1]]
    np.testing.assert_allclose(
        emitted, ReconstructionCosts(fitted, rows).of_codes(np.arange(len(rows)), encoding.codes), rtol=1e-4, atol=1e-5
    )
    if fitted.name != "rq-vae":  # its distance is of the decoded row, its digits are priced among the latents
        np.testing.assert_allclose(emitted, encoding.distance, rtol=1e-3, atol=1e-4)
    if fitted.name in ("rq-kmeans", "pq", "opq", "rq-vae"):
        np.testing.assert_allclose(emitted, table.min(axis=1), atol=1e-4)


@pytest.mark.parametrize("strategy", ["zcr", "capacity", "constrained", "sinkhorn", "neighbour_repair"])
def test_real_codes_are_told_apart(fitted, strategy):
    rows = items()
    codes = fitted.encode(rows).codes
    if strategy == "neighbour_repair" and fitted.name == "random":
        with pytest.raises(InputError, match="top_m 1"):
            resolve_collisions(codes, strategy, tokenizer=fitted, embeddings=rows)
        return
    found = resolve_collisions(codes, strategy, tokenizer=fitted, embeddings=rows)
    emitted = int((sizes_of(tuple_ids(codes)) > 1).sum())
    assert emitted > 0
    assert found.unresolved < emitted
    if strategy == "zcr":
        assert found.unresolved == 0


def test_codes_of_every_method_with_codebooks_can_be_renamed_and_back(fitted):
    rows = items()
    codes = fitted.encode(rows).codes
    arrays = {name: np.array(array) for name, array in fitted.arrays().items()}
    labels = [np.random.default_rng(level).permutation(16) for level in range(2)]
    if fitted.name == "random":
        with pytest.raises(InputError, match="cannot be renamed"):
            relabel(fitted, labels, rows)
        return
    relabel(fitted, labels, rows)
    renamed = np.stack([labels[level][codes[:, level]] for level in range(2)], axis=1)
    np.testing.assert_array_equal(fitted.encode(rows).codes, renamed)
    relabel(fitted, [np.argsort(names) for names in labels], rows)
    for name, array in fitted.arrays().items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


def test_digits_of_projections_are_priced_by_the_cosine_that_chose_them():
    spec = method_spec("prq-kmeans")
    tokenizer = spec.open(spec.options({}, "test", levels=2, codebook_size=16), seed=0).fit(items())
    codes = tokenizer.encode(items()).codes
    table = LastDigitCosts(tokenizer, items()).table(np.arange(len(items())), codes)
    np.testing.assert_array_equal(table.argmin(axis=1), codes[:, -1])
    found = resolve_collisions(codes, "zcr", tokenizer=tokenizer, embeddings=items())
    assert found.unresolved == 0
    assert found.added_distortion is None
    assert found.changed_items > 0


def test_methods_whose_digits_have_no_price_say_so_and_take_a_suffix():
    pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    spec = method_spec("fsq")
    options = spec.options({"hidden": (8,), "steps": 5}, "test", levels=2, codebook_size=8)
    tokenizer = spec.open(options, seed=0).fit(items())
    codes = tokenizer.encode(items()).codes
    with pytest.raises(InputError, match="depends on the digits before"):
        resolve_collisions(codes, "zcr", tokenizer=tokenizer, embeddings=items())
    assert resolve_collisions(codes, "suffix", tokenizer=tokenizer).unresolved == 0
