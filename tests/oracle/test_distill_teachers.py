"""Teachers, cross-fitting, the ensemble and the baselines' mathematics."""

import numpy as np
import pytest
import torch
from scipy.stats import zscore

from recollect.data.examples import Sequences
from recollect.distill.blockwise import blockwise_distillation_loss
from recollect.distill.crossfit import crossfit_ranks, recommender_ranks, rows_without, user_folds
from recollect.distill.dllm2rec import TextInformedEmbedding, list_loss, list_weights
from recollect.distill.ensemble import EnsembleScores, WeightChoice, case_z_scores, mixed_scores
from recollect.distill.factors import Factors
from recollect.distill.llm_srec import Heads, llm_srec_losses, uniformity
from recollect.distill.losses import distillation_kl, distillation_loss
from recollect.distill.samples import training_samples
from recollect.distill.teachers import CachedStateTeacher, OnlineTeacher, PopularityTeacher
from recollect.distill.topk_teacher import TopKTeacher
from recollect.distill.weights import true_item_rank
from recollect.errors import ConfigError, DataError, InputError, ModelFileError

N_SAMPLES, N_ITEMS, WIDTH = 37, 23, 12


class Fixed:
    """A fitted recommender whose scores are a fixed function of the last item."""

    name = "fixed"

    def __init__(self, seed: int, n_items: int = N_ITEMS) -> None:
        self.n_items = n_items
        self.table = np.random.default_rng(seed).normal(size=(n_items, n_items)).astype(np.float32)

    def score(self, histories, candidates=None):
        scores = self.table[[history[-1] for history in histories]]
        return scores if candidates is None else np.take_along_axis(scores, candidates, axis=1)


