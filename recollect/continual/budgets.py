"""One parameter budget for every method of a run; torch-free.

A method's budget is what it keeps after the last task: experts of every generation, pairs of every task, common
adapters and what they absorbed.  *trained* counts all of it, *activated* what one token uses of it.  Routers and gates
are listed apart and not matched, as in the closed form of `adapters.budget`.  The reference is the run's LoRAMoE, or
the default one.  A method without routing activates all it trains, so of the two only one can be equal; which one is
`ContinualConfig.budget`.
Source: moe_lora 4.3; accumulation over tasks is our reading, no paper says how it counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from recollect.continual.adapters.config import (
    TASK_WIDTH,
    MoELoraConfig,
    SAPTAdapterConfig,
    SDLoraMoEConfig,
    TaskGatedConfig,
    config_to_dict,
    largest_common_rank,
    with_rank,
)
from recollect.continual.entries import Entry
from recollect.continual.methods.registry import MethodSpec, method_spec
from recollect.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from recollect.types import Report

Metric = Literal["trained", "activated"]
REFERENCE = "loramoe"
"""The method whose budget the others get."""
LARGEST_MISMATCH = 0.05
_LARGEST_FACTOR = 4  # of the reference's rank, when a rank that suits every method is looked for


class Linears(NamedTuple):
    """The linears of one name in a model: their widths and how many there are."""

    d_in: int
    d_out: int
    number: int


class Budget(NamedTuple):
    """Parameters after the last task; see the module. router: of routers, gates and attention."""

    trained: int
    activated: int
    router: int


@dataclass(frozen=True)
class BudgetRow:
    """What one method got. budget, against: its counts and those of the reference."""

    entry: Entry
    budget: Budget
    against: Budget

    def mismatch(self, metric: Metric) -> float:
        """(own − reference) / reference."""
        return getattr(self.budget, metric) / getattr(self.against, metric) - 1

    def chosen(self) -> dict[str, Any]:
        """The options that make the size."""
        names = ["rank", "experts", "heads", "grow"]
        if isinstance(self.entry.adapter, SDLoraMoEConfig):
            names += ["common_rank", "common_rank_max", "absorb_rank"]
        options = config_to_dict(self.entry.adapter)
        return {name: options[name] for name in names}

    def kept(self) -> dict[str, float]:
        """What else moves an update, not searched: its scale, dropout and the coefficient of load balancing."""
        adapter = self.entry.adapter
        return {"scaling": adapter.scaling, "dropout": adapter.dropout, "balance": adapter.balance}


@dataclass(frozen=True)
class BudgetTable:
    """The methods of a run with matched budgets, in order."""

    metric: Metric
    n_tasks: int
    reference: MoELoraConfig
    rows: tuple[BudgetRow, ...]

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "matched": self.metric,
            "reference": {
                "method": REFERENCE,
                "rank": self.reference.rank,
                "experts": self.reference.experts,
                **self.rows[0].against._asdict(),
            },
            "after_tasks": self.n_tasks,
            "methods": {
                row.entry.name: {
                    **row.budget._asdict(),
                    "trained_mismatch": row.mismatch("trained"),
                    "activated_mismatch": row.mismatch("activated"),
                    "chosen": row.chosen(),
                    "kept": row.kept(),
                }
                for row in self.rows
            },
        }

    def add_to(self, report: Report) -> None:
        """Put the table on a report and its page."""
        report.protocol["budget"] = (
            f"{self.metric} parameters after the last of {self.n_tasks} tasks within {LARGEST_MISMATCH:.0%} of "
            f"{REFERENCE}'s; routers apart"
        )
        report.sections["budget"] = self.to_json()
        report.sections["panels"] = [*report.sections.get("panels", []), self.panel()]

    def panel(self) -> dict[str, Any]:
        """The table for people."""
        first = self.rows[0].against
        held = self.reference
        shape = f"rank {held.rank}, experts {held.experts}"
        moves: list[Any] = [held.scaling, held.dropout, held.balance]
        rows: list[list[Any]] = [
            [f"{REFERENCE} (reference)", first.trained, "", first.activated, "", first.router, shape, *moves]
        ]
        for row in self.rows:
            budget, options = row.budget, row.chosen()
            chosen = ", ".join(f"{name} {value}" for name, value in options.items() if value not in (None, 0))
            shares = [f"{row.mismatch(metric):+.1%}" for metric in ("trained", "activated")]
            sizes = [budget.trained, shares[0], budget.activated, shares[1], budget.router]
            rows.append([row.entry.name, *sizes, chosen, *row.kept().values()])
        return {
            "kind": "table",
            "title": f"Matched budgets after {self.n_tasks} tasks",
            "columns": [
                "method",
                "trained",
                "off by",
                "per token",
                "off by",
                "routers",
                "chosen",
                "scale",
                "dropout",
                "balance",
            ],
            "rows": rows,
            "note": f"Made equal: {self.metric}. Counted is what is kept after the last task: experts of every growth, "
            "pairs of every task, common adapters and what they absorbed (at most). Routers are not matched. Scale: "
            "alpha / rank of the update, which stays as ranks change. Balance: coefficient of the load-balancing loss.",
            "terminal": True,
        }

    def lines(self) -> list[str]:
        """One line a method, for people."""
        found = []
        for row in self.rows:
            options = ", ".join(f"{name} {value}" for name, value in row.chosen().items() if value not in (None, 0))
            found.append(
                f"budget of {row.entry.name}: {row.budget.trained:,} trained ({row.mismatch('trained'):+.1%}), "
                f"{row.budget.activated:,} activated ({row.mismatch('activated'):+.1%}) after {self.n_tasks} tasks; "
                f"{options}; " + ", ".join(f"{name} {value:g}" for name, value in row.kept().items())
            )
        return found


def model_linears(model: Any) -> dict[str, Linears]:
    """The linears of a model by their last name, of the widths that the first one has."""
    from torch import nn

    found: dict[str, Linears] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            last = name.rpartition(".")[2]
            d_in, d_out, count = found.get(last, (module.in_features, module.out_features, 0))
            found[last] = Linears(d_in, d_out, count + 1)
    return found


def weightless_decoder(folder: Path, keep_layers: int | None = None) -> nn.Module:
    """The decoder of a folder on the meta device, cut to its first blocks where asked: shapes without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    described: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if keep_layers is not None:
        text = described.get_text_config()
        text.num_hidden_layers = keep_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:keep_layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(described)


