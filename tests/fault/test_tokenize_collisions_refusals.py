"""Collision handling says what it cannot do, before it does anything."""

import numpy as np
import pytest
from support.additive_tokenizer import GivenCodebooks, crowded_items, random_codebooks

from recollect.errors import ConfigError, InputError, UnknownName
from recollect.tokenize import last_digit
from recollect.tokenize.collisions import CollisionConfig, resolve_collisions
from recollect.tokenize.neighbour_repair import MAX_TUPLES
from recollect.tokenize.sinkhorn import log_transport_plan

CODES = np.zeros((3, 2), dtype=np.int32)


def test_an_unknown_strategy_lists_the_known_ones():
    with pytest.raises(UnknownName, match="neighbour_repair"):
        resolve_collisions(CODES, "magic", codebook_sizes=(2, 2))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros(3, dtype=np.int32), "shape"),
        (np.zeros((3, 3), dtype=np.int32), "shape"),
        (np.zeros((3, 2)), "integers"),
        (np.array([[0, 0], [0, 2]]), "code 2 of row 1 at level 1 is outside 0..1"),
        (np.array([[0, 0], [-1, 0]]), "code -1 of row 1 at level 0"),
    ],
)
def test_codes_outside_the_codebooks_are_refused(codes, message):
    with pytest.raises(InputError, match=message):
        resolve_collisions(codes, "suffix", codebook_sizes=(2, 2))


def test_sizes_must_come_from_somewhere():
    with pytest.raises(InputError, match="codebook_sizes or a fitted tokenizer"):
        resolve_collisions(CODES, "suffix")
    with pytest.raises(InputError, match="not fitted"):
        resolve_collisions(CODES, "suffix", tokenizer=GivenCodebooks())


@pytest.mark.parametrize("strategy", ["sinkhorn", "constrained", "capacity", "neighbour_repair", "zcr"])
def test_strategies_that_weigh_distances_ask_for_tokenizer_and_embeddings(strategy):
    tokenizer = random_codebooks((2, 8))
    with pytest.raises(InputError, match="give tokenizer and embeddings"):
        resolve_collisions(CODES, strategy, codebook_sizes=(2, 2))
    with pytest.raises(InputError, match="2 embeddings for 3 rows"):
        resolve_collisions(CODES, strategy, tokenizer=tokenizer, embeddings=np.zeros((2, 4)))
    with pytest.raises(InputError, match="shape"):
        resolve_collisions(CODES, strategy, tokenizer=tokenizer, embeddings=np.zeros((3, 5)))
    broken = np.zeros((3, 4))
    broken[1, 2] = np.nan
    with pytest.raises(InputError, match="embedding of item 1 holds NaN"):
        resolve_collisions(CODES, strategy, tokenizer=tokenizer, embeddings=broken)


class Crooked(GivenCodebooks):
    """The whole is not the sum of its parts."""

    name = "crooked"

    def decode(self, codes):
        return np.tanh(super().decode(codes))


class Silent(GivenCodebooks):
    name = "silent"
    reconstructs = False


@pytest.mark.parametrize("strategy", ["sinkhorn", "constrained", "capacity", "zcr"])
def test_last_digits_of_a_method_that_is_not_additive_are_not_priced(strategy):
    codebooks = random_codebooks((4, 4)).codebooks
    with pytest.raises(InputError, match="crooked: what a last digit adds depends on the digits before it"):
        resolve_collisions(CODES, strategy, tokenizer=Crooked(*codebooks), embeddings=np.ones((3, 4)))
    with pytest.raises(InputError, match="silent has no reconstruction"):
        resolve_collisions(CODES, strategy, tokenizer=Silent(*codebooks), embeddings=np.ones((3, 4)))


