"""What going on with a run costs as its log grows: nothing more, save where past memories are looked up."""

import pytest
from support.agent_worlds import InProcess, options_of, play, reader

from recollect.agents.agentcf import AgentCF
from recollect.agents.memory import Memory
from recollect.data import HarborConfig, build_harbor
from recollect.journal import Journal, MemoryWrite, StepCommit


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    config = HarborConfig(n_users=4, n_domains=2, items_per_domain=24, min_events=7, max_events=9, shock_items=2)
    world = build_harbor(config, seed=4).dataset
    played = play(
        world, tmp_path_factory.mktemp("run"), InProcess(reader()), recall=True, interactions_per_user=2, held_out=1
    )
    return played.agents


class Reading(Journal):
    """A journal that counts the rows it hands out."""

    n_read = 0

    def events(self, kinds=None):
        for event in super().events(kinds):
            self.n_read += 1
            yield event

    def memories(self):
        found = super().memories()
        self.n_read += len(found)
        return found


class Pending:
    """Takes the place of the index: only what would be read again matters here."""

    def __init__(self):
        self.noted = 0

    def note(self, version):
        self.noted += 1

    def restore(self, rebuilds):
        pass


def rows_read(agents, path, n_versions, others, *, recall):
    """Rows read by `catch_up` from a log of `n_versions` private memories and `others` further events a version."""
    journal = Reading.open(path, config={}, resume=False)
    text = Memory("Likes jazz.", {}, 1).dump()
    for number in range(n_versions):
        owner, key = f"user:{number % 4}", "private:films"
        events = [{"step": number, "kind": "private", "owner": owner, "key": key, "after": text}]
        events += [{"step": number, "kind": "rank"}] * others
        journal.commit([StepCommit(number, tuple(events), (MemoryWrite(owner, key, text),))])
    resumed = AgentCF(
        agents.dataset,
        options_of(agents.dataset, recall=recall),
        questions=agents.questions,
        writer=agents.writer,
        features=agents.features,
        views=agents.views,
        embed=agents.embed,
        recall=Pending(),
        fingerprint="",
        history_rows={},
    )
    resumed.catch_up(journal, [])
    journal.close()
    return journal.n_read, resumed.recall.noted


def test_without_recall_resuming_reads_the_state_and_nothing_of_the_log(agents, tmp_path):
    assert rows_read(agents, tmp_path / "short", 8, 3, recall=False) == (4, 0)
    assert rows_read(agents, tmp_path / "long", 400, 3, recall=False) == (4, 0)


def test_with_recall_resuming_reads_one_row_for_each_memory_version_that_can_be_recalled(agents, tmp_path):
    """The past memories are what the index must hold again; events of other kinds are not read."""
    assert rows_read(agents, tmp_path / "short", 8, 3, recall=True) == (4 + 8, 8)
    assert rows_read(agents, tmp_path / "long", 400, 3, recall=True) == (4 + 400, 400)