def match_budgets(
    entries: Sequence[Entry], linears: Mapping[str, Linears], n_tasks: int, metric: Metric = "trained"
) -> BudgetTable:
    """Every entry with the ranks that give it the reference's budget after the last task, within 5 %.

    What the user chose (rank, experts, common_rank, common_rank_max, absorb_rank) stays.  Else ranks are searched; for
    growing methods also the experts of the first task, for SD-LoRA-MoE also the common rank and what is absorbed.

    Args:
        linears: of the model, by their last name.
        n_tasks: in the whole sequence; those of a joint method count as one.

    Raises:
        ConfigError: a method cannot be matched; the message has the nearest try and, where there is one, a rank of the
            reference that suits all methods.
    """
    own = next((entry.adapter for entry in entries if entry.name == REFERENCE), None)
    reference = own or method_spec(REFERENCE).adapter_options({}, "the default LoRAMoE")
    spec = method_spec(REFERENCE)
    wanted = budget_of(spec, reference, n_tasks, linears)
    rows = []
    for entry in entries:
        found = entry if entry.name == REFERENCE else _nearest(entry, wanted, linears, n_tasks, metric)
        row = BudgetRow(found, budget_of(found.spec, found.adapter, n_tasks, linears), wanted)
        if abs(row.mismatch(metric)) > LARGEST_MISMATCH:
            raise ConfigError(_refusal(row, metric, reference, entries, linears, n_tasks))
        rows.append(row)
    return BudgetTable(metric, n_tasks, reference, tuple(rows))


