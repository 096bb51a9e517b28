"""Matched budgets: counts equal what trained models hold after the last task, and every method comes within 5 %."""

from __future__ import annotations

import pytest
from support.continual_worlds import SMALL, TASKS, write_byte_decoder, write_stream

from recollect.continual.adapters.budget import trainable_report
from recollect.continual.adapters.config import MHMoEConfig, SDLoraMoEConfig, with_rank
from recollect.continual.budgets import Linears, budget_of, match_budgets, model_linears, weightless_decoder
from recollect.continual.entries import make_entries
from recollect.continual.methods.driving import learn_task
from recollect.continual.methods.registry import METHODS, method_spec
from recollect.continual.run import continual
from recollect.errors import ConfigError
from tests.support.adapter_worlds import tiny_decoder
from tests.support.method_worlds import LOOP, N_TASKS, small_method, tiny_task

SMOLLM2 = {
    "gate_proj": Linears(576, 1536, 30),
    "up_proj": Linears(576, 1536, 30),
    "down_proj": Linears(1536, 576, 30),
}
HEADLINE = ("seq-lora", "replay", "ewc", "o-lora", "loramoe", "mh-moe", "sd-moe", "mh-moe-replay")
PAIR = 30 * 3 * (576 + 1536)  # parameters of rank 1 beside every linear


def adapters_of(table):
    return {row.entry.name: row.entry.adapter for row in table.rows}


def test_the_eight_headline_methods_fit_one_budget_after_eight_tasks():
    table = match_budgets(make_entries(HEADLINE, {}, []), SMOLLM2, 8)
    assert [row.entry.name for row in table.rows] == list(HEADLINE)
    assert all(abs(row.mismatch("trained")) <= 0.05 for row in table.rows)
    wanted = 4 * 8 * PAIR  # LoRAMoE: four experts of rank 8
    assert {row.against.trained for row in table.rows} == {wanted}
    found = adapters_of(table)
    assert {name: found[name].rank for name in ("seq-lora", "replay", "ewc")} == dict.fromkeys(
        ("seq-lora", "replay", "ewc"), 32
    )
    assert found["o-lora"].rank * 8 == 32  # a pair per task
    assert found["mh-moe"].rank == 3  # spec 4.3: 8·(d_in + d_out) / (d_in + H·d_out), summed over the three linears
    grown, banks = found["mh-moe-replay"], 30 * (2 * (576 + 4 * 1536) + 1536 + 4 * 576)
    assert (grown.experts + 7 * grown.grow) * grown.rank * banks == table.rows[7].budget.trained
    split = found["sd-moe"]
    assert (split.rank, split.common_rank, split.common_rank_max, split.absorb_rank) == (4, 8, 16, 4)
    assert (4 * 4 + 16) * PAIR == table.rows[6].budget.trained == wanted
    assert table.rows[6].mismatch("activated") == pytest.approx((4 + 16) / 8 - 1)
    assert all(row.entry.adapter.scaling == pytest.approx(4.0) for row in table.rows)  # alpha follows rank
    assert {row.entry.adapter.dropout for row in table.rows} == {0.0}
    panel = table.panel()
    moves = {row[0]: row[panel["columns"].index("scale") :] for row in panel["rows"]}
    assert moves["loramoe"] == moves["seq-lora"] == [4.0, 0.0, 0.0]
    assert moves["mh-moe"] == pytest.approx([4.0, 0.0, 0.01])
    assert any("scaling 4, dropout 0, balance 0.01" in line for line in table.lines())


def test_what_a_token_uses_can_be_made_equal_instead():
    table = match_budgets(make_entries(HEADLINE, {}, []), SMOLLM2, 8, "activated")
    assert all(abs(row.mismatch("activated")) <= 0.05 for row in table.rows)
    assert adapters_of(table)["seq-lora"].rank == 8
    assert adapters_of(table)["o-lora"].rank == 1
    split = adapters_of(table)["sd-moe"]
    assert split.rank + split.common_rank_max == 8
    assert split.common_rank_max >= 2 * split.common_rank  # room to freeze one common adapter
    assert table.rows[0].mismatch("trained") == pytest.approx(-0.75)


@pytest.mark.parametrize("name", [name for name, spec in METHODS.items() if spec.has_adapters])
def test_every_method_has_one_scale_and_one_dropout_unless_options_say_otherwise(name):
    spec = method_spec(name)
    for values in ({}, {"rank": 3}):
        found = spec.adapter_options(values, "the test")
        assert found.scaling == pytest.approx(4.0)
        assert found.dropout == 0.0
    assert spec.adapter_options({"alpha": 32.0, "rank": 4, "dropout": 0.05}, "the test").scaling == 8.0
    rooted = spec.adapter_options({"rslora": True, "rank": 16}, "the test")
    assert rooted.scaling == pytest.approx(32 / 4)
    assert with_rank(rooted, 5).scaling == pytest.approx(8.0)


def one_of_each_form() -> list[str]:
    """A method of every kind of adapters, way of routing and way of accumulating over tasks."""
    found: dict = {}
    for name, spec in METHODS.items():
        if spec.has_adapters and not spec.is_joint:
            adapter = spec.adapter_options({}, "the test")
            found.setdefault((adapter.kind, adapter.gate, adapter.grow, spec.per_task), name)
    return list(found.values())


