"""Known answers of streams of recommendation tasks: floors, ranks, scores, what learning must and must not change."""

import numpy as np
import pytest
import torch
from support.continual_worlds import write_byte_decoder
from support.domain_worlds import SMALL_DOMAINS, random_log, titles_of, walks, written

from recollect.continual.adapters.attach import attach
from recollect.continual.adapters.config import SAPTAdapterConfig
from recollect.continual.domain_benchmark import DomainBenchmark
from recollect.continual.domain_items import ItemVocabulary, item_vectors
from recollect.continual.domain_learner import NOT_OFFERED, word_table
from recollect.continual.domain_ranking import AROUND, SCALE, markov, popularity, rank_cases
from recollect.continual.domain_tasks import cut_stream
from recollect.continual.examples import pad_left
from recollect.continual.methods.banks import grow_banks
from recollect.continual.methods.objective import model_inputs, supervised_logits
from recollect.continual.methods.registry import METHODS
from recollect.continual.methods.sapt import attention_of, prompt_mask
from recollect.continual.run import continual
from recollect.continual.run_config import ContinualConfig
from recollect.data.filters import subset
from recollect.data.splits import leave_one_out, refit_mask
from recollect.eval.ranking import evaluate_ranker
from recollect.recommenders.markov import Markov
from recollect.recommenders.popularity import Popularity


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    write_byte_decoder(folder / "bytes")
    written(walks((1, 3, 5), n_users=10, length=5), folder / "walks")
    return folder


def run(world, out, data="walks", **more):
    named = {"backbone": str(world / "bytes"), "out": out}
    return continual(world / data, **{**SMALL_DOMAINS, **named, **more})


@pytest.fixture(scope="module")
def stream(world):
    options = {**SMALL_DOMAINS, "data": str(world / "walks"), "backbone": str(world / "bytes")}
    return DomainBenchmark(ContinualConfig(**options))


def test_a_user_of_several_tasks_is_one_cluster(stream):
    users = {name: [case.user for case in task.cases] for name, task in stream.tasks.items()}
    labels = stream.clusters()
    assert stream.clusters_span_tasks
    pairs = {(label, user) for name in users for label, user in zip(labels[name].tolist(), users[name], strict=True)}
    assert len(pairs) == len({user for _, user in pairs}) == len({label for label, _ in pairs})
    assert sum(map(len, users.values())) > len(pairs)


@pytest.mark.parametrize(("model", "score"), [(Popularity(), popularity), (Markov(), markov)])
def test_floors_are_those_of_the_toolkits_evaluator_on_the_same_events(model, score):
    whole = random_log(4, n_users=15, n_events=300)
    dataset = subset(whole, whole.interactions.domain == 0, "left only")
    split = leave_one_out(dataset)
    rows = refit_mask(dataset, split)
    table = evaluate_ranker(model.fit(dataset, rows=rows), dataset, split, rows=rows, ks=(10,))
    other = evaluate_ranker(model, dataset, split, rows=rows, ks=(10,), mask="none")
    found = cut_stream(dataset, tasks=["left"], max_history=3)
    (task,) = found.tasks
    assert task.facts.targets == int(rows.sum()) - dataset.n_users
    ranked = rank_cases(score(task.rows, len(found.items), task.catalogue), task.cases, task.catalogue, batch_size=4)
    for name in ("ndcg@10", "hr@10", "mrr"):
        assert np.allclose(ranked.items[name], table.metrics[name], atol=1e-12)
    for name in ("ndcg@10", "hr@10"):
        assert np.allclose(ranked.items[f"{name}_unmasked"], other.metrics[name], atol=1e-12)


def test_a_score_is_the_scaled_cosine_to_state_and_history_and_no_item_outside_the_catalogue_has_one(stream):
    learner = stream.open_learner()
    task = stream.stream.tasks[1]
    question = stream.vocabulary.question(1, task.cases[0].history)
    ids = torch.from_numpy(question.input_ids)[None]
    with torch.no_grad():
        logits = learner.model(input_ids=ids).logits[0, -1]
        hidden = learner.model.trunk(inputs_embeds=learner.model.inputs[ids]).last_hidden_state[0, -1]
    outputs = torch.from_numpy(stream.vectors.outputs)
    around = outputs[task.cases[0].history[-5:]].mean(0)
    cosine = torch.nn.functional.cosine_similarity(
        (hidden / hidden.norm() + AROUND * around / around.norm())[None], outputs
    )
    inside = torch.from_numpy(stream.vectors.offered[1])
    assert inside.sum() == len(task.catalogue) == 8
    assert torch.allclose(logits[inside], SCALE * cosine[inside], atol=1e-4)
    assert (logits[~inside] == NOT_OFFERED).all()
    assert (logits.softmax(-1)[~inside] == 0).all()


def test_a_case_is_ranked_alone_as_beside_others_and_in_any_order(stream):
    learner = stream.open_learner()
    task = stream.stream.tasks[0]
    together = learner.rank(task, 0, batch_size=7)
    alone = learner.rank(task, 0, batch_size=1)
    assert np.array_equal(together.lists, alone.lists)
    for name, values in together.items.items():
        assert np.allclose(values, alone.items[name])
    assert len({tuple(row) for row in together.lists.tolist()}) > 1


def test_a_row_predicts_every_item_but_the_first_and_reads_only_what_came_before(stream):
    learner = stream.open_learner()
    row = stream.stream.tasks[0].rows[0]
    example = stream.vocabulary.training_row(0, row)
    batch = {name: torch.from_numpy(array) for name, array in pad_left([example], 0)._asdict().items()}
    with torch.no_grad():
        logits, targets = supervised_logits(learner.model, batch)
    assert targets.tolist() == row.items[1:].tolist()
    for at in range(1, len(row.items)):
        question = stream.vocabulary.question(0, row.items[:at])
        with torch.no_grad():
            asked = learner.model(input_ids=torch.from_numpy(question.input_ids)[None]).logits[0, -1]
        assert torch.allclose(logits[at - 1], asked, atol=1e-4)


