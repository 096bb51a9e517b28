"""What the shipped TRACE files hold is what their description says."""

import pytest

from recollect.continual.trace_data import leak_key, load_replay_buffer, load_trace
from recollect.continual.trace_tasks import STANDARD_ORDER, trace_tasks

# task: train rows, distinct prompts, eval rows, test rows
DESCRIBED = {
    "C-STANCE": (1000, 1000, 200, 500),
    "FOMC": (1000, 988, 60, 240),
    "MeetingBank": (466, 466, 40, 200),
    "Py150": (1000, 958, 80, 258),
    "ScienceQA": (1000, 1000, 150, 400),
    "NumGLUE-cm": (897, 252, 30, 81),
    "NumGLUE-ds": (1000, 950, 60, 200),
    "20Minuten": (1000, 1000, 50, 200),
}


@pytest.fixture(scope="module")
def official(shared_data):
    return load_trace(shared_data / "trace")


def test_counts_are_those_of_the_description(official):
    found = {
        name: (data.facts.train.n, data.facts.train.n_distinct_prompts, data.facts.eval.n, data.facts.test.n)
        for name, data in official.items()
    }
    assert found == DESCRIBED
    assert tuple(official) == STANDARD_ORDER


def test_splits_are_disjoint_and_every_prompt_has_its_tasks_form(official):
    for name, data in official.items():
        facts = data.facts
        assert (facts.test_in_train, facts.test_in_eval, facts.eval_in_train) == (0, 0, 0), name
        assert facts.train.n_other_form == facts.eval.n_other_form == facts.test.n_other_form == 0, name
        assert facts.test.n == facts.test.n_distinct_prompts
        assert len(data.train) == facts.train.n_used == facts.train.n
    assert official["Py150"].facts.train.n_conflicting_prompts == 5  # one prompt with several next lines
    assert official["NumGLUE-cm"].facts.train.n_conflicting_prompts == 0  # repeated as they are


def test_clean_mode_keeps_one_row_a_prompt(shared_data, official):
    clean = load_trace(shared_data / "trace", ["NumGLUE-cm", "FOMC", "Py150"], clean=True)
    for name, data in clean.items():
        prompts = [record.prompt for record in data.train]
        assert len(prompts) == len(set(prompts)) == data.facts.train.n_used == DESCRIBED[name][1]
        assert data.test == official[name].test
        assert data.facts.train.n == DESCRIBED[name][0]
        # The first row of each prompt, in file order.
        whole = [record.prompt for record in official[name].train]
        assert list(data.train) == [official[name].train[at] for at, text in enumerate(whole) if text not in whole[:at]]


def test_the_replay_buffer_has_1030_pairs(shared_data):
    assert len(load_replay_buffer(shared_data / "trace")) == 1030


def test_tasks_have_the_published_epochs_and_come_in_the_order_asked_for():
    assert [task.epochs_lora for task in trace_tasks()] == [5, 3, 7, 5, 3, 5, 5, 7]
    assert [task.epochs_full for task in trace_tasks()] == [1, 1, 5, 5, 1, 5, 5, 5]
    assert [task.name for task in trace_tasks(STANDARD_ORDER[::-1])] == list(STANDARD_ORDER[::-1])


def test_leak_key_ignores_blanks_and_case():
    assert leak_key(" A  b\n") == leak_key("a B")
    assert leak_key("ab") != leak_key("a b")