@pytest.mark.parametrize("name", one_of_each_form())
def test_counts_are_those_of_the_trained_model_after_the_last_task(name):
    method = small_method(name)
    model = method.prepare(tiny_decoder(num_hidden_layers=1))
    linears = model_linears(tiny_decoder(num_hidden_layers=1))
    for index in range(N_TASKS):
        learn_task(method, model, tiny_task(index, steps=1), LOOP)
    report = trainable_report(model)
    budget = budget_of(method_spec(name), method.adapter, N_TASKS, linears)
    copies = N_TASKS if name == "per-task" else 1
    router = report.router or (budget.router // copies if name in ("moelora", "sapt") else 0)
    assert budget.router == copies * router
    assert budget.trained == copies * (report.total - report.base - router)
    assert budget.activated == report.activated - router


def test_the_cap_of_the_common_rank_leaves_room_for_eight_tasks_by_default():
    adapter = SDLoraMoEConfig()
    assert adapter.common_rank_max is None
    budget = budget_of(method_spec("sd-moe"), adapter, 8, SMOLLM2)
    assert budget.trained == (4 * 8 + 8 + 8 * (8 + 4)) * PAIR  # 104 common rows
    sliced = SDLoraMoEConfig(heads=4)  # slices of 144: the cap is 136
    banks = 30 * (2 * (576 + 4 * 1536) + 1536 + 4 * 576)
    assert budget_of(method_spec("sd-moe"), sliced, 8, SMOLLM2).trained == 4 * 8 * banks + 104 * PAIR
    capped = SDLoraMoEConfig(common_rank_max=32)
    assert budget_of(method_spec("sd-moe"), capped, 8, SMOLLM2).trained == (4 * 8 + 32) * PAIR


@pytest.mark.parametrize("placement", ["per_linear", "block_shared", "parallel_ffn"])
def test_counts_follow_the_placement(placement):
    from recollect.continual.adapters.attach import attach

    config = MHMoEConfig(rank=2, heads=2, placement=placement)
    linears = model_linears(tiny_decoder())
    report = trainable_report(attach(tiny_decoder(), config))
    budget = budget_of(method_spec("mh-moe"), config, 5, linears)
    assert budget == (report.experts, report.activated - report.router, report.router)


def test_a_decoders_folder_and_the_loaded_model_have_the_same_linears(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_byte_decoder(tmp_path)
    loaded = model_linears(AutoModelForCausalLM.from_pretrained(folder))
    assert model_linears(weightless_decoder(folder)) == loaded
    assert loaded["down_proj"] == (48, 32, 2)


def test_a_rank_the_user_chose_stays_and_must_fit():
    entries = make_entries(("loramoe", "seq-lora"), {"seq-lora": {"rank": 33}}, [])
    assert adapters_of(match_budgets(entries, SMOLLM2, 8))["seq-lora"].rank == 33
    entries = make_entries(("loramoe", "seq-lora"), {"seq-lora": {"rank": 8}}, [])
    with pytest.raises(ConfigError, match=r"no rank gives seq-lora .* within 5%: nearest is rank 8.*\(-75\.0%\)"):
        match_budgets(entries, SMOLLM2, 8)


def test_a_refusal_names_a_reference_that_suits_every_method():
    entries = make_entries(("loramoe", "mh-moe", "o-lora"), {}, ["loramoe.rank=3"])
    with pytest.raises(ConfigError, match=r"no rank gives .* --set loramoe\.rank=(\d+) every method fits") as refused:
        match_budgets(entries, SMOLLM2, 8)
    rank = str(refused.value).split("loramoe.rank=")[1].split()[0]
    entries = make_entries(("loramoe", "mh-moe", "o-lora"), {}, [f"loramoe.rank={rank}"])
    assert match_budgets(entries, SMOLLM2, 8).reference.rank == int(rank)


def test_a_method_that_tunes_the_weights_is_refused():
    with pytest.raises(ConfigError, match="osf tunes the weights themselves"):
        match_budgets(make_entries(("loramoe", "osf"), {}, []), SMOLLM2, 8)


class Stages:
    def __init__(self):
        self.names = []

    def stage(self, name, total=None):
        self.names.append(name)

    def advance(self, steps=1, note=""):
        pass

    def close(self):
        pass


def test_a_run_says_what_it_chose_and_its_rounds_hold_that_much(tmp_path):
    write_stream(tmp_path / "trace")
    write_byte_decoder(tmp_path / "bytes")
    named = {"tasks": TASKS[:2], "backbone": str(tmp_path / "bytes"), "method": "o-lora,loramoe,mh-moe-replay"}
    options = {**SMALL, **named, "match_budget": True, "set": "loramoe.rank=12,mh-moe-replay.heads=2"}
    plan = continual(tmp_path / "trace", **options, dry_run=True)
    said = Stages()
    report = continual(tmp_path / "trace", **options, out=tmp_path / "run", progress=said)
    assert plan.sections["budget"] == report.sections["budget"]
    assert "after the last of 2 tasks" in report.protocol["budget"]
    kept = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors")) / 1e6
    assert plan.ledger["disk_mb"] == pytest.approx(kept, rel=0.3)  # headers of many small tensors
    for name, one in report.sections["budget"]["methods"].items():
        size = report.sections["methods"][name]["seeds"][0]["rounds"][-1]["parameters"]
        assert one["trained"] == size["total"] - size["base"] - size["router"]
        assert one["activated"] == size["activated"] - size["router"]
        assert abs(one["trained_mismatch"]) <= 0.05
        assert any(line.startswith(f"budget of {name}: {one['trained']:,} trained") for line in said.names)
    panel = next(one for one in report.sections["panels"] if one["title"] == "Matched budgets after 2 tasks")
    assert [row[0] for row in panel["rows"]] == ["loramoe (reference)", "o-lora", "loramoe", "mh-moe-replay"]
    assert "Matched budgets" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_budget_without_matching_is_refused():
    with pytest.raises(ConfigError, match="give --match-budget, too"):
        continual("nowhere", budget="activated")