def test_sapt_ranks_with_the_weights_it_trains_with(stream):
    learner = stream.open_learner()
    attach(learner.model, SAPTAdapterConfig(query_width=8))
    grow_banks(learner.model, 1)
    attention = attention_of(learner.model)
    attention.add_key()
    row, question = (
        {name: torch.from_numpy(array) for name, array in pad_left([example], 0)._asdict().items()}
        for example in (
            stream.vocabulary.training_row(1, stream.stream.tasks[1].rows[0]),
            stream.vocabulary.question(1, stream.stream.tasks[1].cases[0].history),
        )
    )
    with torch.no_grad():
        with attention.prompts(prompt_mask(learner.model, row)):
            learner.model(**model_inputs(row))
        trained = attention()
        learner.model(**model_inputs(question))
        assert torch.equal(attention(), trained)
        other = stream.vocabulary.question(0, stream.stream.tasks[1].cases[0].history)
        learner.model(input_ids=torch.from_numpy(other.input_ids)[None])
    assert (attention() - trained).abs().max() > 1e-4  # another domain, the same items


def test_a_context_item_is_read_and_not_predicted():
    vocabulary = ItemVocabulary(n_items=5, words=(9, 9), n_catalogues=2)
    from recollect.continual.domain_tasks import TrainingRow

    example = vocabulary.training_row(1, TrainingRow(np.array([4, 2, 0, 3]), n_context=2))
    assert example.input_ids.tolist() == [5, 6, 8, 4, 2, 0, 3]
    assert example.labels.tolist() == [-100, -100, -100, -100, -100, 0, 3]


def test_items_of_one_text_have_one_vector_and_an_item_without_text_has_its_own(world):
    dataset = walks((1, 1))
    dataset.catalog.titles[3] = ""
    found = cut_stream(dataset)
    options = ContinualConfig(**{**SMALL_DOMAINS, "data": str(world / "walks"), "backbone": str(world / "bytes")})
    tokens = DomainBenchmark(options).tokens
    vocabulary = ItemVocabulary(len(found.items), (5,), 2)
    table = word_table(world / "bytes")
    one, again = (item_vectors(found, vocabulary, ["a", "b"], tokens, table, "words", 0) for _ in range(2))
    assert np.array_equal(one.inputs, again.inputs)
    assert one.n_random == 1
    assert np.allclose(np.linalg.norm(one.outputs, axis=1), 1, atol=1e-5)
    same = [item for item in range(8) if item != 3]
    assert np.array_equal(one.outputs[same], one.outputs[[item + 8 for item in same]])
    similar = np.abs(one.outputs @ one.outputs[3])
    assert np.argmax(similar) == 3
    assert np.sort(similar)[-2] < 0.9
    assert len(set(titles_of(8))) == 8


def test_a_frozen_model_forgets_exactly_nothing(world, tmp_path):
    report = run(world, tmp_path, learning_rate=0.0, untouched=True, evaluation="square", method="seq-lora,mh-moe")
    for one in report.sections["methods"].values():
        assert all(row == one["untouched"] for row in one["accuracy_matrix"])
        assert one["aggregates"]["bwt"]["value"] == 0.0
        assert one["aggregates"]["forgetting"]["value"] == 0.0
        assert one["aggregates"]["op"]["value"] == pytest.approx(np.mean(one["untouched"]))


def test_a_domain_learnt_a_second_time_is_not_forgotten_and_a_contrary_one_makes_it_so(world, tmp_path):
    learnt = {"epochs": 8, "learning_rate": 0.01, "checkpoint_every": 1000}
    written(walks((1, 1)), tmp_path / "same")
    written(walks((1, 3)), tmp_path / "other")
    named = {**SMALL_DOMAINS, **learnt, "backbone": str(world / "bytes")}
    same = continual(tmp_path / "same", **named, out=tmp_path / "run-same")
    other = continual(tmp_path / "other", **named, method="seq-lora,per-task", out=tmp_path / "run-other")
    first, last = same.sections["accuracy_matrix"]
    assert first[0] > 0.9
    assert last[0] >= first[0]
    assert last[0] == pytest.approx(last[1], abs=0.05)  # the same users, titles and walks
    methods = other.sections["methods"]
    lost = methods["seq-lora"]["aggregates"]["bwt"]["value"]
    assert lost < -0.15
    assert lost < same.sections["bwt"] - 0.1
    assert methods["per-task"]["aggregates"]["bwt"]["value"] == 0.0
    assert methods["per-task"]["aggregates"]["op"]["value"] > methods["seq-lora"]["aggregates"]["op"]["value"] + 0.1


def test_floors_know_the_walk_and_stand_in_the_report(world, tmp_path):
    report = run(world, tmp_path, learning_rate=0.0)
    for floor in report.sections["floors"].values():
        assert floor["predictor"] == "Markov chain"
        assert floor["value"] == 1.0  # every user walks in the same steps
        assert set(floor["others"]) == {"popularity", "text similarity"}
    assert report.sections["op_norm"] is None
    assert any("no model is needed for a, b, c" in warning for warning in report.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_a_stream_of_domains(world, tmp_path, method):
    report = run(world, tmp_path, method=method, tasks="a,b", checkpoint_every=100)
    first, last = report.sections["accuracy_matrix"]
    assert all(0 < value <= 1 for value in last)
    assert first == [None, None] if method == "joint" else first[0] > 0
