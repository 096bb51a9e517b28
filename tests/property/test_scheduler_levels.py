"""Dependency levels against their definition."""

from hypothesis import given
from hypothesis import strategies as st

from recollect.agents.scheduler import Step, levels

steps_of = st.lists(
    st.tuples(st.lists(st.sampled_from("abcdefg"), max_size=3), st.integers(0, 9).map(lambda n: n == 0)), max_size=25
).map(lambda rows: [Step(n, tuple(touches), lambda: iter(()), barrier) for n, (touches, barrier) in enumerate(rows)])


@given(steps_of)
def test_levels_are_what_the_definition_says(steps):
    """level(t) = 1 + max level of earlier steps it waits for, where a barrier waits for and holds up everything."""
    level: dict[int, int] = {}
    for step in steps:
        before = [
            level[other.number]
            for other in steps[: step.number]
            if other.barrier or step.barrier or set(other.touches) & set(step.touches)
        ]
        level[step.number] = 1 + max(before, default=-1)
    found = levels(steps)
    assert {step.number: at for at, group in enumerate(found) for step in group} == level
    assert all([step.number for step in group] == sorted(step.number for step in group) for group in found)
