"""Half-rounds and runs of a distillation: what is frozen, what is injected, and that a killed one repeats itself."""

from __future__ import annotations

import dataclasses
import multiprocessing

import numpy as np
import pytest
import torch
from support.tiny_decoder import patterned_log, write_tiny_decoder

import recollect
from recollect.data.examples import training_sequences
from recollect.data.splits import leave_one_out
from recollect.distill.config import METHODS, DistillConfig
from recollect.distill.ensemble import WeightChoice, mixed_scores
from recollect.distill.factors import Factors, Shares
from recollect.distill.fused import fused_distillation_loss
from recollect.distill.learners import Crm, KeptStates, Llm, SampleTeacher, trained_samples, weights_hash, wrap
from recollect.distill.llm_srec_ranker import LlmSRec
from recollect.distill.losses import distillation_loss
from recollect.distill.rounds import Strength, train_half
from recollect.distill.weights import sample_weights, true_item_rank
from recollect.errors import ConfigError, TrainingDiverged
from recollect.eval.metrics import ndcg, rank_counts
from recollect.io import read_json
from recollect.loop import LoopConfig, train
from recollect.progress import SilentProgress
from recollect.recommenders.configs import SASRecConfig
from recollect.recommenders.llm_sequential import LlmConfig, LlmSequential
from recollect.recommenders.sasrec import SASRec

LOG = patterned_log()
SEQUENCES = training_sequences(LOG, leave_one_out(LOG).train)
LOOP = LoopConfig(epochs=2, patience=None, learning_rate=3e-3)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_tiny_decoder(tmp_path_factory.mktemp("decoder"))


def student(seed: int = 0, epochs: int = 2) -> SASRec:
    return SASRec(SASRecConfig(hidden=16, epochs=epochs, batch_size=16, seed=seed, max_length=6)).fit(LOG)


def reader(decoder, crm: SASRec, **options) -> LlmSequential:
    config = LlmConfig(**{"base": str(decoder), "keep_layers": 1, "precision": "fp32", "max_length": 6} | options)
    return LlmSequential(config).build(LOG, crm.module.item_vectors().detach().numpy())