def budget_of(spec: MethodSpec, adapter: MoELoraConfig, n_tasks: int, linears: Mapping[str, Linears]) -> Budget:
    """The budget of a method after `n_tasks` tasks.

    Raises:
        ConfigError: it has no adapters, or the model no linear of a target's name.
    """
    if not spec.has_adapters:
        raise ConfigError(f"{spec.name} tunes the weights themselves and has no budget to match; leave it out")
    tasks = 1 if spec.is_joint else n_tasks
    added = 1 if spec.per_task == "pair" else adapter.grow
    copies = tasks if spec.per_task == "copy" else 1
    experts = adapter.experts + added * (tasks - 1)
    is_dense = adapter.gate == "dense" or adapter.kind == "lora"
    active = experts if is_dense else adapter.top_k
    trained = activated = router = 0
    routed: set[str] = set()
    for name, (d_in, d_out, count) in _wrapped(adapter, linears).items():
        if adapter.kind == "hydra_lora":
            bank = used = adapter.rank * (d_in + experts * d_out)
        else:
            expert = adapter.rank * (d_in + adapter.heads * d_out)  # one per slice
            bank, used = experts * expert, active * expert
        if isinstance(adapter, SDLoraMoEConfig):
            always = (adapter.common_rank + absorbed_rank(adapter, d_in, d_out, tasks)) * (d_in + d_out)
            bank, used = bank + always, used + always
        trained, activated = trained + count * bank, activated + count * used
        if _has_routers(adapter) and not (adapter.placement == "block_shared" and routed):
            router += count * experts * d_in
            routed.add(name)
    if isinstance(adapter, TaskGatedConfig):
        router = TASK_WIDTH * (experts + tasks)
    if isinstance(adapter, SAPTAdapterConfig):
        router = adapter.query_width * (_hidden(linears) + tasks)
    return Budget(copies * trained, activated, copies * router)


def absorbed_rank(adapter: SDLoraMoEConfig, d_in: int, d_out: int, tasks: int) -> int:
    """Rank of the frozen pair after `tasks` tasks at most, by the rule of `SDLoraMoELinear.absorb`."""
    largest, frozen = largest_common_rank(adapter, d_in, d_out), 0
    for _ in range(tasks):
        room = largest - adapter.common_rank - frozen
        if room >= adapter.common_rank:
            frozen += adapter.common_rank
            room -= adapter.common_rank
        frozen += min(adapter.absorb_rank, room)
    return frozen


def _wrapped(adapter: MoELoraConfig, linears: Mapping[str, Linears]) -> dict[str, Linears]:
    """What the adapters stand beside: the target linears, or whole FFNs as linears of the model's width."""
    absent = [name for name in adapter.target_modules if name not in linears]
    if absent:
        raise ConfigError(f"no linear of the model is called {absent[0]!r}; its linears: {', '.join(sorted(linears))}")
    if adapter.placement != "parallel_ffn":
        return {name: linears[name] for name in adapter.target_modules}
    hidden, count = _hidden(linears), linears["down_proj"].number
    source = linears["o_proj"].d_in if adapter.slice_source == "pre_o" else hidden
    return {"ffn": Linears(source, hidden, count)}


def _hidden(linears: Mapping[str, Linears]) -> int:
    return linears["down_proj"].d_out


def _has_routers(adapter: MoELoraConfig) -> bool:
    return adapter.kind not in ("lora", "moelora", "sapt")


def _nearest(entry: Entry, wanted: Budget, linears: Mapping[str, Linears], n_tasks: int, metric: Metric) -> Entry:
    """The entry with the options that suit best: within 5 % those that keep most of what the method is.

    Of SD-LoRA-MoE, that something is absorbed and one common adapter is frozen at least, then the common rank it was
    asked for (the spec's 8) where the budget has room for it.
    """

    def cost(adapter: MoELoraConfig) -> tuple[float, ...]:
        found = BudgetRow(entry, budget_of(entry.spec, adapter, n_tasks, linears), wanted)
        mismatch, other = abs(found.mismatch(metric)), abs(found.mismatch("activated"))
        far = mismatch if mismatch > LARGEST_MISMATCH else 0.0
        if isinstance(adapter, SDLoraMoEConfig):
            d_in, d_out, _ = next(iter(_wrapped(adapter, linears).values()))
            absorbed = absorbed_rank(adapter, d_in, d_out, n_tasks)
            asked = entry.adapter
            assert isinstance(asked, SDLoraMoEConfig)
            return (
                far,
                float(absorbed == 0),
                float(absorbed < adapter.common_rank),  # no common adapter is ever frozen
                abs(adapter.common_rank - asked.common_rank),
                abs(adapter.absorb_rank - asked.absorb_rank),
                -float(min(adapter.rank, adapter.common_rank + absorbed)),
                mismatch,
            )
        return far, other if adapter.grow else 0.0, abs(adapter.experts - entry.adapter.experts), mismatch

    candidates = list(_candidates(entry, wanted, linears, n_tasks, metric))
    return replace(entry, adapter=min(candidates, key=cost))


