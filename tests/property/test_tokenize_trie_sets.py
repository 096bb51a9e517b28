"""The prefix tree says what Python sets of tuples say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.tokenize.trie import PrefixTrie


@st.composite
def catalogues(draw):
    """(codes, sizes): up to 40 items, with repeats, some without a last digit."""
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    row = st.tuples(*[st.integers(0, size - 1) for size in sizes])
    rows = draw(st.lists(row, min_size=1, max_size=40))
    codes = np.array(rows, dtype=np.int32)
    if len(sizes) > 1 and draw(st.booleans()):
        codes[draw(st.lists(st.integers(0, len(rows) - 1), max_size=5)), -1] = -1
    return codes, sizes


def prefixes(codes: np.ndarray, depth: int) -> list[tuple[int, ...]]:
    return sorted({tuple(row) for row in codes[:, :depth].tolist()})


@given(catalogues())
@settings(max_examples=150, deadline=None)
def test_nodes_edges_and_items_are_those_of_the_set_of_tuples(catalogue):
    codes, sizes = catalogue
    trie = PrefixTrie(codes, sizes)
    rows = [tuple(row) for row in codes.tolist()]
    for depth in range(len(sizes) + 1):
        known = prefixes(codes, depth)
        assert trie.n_nodes[depth] == len(known)
        nodes = torch.arange(len(known))
        assert [tuple(row) for row in trie.codes_at(depth, nodes).tolist()] == known
        if depth == len(sizes):
            continue
        following = [sorted({row[depth] for row in rows if row[:depth] == prefix}) for prefix in known]
        edges = trie.step(depth, nodes)
        assert edges.code.tolist() == [code for found in following for code in found]
        assert edges.row.tolist() == [at for at, found in enumerate(following) for _ in found]
        reached = prefixes(codes, depth + 1)
        assert [reached[child] for child in edges.child.tolist()] == [
            (*known[row], code) for row, code in zip(edges.row.tolist(), edges.code.tolist(), strict=True)
        ]
        mask = trie.mask(depth, nodes)
        assert mask.shape == (len(known), sizes[depth])
        assert [np.flatnonzero(row).tolist() for row in mask] == [[c for c in found if c >= 0] for found in following]
        child, code = trie.children(depth, nodes)
        assert [[c for c in row if c > -2] for row in code.tolist()] == following
        assert (child >= 0).sum(1).tolist() == [len(found) for found in following]
        assert trie.counts(depth, nodes).tolist() == [len(found) for found in following]
    for leaf, prefix in enumerate(prefixes(codes, len(sizes))):
        assert trie.items_at(leaf).tolist() == [at for at, row in enumerate(rows) if row == prefix]
    row, item = trie.leaf_items(torch.tensor([trie.n_ids - 1, -1, 0]))
    assert item[row == 0].tolist() == trie.items_at(trie.n_ids - 1).tolist()
    assert item[row == 2].tolist() == trie.items_at(0).tolist()
    assert not (row == 1).any()
    assert trie.has_short_ids == bool((codes[:, -1] < 0).any())


@given(catalogues(), st.data())
@settings(max_examples=150, deadline=None)
def test_walking_reaches_existing_prefixes_alone(catalogue, data):
    codes, sizes = catalogue
    trie = PrefixTrie(codes, sizes)
    depth = data.draw(st.integers(0, len(sizes)))
    code = st.integers(-2, max(sizes) + 1)
    asked = data.draw(st.lists(st.tuples(*[code] * depth), min_size=1, max_size=20))
    known = prefixes(codes, depth)
    found = trie.walk(torch.tensor(asked, dtype=torch.int64).reshape(len(asked), depth))
    assert found.tolist() == [known.index(prefix) if prefix in known else -1 for prefix in asked]


@given(catalogues(), st.data())
@settings(max_examples=100, deadline=None)
def test_open_nodes_are_the_tree_of_the_allowed_items(catalogue, data):
    codes, sizes = catalogue
    trie = PrefixTrie(codes, sizes)
    n_requests = data.draw(st.integers(1, 3))
    allowed = np.array(
        data.draw(st.lists(st.lists(st.booleans(), min_size=len(codes), max_size=len(codes)), min_size=n_requests,
                           max_size=n_requests))
    )  # fmt: skip
    opened = trie.open_nodes(torch.from_numpy(allowed))
    for depth in range(len(sizes) + 1):
        known = prefixes(codes, depth)
        for request in range(n_requests):
            kept = set(prefixes(codes[allowed[request]], depth)) if allowed[request].any() else set()
            assert [prefix in kept for prefix in known] == opened[depth][request].tolist()


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_many_levels_of_large_codebooks_do_not_overflow(seed):
    draw = np.random.Generator(np.random.Philox(key=seed))
    sizes = (1 << 20,) * 5
    codes = draw.integers(1 << 20, size=(50, 5)).astype(np.int32)
    codes[25:] = codes[:25]
    trie = PrefixTrie(codes, sizes)
    assert trie.n_ids == len(set(map(tuple, codes.tolist())))
    leaves = trie.walk(torch.from_numpy(codes.astype(np.int64)))
    assert (leaves[:25] == leaves[25:]).all()
    assert [at in trie.items_at(int(leaf)) for at, leaf in enumerate(leaves)] == [True] * 50


def test_bad_codes_are_refused():
    from recollect.errors import InputError

    with pytest.raises(InputError, match="needs codes"):
        PrefixTrie(np.zeros((0, 2), dtype=np.int32), (3, 3))
    with pytest.raises(InputError, match=r"level 1 range over 0\.\.7; allowed: 0\.\.2"):
        PrefixTrie(np.array([[0, 0], [2, 7]]), (3, 3))
    with pytest.raises(InputError, match=r"\(requests, 2\) bool"):
        PrefixTrie(np.array([[0, 0], [2, 2]]), (3, 3)).open_nodes(torch.ones(1, 3, dtype=torch.bool))