def test_neighbour_repair_needs_no_additivity_but_a_bounded_product():
    tokenizer = Crooked(*random_codebooks((4, 4)).codebooks)
    found = resolve_collisions(CODES, "neighbour_repair", tokenizer=tokenizer, embeddings=np.ones((3, 4)))
    assert found.unresolved == 0
    deep = random_codebooks((8,) * 12)
    codes = np.zeros((2, 12), dtype=np.int32)
    with pytest.raises(InputError, match=f"more than {MAX_TUPLES}"):
        resolve_collisions(codes, "neighbour_repair", tokenizer=deep, embeddings=np.ones((2, 4)))


def test_neighbour_repair_leaves_what_finds_no_tuple():
    tokenizer = random_codebooks((2, 2))
    items = np.ones((9, 4), dtype=np.float32)
    found = resolve_collisions(tokenizer.encode(items).codes, "neighbour_repair", tokenizer=tokenizer, embeddings=items)
    assert len(np.unique(found.codes, axis=0)) == 4
    assert found.unresolved == 6


def test_constrained_refuses_groups_it_cannot_assign_exactly(monkeypatch):
    monkeypatch.setattr(last_digit, "MAX_BOUNDED", 10)
    tokenizer = random_codebooks((1, 4))
    items = crowded_items(tokenizer, 11)
    with pytest.raises(InputError, match="Use the collision strategy capacity"):
        resolve_collisions(tokenizer.encode(items).codes, "constrained", tokenizer=tokenizer, embeddings=items)


def test_item_ids_must_be_distinct_and_one_per_row():
    with pytest.raises(InputError, match="item id 'x' stands twice"):
        resolve_collisions(CODES, "suffix", codebook_sizes=(2, 2), item_ids=["x", "y", "x"])
    with pytest.raises(InputError, match="2 item ids for 3 rows"):
        resolve_collisions(CODES, "suffix", codebook_sizes=(2, 2), item_ids=["x", "y"])


def test_hash_last_needs_attributes_of_every_item():
    with pytest.raises(InputError, match="needs attributes"):
        resolve_collisions(CODES, "hash_last", codebook_sizes=(2, 2))
    with pytest.raises(InputError, match="no column"):
        resolve_collisions(CODES, "hash_last", codebook_sizes=(2, 2), attributes=[])
    with pytest.raises(InputError, match="one length"):
        resolve_collisions(CODES, "hash_last", codebook_sizes=(2, 2), attributes=[[1, 2, 3], [1]])
    with pytest.raises(InputError, match="attributes describe 2 items where there are 3"):
        resolve_collisions(CODES, "hash_last", codebook_sizes=(2, 2), attributes=[[1, 2]])


def test_existing_tuples_of_another_strategy_are_refused():
    with pytest.raises(InputError, match="use the strategy they were resolved with"):
        resolve_collisions(CODES, "suffix", codebook_sizes=(2, 2), existing=np.zeros((1, 2), dtype=int))
    with pytest.raises(InputError, match="use the strategy they were resolved with"):
        resolve_collisions(CODES, "none", codebook_sizes=(2, 2), existing=np.zeros((1, 3), dtype=int))


@pytest.mark.parametrize(
    "options", [{"epsilon": 0.0}, {"epsilon": float("nan")}, {"iterations": 0}, {"rounds": 0}, {"capacity": 0}]
)
def test_illegal_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        CollisionConfig(**options)


def test_sinkhorn_refuses_distances_that_are_not_finite():
    import torch

    with pytest.raises(InputError, match="NaN or infinity"):
        log_transport_plan(torch.full((2, 2), torch.inf), 0.1, 5)


@pytest.mark.parametrize("strategy", ["none", "suffix", "variable_suffix", "sinkhorn", "zcr", "neighbour_repair"])
def test_an_empty_catalogue_stays_empty(strategy):
    tokenizer = random_codebooks((2, 3))
    found = resolve_collisions(
        np.zeros((0, 2), dtype=np.int32), strategy, tokenizer=tokenizer, embeddings=np.zeros((0, 4), dtype=np.float32)
    )
    assert len(found.codes) == 0
    assert found.unresolved == 0
