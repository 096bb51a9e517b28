"""Closed forms and exact identities of the continual methods (moe_lora 10.11 to 10.15, 10.17)."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.nn import functional

from recollect.continual.adapters import usage_gate
from recollect.continual.adapters.attach import adapters, token_mask
from recollect.continual.adapters.saving import from_pretrained, save_pretrained
from recollect.continual.methods.banks import banks, generations_of
from recollect.continual.methods.driving import learn_task
from recollect.continual.methods.ewc import EWC, quadratic_pull, sample_fisher
from recollect.continual.methods.gem import agem_projection, gem_projection
from recollect.continual.methods.inflora import InfLora, extended, input_covariances, new_rows
from recollect.continual.methods.lwf import distillation
from recollect.continual.methods.o_lora import orthogonality_penalty, size_penalty
from recollect.continual.methods.objective import answer_loss, model_inputs, sample_rows, sample_types
from recollect.continual.methods.protocol import Phase, live_state, trained_parameters
from recollect.continual.methods.replay import kept_batches
from tests.support.adapter_worlds import randomize, tiny_decoder
from tests.support.method_worlds import LOOP, N_TASKS, Kept, rows, same, small_method, tiny_task, weights


def learned(method, n_tasks, after=None):
    model = method.prepare(tiny_decoder(num_hidden_layers=1))
    for index in range(n_tasks):
        learn_task(method, model, tiny_task(index), LOOP)
        if after is not None:
            after(index, model)
    return model


# O-LoRA


def test_o_lora_earlier_pairs_are_bit_identical_after_later_tasks():
    seen: list = []
    learned(
        small_method("o-lora"),
        3,
        after=lambda index, model: seen.append(
            [(bank.lora_A[0].clone(), bank.lora_B[0].clone()) for bank in banks(model).values()]
        ),
    )
    for first, last in zip(seen[0], seen[2], strict=True):
        assert torch.equal(first[0], last[0])
        assert torch.equal(first[1], last[1])


def test_o_lora_penalty_is_zero_exactly_for_orthogonal_rows_and_else_the_sum_of_products():
    model = learned(small_method("o-lora"), 2)
    expected = sum(
        float((bank.lora_A[0][0, 0] @ bank.lora_A[1][0, 0].t()).detach().abs().sum()) for bank in banks(model).values()
    )
    assert expected > 0.01
    assert orthogonality_penalty(model).item() == pytest.approx(expected, rel=1e-6)
    for bank in banks(model).values():
        basis = torch.linalg.qr(torch.randn(bank.in_features, 4, generator=torch.Generator().manual_seed(0)))[0].t()
        bank.lora_A[0].data[0, 0], bank.lora_A[1].data[0, 0] = basis[:2], basis[2:]
    assert orthogonality_penalty(model).item() < 1e-5
    sizes = sum((bank.lora_A[1].norm() + bank.lora_B[1].norm()).item() for bank in banks(model).values())
    assert size_penalty(model).item() == pytest.approx(sizes, rel=1e-6)


def test_o_lora_forward_is_the_sum_of_pairs_and_of_all_of_them_along_the_rank_axis():
    model = randomize(learned(small_method("o-lora"), 3))
    for module in adapters(model).values():
        x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(1))
        pairs = sum(
            module.scaling * x @ down[0, 0].t() @ up[0, 0]
            for down, up in zip(module.bank.lora_A, module.bank.lora_B, strict=True)
        )
        down = torch.cat([part[0, 0] for part in module.bank.lora_A])
        up = torch.cat([part[0, 0] for part in module.bank.lora_B])
        assert down.shape[0] == 6
        assert torch.allclose(module.eval().delta(x), pairs, atol=1e-5)
        assert torch.allclose(module.scaling * x @ down.t() @ up, pairs, atol=1e-5)


def test_o_lora_loss_adds_the_weighted_penalties():
    method = small_method("o-lora", {"orthogonality": 0.5, "size": 0.25})
    model = learned(method, 2)
    batch = rows(1, 0)
    expected = answer_loss(model, batch) + 0.5 * orthogonality_penalty(model) + 0.25 * size_penalty(model)
    assert torch.allclose(method.loss(model, batch), expected)


# EWC


@pytest.mark.parametrize("fisher", ["per_sample", "trace_online"])
def test_ewc_of_strength_zero_is_sequential_lora_bit_for_bit(fisher):
    plain = weights(learned(small_method("seq-lora"), 2))
    assert same(plain, weights(learned(small_method("ewc", {"strength": 0.0, "fisher": fisher}), 2)))


@pytest.mark.parametrize("strength", [1.0, 1e4])
def test_ewc_on_quadratic_tasks_ends_at_the_precision_weighted_mean(strength):
    first, second = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([-1.0, 1.0, 3.0])
    h1, h2 = torch.tensor([2.0, 0.5, 4.0]), torch.tensor([1.0, 3.0, 0.25])
    theta = second.clone().requires_grad_(True)
    for _ in range(500):
        pull = quadratic_pull({"w": theta}, {"w": h1}, {"w": first})
        loss = 0.5 * (h2 * (theta - second).square()).sum() + strength * pull
        (gradient,) = torch.autograd.grad(loss, theta)
        theta.data -= 0.2 / strength * gradient
    expected = (strength * h1 * first + h2 * second) / (strength * h1 + h2)
    assert torch.allclose(theta, expected, atol=1e-5)
    assert strength == 1 or torch.allclose(theta, first, atol=5e-3)


def test_ewc_pulls_with_strength_times_information_times_distance():
    method = small_method("ewc", {"strength": 30.0, "samples": 0})
    model = learned(method, 1)
    parameters = trained_parameters(model)
    for parameter in parameters.values():
        parameter.data += 0.1
    batch = rows(1, 0)
    plain = torch.autograd.grad(answer_loss(model, batch), list(parameters.values()))
    pulled = torch.autograd.grad(method.loss(model, batch), list(parameters.values()))
    for name, one, other in zip(parameters, plain, pulled, strict=True):
        distance = parameters[name].detach() - method.anchor[name]
        assert torch.allclose(other, one + 30 * method.fisher[name] * distance, rtol=1e-4, atol=1e-6)


def test_ewc_information_is_the_mean_squared_gradient_of_single_samples():
    method = small_method("ewc")
    model = randomize(method.prepare(tiny_decoder(num_hidden_layers=1)))
    batch = rows(0, 0)
    expected = {name: torch.zeros_like(parameter) for name, parameter in trained_parameters(model).items()}
    for row in range(3):
        ids, mask, positions = (
            batch["input_ids"][row : row + 1],
            batch["attention_mask"][row : row + 1],
            batch["position_ids"][row],
        )
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions[None]).logits[0, -3:-1]
        value = functional.cross_entropy(logits, ids[0, -2:], reduction="sum")  # log p of the whole answer
        gradients = torch.autograd.grad(value, list(trained_parameters(model).values()))
        for total, gradient in zip(expected.values(), gradients, strict=True):
            total += gradient.square() / 3
    method.after_task(tiny_task(0, steps=1), model)
    assert isinstance(method, EWC)
    for name, total in expected.items():
        assert torch.allclose(method.fisher[name], total, rtol=1e-4, atol=1e-9)
        assert torch.equal(method.anchor[name], dict(model.named_parameters())[name])


def test_ewc_decay_weighs_older_information():
    method = small_method("ewc", {"decay": 0.5, "samples": 0})
    model = learned(method, 1)
    first = {name: tensor.clone() for name, tensor in method.fisher.items()}
    method.after_task(tiny_task(1), model)
    second = sample_fisher(model, (row for number in range(2) for row in sample_rows(rows(1, number))))
    for name, tensor in method.fisher.items():
        assert torch.allclose(tensor, 0.5 * first[name] + second[name], rtol=1e-4, atol=1e-10)


def test_trace_online_information_adds_squared_batch_gradients_and_never_resets():
    method = small_method("ewc", {"fisher": "trace_online"})
    model = method.prepare(tiny_decoder(num_hidden_layers=1))
    total = 0.0
    for index in range(2):
        method.before_task(tiny_task(index, steps=4), model)
        for number in range(3):
            model.zero_grad()
            method.loss(model, rows(index, number)).backward()
            method.after_backward(model, None)
            total += sum(float((p.grad**2).sum()) for p in trained_parameters(model).values()) / 4
        method.after_task(tiny_task(index), model)
    assert sum(float(buffer.sum()) for buffer in live_state(model).buffers()) == pytest.approx(total, rel=1e-5)


# GEM


def brute_force(gradient, memories, margin):
    """The best multipliers over every set of active constraints."""
    gram, linear = memories @ memories.t(), memories @ gradient
    best, found = None, None
    for free in itertools.chain.from_iterable(
        itertools.combinations(range(len(memories)), size) for size in range(len(memories) + 1)
    ):
        v = torch.full((len(memories),), margin, dtype=torch.float64)
        chosen = list(free)
        if chosen:
            rest = [k for k in range(len(memories)) if k not in free]
            right = -linear[chosen] - gram[chosen][:, rest] @ v[rest]
            v[chosen] = torch.linalg.solve(gram[chosen][:, chosen], right)
        if (v >= margin - 1e-12).all():
            value = float(0.5 * v @ gram @ v + linear @ v)
            if best is None or value < best:
                best, found = value, v
    return gradient + memories.t() @ found


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("n_memories", [1, 2, 4, 7])
def test_gem_equals_the_best_active_set_and_no_memory_objects(n_memories, margin):
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        memories = torch.randn(n_memories, 12, generator=generator, dtype=torch.float64)
        gradient = torch.randn(12, generator=generator, dtype=torch.float64) - memories.mean(0)
        if (memories @ gradient >= 0).all():
            continue
        found = gem_projection(gradient, memories, margin)
        assert torch.allclose(found, brute_force(gradient, memories, margin), atol=1e-8)
        assert (memories @ found >= -1e-5).all()


def test_gem_leaves_a_gradient_without_conflict_alone():
    gradient = torch.tensor([1.0, 1.0, 0.0])
    memories = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, -5.0]])
    assert gem_projection(gradient, memories) is gradient
    assert agem_projection(gradient, memories[0]) is gradient


def test_one_memory_is_the_closed_form_in_gem_and_a_gem():
    gradient, memory = torch.tensor([1.0, -3.0, 0.5]), torch.tensor([0.5, 2.0, 1.0])
    expected = gradient - memory * (memory @ gradient) / (memory @ memory)
    assert torch.allclose(gem_projection(gradient, memory[None]), expected, atol=1e-6)
    assert torch.allclose(agem_projection(gradient, memory), expected, atol=1e-6)


def test_gem_survives_equal_and_empty_memories():
    memory = torch.tensor([1.0, 0.0, 0.0])
    memories = torch.stack([memory, memory, torch.zeros(3), 1e-6 * memory])
    assert torch.allclose(gem_projection(torch.tensor([-1.0, 2.0, 3.0]), memories), torch.tensor([0.0, 2.0, 3.0]))


@pytest.mark.parametrize("name", ["gem", "a-gem"])
def test_the_step_of_gem_goes_along_no_memory_backwards(name):
    method = small_method(name, {"batches_per_step": 0})
    model = learned(method, 2)
    method.before_task(tiny_task(2), model)
    parameters = list(trained_parameters(model).values())

    def memory_gradient(task):
        gradients = torch.autograd.grad(
            sum(answer_loss(model, batch) for batch in Kept().batches(task, 6)) / 2, parameters
        )
        return torch.cat([gradient.flatten() for gradient in gradients])

    # the opposite of a memory's gradient, so that the constraint is active
    against = -memory_gradient(0) - memory_gradient(1)
    start = 0
    for parameter in parameters:
        parameter.grad = against[start : start + parameter.numel()].view_as(parameter).clone()
        start += parameter.numel()
    method.after_backward(model, None)
    stepped = torch.cat([parameter.grad.flatten() for parameter in parameters])
    checked = [memory_gradient(0), memory_gradient(1)] if name == "gem" else [memory_gradient(0) + memory_gradient(1)]
    for memory in checked:
        assert float(memory @ against) < 0
        assert float(memory @ stepped) >= -1e-5 * float(memory.norm() * against.norm())


def test_a_gem_steps_by_one_batch_drawn_from_all_memories():
    method = small_method("a-gem")
    model = learned(method, 2)
    method.before_task(tiny_task(2), model)
    parameters = list(trained_parameters(model).values())
    of_batches = [
        torch.cat([part.flatten() for part in torch.autograd.grad(answer_loss(model, batch), parameters)])
        for task in (0, 1)
        for batch in Kept().batches(task, method.options.samples)
    ]
    drawn = set()
    for _ in range(40):
        against, start = -sum(of_batches), 0
        for parameter in parameters:
            parameter.grad = against[start : start + parameter.numel()].view_as(parameter).clone()
            start += parameter.numel()
        method.after_backward(model, None)
        stepped = torch.cat([parameter.grad.flatten() for parameter in parameters])
        expected = torch.stack([agem_projection(against, memory) for memory in of_batches])
        distances = (expected - stepped).norm(dim=1) / against.norm()
        assert float(distances.min()) < 1e-4
        drawn.add(int(distances.argmin()))
    assert drawn == set(range(len(of_batches)))


# LwF


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lwf_adds_exactly_nothing_at_the_first_step_of_a_task(dropout):
    method = small_method("lwf", adapter={"dropout": dropout})
    model = learned(method, 1)
    method.before_task(tiny_task(1), model)
    model.train()
    batch, parameters = rows(1, 0), list(trained_parameters(model).values())
    torch.manual_seed(5)
    plain = answer_loss(model, batch)
    plain_gradients = torch.autograd.grad(plain, parameters)
    torch.manual_seed(5)
    taught = method.loss(model, batch)
    taught_gradients = torch.autograd.grad(taught, parameters)
    assert torch.equal(plain, taught)
    assert all(torch.equal(one, other) for one, other in zip(plain_gradients, taught_gradients, strict=True))
    parameters[1].data += 0.1
    model.eval()
    assert method.loss(model, batch).item() > answer_loss(model, batch).item()


def test_distillation_is_the_scaled_divergence_with_its_gradient():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    ours = distillation(student, teacher, 2.0)
    reference = 4 * functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert torch.allclose(ours, reference)
    assert torch.allclose(torch.autograd.grad(ours, student)[0], torch.autograd.grad(reference, student)[0])


# InfLoRA


def test_inflora_reads_nothing_of_the_stored_directions():
    method = small_method("inflora", {"energy": 0.6})
    model = learned(method, 2)
    assert isinstance(method, InfLora)
    task = tiny_task(2)
    stored = {name: past.clone() for name, past in method.past.items()}
    inside = {
        name: past @ torch.randn(past.shape[1], 3, generator=torch.Generator().manual_seed(1))
        for name, past in stored.items()
    }
    before = {name: module.eval()(inside[name].t()) for name, module in adapters(model).items()}
    learn_task(method, model, task, LOOP)
    assert generations_of(model) == [1, 1, 1]
    for name, module in adapters(model).items():
        rows_of_a = module.bank.lora_A[-1][0, 0]
        assert float((rows_of_a @ stored[name]).norm()) <= 1e-5
        assert torch.allclose(rows_of_a @ rows_of_a.t(), torch.eye(2), atol=1e-5)
        after = module.eval()(inside[name].t())
        assert ((after - before[name]).norm() / before[name].norm()).item() <= 1e-4
        gram = method.past[name].t() @ method.past[name]
        assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-5)


def test_inflora_stores_as_few_directions_as_keep_the_energy():
    covariance = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0]))
    assert extended(covariance, None, 0.8).shape == (5, 2)
    assert extended(covariance, None, 1.0).shape == (5, 4)
    past = torch.eye(5)[:, :1]
    more = extended(covariance, past, 0.9)
    assert more.shape == (5, 3)
    assert torch.allclose(more.abs(), torch.eye(5)[:, :3], atol=1e-6)
    assert extended(covariance, past, 0.5).shape == (5, 1)
    assert torch.allclose(new_rows(covariance, past, 2).abs(), torch.eye(5)[1:3], atol=1e-6)
    assert torch.equal(new_rows(covariance, torch.eye(5)[:, :4], 2), torch.zeros(2, 5))


def test_inflora_keeps_a_share_of_the_energy_that_rises_to_all_of_it():
    method = small_method("inflora", {"energy": 0.4, "covariance_batches": 0})
    unkept = []

    def note(index, model):
        worst = 0.0
        for name, covariance in method._covariances(tiny_task(index), model).items():
            outside = torch.eye(len(covariance)) - method.past[name] @ method.past[name].t()
            worst = max(worst, float((outside @ covariance @ outside).trace() / covariance.trace()))
        unkept.append(worst)

    learned(method, N_TASKS, after=note)
    allowed = [0.6 * (1 - index / (N_TASKS - 1)) for index in range(N_TASKS)]
    assert all(one <= most + 1e-5 for one, most in zip(unkept, allowed, strict=True))
    assert unkept[0] > 1e-3
    assert unkept[-1] <= 1e-5


def test_input_covariance_counts_real_tokens_alone():
    method = small_method("inflora")
    model = method.prepare(tiny_decoder(num_hidden_layers=1))
    seen = {}
    name, module = next(iter(adapters(model).items()))
    handle = module.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0].detach()))
    batch = rows(0, 0)
    found = input_covariances(model, iter([batch]))[name]
    handle.remove()
    real = seen["x"][batch["attention_mask"].bool()]
    assert torch.allclose(found, real.t() @ real / len(real), atol=1e-5)


# Routed experts, replay, bounds


def test_router_replay_leaves_every_expert_bit_identical():
    method = small_method("mh-moe-replay")
    model = learned(method, 1)
    task = tiny_task(1)
    method.before_task(task, model)
    seen = []
    for phase in method.phases(task, model):
        assert isinstance(phase, Phase)
        optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.05)
        for batch in phase.batches(0):
            optimizer.zero_grad()
            method.loss(model.train(), batch).backward()
            optimizer.step()
        seen.append((phase.name, weights(model)))
    (first, trained), (second, replayed) = seen
    assert (first, second) == ("train", "routers")
    experts = [name for name in trained if ".lora_" in name]
    assert all(torch.equal(trained[name], replayed[name]) for name in experts)
    assert any(not torch.equal(trained[name], replayed[name]) for name in trained if name not in experts)


def test_grown_methods_leave_older_experts_bit_identical():
    seen = []
    learned(small_method("loramoe-replay"), 3, after=lambda index, model: seen.append(weights(model)))
    oldest = [name for name in seen[0] if ".lora_A.0" in name or ".lora_B.0" in name]
    assert oldest
    assert all(torch.equal(seen[0][name], seen[2][name]) for name in oldest)


def test_gated_experts_say_what_share_of_them_was_held_back():
    gated = small_method("mh-moe-gated")
    shares = []
    learned(gated, 2, after=lambda index, model: shares.append(gated.facts()["gated_share"]))
    assert shares[0] == 0.0
    assert 0 < shares[1] <= 1


def test_a_gate_of_zero_holds_every_expert_where_it_was(monkeypatch):
    def experts(model):
        return {name: value for name, value in weights(model).items() if ".lora_" in name}

    ends = {}
    for closed in (False, True):
        seen = []
        with monkeypatch.context() as patched:

            def note(index, model, seen=seen, closed=closed, patched=patched):
                seen.append(experts(model))
                if closed:
                    patched.setattr(usage_gate, "update_scale", lambda new, old: torch.zeros_like(new))

            learned(small_method("mh-moe-gated"), 2, after=note)
        ends[closed] = seen
    assert ends[True][0]
    assert same(*ends[True])
    assert not same(*ends[False])


def test_decay_spares_what_the_experts_of_sd_moe_share():
    method = small_method("sd-moe")
    model = method.prepare(tiny_decoder(num_hidden_layers=1))
    spared = {id(parameter) for parameter in method.undecayed(model)}
    names = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if id(parameter) in spared}
    assert names == {"common_A", "common_B"}
    assert len(spared) == 2 * len(adapters(model))
    assert not small_method("mh-moe").undecayed(small_method("mh-moe").prepare(tiny_decoder(num_hidden_layers=1)))


def test_sd_moe_absorbs_after_every_task():
    method = small_method("sd-moe")
    ranks = []
    learned(method, 2, after=lambda index, model: ranks.append(method.facts()["frozen_rank"]))
    assert 0 < ranks[0] <= ranks[1] <= 3


def test_a_growing_sd_moe_learns_what_is_common_and_absorbs_it_before_the_router_replay():
    method = small_method("sd-moe", adapter={"grow": 1, "router_replay": 0.5, "common_rank_max": None})
    model = method.prepare(tiny_decoder(num_hidden_layers=1))
    learn_task(method, model, tiny_task(0), LOOP)
    experts = [(bank.lora_A[0].clone(), bank.lora_B[0].clone()) for bank in banks(model).values()]
    frozen = {name: module.frozen_B.clone() for name, module in adapters(model).items()}
    method.before_task(tiny_task(1), model)
    trained = {name.rpartition(".")[2] for name in trained_parameters(model)}
    assert {"common_A", "common_B"} <= trained
    learn_task(method, model, tiny_task(1), LOOP)
    assert method.facts()["absorbed_directions"] > 0
    for name, module in adapters(model).items():
        before = frozen[name]
        assert torch.equal(module.frozen_B[: len(before)], before)
        assert module.frozen_B[len(before) :].abs().max() > 0  # the second task's common adapter is in it
    for one, bank in zip(experts, banks(model).values(), strict=True):
        assert torch.equal(one[0], bank.lora_A[0])
        assert torch.equal(one[1], bank.lora_B[0])
    assert not any("common" in name or "lora" in name for name in trained_parameters(model))


def test_a_router_replay_marks_the_past_and_leaves_the_present_task_what_it_is():
    method = small_method("loramoe-replay", adapter={"router_replay": 0.5, "lbc": 0.1})
    model = learned(method, 1)
    method.before_task(tiny_task(1), model)
    phases = method.phases(tiny_task(1), model)
    assert next(phases).name == "train"
    replayed = next(phases).batches(0)
    own = {int(token) for batch in tiny_task(1).batches(0) for token in batch["input_ids"].flatten() if token}
    marks = {}
    for batch in replayed:
        is_own = set(batch["input_ids"].flatten().tolist()) - {0} <= own | set(range(15, 27))
        marks.setdefault(is_own, []).append(sample_types(batch).tolist())
    assert all(value == 1 for values in marks[True] for value in values)
    assert all(value == 0 for values in marks[False] for value in values)


def test_the_gates_of_a_router_replay_are_not_counted_in_the_next_task():
    method = small_method("sd-moe", adapter={"router_replay": 0.5})
    model = learned(method, 2)
    assert all(float(bank.token_count) > 0 for bank in banks(model).values())  # the replay's tokens
    method.before_task(tiny_task(2), model)
    for bank in banks(model).values():
        assert float(bank.token_count) == float(bank.gate_sum.abs().sum()) == 0.0


def test_frozen_routers_are_not_balanced():
    method = small_method("mh-moe-gated", adapter={"balance": 0.5})
    model = learned(method, 1)
    batch = rows(1, 0)
    assert method.loss(model, batch).item() > answer_loss(model, batch).item()  # they are trained in the first task
    method.before_task(tiny_task(1), model)
    assert not any("router" in name for name in trained_parameters(model))
    assert torch.equal(method.loss(model, batch), answer_loss(model, batch))


def test_separate_adapters_forget_nothing():
    method = small_method("per-task")
    model = method.prepare(tiny_decoder(num_hidden_layers=1))
    losses = []
    for index in range(2):
        learn_task(method, model, tiny_task(index), LOOP)
        method.select(model, 0)
        losses.append(answer_loss(model, rows(0, 0)).item())
    assert losses[0] == losses[1]


def test_replay_after_trains_the_task_and_then_the_kept_share():
    method = small_method("replay", {"ratio": 0.5})
    model = method.prepare(tiny_decoder(num_hidden_layers=1))
    assert [phase.name for phase in method.phases(tiny_task(0), model)] == ["train"]
    phases = list(method.phases(tiny_task(2), model))
    assert [phase.name for phase in phases] == ["train", "replay"]
    kept = phases[1].batches(0)
    assert sum(len(batch["input_ids"]) for batch in kept) == 6  # half of two tasks of six
    assert all((batch["sample_types"] == 0).all() for batch in kept)
    with_general = list(method.phases(dataclasses.replace(tiny_task(2), memory=Kept(general=2)), model))[1]
    assert len(with_general.batches(0)) == len(kept) + 2


def test_replay_mix_sees_every_own_and_kept_batch_once():
    method = small_method("replay", {"mode": "mix", "ratio": 1.0})
    model = method.prepare(tiny_decoder(num_hidden_layers=1))
    (phase,) = method.phases(tiny_task(2), model)
    batches = phase.batches(0)
    wanted = [*tiny_task(2).batches(0), *(batch for kept in kept_batches(Kept(), range(2), 1.0) for batch in kept)]
    key = lambda batch: tuple(batch["input_ids"].flatten().tolist())  # noqa: E731
    assert sorted(map(key, (batches[i] for i in range(len(batches))))) == sorted(map(key, wanted))
    orders = [[key(phase.batches(epoch)[i]) for i in range(len(batches))] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_saved_o_lora_model_gives_equal_logits(tmp_path):
    model = randomize(learned(small_method("o-lora"), 3))
    save_pretrained(model, tmp_path)
    again = from_pretrained(tiny_decoder(num_hidden_layers=1), tmp_path)
    batch = rows(0, 0)
    assert torch.equal(model(**model_inputs(batch)).logits, again(**model_inputs(batch)).logits)


def test_moelora_mixes_experts_by_the_gate_of_the_task():
    method = small_method("moelora", adapter={"experts": 3, "dropout": 0.0})
    model = learned(method, 2)
    gates = model.get_submodule("task_gates")
    batch, losses = rows(0, 0), []
    for task in (0, 1):
        method.select(model, task)
        weights_of_task = (gates.weight @ gates.tasks[task]).softmax(-1)
        for module in adapters(model).values():
            x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(1))
            parts = torch.stack([x @ module.bank.lora_A[0][0, e].t() @ module.bank.lora_B[0][0, e] for e in range(3)])
            expected = module.base(x) + module.scaling * torch.einsum("e,eno->no", weights_of_task, parts)
            with token_mask(model, torch.ones(4)):
                assert torch.allclose(module(x), expected, atol=1e-5)
        losses.append(answer_loss(model, batch).item())
    assert losses[0] != losses[1]
