"""A run is not continued, unnoticed, with items that are called something else."""

from dataclasses import replace

import numpy as np
import pytest
from support.agent_worlds import objects, reader, with_titles
from support.fair_worlds import long_tail_world
from support.recommender_worlds import random_log
from support.tiny_decoder import patterned_log

import recollect
from recollect.agents.simulate import replay, simulate
from recollect.backbones.scripted import ScriptedBackbone
from recollect.data import HarborConfig, build_harbor, fingerprint, leave_one_out, text_fingerprint
from recollect.distill.config import DistillConfig
from recollect.distill.loop import _open_run
from recollect.errors import ResumeRefused
from recollect.eval.protocol import compare_protocols, protocol_hash
from recollect.eval.ranking import evaluate_ranker
from recollect.io import read_json
from recollect.recommenders import text
from recollect.recommenders.popularity import Popularity
from recollect.recommenders.prompt_rank import prompt_rank


def renamed(dataset, item=0):
    titles = [str(title) for title in dataset.catalog.titles]
    titles[item] += " (revised)"
    return with_titles(dataset, titles)


def test_the_fingerprint_of_texts_is_of_what_is_said_of_the_items_and_of_nothing_else():
    log = random_log()
    known = text_fingerprint(log)
    catalog = log.catalog
    said = [
        replace(catalog, titles=objects(["other", *catalog.titles[1:]])),
        replace(catalog, texts=objects(["a text", *catalog.texts[1:]])),
        replace(catalog, categories=[("Drama",), *catalog.categories[1:]]),
        replace(catalog, extra={"year": np.arange(len(catalog))}),
        replace(catalog, extra={"year": np.arange(len(catalog)) + 1}),
        replace(catalog, titles=objects(["\ud800", *catalog.titles[1:]])),
    ]
    found = [text_fingerprint(replace(log, catalog=other)) for other in said]
    assert len({known, *found}) == 1 + len(said)
    assert {fingerprint(replace(log, catalog=other)) for other in said} == {fingerprint(log)}
    later = replace(log, interactions=replace(log.interactions, time=log.interactions.time + 1))
    assert text_fingerprint(later) == known
    assert fingerprint(later) != fingerprint(log)
    order = np.argsort([str(name)[::-1] for name in catalog.item_ids])
    shuffled = replace(
        catalog,
        item_ids=catalog.item_ids[order],
        titles=catalog.titles[order],
        categories=[catalog.categories[at] for at in order],
        texts=catalog.texts[order],
    )
    assert text_fingerprint(replace(log, catalog=shuffled)) == known


def test_the_protocol_says_which_texts_and_rows_of_id_models_stay_comparable():
    log, other = random_log(), renamed(random_log())
    blocks = []
    for dataset in (log, other):
        split = leave_one_out(dataset)
        blocks.append(dict(evaluate_ranker(Popularity().fit(dataset, split), dataset, split).protocol))
    assert blocks[0]["text_fingerprint"] == text_fingerprint(log)
    assert set(compare_protocols(*blocks)) == {"text_fingerprint"}
    assert protocol_hash(blocks[0]) == protocol_hash(blocks[1])


def test_an_evaluation_keeps_rows_of_ids_and_refuses_rows_of_texts(monkeypatch, tmp_path):
    def by_letters(dataset, *_):
        vectors = np.array([[title.count(letter) + 1.0 for letter in "item0123"] for title in dataset.catalog.titles])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    monkeypatch.setattr(text, "item_vectors", by_letters)
    log, options = random_log(), {"core": 0, "out": (out := tmp_path / "run")}
    recollect.evaluate(log, models=("pop", "minilm"), **options)
    assert read_json(out / "run.json")["text_fingerprint"] == text_fingerprint(log)
    recollect.evaluate(renamed(log), models=("pop",), resume=True, **options)
    with pytest.raises(ResumeRefused, match="other titles, categories or texts, which 'minilm' reads"):
        recollect.evaluate(renamed(log), models=("pop", "minilm"), resume=True, **options)
    recollect.evaluate(log, models=("pop", "minilm"), resume=True, **options)


def test_prompts_are_not_continued_with_other_titles(tmp_path):
    world = long_tail_world(n_users=24, n_items=60)
    options = {"core": 1, "generator": "pop", "resamples": 20, "rerankers": (), "permutations": 1, "users": 4}
    options |= {"preset": ("base",), "out": tmp_path / "run"}
    prompt_rank(world, backbone=ScriptedBackbone(name="hash"), **options)
    assert read_json(tmp_path / "run" / "run.json")["text_fingerprint"] == text_fingerprint(world)
    with pytest.raises(ResumeRefused, match="item_texts"):
        prompt_rank(renamed(world), backbone=ScriptedBackbone(name="hash"), resume=True, **options)


@pytest.mark.parametrize("reads", ["text", "semantic_init"])
def test_a_distillation_that_reads_texts_is_not_continued_with_others(tmp_path, reads):
    log = patterned_log(n_users=12)
    log, other = (replace(one, meta={**one.meta, "fingerprint": fingerprint(one)}) for one in (log, renamed(log)))
    config = DistillConfig(resume=True, out=str(tmp_path), **{reads: "minilm"})
    manifest = _open_run(config, log, leave_one_out(log), tmp_path)
    assert manifest["text_fingerprint"] == text_fingerprint(log)
    assert _open_run(config, log, leave_one_out(log), tmp_path) == manifest
    with pytest.raises(ResumeRefused, match="has text_fingerprint"):
        _open_run(config, other, leave_one_out(other), tmp_path)


def test_a_distillation_of_ids_goes_on_whatever_the_titles(tmp_path):
    log = patterned_log(n_users=12)
    log, other = (replace(one, meta={**one.meta, "fingerprint": fingerprint(one)}) for one in (log, renamed(log)))
    config = DistillConfig(resume=True, out=str(tmp_path))
    _open_run(config, log, leave_one_out(log), tmp_path)
    assert _open_run(config, other, leave_one_out(other), tmp_path)["text_fingerprint"] == text_fingerprint(other)


def test_a_simulation_is_not_continued_with_other_titles_and_a_replay_says_what_it_did_not_need(tmp_path):
    small = HarborConfig(n_users=6, n_domains=2, items_per_domain=24, min_events=7, max_events=8, shock_items=2)
    world, backbone, out = build_harbor(small, seed=6).dataset, reader(), tmp_path / "run"
    options = {"interactions_per_user": 2, "held_out": 1, "recall": False, "out": str(out)}
    simulate(world, backbone=backbone, embedder=backbone, **options)
    assert read_json(out / "run.json")["text_fingerprint"] == text_fingerprint(world)
    with pytest.raises(ResumeRefused, match="item_texts"):
        simulate(renamed(world), backbone=backbone, embedder=backbone, resume=True, **options)
    assert not any("says other things of its items" in warning for warning in replay(out, dataset=world).warnings)
    unread = replace(world.catalog, extra={**world.catalog.extra, "colour": objects(["red"] * world.n_items)})
    again = replay(out, dataset=replace(world, catalog=unread))
    assert any("says other things of its items" in warning for warning in again.warnings)
