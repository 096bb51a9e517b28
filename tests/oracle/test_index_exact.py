"""The exact index against a sort of all cosines."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.agents.memory_index import ExactIndex, Hit, IndexRow, most_similar, unit_rows
from recollect.errors import DataError


def rows_of(vectors, owner=lambda n: f"u{n % 3}"):
    return [IndexRow(f"m{n}", f"text {n}", vector, {"owner": owner(n)}) for n, vector in enumerate(vectors)]


def brute_force(rows, query, k, where=None):
    def cosine(vector):
        lengths = np.linalg.norm(vector) * np.linalg.norm(query)
        return round(float(vector @ query / lengths), 6) if lengths else 0.0

    kept = [row for row in rows if not where or where.items() <= dict(row.metadata).items()]
    return sorted(((row.id, cosine(row.vector)) for row in kept), key=lambda hit: (-hit[1], hit[0]))[:k]


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 8), st.integers(1, 12), st.booleans())
@settings(max_examples=200, deadline=None)
def test_hits_equal_a_sort_of_all_cosines(seed, n, dimension, k, filtered):
    generator = np.random.default_rng(seed)
    vectors = generator.integers(-2, 3, size=(n, dimension)).astype(float)  # many ties
    rows = rows_of(vectors)
    index = ExactIndex()
    index.upsert("memories", rows)
    queries = generator.integers(-2, 3, size=(4, dimension)).astype(float)
    where = {"owner": "u1"} if filtered else None
    for hits, query in zip(index.query("memories", queries, k, where), queries, strict=True):
        expected = brute_force(rows, query, k, where)
        assert [hit.id for hit in hits] == [name for name, _ in expected]
        np.testing.assert_allclose([hit.similarity for hit in hits], [value for _, value in expected], atol=2e-6)


def test_rows_are_replaced_by_id_and_forgotten_on_request():
    index = ExactIndex()
    index.upsert("memories", rows_of(np.eye(3)))
    index.upsert("memories", [IndexRow("m0", "new", np.array([0.0, 0.0, 2.0]), {"owner": "x"})])
    assert index.count("memories") == 3
    assert index.query("memories", np.array([[0, 0, 1.0]]), 2) == [[Hit("m0", 1.0), Hit("m2", 1.0)]]
    assert index.query("memories", np.array([[0, 0, 1.0]]), 2, {"owner": "x"}) == [[Hit("m0", 1.0)]]
    index.delete("memories", ["m0", "unknown"])
    assert index.query("memories", np.array([[0, 0, 1.0]]), 1) == [[Hit("m2", 1.0)]]
    assert [row.id for row in index.contents()["memories"]] == ["m1", "m2"]
    index.upsert("memories", rows_of(np.eye(3)))
    assert index.count("memories") == 3
    assert index.query("other", np.eye(3), 1) == [[], [], []]
    index.close()
    assert index.count("memories") == 0


def test_many_small_upserts_equal_one():
    vectors = np.random.default_rng(3).normal(size=(300, 5))
    one, many = ExactIndex(), ExactIndex()
    one.upsert("m", rows_of(vectors))
    for row in rows_of(vectors):
        many.upsert("m", [row])
    assert one.query("m", vectors[:20], 7) == many.query("m", vectors[:20], 7)


def test_equal_rows_tie_exactly_wherever_they_stand():
    vector = np.random.default_rng(1).normal(size=384)
    rows = unit_rows(np.tile(vector, (1000, 1)))
    hits = most_similar([f"{n:04d}" for n in range(1000)], rows, unit_rows(vector[None] + 0.1)[0], 5)
    assert [hit.id for hit in hits] == ["0000", "0001", "0002", "0003", "0004"]


def test_bad_vectors_are_refused():
    index = ExactIndex()
    index.upsert("m", rows_of(np.eye(3)))
    with pytest.raises(DataError, match="finite"):
        index.upsert("m", rows_of([np.array([np.nan, 0, 0])]))
    with pytest.raises(DataError, match="3 dimensions, got 2"):
        index.upsert("m", rows_of(np.eye(2)))
    with pytest.raises(DataError, match="3 dimensions, got 2"):
        index.query("m", np.eye(2), 1)
    with pytest.raises(DataError, match="k must be at least 1"):
        index.query("m", np.eye(3), 0)
    assert index.count("m") == 3


def test_a_planted_loss_of_the_tie_rule_is_caught():
    rows = rows_of(np.ones((5, 2)))
    index = ExactIndex()
    index.upsert("m", rows[::-1])
    assert [hit.id for hit in index.query("m", np.ones((1, 2)), 3)[0]] == ["m0", "m1", "m2"]
