"""The real small model on a handful of prompts: labels, batches, token estimates (fairlrm 9.10, 9.12, 9.13)."""

import numpy as np
import pytest
from support.fair_worlds import long_tail_world

from recollect.backbones.protocol import answer_batch
from recollect.data.splits import leave_one_out
from recollect.errors import ConfigError
from recollect.prompts.fairlrm import PRESETS, FairPrompts, estimated_tokens
from recollect.recommenders.popularity import Popularity
from recollect.recommenders.prompt_cases import draw_cases, requests_of
from recollect.recommenders.prompt_rank_config import PromptRankConfig
from recollect.recommenders.prompted import PromptedRanker, single_token_labels


@pytest.fixture(scope="module")
def model(smollm2_dir):
    from recollect.backbones.transformers_engine import TransformersBackbone

    backbone = TransformersBackbone(smollm2_dir, dtype="float32", device="cpu")
    yield backbone
    backbone.close()


def test_label_logits_of_a_batch_equal_those_one_by_one_and_estimates_bound_the_tokens(model):
    labels = single_token_labels(lambda calls: answer_batch(model, calls), 26)
    assert labels == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    two_letters = single_token_labels(lambda calls: answer_batch(model, calls), 60)
    assert len(set(two_letters)) == 60
    dataset = long_tail_world(n_users=12)
    split = leave_one_out(dataset)
    config = PromptRankConfig(core=1, users=2, candidates=6, k=3)
    cases = draw_cases(dataset, split, Popularity().fit(dataset, split), config)
    prompts = FairPrompts(dataset.catalog, cases.popularity, model.control_tokens, 0, history_length=3)
    ranker = PromptedRanker(prompts, permutations=2)
    requests = requests_of(cases, labels[:6], 3)
    asked = []

    def together(calls):
        asked.extend(calls)
        return answer_batch(model, calls)

    def one_by_one(calls):
        return [answer_batch(model, [call])[0] for call in calls]

    batch = ranker.rank(together, requests, PRESETS["fairlrm"])
    alone = ranker.rank(one_by_one, requests, PRESETS["fairlrm"])
    for first, second in zip(batch, alone, strict=True):
        assert first.scores == pytest.approx(second.scores, abs=1e-4)
        assert np.isfinite(first.scores).all()
    tokens = [model._chats.encode_chat(call.messages) for call in asked]
    assert all(len(found) <= estimated_tokens(call.messages) for found, call in zip(tokens, asked, strict=True))


def test_labels_of_several_tokens_stop_the_run_before_it_asks(model):
    with pytest.raises(ConfigError, match="labels of one token"):
        single_token_labels(lambda calls: answer_batch(model, calls), 702)