def _candidates(
    entry: Entry, wanted: Budget, linears: Mapping[str, Linears], n_tasks: int, metric: Metric
) -> Iterator[MoELoraConfig]:
    """Options to choose from: for every shape of the method, the two ranks around the budget."""
    if "rank" in entry.given:
        yield entry.adapter
        return
    for shape in _shapes(entry, wanted, linears, n_tasks, metric):
        one, two = (
            getattr(budget_of(entry.spec, replace(shape, rank=rank), n_tasks, linears), metric) for rank in (1, 2)
        )
        rank = (getattr(wanted, metric) - one) / (two - one) + 1  # counts are linear in the rank
        for whole in sorted({max(1, int(rank)), max(1, int(rank) + 1)}):
            yield with_rank(shape, whole)


def _shapes(
    entry: Entry, wanted: Budget, linears: Mapping[str, Linears], n_tasks: int, metric: Metric
) -> Iterator[MoELoraConfig]:
    adapter = entry.adapter
    if isinstance(adapter, SDLoraMoEConfig):
        wrapped = _wrapped(adapter, linears).values()
        smallest = min(min(d_in // adapter.heads, d_out) for d_in, d_out, _ in wrapped)
        one_row = sum(count * (d_in + d_out) for d_in, d_out, count in wrapped)  # of the common pair, always on
        most = min(smallest - 1, max(1, getattr(wanted, metric) // one_row))
        common = [adapter.common_rank] if "common_rank" in entry.given else range(1, adapter.common_rank + 1)
        is_capped = "common_rank_max" in entry.given  # else the cap says what is absorbed in all
        is_fixed = "absorb_rank" in entry.given or not is_capped
        moved = [adapter.absorb_rank] if is_fixed else range(adapter.absorb_rank + 1)
        for rank in common:
            for directions in moved:
                caps: Sequence[int | None] = [adapter.common_rank_max]
                if not is_capped:
                    caps = [None, *range(rank, min(most, rank + n_tasks * (rank + directions)) + 1)]
                for cap in caps:
                    if cap is None or cap >= rank:
                        yield replace(adapter, common_rank=rank, absorb_rank=directions, common_rank_max=cap)
    elif adapter.grow and "experts" not in entry.given:
        for experts in range(adapter.top_k, 2 * adapter.experts + 1):
            yield replace(adapter, experts=experts)
    else:
        yield adapter


def _refusal(
    row: BudgetRow,
    metric: Metric,
    reference: MoELoraConfig,
    entries: Sequence[Entry],
    linears: Mapping[str, Linears],
    n_tasks: int,
) -> str:
    options = ", ".join(f"{name} {value}" for name, value in row.chosen().items() if value not in (None, 0))
    wanted, found = getattr(row.against, metric), getattr(row.budget, metric)
    text = (
        f"no rank gives {row.entry.name} the {metric} parameters of {REFERENCE} ({wanted:,} after {n_tasks} tasks) "
        f"within {LARGEST_MISMATCH:.0%}: nearest is {options} with {found:,} ({row.mismatch(metric):+.1%})"
    )
    for rank in range(reference.rank + 1, _LARGEST_FACTOR * reference.rank + 1):
        other = with_rank(reference, rank)
        goal = budget_of(method_spec(REFERENCE), other, n_tasks, linears)
        rest = [_nearest(entry, goal, linears, n_tasks, metric) for entry in entries if entry.name != REFERENCE]
        rows = (BudgetRow(one, budget_of(one.spec, one.adapter, n_tasks, linears), goal) for one in rest)
        if all(abs(one.mismatch(metric)) <= LARGEST_MISMATCH for one in rows):
            return f"{text}; with {REFERENCE} in the run and --set {REFERENCE}.rank={rank} every method fits"
    return f"{text}; set other heads or experts, or leave the method out"
