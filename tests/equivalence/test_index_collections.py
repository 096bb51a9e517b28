"""Memories, tags and items are found through one derived index; Chroma, in a folder or served, answers as arrays do."""

import shutil

import numpy as np
import pytest
from support.agent_worlds import InProcess, play, reader
from support.chroma_server import Server

from recollect.agents.groups import build_groups
from recollect.agents.memory_index import DECIMALS, ExactIndex
from recollect.agents.recall import Recall, Version
from recollect.data import HarborConfig, build_harbor

pytest.importorskip("chromadb")
from recollect.agents.chroma_index import ChromaIndex

DIMENSION = 12
N_ITEMS = 90
TAGS = [("jazz", "slow evenings", "vinyl"), ("robots",), ("gardens", "rain", "jazz clubs")]
QUESTIONS = ("quiet music at night", "machines that think", "jazz")


def embed(texts):
    """(B, D) unit rows, a pure function of each text."""
    rows = [np.random.default_rng(list(text.encode()) or [0]).normal(size=DIMENSION) for text in texts]
    return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


def described(item):
    return f"item {item}", f"domain {item % 3}"


def recall_over(open_index):
    items = list(range(5, 5 + N_ITEMS))
    vectors = embed([described(item)[0] for item in items])
    recall = Recall({item: at for at, item in enumerate(items)}, vectors, described, open_index, embed)
    recall.put_tags(TAGS)
    for step in range(8):
        recall.note(Version(step, f"user:{step % 2}", "single", step, f"memory {step}"))
    recall.restore([8])
    return recall


def exact(source):
    index = ExactIndex()
    for collection, row in source():
        index.upsert(collection, [row])
    return index


def answers(recall):
    return {
        "items": [recall.nearest_items(text, 7, domain) for text in QUESTIONS for domain in (None, "domain 1", "none")],
        "tags": [recall.nearest_tags(text, k) for text in QUESTIONS for k in (1, 4, 50)],
        "groups": [recall.nearest_groups(text) for text in QUESTIONS],
        "memories": recall.past_memories("user:1", np.arange(5, 25)).tolist(),
    }


def cosine(left, right):
    return round(float(embed([left])[0].astype(np.float64) @ embed([right])[0].astype(np.float64)), DECIMALS)


def test_nearest_items_tags_and_groups_are_those_of_a_plain_sort():
    recall = recall_over(exact)
    for text in QUESTIONS:
        for domain in (None, "domain 1"):
            pool = [item for item in range(5, 5 + N_ITEMS) if domain in (None, described(item)[1])]
            best = sorted(pool, key=lambda item: (-cosine(text, described(item)[0]), str(item)))[:7]
            found = recall.nearest_items(text, 7, domain)
            assert [item for item, _ in found] == best
            assert [share for _, share in found] == pytest.approx(
                [cosine(text, described(i)[0]) for i in best], abs=2e-6
            )
        owned = [(tag, rank) for rank, tags in enumerate(TAGS) for tag in tags]
        ranked = sorted(owned, key=lambda pair: -cosine(text, pair[0]))
        assert [(hit.tag, hit.group) for hit in recall.nearest_tags(text, 50)] == ranked
        assert [hit.group for hit in recall.nearest_groups(text)] == list(dict.fromkeys(rank for _, rank in ranked))
    assert recall.nearest_tags("jazz", 1)[0].tag == "jazz"


def test_an_embedded_store_answers_like_the_arrays_and_is_rebuilt_from_the_journal_when_damaged(tmp_path):
    expected = answers(recall_over(exact))
    held = []

    def opened(source):
        held.append(ChromaIndex(tmp_path / "index", source))
        return held[-1]

    for rebuilt, damage in ((0, False), (0, True), (1, False)):  # made, found again, then damaged and made anew
        recall = recall_over(opened)
        assert answers(recall) == expected
        assert held[-1].rebuilt == rebuilt
        recall.close()
        if damage:
            (tmp_path / "index" / "store-0001" / "chroma.sqlite3").write_bytes(b"not a database" * 1000)


def test_a_server_answers_like_the_arrays_and_its_lost_collections_come_back(tmp_path):
    expected = answers(recall_over(exact))
    server = Server(tmp_path / "server")
    server.start()
    try:
        recall = recall_over(lambda source: ChromaIndex(server.url, source, namespace="run"))
        assert answers(recall) == expected
        recall._index._store.drop_all()
        assert answers(recall) == expected
        assert recall._index.rebuilt >= 1
        recall.close()
    finally:
        server.kill()
        shutil.rmtree(server.folder, ignore_errors=True)


def test_new_groups_replace_every_old_tag(tmp_path):
    for open_index in (exact, lambda source: ChromaIndex(tmp_path / "index", source)):
        recall = recall_over(open_index)
        recall.put_tags([("trains",), ("tea", "robots")])
        assert {hit.tag for hit in recall.nearest_tags("jazz", 50)} == {"trains", "tea", "robots"}
        assert {hit.group for hit in recall.nearest_groups("jazz")} == {0, 1}
        recall.put_tags([])
        assert recall.nearest_tags("jazz", 3) == recall.nearest_groups("jazz") == []
        recall.close()


def test_clusters_of_tags_are_the_groups_whose_tags_are_found():
    """K-means reads the journaled vectors; a tag of a group, asked for by its own text, leads back to that group."""
    owned = {user: [f"tag {(user + shift) % 9}" for shift in range(3)] for user in range(12)}
    distinct = sorted({tag for tags in owned.values() for tag in tags})
    vectors = dict(zip(distinct, embed(distinct), strict=True))
    groups = build_groups(owned, vectors, kept=5, most_clusters=4, by="coverage", seed=0)
    recall = recall_over(exact)
    recall.put_tags([group.tags for group in groups])
    for rank, group in enumerate(groups):
        for tag in group.tags:
            assert recall.nearest_groups(tag)[0].group == rank
            assert recall.nearest_tags(tag, 1)[0].tag == tag


def test_a_run_keeps_tags_of_its_last_groups_and_all_its_items_in_the_index(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Recall, "close", lambda self: kept.append(self))
    config = HarborConfig(n_users=5, n_domains=2, items_per_domain=24, min_events=7, max_events=9, shock_items=2)
    world = build_harbor(config, 4).dataset
    played = play(world, tmp_path, InProcess(reader()), recall=True, interactions_per_user=3, held_out=1)
    (recall,) = kept
    index = recall._index
    recall._embed = reader().embed  # the run's own goes through its journal, which is closed
    tags = [tag for group in played.agents.groups for tag in group.tags]
    assert tags
    assert index.count("tags") == len(tags)
    assert index.count("items") == len(recall._item_rows)
    assert recall.nearest_tags(tags[0], 1)[0].tag == tags[0]
    item = next(iter(recall._item_rows))
    text = played.agents.questions.item_text(item)
    assert recall.nearest_items(text, 1)[0][1] == 1.0
    monkeypatch.undo()
    recall.close()