@pytest.fixture
def language_model() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States of all samples, W_out, and the logits the model itself gives."""
    generator = torch.Generator().manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(5, WIDTH), torch.nn.LayerNorm(WIDTH), torch.nn.GELU())
    head = torch.nn.Linear(WIDTH, N_ITEMS, bias=False)
    with torch.no_grad():
        for parameter in (*body.parameters(), *head.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        prompts = torch.randn(N_SAMPLES, 5, generator=generator)
        states = body(prompts)
        return states, head.weight.detach(), head(states)


# ---- cached states (oracle 7) -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-2), ("bf16", 1e-1)])
def test_cached_states_give_the_logits_of_the_model_itself(tmp_path, language_model, precision, tolerance):
    states, head, online = language_model
    written = CachedStateTeacher.write(
        tmp_path, states.split(10), head, n_samples=N_SAMPLES, precision=precision, fingerprint="weights 1"
    )
    for teacher in (written, CachedStateTeacher(tmp_path)):
        index = np.array([36, 0, 5, 5])
        assert (teacher.logits(index) - online[index]).abs().max() < tolerance
        assert torch.equal(teacher.factors(index).block(slice(0, 4), slice(0, N_ITEMS)), teacher.logits(index))
        assert (len(teacher), teacher.n_items, teacher.fingerprint) == (N_SAMPLES, N_ITEMS, "weights 1")
    size = {"fp32": 4, "fp16": 2, "bf16": 2}[precision]
    assert (tmp_path / "states.bin").stat().st_size == N_SAMPLES * WIDTH * size


def test_a_cached_bias_is_part_of_the_logits(tmp_path, language_model):
    states, head, online = language_model
    bias = torch.arange(float(N_ITEMS))
    teacher = CachedStateTeacher.write(tmp_path, [states], head, n_samples=N_SAMPLES, bias=bias, precision="fp32")
    torch.testing.assert_close(teacher.logits(np.arange(3)), online[:3] + bias)


def test_the_cached_teacher_feeds_the_blockwise_loss(tmp_path, language_model):
    states, head, online = language_model
    teacher = CachedStateTeacher.write(tmp_path, [states], head, n_samples=N_SAMPLES, precision="fp32")
    index = np.arange(8)
    student = Factors(torch.randn(8, 4), torch.randn(N_ITEMS, 4))
    options = {"temperature": 2.0, "strength": 0.5}
    found = blockwise_distillation_loss(student, torch.arange(8), teacher.factors(index), torch.ones(8), **options)
    expected = distillation_loss(student.state @ student.items.T, torch.arange(8), online[:8], torch.ones(8), **options)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_unfinished_or_altered_cache_is_refused(tmp_path, language_model):
    states, head, _ = language_model

    def interrupted():
        yield states[:10]
        raise KeyboardInterrupt

    CachedStateTeacher.write(tmp_path, [states], head, n_samples=N_SAMPLES)
    with pytest.raises(KeyboardInterrupt):
        CachedStateTeacher.write(tmp_path, interrupted(), head, n_samples=N_SAMPLES)
    with pytest.raises(ModelFileError, match="no finished cache"):
        CachedStateTeacher(tmp_path)
    CachedStateTeacher.write(tmp_path, [states], head, n_samples=N_SAMPLES)
    with (tmp_path / "states.bin").open("ab") as handle:
        handle.write(b"\0")
    with pytest.raises(ModelFileError, match="bytes where"):
        CachedStateTeacher(tmp_path)
    CachedStateTeacher.write(tmp_path, [states], head, n_samples=N_SAMPLES)
    other = tmp_path / "other"
    CachedStateTeacher.write(other, [states], head + 1, n_samples=N_SAMPLES)
    (tmp_path / "head.safetensors").write_bytes((other / "head.safetensors").read_bytes())
    with pytest.raises(ModelFileError, match="not the head"):
        CachedStateTeacher(tmp_path)


def test_states_that_cannot_be_kept_are_refused(tmp_path, language_model):
    states, head, _ = language_model
    with pytest.raises(InputError, match="36 teacher states"):
        CachedStateTeacher.write(tmp_path, [states[:36]], head, n_samples=N_SAMPLES)
    with pytest.raises(InputError, match=r"like the head"):
        CachedStateTeacher.write(tmp_path, [states[:, :3]], head, n_samples=N_SAMPLES)
    spoiled = states.clone()
    spoiled[12, 0] = float("nan")
    with pytest.raises(InputError, match="sample 12 holds NaN"):
        CachedStateTeacher.write(tmp_path, spoiled.split(10), head, n_samples=N_SAMPLES)
    with pytest.raises(InputError, match="does not fit fp16"):
        CachedStateTeacher.write(tmp_path, [states * 1e6], head, n_samples=N_SAMPLES, precision="fp16")
    with pytest.raises(ConfigError, match="int8"):
        CachedStateTeacher.write(tmp_path, [states], head, n_samples=N_SAMPLES, precision="int8")


# ---- other teachers -----------------------------------------------------------------------------------------------


def test_the_popularity_teacher_is_the_training_shares_and_uniform_without_counts():
    counts = np.array([9, 0, 4, 3])
    teacher = PopularityTeacher(counts)
    np.testing.assert_allclose(teacher.logits(np.arange(2)).softmax(1)[1].numpy(), (counts + 1) / 20, rtol=1e-6)
    assert PopularityTeacher(np.zeros(4)).logits(np.arange(1)).unique().numel() == 1
    with pytest.raises(InputError, match="positive"):
        PopularityTeacher(counts, smoothing=0.0)


def sequences() -> Sequences:
    """Three users with 4, 1 and 3 events."""
    return Sequences(np.array([5, 1, 2, 7, 3, 0, 5, 6]), np.array([0, 4, 5, 8]), np.array([10, 11, 14]), N_ITEMS)


def test_samples_are_every_event_but_a_users_first():
    samples = training_samples(sequences())
    assert samples.position.tolist() == [1, 2, 3, 6, 7]
    assert samples.target.tolist() == [1, 2, 7, 5, 6]
    assert samples.user.tolist() == [10, 10, 10, 14, 14]
    assert [history.tolist() for history in samples.histories(np.array([2, 3]))] == [[5, 1, 2], [0]]
    with pytest.raises(DataError, match="two events"):
        training_samples(Sequences(np.array([1, 2]), np.array([0, 1, 2]), np.array([0, 1]), N_ITEMS))


def test_the_online_teacher_scores_the_prefix_of_each_sample():
    samples, model = training_samples(sequences()), Fixed(0)
    teacher = OnlineTeacher(model, samples.histories)
    np.testing.assert_array_equal(teacher.logits(np.array([2, 3])).numpy(), model.table[[2, 0]])


def test_kept_lists_are_those_of_the_teacher_and_survive_a_round_trip(tmp_path):
    samples = training_samples(sequences())
    teacher = OnlineTeacher(Fixed(0), samples.histories)
    lists = TopKTeacher.of(teacher, samples.target, k=N_ITEMS - 1, temperature=2.0, batch_size=2)
    lists.save(tmp_path)
    student = torch.randn(3, N_ITEMS)
    index = np.array([4, 0, 2])
    for kept in (lists, TopKTeacher.load(tmp_path)):
        torch.testing.assert_close(
            kept.kl(student, index), distillation_kl(student, teacher.logits(index), 2.0), rtol=1e-4, atol=1e-5
        )
        expected = true_item_rank(teacher.logits(np.arange(5)), torch.from_numpy(samples.target))
        assert torch.equal(kept.true_rank, expected)
    with pytest.raises(InputError, match="teacher 23"):
        lists.kl(torch.zeros(3, 5), index)


def test_damaged_lists_are_refused(tmp_path):
    lists = TopKTeacher.of(PopularityTeacher(np.arange(9)), np.arange(4), k=3, temperature=1.0)
    lists.save(tmp_path)
    data = bytearray((tmp_path / "lists.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "lists.safetensors").write_bytes(data)
    with pytest.raises(ModelFileError, match="damaged"):
        TopKTeacher.load(tmp_path)


# ---- cross-fitting ------------------------------------------------------------------------------------------------


def test_a_users_samples_share_a_fold_and_folds_are_even():
    user = np.repeat(np.arange(0, 44, 2), np.arange(22) % 5 + 1)
    fold = user_folds(user, 5, seed=3)
    for one in np.unique(user):
        assert len(np.unique(fold[user == one])) == 1
    sizes = [len(np.unique(user[fold == number])) for number in range(5)]
    assert max(sizes) - min(sizes) <= 1
    assert np.array_equal(fold, user_folds(user, 5, seed=3))
    assert not np.array_equal(fold, user_folds(user, 5, seed=4))
    with pytest.raises(ConfigError, match="22 users"):
        user_folds(user, 23)


def test_no_sample_is_ranked_by_a_model_that_saw_it_and_every_sample_is_ranked_once():
    fold = user_folds(np.arange(40), 5)
    asked = []

    def rank(seen: np.ndarray, index: np.ndarray) -> np.ndarray:
        assert not np.isin(index, seen).any()
        assert len(seen) + len(index) == 40
        asked.extend(index.tolist())
        return index + 1.0

    ranks = crossfit_ranks(fold, lambda number, seen: seen, rank)
    assert sorted(asked) == list(range(40))
    np.testing.assert_array_equal(ranks, np.arange(1, 41))
    with pytest.raises(InputError, match="ranks >= 1"):
        crossfit_ranks(fold, lambda number, seen: seen, lambda model, index: index * 0.0)


def test_recommender_ranks_do_not_depend_on_the_batch():
    samples = training_samples(sequences())
    model = Fixed(1)
    index = np.array([4, 1, 0])
    expected = [
        1 + (model.table[history[-1]] > model.table[history[-1], target]).sum()
        for history, target in zip(samples.histories(index), samples.target[index], strict=True)
    ]
    for batch_size in (1, 2, 256):
        assert recommender_ranks(model, samples, index, batch_size).tolist() == expected


def test_a_folds_rows_are_the_training_rows_of_all_other_users():
    from recollect.data.registry import load_dataset
    from recollect.data.splits import leave_one_out

    dataset = load_dataset("harbor")
    train = leave_one_out(dataset).train
    rows = rows_without(dataset, train, np.array([0, 3]))
    user = dataset.interactions.user
    assert not rows[np.isin(user, [0, 3])].any()
    assert np.array_equal(rows[~np.isin(user, [0, 3])], train[~np.isin(user, [0, 3])])


# ---- ensemble -----------------------------------------------------------------------------------------------------


def test_case_z_scores_are_those_of_scipy_and_leave_masked_items_out():
    scores = np.random.default_rng(0).normal(3, 5, (4, 9))
    np.testing.assert_allclose(case_z_scores(scores), zscore(scores, axis=1))
    masked = np.concatenate([scores, np.full((4, 2), -np.inf)], axis=1)
    np.testing.assert_allclose(case_z_scores(masked)[:, :9], zscore(scores, axis=1))
    assert np.isneginf(case_z_scores(masked)[:, 9:]).all()
    assert (case_z_scores(np.full((1, 5), 0.1)) == 0).all()
    with pytest.raises(InputError, match="NaN"):
        case_z_scores(np.array([[1.0, np.nan]]))


def test_the_scale_of_a_model_does_not_change_the_ensemble():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 6, 9))
    np.testing.assert_allclose(mixed_scores(first, second, 0.3), mixed_scores(first * 100 - 7, second, 0.3))
    np.testing.assert_allclose(mixed_scores(first, second, 0.0), zscore(first, axis=1))


def test_the_weight_chosen_on_validation_finds_the_better_model_and_the_mixture():
    generator = np.random.default_rng(0)
    target = generator.integers(0, 50, 400)
    truth = np.eye(50)[target] * 1.5
    noisy = truth + generator.normal(size=(400, 50))
    as_noisy = truth + generator.normal(size=(400, 50))
    rubbish = generator.normal(size=(400, 50))
    for first, second, low, high in (
        (noisy, rubbish, 0.0, 0.25),
        (rubbish, noisy, 0.75, 1.0),
        (noisy, as_noisy, 0.3, 0.7),
    ):
        choice = WeightChoice()
        for part in np.array_split(np.arange(400), 3):
            choice.add(first[part], second[part], target[part])
        assert low <= choice.best <= high
    assert choice.curve.max() > max(choice.curve[0], choice.curve[-1]) + 0.05
    with pytest.raises(InputError, match="validation cases"):
        WeightChoice().best  # noqa: B018 - the access is the test


def test_candidates_get_the_scores_they_have_in_the_whole_catalogue():
    ensemble = EnsembleScores(Fixed(0), Fixed(1), 0.4)
    histories = [np.array([3]), np.array([1, 8])]
    candidates = np.array([[4, 2], [0, 22]])
    np.testing.assert_array_equal(
        ensemble.score(histories, candidates), np.take_along_axis(ensemble.score(histories), candidates, axis=1)
    )
    with pytest.raises(InputError, match="22"):
        EnsembleScores(Fixed(0), Fixed(1, 22), 0.4)


# ---- DLLM2Rec and LLM-SRec ----------------------------------------------------------------------------------------


def test_list_weights_are_the_worked_example():
    teacher_list, distance = torch.tensor([[4, 1, 0]]), torch.tensor([[0.0, 1.0, 0.5]])
    student = torch.tensor([[0.0, 5.0, 4.0, 3.0, 1.0]])  # its own top three: 1, 2, 3
    place = np.exp(-np.arange(1, 4)) / np.exp(-np.arange(1, 4)).sum()
    confidence = np.exp([-0.0, -1.0, -0.5]) / np.exp([-0.0, -1.0, -0.5]).sum()
    expected = 0.3 * place + 0.5 * confidence + 0.1 * np.array([0, 1, 0])
    found = list_weights(teacher_list, distance, student)
    np.testing.assert_allclose(found[0].numpy(), expected / expected.sum(), rtol=1e-6)


def test_the_list_loss_pulls_listed_items_up_by_their_weight_and_the_negative_down():
    student = torch.zeros(1, 5, requires_grad=True)
    weight = torch.tensor([[0.7, 0.3]])
    loss = list_loss(student, torch.tensor([[4, 1]]), weight, torch.tensor([2]))
    loss.backward()
    assert loss.item() == pytest.approx(2 * np.log(2))
    np.testing.assert_allclose(student.grad[0].numpy(), [0, -0.15, 0.5, 0, -0.35], atol=1e-7)


def test_text_informed_embedding_trains_the_id_part_and_leaves_the_text_alone():
    module = TextInformedEmbedding(torch.randn(6, 3), torch.randn(6, 10))
    module().sum().backward()
    assert module.embedding.grad is not None
    assert "text" not in dict(module.named_parameters())
    with torch.no_grad():
        module.project.weight.zero_()
        module.project.bias.zero_()
    assert torch.equal(module(), module.embedding)


def test_uniformity_is_one_for_a_collapsed_space_and_the_mean_over_pairs():
    assert uniformity(torch.ones(4, 3)).item() == 1
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert uniformity(corners).item() == pytest.approx((2 * np.exp(-2) + np.exp(-4)) / 3, rel=1e-6)
    with pytest.raises(InputError, match="two users"):
        uniformity(torch.ones(1, 3))


def test_llm_srec_losses_are_their_definitions_and_only_heads_learn():
    user, collaborative, items = torch.randn(4, 3), torch.randn(4, 3), torch.randn(7, 3)
    target = torch.tensor([0, 6, 2, 2])
    found = llm_srec_losses(user, collaborative, items, target)
    log_probability = (user @ items.T).log_softmax(1)
    assert found.retrieval.item() == pytest.approx(-log_probability[torch.arange(4), target].mean().item(), rel=1e-5)
    assert found.distillation.item() == pytest.approx(((user - collaborative) ** 2).sum(1).mean().item(), rel=1e-5)
    assert found.total.item() == pytest.approx(sum(part.item() for part in found), rel=1e-5)
    heads = Heads(3, 3, 8)
    llm_user = user.clone().requires_grad_()
    heads.losses(llm_user.detach(), collaborative, items, target).total.backward()
    assert all(parameter.grad is not None for parameter in heads.parameters())
    assert heads.logits(user, items).shape == (4, 7)
