"""Properties of sample weights and top-K divergences over random input."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.distill.losses import distillation_kl, top_k_of, top_k_rest_kl
from recollect.distill.weights import sample_weights

RANKS = st.integers(2, 20_000).map(lambda doubled: doubled / 2)  # ties give half ranks
LOGIT = st.floats(-20, 20, width=32)


def one(rank: float) -> torch.Tensor:
    return torch.tensor([rank], dtype=torch.float64)


@given(RANKS, RANKS, st.sampled_from([0, 1]))
def test_exchanging_student_and_teacher_gives_two_minus_the_weight(first, second, base):
    weight = sample_weights(one(first), one(second), rank_base=base).item()
    exchanged = sample_weights(one(second), one(first), rank_base=base).item()
    assert 0 <= weight <= 2
    assert abs(weight + exchanged - 2) < 1e-12


@given(RANKS, RANKS, st.integers(1, 1000))
def test_only_the_ratio_of_ranks_matters(student, teacher, factor):
    before = sample_weights(one(student), one(teacher)).item()
    assert abs(sample_weights(one(student * factor), one(teacher * factor)).item() - before) < 1e-12


@given(RANKS, RANKS, RANKS, st.sampled_from([0, 1]))
def test_a_worse_student_listens_more_and_a_worse_teacher_is_heard_less(student, teacher, extra, base):
    weight = sample_weights(one(student), one(teacher), rank_base=base).item()
    assert sample_weights(one(student + extra), one(teacher), rank_base=base).item() >= weight - 1e-12
    assert sample_weights(one(student), one(teacher + extra), rank_base=base).item() <= weight + 1e-12


@given(RANKS, st.sampled_from([0, 1]))
def test_equal_ranks_weigh_one(rank, base):
    assert sample_weights(one(rank), one(rank), rank_base=base).item() == 1


@given(RANKS, RANKS)
def test_the_weight_is_the_closed_form_of_the_ratio(student, teacher):
    ratio = student / teacher
    expected = min(2.0, ratio) if ratio >= 1 else max(0.0, 2 - 1 / ratio)
    assert abs(sample_weights(one(student), one(teacher)).item() - expected) < 1e-12


@settings(deadline=None)
@given(st.data())
def test_merging_items_never_raises_the_divergence(data):
    n_items = data.draw(st.integers(2, 12))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 2.0, 4.0]))
    rows = st.lists(LOGIT, min_size=n_items, max_size=n_items)
    student = torch.tensor([data.draw(rows)], dtype=torch.float64)
    teacher = torch.tensor([data.draw(rows)], dtype=torch.float64)
    full = distillation_kl(student, teacher, temperature).item()
    lists = [
        top_k_rest_kl(student, top_k_of(teacher, k, temperature), temperature).item() for k in range(1, n_items + 1)
    ]
    slack = 1e-9 * (1 + full)
    assert full >= -slack
    assert all(later >= earlier - slack for earlier, later in pairwise(lists))
    assert lists[0] <= full + slack
    assert abs(lists[-2] - full) < slack
    assert abs(lists[-1] - full) < slack
