"""A simulation with the embedded model, killed at random moments, ends as if nothing had happened and pays once."""

import random

import pytest
from support.killed_runs import Child

ARGUMENTS = ("--users", "4", "--interactions-per-user", "5", "--held-out", "2")
BATCH_SIZE = 16  # calls whose answers one kill can lose


def kill_run(child: Child, most: int, seed: int) -> int:
    """`kill -9` at random moments, at most `most` times, until the run is finished; how often it was killed.

    No start may ask again for what the journal held when it began.
    """
    generator = random.Random(seed)
    kills, is_finished = 0, False
    while not is_finished:
        paid, recorded = len(child.sent_calls()), set(child.recorded())
        if kills < most:
            # From before the models are loaded to well inside the run; a start alone takes several seconds.
            is_finished = not child.kill_after(generator.uniform(4.0, 16.0))
            kills += not is_finished
        else:
            child.finish()
            is_finished = True
        assert not recorded & set(child.sent_calls()[paid:]), "a recorded call was paid for again"
    return kills


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_kills_with_the_embedded_model_change_nothing(smollm2_dir, minilm_dir, tmp_path):
    undisturbed, killed = Child(tmp_path / "undisturbed", ARGUMENTS), Child(tmp_path / "killed", ARGUMENTS)
    undisturbed.finish()
    total = 0
    for attempt in range(20):  # a run that ends before its twentieth kill is followed by another one
        kills = kill_run(killed, 20 - total, attempt)
        total += kills
        assert killed.events() == undisturbed.events()
        assert sorted(killed.recorded()) == sorted(undisturbed.recorded())
        assert killed.sent_twice() <= kills * BATCH_SIZE
        if total == 20:
            break
        killed = Child(tmp_path / f"killed-{attempt}", ARGUMENTS)
    assert total == 20
