"""The four ways of reading an answer, orders of candidates, candidate sets (fairlrm 5, 9.10, 9.12)."""

import numpy as np
import pytest
from support.fair_worlds import by_popularity, candidates_in, long_tail_world, reader

from recollect.backbones.protocol import Choice, Request, Scored, answer_batch
from recollect.backbones.scripted import ScriptedBackbone
from recollect.data.splits import leave_one_out
from recollect.errors import ConfigError, InputError
from recollect.prompts.fairlrm import PRESETS, FairPrompts
from recollect.recommenders.candidate_sets import full_candidates, mixed_candidates, retrieval_candidates, with_target
from recollect.recommenders.popularity import Popularity
from recollect.recommenders.prompt_cases import draw_cases, requests_of
from recollect.recommenders.prompt_rank_config import PromptRankConfig
from recollect.recommenders.prompted import LABEL_POOL, PromptedRanker, single_token_labels


@pytest.fixture(scope="module")
def cases():
    dataset = long_tail_world()
    split = leave_one_out(dataset)
    return draw_cases(dataset, split, Popularity().fit(dataset, split), PromptRankConfig(core=1, users=20))


def prompts_of(cases, **options):
    return FairPrompts(cases.dataset.catalog, cases.popularity, (), 0, **options)


def rank(cases, backbone, preset="base", **options):
    ranker = PromptedRanker(prompts_of(cases), **options)
    requests = requests_of(cases, LABEL_POOL[:20], 10)
    return ranker.rank(lambda calls: answer_batch(backbone, calls), requests, PRESETS[preset])


def title_number(title):
    return int(title.split()[1])


def test_label_scores_follow_the_item_and_not_its_place(cases):
    def choose(choice: Choice):
        return [-title_number(item.title) / 10 for item in candidates_in(choice.messages)]

    for response in rank(cases, ScriptedBackbone(choose=choose, name="by number")):
        assert response.order.tolist() == sorted(response.candidates.tolist())
        assert (response.orders == response.order).all()


@pytest.mark.parametrize("m", [1, 4, 16])
def test_a_prior_on_places_shrinks_with_the_root_of_the_number_of_orders(cases, m):
    def choose(choice: Choice):
        return [-float(place) for place in range(len(choice.options))]

    spread = [
        response.scores.std() for response in rank(cases, ScriptedBackbone(choose=choose, name="place"), permutations=m)
    ]
    one_order = np.arange(20).std()
    assert np.mean(spread) == pytest.approx(one_order / np.sqrt(m), rel=0.12)


def test_equal_seeds_give_equal_answers_and_other_seeds_other_orders(cases):
    backbone = ScriptedBackbone(name="hash")
    first, again, other = (rank(cases, backbone, seed=seed) for seed in (0, 0, 1))
    assert all(
        (a.scores == b.scores).all() and a.prompt_hash == b.prompt_hash for a, b in zip(first, again, strict=True)
    )
    assert any(a.prompt_hash != b.prompt_hash for a, b in zip(first, other, strict=True))


def test_calibration_takes_out_what_is_said_without_a_user(cases):
    def choose(choice: Choice):
        liked = "The user took" in choice.messages[-1].content
        return [
            -float(place) + (title_number(item.title) % 7 if liked else 0)
            for place, item in enumerate(candidates_in(choice.messages))
        ]

    for response in rank(cases, ScriptedBackbone(choose=choose, name="prior"), calibrate=True, permutations=2):
        own = response.candidates % 7
        assert np.corrcoef(response.scores, own)[0, 1] == pytest.approx(1)


def test_title_likelihood_is_pmi_per_token_and_raw_beside_it(cases):
    def score(scoring):
        told = "The user took" in scoring.messages[-1].content
        return [
            -float(title_number(text)) - (2.0 * (title_number(text) % 3) if told else 0)
            for text in scoring.continuations
        ]

    for response in rank(cases, ScriptedBackbone(score=score, name="titles"), backend="title_loglik", permutations=1):
        n_tokens = 2  # "Title 007"
        assert response.scores == pytest.approx(-2.0 * (response.candidates % 3) / n_tokens)
        assert response.raw_scores == pytest.approx(-(response.candidates + 2.0 * (response.candidates % 3)) / n_tokens)
    ranker = PromptedRanker(prompts_of(cases), backend="title_loglik", permutations=1)
    (request, *_) = requests_of(cases, LABEL_POOL[:20], 10)
    calls = ranker.calls(request, PRESETS["base"])
    answers = answer_batch(ScriptedBackbone(), calls)
    with pytest.raises(InputError, match="prepare"):
        ranker.response(request, calls, answers)


def test_yes_no_asks_about_one_candidate_at_a_time(cases):
    seen = []

    def choose(choice: Choice):
        (line,) = [line for line in choice.messages[-1].content.split("\n") if line.startswith("Title")]
        seen.append(choice.options)
        return [float(title_number(line)), 50.0]

    for response in rank(cases, ScriptedBackbone(choose=choose, name="yes"), backend="yes_no"):
        assert response.order.tolist() == sorted(response.candidates.tolist(), reverse=True)
    assert set(seen) == {("yes", "no")}