@pytest.mark.parametrize("kind", ["none", "fixed", "online"])
def test_the_fused_loss_equals_the_plain_one_gradients_included(kind):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state, items = draw(50, 6).requires_grad_(), draw(31, 6).requires_grad_()
    teacher = Factors(draw(50, 4), draw(31, 4))
    target = torch.randint(31, (50,), generator=generator)
    taught = teacher.state @ teacher.items.T
    rank = true_item_rank(taught, target)
    given = {"none": {}, "fixed": {"weight": draw(50).abs()}, "online": {"teacher_rank": rank}}[kind]
    value, used = fused_distillation_loss(
        Factors(state, items), target, teacher, temperature=2.0, strength=0.5, **given
    )
    found = torch.autograd.grad(value, (state, items))
    logits = state @ items.T
    weight = given.get("weight", torch.ones(50, dtype=torch.float64))
    if kind == "online":
        weight = sample_weights(true_item_rank(logits, target), rank)
    plain = distillation_loss(logits, target, taught, weight, temperature=2.0, strength=0.5)
    torch.testing.assert_close(value, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(used, weight.to(used.dtype))
    for one, two in zip(found, torch.autograd.grad(plain, (state, items)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)


def test_distributions_made_once_give_the_loss_of_the_logits_and_only_at_their_temperature():
    generator = torch.Generator().manual_seed(0)
    state, items = (torch.randn(n, 6, generator=generator, dtype=torch.float64).requires_grad_() for n in (50, 31))
    taught = torch.randn(50, 31, generator=generator, dtype=torch.float64)
    taught[:, 3] = -torch.inf
    target = torch.randint(31, (50,), generator=generator)
    results = []
    for teacher in (taught, Shares.of(taught, 2.0)):
        value, _ = fused_distillation_loss(Factors(state, items), target, teacher, temperature=2.0, strength=0.5)
        results.append([value, *torch.autograd.grad(value, (state, items))])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)
    ones = torch.ones(50, dtype=torch.float64)
    plain = distillation_loss(state @ items.T, target, taught, ones, temperature=2.0, strength=0.5)
    torch.testing.assert_close(results[0][0], plain, rtol=1e-12, atol=0)
    with pytest.raises(ConfigError, match=r"made at temperature 2\.0, not 1\.0"):
        fused_distillation_loss(Factors(state, items), target, Shares.of(taught, 2.0), temperature=1.0, strength=0.5)


def test_a_teacher_asked_often_gives_the_distributions_of_its_logits(decoder, tmp_path, monkeypatch):
    crm = Crm(student())
    wanted = trained_samples(crm, SEQUENCES)
    teacher = SampleTeacher.cached(tmp_path / "teacher", crm, SEQUENCES, wanted)
    position = np.flatnonzero(wanted)[::7]
    given = teacher.take_often(position, 2.0)
    factors = teacher.take(position)
    expected = (factors.state @ factors.items.T / 2).softmax(1)
    torch.testing.assert_close(given.share, expected)
    torch.testing.assert_close(given.log_mass, (expected * expected.log()).sum(1), rtol=1e-4, atol=1e-5)
    assert teacher.take_often(position, 1.0).temperature == 1.0
    with pytest.raises(recollect.RecollectError, match="was not asked about"):
        teacher.take_often(np.flatnonzero(~wanted)[:1], 2.0)
    monkeypatch.setattr("recollect.distill.learners.SHARE_CELLS", 10)
    assert isinstance(teacher.take_often(position, 2.0), Factors)


def test_a_weight_of_zero_everywhere_is_cross_entropy_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    state, items = (torch.randn(n, 6, generator=generator).requires_grad_() for n in (50, 31))
    teacher = torch.randn(50, 31, generator=generator)
    target = torch.randint(31, (50,), generator=generator)
    results = []
    for options in ({"strength": 0.5, "weight": torch.zeros(50)}, {"strength": 0.0}):
        value, _ = fused_distillation_loss(Factors(state, items), target, teacher, temperature=2.0, **options)
        results.append([value, *torch.autograd.grad(value, (state, items))])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_without_strength_a_half_round_is_training_with_cross_entropy_bit_for_bit(tmp_path):
    model, plain = student(), student()
    how = Strength(strength=0.0)
    train_half(Crm(model), Crm(student(1)), SEQUENCES, how=how, loop=LOOP, scratch=tmp_path / "scratch")
    batches = type(plain)(dataclasses.replace(plain.config, seed=LOOP.seed)).batches(SEQUENCES)
    train(plain.module, batches=batches, loss=plain.module.training_loss, config=LOOP)
    assert weights_hash(model.module, trained=True) == weights_hash(plain.module, trained=True)


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_half_round_changes_what_is_trained_and_nothing_else(decoder, tmp_path, direction):
    crm = student()
    llm = reader(decoder, crm)
    sides = (Llm(llm), Crm(crm)) if direction == "down" else (Crm(crm), Llm(llm))
    before = [(weights_hash(side.module, True), weights_hash(side.module, False)) for side in sides]
    sizes = [sum(tensor.numel() for tensor in side.module.parameters()) for side in sides]
    train_half(*sides, SEQUENCES, how=Strength(), loop=LOOP, scratch=tmp_path / "scratch")
    after = [(weights_hash(side.module, True), weights_hash(side.module, False)) for side in sides]
    assert after[0][0] != before[0][0]  # the student learnt
    assert after[0][1] == before[0][1]  # its frozen part, item vectors E included, did not move
    assert after[1] == before[1]  # the teacher did not move
    assert [sum(tensor.numel() for tensor in side.module.parameters()) for side in sides] == sizes
    assert not (tmp_path / "scratch").exists()


def test_the_cached_teacher_gives_the_logits_and_ranks_it_gives_online(decoder, tmp_path):
    crm = student()
    for side in (Crm(crm), Llm(reader(decoder, crm))):
        wanted = trained_samples(side, SEQUENCES)
        teacher = SampleTeacher.cached(tmp_path / side.recommender.name, side, SEQUENCES, wanted)
        position = np.flatnonzero(wanted)[::7]
        factors = teacher.take(position)
        cached = (factors.state @ factors.items.T).numpy()
        own = np.searchsorted(SEQUENCES.starts, position, side="right") - 1
        # In reading order a sample sees at least half a window; where it sees all it has, scoring is the same.
        histories = [SEQUENCES.items[SEQUENCES.starts[s] : p] for s, p in zip(own, position, strict=True)]
        whole = np.array([len(history) <= 3 for history in histories])
        online = side.recommender.score(histories)
        np.testing.assert_allclose(cached[whole], online[whole], atol=1e-5)
        ranks = true_item_rank(torch.from_numpy(cached), torch.from_numpy(SEQUENCES.items[position])).numpy()
        np.testing.assert_array_equal(teacher.rank[position], ranks)
        with pytest.raises(recollect.RecollectError, match="was not asked about"):
            teacher.take(np.array([0]))


class Killed(Exception):
    pass


class Kill(SilentProgress):
    """Dies after so many steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.left -= steps
        if self.left < 0:
            raise Killed


def test_a_killed_half_round_repeats_the_uninterrupted_one(decoder, tmp_path):
    crm = student()

    def run(name, progress=None):
        model = reader(decoder, crm)
        train_half(
            Llm(model),
            Crm(crm),
            SEQUENCES,
            how=Strength(ranks="round_start"),
            loop=LOOP,
            scratch=tmp_path / name / "teacher",
            folder=tmp_path / name,
            checkpoint_every=2,
            progress=progress,
        )
        return weights_hash(model.module, trained=True)

    whole = run("whole")
    with pytest.raises(Killed):
        run("killed", Kill(5))
    assert run("killed") == whole


SMALL = {
    "core": 0,
    "rounds": 2,
    "seeds": 1,
    "keep_layers": 1,
    "precision": "fp32",
    "student_hidden": 8,
    "student_epochs": 2,
    "round_epochs": 1,
    "teacher_epochs": 1,
    "student_batch": 16,
}


def test_a_killed_run_resumes_to_the_same_report(decoder, tmp_path):
    options = {**SMALL, "teacher": str(decoder), "method": "round-start", "compare": ("none",)}
    whole = recollect.distill(LOG, out=tmp_path / "whole", **options)
    with pytest.raises(Killed):
        recollect.distill(LOG, out=tmp_path / "killed", progress=Kill(22), **options)
    resumed = recollect.distill(LOG, out=tmp_path / "killed", resume=True, **options)
    assert resumed.sections["models"] == whole.sections["models"]
    assert resumed.sections["differences"] == whole.sections["differences"]
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1]
    stored = read_json(tmp_path / "whole" / "report.json")
    wanted = {"student_alone", "teacher_alone", "student_distilled", "teacher_distilled", "ensemble", "self_distilled"}
    assert wanted <= set(stored["models"])
    assert set(stored["models"]["student_distilled"]["ndcg@10"]) >= {"value", "ci95", "n", "per_seed"}
    assert {"teacher_alone", "teacher_distilled"} <= set(stored["shuffled_histories"])
    assert all(-1 <= entry["cosine"] <= 1 for entry in stored["shuffled_histories"].values())
    masks = stored["other_mask"]
    assert set(masks) == {"teacher_alone", "teacher_distilled", "labels-only/teacher"}
    for name, both in masks.items():
        own = stored["models"][name]["ndcg@10"]
        assert [both["own"]["value"], *both["own"]["ci95"]] == pytest.approx([own["value"], *own["ci95"]], abs=1e-12)
        assert 0 <= both["other"]["value"] < own["value"]  # what was seen stands in the way
    # Every table has the rows of counts: those of an evaluation, without a share in the adjusted p-values.
    counted = recollect.evaluate(LOG, models=("pop", "markov"), core=0, out=tmp_path / "counted").sections["models"]
    for name in ("pop", "markov"):
        for metric in ("hr@10", "ndcg@10", "mrr", "coverage@10"):
            assert stored["models"][name][metric]["value"] == pytest.approx(counted[name][metric]["value"], abs=1e-12)
        assert name not in {row["model"] for row in stored["differences"]}
    (table,) = [panel for panel in stored["panels"] if panel["title"].startswith("Test, full ranking")]
    assert [row[0] for row in table["rows"]][-2:] == ["pop", "markov"]
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "Sample weights after round 1" in page
    assert "Validation ndcg@10 per round" in page
    assert "full ranking of the" in page


def recipes(folder):
    """{key: recipe} of every stage in a run folder."""
    paths = (folder / "stages").glob("*/stage.json")
    return {path.parent.name.rpartition("-")[2]: read_json(path)["recipe"] for path in paths}


def stage(folder, kind, number):
    """The stage of a kind and round in a run folder, as (recipe, model)."""
    from recollect.distill.stages import Stage

    found = []
    for path in sorted((folder / "stages").glob(f"{kind}-*")):
        content = read_json(path / "stage.json")
        if content["recipe"].get("round") == number:
            found.append((content["recipe"], Stage("", path, {}, {}).load()))
    return found


def test_every_method_gives_its_rows_and_item_vectors_are_injected_anew_or_not(decoder, tmp_path):
    report = recollect.distill(LOG, out=tmp_path / "run", teacher=str(decoder), compare=("all",), **SMALL)
    models = report.sections["models"]
    both = {"static", "round-start", "crossfit", "no-update"}
    expected = {f"{method}/{side}" for method in both for side in ("student", "teacher")}
    expected |= {"down-only/teacher", "up-only/student", "mutual/student", "popularity/student"}
    expected |= {"label-smoothing/student", "dllm2rec/student", "llm-srec/teacher"}
    expected |= {"labels-only/student", "labels-only/teacher"}
    assert expected <= set(models)
    assert len(report.sections["half_rounds"]) == len(METHODS)
    details = report.sections["rows"]
    students = {row["parameters"] for name, row in details.items() if "student" in name or name == "self_distilled"}
    assert len(students) == 1  # distillation adds nothing to what is served
    assert {row["parameters"] for name, row in details.items() if name in ("teacher_alone", "teacher_distilled")} == {
        details["teacher_alone"]["parameters"]
    }
    trained = [
        path for path in (tmp_path / "run" / "stages").iterdir() if "seconds" in read_json(path / "stage.json")["info"]
    ]
    assert report.ledger["stages"] == len(trained)  # fold models and the other seed's student included
    assert sum(path.name.startswith("crossfit-") for path in trained) == 1
    budget = {name: len(halves[0]) for name, halves in report.sections["half_rounds"].items()}
    assert {budget[name] for name in ("self", "up-only", "popularity", "label-smoothing")} == {SMALL["rounds"]}
    assert budget["labels-only"] == 2 * SMALL["rounds"]
    plan = recollect.distill(LOG, dry_run=True, teacher=str(decoder), compare=("all",), **SMALL).ledger
    made = [path.name.rpartition("-")[0] for path in (tmp_path / "run" / "stages").iterdir()]
    assert plan["downward_half_rounds_per_seed"] == made.count("llm-down")
    assert plan["upward_half_rounds_per_seed"] == made.count("crm-up") + made.count("crm-constant")
    assert report.protocol["folds"] == 2
    assert not (tmp_path / "run" / "teacher-states").exists()
    at_once = [
        recipe for recipe in recipes(tmp_path / "run").values() if recipe["kind"] in ("crm-mutual", "crm-dllm2rec")
    ]
    assert [recipe["patience"] for recipe in at_once] == [SMALL["rounds"] * DistillConfig.round_patience] * 2
    first = report.sections["half_rounds"]["self"][0][0]["stage"]
    teacher = recipes(tmp_path / "run")[first]["teacher"]
    taught = read_json(tmp_path / "run" / "stages" / f"crm-{teacher}" / "stage.json")["info"]
    assert details["self_distilled"]["teacher_validation"] == [taught["validation"]]
    by_key = {path.name.rpartition("-")[2]: path for path in (tmp_path / "run" / "stages").iterdir()}
    seen = set()
    for recipe, llm in stage(tmp_path / "run", "llm-down", 2):
        from recollect.distill.stages import Stage

        crm = Stage("", by_key[recipe["embedding"]], {}, {}).load()
        assert torch.equal(llm.module.embedding, crm.module.item_vectors())
        seen.add(recipe["embedding"] == recipe["teacher"])
    assert seen == {True, False}  # re-injected; with no-update those of round 0
    assert type(wrap(crm)) is Crm


def test_processes_side_by_side_make_the_run_of_one(decoder, tmp_path):
    options = {**SMALL, "rounds": 1, "seeds": 2, "teacher": str(decoder), "method": "up-only", "compare": ("none",)}
    one = recollect.distill(LOG, out=tmp_path / "one", **options)
    two = recollect.distill(LOG, out=tmp_path / "two", workers=2, **options)
    for section in ("models", "differences", "shuffled_histories", "other_mask"):
        assert two.sections[section] == one.sections[section]
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two")]
    assert lines[0] == lines[1]
    assert not list((tmp_path / "two").glob("teacher-states*"))


def test_what_a_process_refuses_reaches_the_caller_and_ends_the_others(decoder, tmp_path):
    options = {**SMALL, "rounds": 1, "seeds": 2, "teacher": str(decoder), "student_learning_rate": 1e38}
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        recollect.distill(LOG, out=tmp_path / "run", workers=2, **options)
    assert not multiprocessing.active_children()


def test_labels_only_is_the_alternation_with_a_lambda_of_zero(decoder, tmp_path):
    """With lambda 0 the alternation itself is that control, bit for bit; with the default it is another model."""
    options = {**SMALL, "teacher": str(decoder), "compare": ("none",)}
    zero = recollect.distill(LOG, out=tmp_path / "zero", strength_down=0.0, strength_up=0.0, **options)
    models = zero.sections["models"]
    for side in ("student", "teacher"):
        assert models[f"labels-only/{side}"] == models[f"{side}_distilled"]
    taught = recollect.distill(LOG, out=tmp_path / "taught", **options).sections["models"]
    for side in ("student", "teacher"):
        assert taught[f"labels-only/{side}"] == models[f"labels-only/{side}"]
        assert taught[f"{side}_distilled"] != models[f"{side}_distilled"]


def test_the_llm_is_trained_on_labels_only_where_another_row_trains_it(decoder, tmp_path):
    options = {**SMALL, "rounds": 1, "teacher": str(decoder), "compare": ("none",)}
    report = recollect.distill(LOG, out=tmp_path / "run", method="up-only", **options)
    assert "labels-only/student" in report.sections["models"]
    assert "labels-only/teacher" not in report.sections["models"]
    assert not list((tmp_path / "run" / "stages").glob("llm-down-*"))


def test_a_teacher_kept_between_half_rounds_is_read_once_and_teaches_the_same(decoder, tmp_path, monkeypatch):
    crm = student()
    llm, loop = Llm(reader(decoder, crm)), dataclasses.replace(LOOP, epochs=1)
    kept = KeptStates(tmp_path / "kept")

    def two_rounds(read):
        models = [student(), student(3)]
        for model in models:
            train_half(Crm(model), llm, SEQUENCES, how=Strength(), loop=loop, scratch=tmp_path / "scratch", read=read)
        return [weights_hash(model.module, trained=True) for model in models]

    expected = two_rounds(None)
    reads = []
    whole = SampleTeacher.cached.__func__
    monkeypatch.setattr(SampleTeacher, "cached", classmethod(lambda *given: reads.append(1) or whole(*given)))
    assert two_rounds(kept) == expected
    assert len(reads) == 1


def test_a_run_folder_may_move_whatever_its_models_refer_to(decoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {**SMALL, "rounds": 1, "teacher": str(decoder), "method": "llm-srec", "compare": ("none",)}
    first = recollect.distill(LOG, out="run", **options)
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    (path,) = (tmp_path / "moved" / "stages").glob("llm-srec-*")
    from recollect.distill.stages import Stage

    assert Stage("", path, {}, {}).load().score([LOG.interactions.item[:3]]).shape == (1, LOG.n_items)
    for cached in (tmp_path / "moved").glob("stages/*/*-*.json"):
        cached.unlink()  # forces every model to be read and tested again
    again = recollect.distill(LOG, out=tmp_path / "moved", resume=True, **options)
    assert again.sections["models"] == first.sections["models"]


def test_parameters_are_what_serving_reads(decoder):
    from recollect.distill.workshop import served_parameters

    crm = student()
    llm = reader(decoder, crm)
    words = 9 * 32  # of the tiny decoder
    everything = sum(tensor.numel() for tensor in llm.module.parameters())
    assert served_parameters(llm) == everything - words + LOG.n_items * 16
    assert served_parameters(crm) == sum(tensor.numel() for tensor in crm.module.parameters())
    heads = LlmSRec(llm, collaborative_width=16, seed=0, source="nowhere")
    own = sum(tensor.numel() for part in (heads.module.user, heads.module.items) for tensor in part.parameters())
    assert served_parameters(heads) == served_parameters(llm) + own


def test_a_half_round_under_another_teacher_or_temperature_is_not_continued(tmp_path):
    def run(teacher: int, how: Strength, progress=None):
        train_half(
            Crm(student()),
            Crm(student(teacher)),
            SEQUENCES,
            how=how,
            loop=LOOP,
            scratch=tmp_path / "scratch",
            folder=tmp_path / "work",
            checkpoint_every=1,
            progress=progress,
        )

    with pytest.raises(Killed):
        run(1, Strength(), Kill(3))
    for teacher, how in ((2, Strength()), (1, Strength(temperature=3.0))):
        with pytest.raises(recollect.RecollectError, match="other"):
            run(teacher, how)
    run(1, Strength())


def test_the_weight_is_chosen_for_the_mixture_that_is_tested():
    """Standardised over the whole catalogue, then masked: as `EnsembleScores` under the evaluator."""
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 40, 12))
    first[:, :4] += 50  # what was seen would stretch the scale of one model, were it standardised after masking
    target = generator.integers(4, 12, 40)
    masked = np.zeros((40, 12), dtype=bool)
    masked[:, :4] = True
    choice = WeightChoice(k=5)
    choice.add(first, second, target, masked=masked)
    for number, weight in enumerate(choice.weights.tolist()):
        scores = mixed_scores(first, second, weight)
        scores[masked] = -np.inf
        assert choice.curve[number] == pytest.approx(ndcg(*rank_counts(scores, target), 5).mean())


def test_adding_a_row_reuses_what_is_there(decoder, tmp_path):
    options = {**SMALL, "teacher": str(decoder), "rounds": 1}
    first = recollect.distill(LOG, out=tmp_path / "run", compare=("none",), **options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "stages").glob("*/stage.json")}
    second = recollect.distill(LOG, out=tmp_path / "run", resume=True, compare=("down-only",), **options)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "stages").glob("*/stage.json")}
    assert after == before  # one downward round of the main method is the whole of down-only
    assert second.sections["models"]["down-only/teacher"] == first.sections["models"]["teacher_distilled"]
