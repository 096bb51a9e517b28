"""Diagnostics of routes against known truths: planted factors, planted relations, gradients by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.adapter_worlds import tiny_decoder
from support.factor_toy import FACTORS, FLAT, HEADWISE, VALUES, World, trained_on_a

from recollect.continual.adapters.attach import adapters, attach, routers
from recollect.continual.adapters.collision import n_eff, route_n_eff
from recollect.continual.adapters.config import MHMoEConfig, PlainLoraConfig, SDLoraMoEConfig
from recollect.continual.adapters.routing import Routing, choose
from recollect.continual.diagnostics.alignment import (
    composition_gradient_alignment,
    composition_gradients,
    main_routes,
)
from recollect.continual.diagnostics.factors import (
    ABSENT,
    OldExamples,
    choose_old,
    common_prefix,
    frequency_quarters,
    token_class,
)
from recollect.continual.diagnostics.forgetting import (
    RoutePoints,
    by_fifths,
    collision_vs_forgetting,
    joined,
    route_points,
)
from recollect.continual.diagnostics.n_eff_report import layer_number, load_cv, neff_report
from recollect.continual.diagnostics.probes import factor_probes
from recollect.continual.diagnostics.spectra import adapter_gradients, round_spectra
from recollect.continual.diagnostics.watching import Choices, passes, watch, why_no_routes
from recollect.continual.examples import NO_LOSS, Example
from recollect.continual.learner import token_batch
from recollect.continual.methods.objective import answer_loss, model_inputs
from recollect.continual.task_stream import TaskRows
from recollect.rng import stream

ROUTED = MHMoEConfig(heads=2, experts=2, rank=2, balance=0.0)


def _example(prompt: list[int], answer: list[int]) -> Example:
    ids = np.array([*prompt, *answer], dtype=np.int64)
    labels = ids.copy()
    labels[: len(prompt)] = NO_LOSS
    return Example(ids, labels, len(prompt))


def _tasks(n_rows: int = 6) -> list[TaskRows]:
    """Two tasks of rows [begin, task, random …, answer, end]; the first has two labels, the second no two alike."""
    draws = stream(0, "rows")
    found = []
    for number, first_answers in enumerate(([4, 5], range(20, 40))):
        rows = []
        for row in range(n_rows):
            body = draws.integers(6, 20, 4 + row % 3).tolist()
            rows.append(_example([2, 3 + 40 * number, *body], [list(first_answers)[row % len(first_answers)], 1]))
        found.append(TaskRows(f"task-{number}", rows * 2 if number == 0 else _many(rows), 1))
    return found


def _many(rows: list[Example]) -> list[Example]:
    """The rows, and as many again with other answers, so that the task has more answers than labels may be."""
    others = [
        _example(row.input_ids[: row.n_prompt].tolist(), [int(row.input_ids[row.n_prompt]) + 10, 1]) for row in rows
    ]
    return rows + others


def _old(per_task: int = 6, n_rows: int = 6):
    return choose_old(_tasks(n_rows), str, per_task=per_task, seed=0)


def _model(config=ROUTED, seed: int = 0):
    """A tiny decoder whose experts do something."""
    model = attach(tiny_decoder(seed=seed), replace(config, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    for module in adapters(model).values():
        for weight in module.bank.lora_B:
            weight.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def test_a_token_is_a_word_a_number_punctuation_or_a_symbol():
    found = [token_class(text) for text in (" the", "\u6001", "\ufffd", "7", "\u00bd", "?", " (", "+", "\n", "")]
    assert found == [*["word"] * 3, *["number"] * 2, *["punctuation"] * 2, *["symbol"] * 3]


def test_frequency_is_cut_at_quarters_of_all_tokens_in_order_of_rank():
    rows = [np.repeat([9, 5, 7, 3], [8, 4, 2, 2])]
    assert frequency_quarters(rows) == {9: 0, 5: 2, 3: 3, 7: 3}


def test_old_examples_know_task_label_position_and_answer_of_each_token():
    old = _old()
    assert old.tasks == ("task-0", "task-1")
    assert len(old) == 12
    lengths = [len(row) for row in old.rows]
    assert np.bincount(old.token_row).tolist() == lengths
    first = old.token_row == 0
    row = old.rows[0]
    assert old.factors["label"][first].tolist() == [ABSENT, ABSENT, *[int(row.input_ids[-2])] * (len(row) - 2)]
    assert set(old.factors["label"][old.factors["task"] == 1]) == {ABSENT}  # too many answers to be labels
    assert old.factors["position"][first].tolist() == [4 * at // len(row) for at in range(len(row))]
    assert old.is_answer[first].tolist() == [False] * (len(row) - 3) + [True, True, False]
    assert common_prefix([np.array([1, 2, 3]), np.array([1, 2, 4, 5])]) == 2


def test_the_examples_of_fewer_tasks_are_a_prefix_and_keep_their_compositions_apart():
    old = _old()
    first = old.first_tasks(1)
    n = len(first.token_row)
    assert first.tasks == ("task-0",)
    assert (old.factors["task"][:n] == 0).all()
    assert (old.factors["task"][n:] == 1).all()
    same = first.compositions[:, None] == first.compositions[None, :]
    assert (same == (old.compositions[:n, None] == old.compositions[None, :n])).all()
    assert first.fingerprint() != old.fingerprint()
    some = old.some(old.spread_rows(4))
    assert some.row_task.tolist() == [0, 0, 1, 1]
    kept = np.isin(old.token_row, old.spread_rows(4))
    assert np.concatenate([row.input_ids for row in some.rows]).shape == (int(kept.sum()),)


def test_routes_are_tuples_of_experts_whatever_their_order():
    logits = torch.tensor([[[3.0, 2.0, 1.0]], [[2.0, 3.0, 1.0]], [[1.0, 2.0, 3.0]]])
    weights, indices, probabilities = choose(logits, "topk_renorm", 2)
    mask = torch.tensor([True, True, True])
    choices = Choices.of(Routing(logits, probabilities, weights, indices, mask, (3,)))
    routes = choices.routes()
    assert routes[0] == routes[1] != routes[2]
    assert choices.banks().tolist() == [[0, 1], [0, 1], [1, 2]]
    masked = Choices.of(Routing(logits, probabilities, weights, indices, torch.tensor([True, False, True]), (3,)))
    assert masked.winners[:, 0].tolist() == [[0, 1], [1, 2]]


def test_the_report_of_n_eff_equals_its_parts_and_counts_banks_apart():
    draws = stream(1, "routes")
    winners = draws.integers(0, 3, (4_000, 2, 1))
    compositions = draws.integers(0, 30, 4_000)
    choices = Choices(winners, 3)
    (entry,) = neff_report({"model.layers.7.mlp": choices}, compositions)
    pairs = 3 * winners[:, 0, 0] + winners[:, 1, 0]
    by_route = [compositions[pairs == route] for route in range(9)]
    joint = np.average([n_eff(np.bincount(one)) for one in by_route], weights=[len(one) for one in by_route])
    assert entry["joint"] == pytest.approx(joint)
    by_bank = [(n_eff(np.bincount(compositions[winners[:, j, 0] == e])), j, e) for j in range(2) for e in range(3)]
    sizes = [(winners[:, j, 0] == e).sum() for _, j, e in by_bank]
    assert entry["bank"] == pytest.approx(np.average([value for value, *_ in by_bank], weights=sizes))
    assert entry["one_route"] == pytest.approx(n_eff(np.bincount(compositions)))
    assert (entry["layer"], entry["routes_used"], entry["joint_share"]) == (7, 9, 1.0)
    assert entry["route_entropy"] == pytest.approx(np.log(9), abs=0.01)
    assert load_cv(Choices(np.zeros((10, 1, 1), dtype=np.int64), 4)) == pytest.approx(3**0.5)
    assert layer_number("proj") == 0
    (few,) = neff_report({"r": choices}, compositions, least_tokens=5_000)
    assert (few["joint"], few["joint_share"]) == (None, 0.0)


def test_flat_routes_collect_more_compositions_than_headwise_ones_on_the_toy():
    joint = {}
    for config in (FLAT, HEADWISE):
        world, model, _ = trained_on_a(config, seed=0, steps=120)
        inputs, _, values = world.draw(8_000, "a")
        with torch.no_grad():
            model(inputs)
        choices = {name: Choices.of(router.last_routing) for name, router in routers(model).items()}
        compositions = (values * VALUES ** torch.arange(FACTORS)).sum(1).numpy()
        (entry,) = neff_report(choices, compositions, least_tokens=20)
        joint[config.kind] = entry["joint"]
    assert joint["loramoe"] > 3 * joint["mh_moe"]


def test_probes_find_each_planted_factor_in_its_own_slice_and_in_no_other():
    inputs, _, values = World(0).draw(1_000, "a")
    factors = {str(factor): values[:, factor].numpy() for factor in range(FACTORS)}
    found = factor_probes(inputs.numpy(), FACTORS, factors, np.arange(1_000))
    assert len(found) == FACTORS * (FACTORS + 1)
    for entry in found:
        holds = entry["slice"] is None or entry["slice"] == int(entry["factor"])
        assert entry["value"] > 0.95 if holds else abs(entry["value"]) < 0.12, entry


def test_a_probe_does_not_profit_from_remembering_texts():
    rows = np.repeat(np.arange(40), 10)
    fingerprints = stream(0, "texts").standard_normal((40, 64))[rows]  # says which text, nothing else
    values = stream(0, "values").integers(0, 2, 40)[rows]
    (entry,) = factor_probes(fingerprints, 1, {"label": values}, rows)
    assert abs(entry["value"]) < 0.6  # 20 training texts and 64 directions: remembered perfectly, useless on others
    leaky = factor_probes(fingerprints, 1, {"label": values}, np.arange(len(rows)))[0]
    assert leaky["value"] > 0.99


def test_examples_of_one_prompt_are_on_one_side_of_a_probe():
    prompts = ([1, 2], [3, 4], [1, 2], [1], [3, 4])
    rows = tuple(Example(np.array([*ids, 9]), np.full(len(ids) + 1, NO_LOSS), len(ids)) for ids in prompts)
    nothing = np.zeros(0, dtype=np.int64)
    old = OldExamples(("a",), rows, np.zeros(5, dtype=np.int64), nothing, {}, nothing.astype(bool))
    assert old.row_prompt.tolist() == [0, 1, 0, 2, 1]


def test_a_probe_leaves_out_absent_and_rare_values():
    rows = np.arange(400)
    inputs = stream(2, "inputs").standard_normal((400, 4))
    values = np.where(inputs[:, 0] > 0, 1, 0)
    values[:100] = ABSENT
    values[100:110] = 7
    (entry,) = factor_probes(inputs, 1, {"label": values}, rows)
    assert (entry["classes"], entry["train"] + entry["test"]) == (2, 290)
    assert entry["value"] > 0.8
    (constant,) = factor_probes(inputs, 1, {"task": np.zeros(400)}, rows)
    assert (constant["classes"], constant["value"]) == (1, None)


def test_alignment_is_one_for_equal_pulls_and_minus_one_for_planted_conflicts():
    pull = torch.tensor(stream(0, "pull").standard_normal(50))
    other = torch.tensor(stream(1, "pull").standard_normal(50))
    other -= (other @ pull) / (pull @ pull) * pull
    same = composition_gradient_alignment(torch.stack([pull, 3 * pull, other]), np.array([0, 0, 1]))
    assert same["sharing"] == pytest.approx(1.0)
    assert same["apart"] == pytest.approx(0.0, abs=1e-9)
    assert (same["sharing_pairs"], same["apart_pairs"]) == (1, 2)
    conflict = composition_gradient_alignment(torch.stack([pull, -pull, pull * 0]), np.array([4, 4, 4]))
    assert conflict["sharing"] == pytest.approx(-1.0)
    assert (conflict["sharing_pairs"], conflict["apart"]) == (1, None)


def test_planted_monotone_relation_is_recovered_and_a_shuffled_one_is_not():
    draws = stream(3, "relation")
    routes, layers = np.repeat(np.arange(12), 8), np.repeat(np.arange(6), 16)
    values = draws.uniform(1, 50, 96)
    planted = collision_vs_forgetting(RoutePoints(values, np.log(values), routes, layers))
    assert planted["rho"] == pytest.approx(1.0)
    assert planted["within"] == pytest.approx(1.0)
    assert planted["p"] == pytest.approx(0.001)
    assert planted["ci95"][0] > 0.99
    noise = [
        collision_vs_forgetting(RoutePoints(values, draws.permutation(np.log(values)), routes, layers), seed=seed)
        for seed in range(8)
    ]
    assert abs(np.mean([one["rho"] for one in noise])) < 0.1
    assert sum(one["p"] < 0.05 for one in noise) <= 2
    assert sum(one["ci95"][0] <= 0 <= one["ci95"][1] for one in noise) >= 6


def test_a_relation_between_routers_alone_does_not_count_inside_them():
    draws = stream(4, "between")
    router = np.repeat(np.arange(10), 6)
    level = router.astype(float)
    points = RoutePoints(level + 0.1 * draws.random(60), level + 0.1 * draws.random(60), router, router)
    found = collision_vs_forgetting(points)
    assert found["rho"] > 0.95
    assert abs(found["within"]) < 0.3
    assert found["p"] > 0.02


def test_points_come_from_tokens_and_too_few_routes_give_no_number():
    draws = stream(5, "tokens")
    sizes, kinds = [300, 300, 300, 300, 300, 50], [1, 2, 5, 10, 20, 3]
    routes = np.repeat(np.arange(6), sizes)
    compositions = np.concatenate(
        [100 * at + draws.integers(0, k, n) for at, (n, k) in enumerate(zip(sizes, kinds, strict=True))]
    )
    rise = np.array(kinds)[routes] / 10
    rise[::2] = np.nan
    points = route_points(routes, compositions, rise, router=3, layer=2)
    assert len(points) == 5  # the last route has too few tokens
    assert points.n_eff == pytest.approx(kinds[:5], rel=0.15)
    assert points.increase == pytest.approx(np.array(kinds[:5]) / 10)
    assert set(points.router) == {3}
    assert set(points.layer) == {2}
    assert collision_vs_forgetting(points)["rho"] == pytest.approx(1.0)
    assert by_fifths(points)["increase"] == pytest.approx(np.array(kinds[:5]) / 10)
    few = joined([route_points(routes[:600], compositions[:600], rise[:600])])
    assert collision_vs_forgetting(few)["rho"] is None
    assert not len(route_points(routes, compositions, rise, least_counted=200))


def test_route_n_eff_is_the_unbiased_value_of_every_route():
    routes = np.array([0, 0, 0, 1, 1, 2])
    values, sizes = route_n_eff(routes, np.array([4, 4, 5, 1, 2, 9]))
    assert values[0] == pytest.approx(n_eff(np.array([2, 1])))
    assert values[1] == np.inf
    assert np.isnan(values[2])
    assert sizes.tolist() == [3, 2, 1]


def test_watching_equals_row_after_row_and_leaves_the_model_as_it_was():
    old, model = _old(), _model()
    model.train()
    asked = old.spread_tokens(20)
    names = list(routers(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    seen = watch(model, old, 0, inputs_of=names[:1], input_tokens=asked)
    assert model.training
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    start = 0
    for row in old.rows:
        ids = torch.from_numpy(row.input_ids)[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        wanted = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        part = seen.losses[start : start + len(row)]
        assert part[:-1] == pytest.approx(wanted.numpy(), abs=1e-4)
        assert np.isnan(part[-1])
        for name, router in routers(model).items():
            alone = Choices.of(router.last_routing)
            assert (seen.choices[name].winners[start : start + len(row)] == alone.winners).all()
        start += len(row)
    assert seen.inputs[names[0]].shape == (len(asked), 32)
    assert list(passes([5, 5, 20, 3, 3], most=16)) == [[0, 1], [2], [3, 4]]


def test_gradients_of_compositions_are_those_of_their_mean_token_loss():
    old, model = _old(4), _model()
    names = list(routers(model))[:2]
    wanted = [int(one) for one in np.bincount(old.compositions).argsort()[::-1][:3]]
    found = composition_gradients(model, old, old.compositions, wanted, names, 0)
    batch = token_batch(old.rows, range(len(old.rows)), 0)
    logits = model(**model_inputs(batch)).logits
    real = batch["attention_mask"].bool()
    both = real[:, :-1] & real[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
    )
    compositions = torch.full(real.shape, -1)
    compositions[real] = torch.from_numpy(old.compositions)
    for at, composition in enumerate(wanted):
        chosen = both & (compositions[:, :-1] == composition)
        for name in names:
            bank = adapters(model)[name].bank
            gradients = torch.autograd.grad(losses[chosen].mean(), [*bank.lora_A, *bank.lora_B], retain_graph=True)
            byhand = torch.cat([gradient.flatten() for gradient in gradients])
            assert byhand.norm() > 0
            torch.testing.assert_close(found[name][at], byhand, rtol=1e-3, atol=1e-6)
    routes = main_routes(Choices(np.array([0, 0, 1, 1, 1])[:, None, None], 2), np.array([8, 8, 8, 9, 9]), [8, 9])
    assert routes.tolist() == [0, 1]


def test_expert_gradients_are_those_of_the_effective_updates():
    old, model = _old(3), _model()
    name, module = next(iter(adapters(model).items()))
    found = adapter_gradients(model, {name: module}, old, 0)[name]
    total = sum(answer_loss(model, token_batch([row], [0], 0)) for row in old.rows)
    down, up = module.bank.lora_A[0], module.bank.lora_B[0]
    by_down, by_up = torch.autograd.grad(total, [down, up])
    for head in range(2):
        for expert in range(2):
            effective = module.scaling * found[f"slice_{head}"][expert]  # chain rule of D = s·B·A
            torch.testing.assert_close(
                by_up[head, expert], (effective @ down[head, expert].T).T.detach(), rtol=1e-3, atol=1e-6
            )
            torch.testing.assert_close(
                by_down[head, expert], (up[head, expert] @ effective).detach(), rtol=1e-3, atol=1e-6
            )
    assert by_up.abs().max() > 0


def test_spectra_tell_planted_copies_of_one_expert_from_unrelated_ones():
    old = _old()
    overlaps = {}
    for are_copies in (False, True):
        model = _model(SDLoraMoEConfig(experts=2, rank=2, common_rank=2, common_rank_max=4, balance=0.0))
        module = next(iter(adapters(model).values()))
        if are_copies:
            for weights in (module.bank.lora_A[0], module.bank.lora_B[0]):
                weights.data[:, 1] = weights.data[:, 0]
        module.bank.settle()
        name = next(iter(adapters(model)))
        sampled = old.spread_tokens(30)
        seen = watch(model, old, 0, inputs_of=[name], input_tokens=sampled)
        choices = {name: Choices(seen.choices[name].winners[sampled], 2)}
        labels = old.factors["task"][sampled]
        entries = round_spectra(model, old, [0], 0, inputs=seen.inputs, choices=choices, labels=labels)
        entry = next(one for one in entries if one["linear"] == name)
        overlaps[are_copies] = entry["metrics"]["overlap_left@2"]
        assert entry["metrics"]["leak_left"] < 1e-5
        assert entry["random"]["overlap_left@2"] == pytest.approx(2 / module.out_features)
        assert not any(metric.startswith("gradient/") for metric in entry["metrics"])  # 12 examples are too few
    many = _old(per_task=16, n_rows=8)
    enough = round_spectra(model, many, [0], 0, inputs={}, choices={}, labels=labels)[0]["metrics"]
    assert 0 <= enough["gradient/overlap_left@2"] <= 1
    assert len(many.spread_rows(31)) == 32
    assert overlaps[True] == pytest.approx(1.0, abs=1e-4)
    assert overlaps[False] < 0.3


def test_models_without_a_choice_of_routes_say_why():
    assert "no experts" in why_no_routes(tiny_decoder())
    assert "no router" in why_no_routes(_model(PlainLoraConfig(rank=2)))
    assert why_no_routes(_model()) is None