def test_written_lists_are_completed_in_backbone_order_and_marked(cases):
    def generate(request: Request):
        shown = candidates_in(request.messages)
        return f'["{shown[5].label}", "{shown[2].label}", "{shown[5].label}", "Nowhere"]'

    options = {"backend": "generate", "orders": "retrieval", "permutations": 1}
    for response in rank(cases, ScriptedBackbone(generate=generate, name="two"), **options):
        expected = [5, 2, *(place for place in range(20) if place not in (5, 2))]
        assert response.order.tolist() == response.candidates[expected].tolist()
        assert (response.entries, response.invalid, response.duplicates, response.missing) == (4, 1, 1, 18)
        assert response.fill == "backbone"
    for response in rank(cases, reader(by_popularity, "whole"), **options):
        assert response.fill == ""


def test_labels_of_several_tokens_are_refused_at_the_start():
    def tokens(lengths):
        def answer(calls):
            (scoring,) = calls
            return [Scored(tuple(0.0 for _ in scoring.continuations), tuple(map(lengths, scoring.continuations)), 1)]

        return answer

    assert single_token_labels(tokens(lambda label: 1), 20) == LABEL_POOL[:20]
    assert single_token_labels(tokens(lambda label: 1 + (label == "AB")), 28)[-2:] == ("AA", "AC")
    with pytest.raises(ConfigError, match="'C' is not one token"):
        single_token_labels(tokens(lambda label: 1 + (label == "C")), 20)
    with pytest.raises(ConfigError, match="26 labels of one token where 30"):
        single_token_labels(tokens(len), 30)


def test_candidates_are_the_unseen_top_and_targets_are_never_added():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(6, 40)).astype(np.float32)
    histories = [generator.choice(40, 5, replace=False) for _ in range(6)]
    found = retrieval_candidates(scores, histories, 8)
    for row, history in enumerate(histories):
        unseen = [item for item in np.argsort(-scores[row], kind="stable") if item not in history]
        assert found[row].tolist() == unseen[:8]
    assert [len(row) for row in full_candidates(scores, histories)] == [35] * 6
    assert all(
        row[:8].tolist() == top.tolist() for row, top in zip(full_candidates(scores, histories), found, strict=True)
    )
    target = np.array([row[3] for row in found])
    assert (with_target(found, target) == found).all()
    lost = np.array([int(history[0]) for history in histories])
    assert (with_target(found, lost)[:, -1] == lost).all()
    with pytest.raises(InputError, match="fewer than 36 unseen"):
        retrieval_candidates(scores, histories, 36)
    with pytest.raises(InputError, match="NaN"):
        retrieval_candidates(np.full((1, 4), np.nan), [np.array([0])], 2)


def test_mixed_sets_are_half_retrieved_and_half_drawn_niche_items():
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(5, 60)).astype(np.float32)
    histories = [generator.choice(60, 5, replace=False) for _ in range(5)]
    popular = np.arange(60) < 12
    keys = [f"u{row}" for row in range(5)]
    found = mixed_candidates(scores, histories, 10, popular, keys=keys, seed=3)
    assert (found[:, :5] == retrieval_candidates(scores, histories, 5)).all()
    assert not popular[found[:, 5:]].any()
    for row in range(5):
        assert len(set(found[row])) == 10
        assert not set(found[row]) & set(histories[row])
    swapped = mixed_candidates(scores[::-1], histories[::-1], 10, popular, keys=keys[::-1], seed=3)
    assert (swapped[::-1] == found).all()  # a user's draw depends on the user alone
    with pytest.raises(InputError, match="unseen niche items"):
        mixed_candidates(scores, histories, 10, ~popular & False | (np.arange(60) > 2), keys=keys, seed=0)


def test_the_whole_catalogue_can_be_scored_title_by_title(tmp_path):
    from recollect.recommenders.prompt_rank import prompt_rank

    def score(scoring):
        assert "[niche]" not in scoring.messages[-1].content
        assert "Candidates" not in scoring.messages[-1].content
        return [
            -float(title_number(text)) if "The user took" in scoring.messages[-1].content else -1.0
            for text in scoring.continuations
        ]

    report = prompt_rank(
        long_tail_world(n_users=12),
        backbone=ScriptedBackbone(score=score, name="all titles"),
        out=tmp_path / "run",
        preset=("fairlrm",),
        candidate_set="full",
        backend="title_loglik",
        permutations=1,
        core=1,
        generator="pop",
        resamples=20,
        rerankers=("cp",),
    )
    assert report.protocol["retrieved_share"] == 1
    assert "fairlrm (raw likelihood)" in report.sections["models"]
    assert report.sections["user_side"]["verdict"]
