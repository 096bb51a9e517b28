"""Low-rank experts beside PEFT's LoRA and beside loops over experts; how cost grows; what the spectral split costs.

    python benchmarks/moe_lora.py [--quick] [--only SECTION ...] [--out benchmarks/results/moe_lora.jsonl]

All sides share one frozen decoder in float32 and run in one process, turn by turn; a figure is the median of the turns,
a ratio the median of the turns' ratios. Times are seconds of the processor at one thread, which other work on the
machine disturbs less than the clock. Token ids are random, the adapted linears are the FFN's three, dropout is off.

Methods of one activated rank R = 8: PEFT's LoRA of rank 8; LoRAMoE of 4 experts of rank 8, top-1, or of rank 2 with a
dense gate; MH-MoE of 4 slices with 4 experts of rank 2 each, top-1, in its three placements, and of 3 slices with
experts of rank 3, 9 in all, on the heads' outputs (pre_o: a slice must hold whole groups of heads).

* memory: what one training step adds to the peak of a process that holds the model, each in a forked process.
* training: tokens a second of steps (forward, loss, routing loss, backward, fused AdamW), and the loops of
  `expert_loops.py` in the same model.
* inference: seconds of reading a prompt and of one token after it, beside the bare model too.
* layer: one layer's adapter alone, without its frozen linear, forward and backward, beside the loops.
* growth: the same adapter when experts are added, all in use or only two of them, at top-1; when the experts' total
  rank grows under a dense gate.
* spectral: a step of a decoupled expert linear beside a plain one (8 experts of 512 x 512, common rank 8, top-1).
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from expert_loops import LoopLinear, Style, with_loops
from memory import peak_mb
from rows import Rows
from torch import Tensor, nn

from recollect.backbones.store import model_folder
from recollect.continual.adapters.attach import attach, attached, routing_loss
from recollect.continual.adapters.config import FFN_LINEARS, LoRAMoEConfig, MHMoEConfig, MoELoraConfig
from recollect.continual.adapters.loramoe import LoRAMoELinear
from recollect.continual.spectral.grouped import group_by_expert, grouped_linear
from recollect.continual.spectral.linear import SpectralDecoupledLinear
from recollect.continual.spectral.projector import SpectralProjector
from recollect.rng import stream

SECTIONS = ("memory", "training", "inference", "layer", "growth", "spectral")
RANK, EXPERTS, HEADS = 8, 4, 4
PEFT, BARE = "PEFT LoRA", "bare model"
LOOPS: dict[str, Style] = {"loop, every expert on all tokens": "all tokens", "loop, on its own tokens": "own tokens"}


@dataclass(frozen=True)
class Size:
    """How much is measured.

    batch: (samples, tokens) of a training step.  rounds: turns of training.  prompt, prompt_rounds, steps: tokens and
    turns of reading a prompt, and turns of one token after it.  layers: (tokens, d_in, d_out) of a layer's adapter;
    growth uses the first.  experts, total_ranks: swept.  layer_rounds: turns of layer and growth.  spectral: tokens;
    side: of its experts; spectral_rounds.
    """

    batch: tuple[int, int]
    rounds: int
    prompt: int
    prompt_rounds: int
    steps: int
    layers: tuple[tuple[int, int, int], ...]
    experts: tuple[int, ...]
    total_ranks: tuple[int, ...]
    layer_rounds: int
    spectral: tuple[int, ...]
    side: int
    spectral_rounds: int


FULL = Size(
    batch=(1, 128),
    rounds=3,
    prompt=128,
    prompt_rounds=3,
    steps=7,
    layers=((1024, 576, 1536), (1024, 1536, 576), (256, 576, 1536)),
    experts=(2, 4, 8, 16, 32, 64),
    total_ranks=(16, 32, 64, 128, 256, 512),
    layer_rounds=9,
    spectral=(1024, 2048, 4096),
    side=512,
    spectral_rounds=16,
)
QUICK = Size((2, 8), 1, 8, 1, 1, ((32, 24, 48),), (2, 4), (8, 16), 1, (64,), 32, 1)


def main() -> None:
    """Parse the command line and run the sections."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a decoder; default: SmolLM2-135M of the model store")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="a random decoder of two layers, seconds; ratios mean little"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else FULL
    with Rows("moe_lora", options.out) as rows:
        rows.note = f"{options.threads} threads, float32"
        chosen = set(options.only)
        if chosen & {"memory", "training", "inference"}:
            model = small_decoder() if options.quick else decoder(options.model or model_folder("smollm2"))
            rows.model = "random Llama" if options.quick else (options.model.name if options.model else "SmolLM2-135M")
            if "memory" in chosen:  # first: a process that has run a backward pass should not be forked
                memory(rows, model, size)
            if "training" in chosen:
                training(rows, model, size)
            if "inference" in chosen:
                inference(rows, model, size)
            del model
        rows.model = "none, one layer"
        for name, section in (("layer", layer_alone), ("growth", growth), ("spectral", spectral)):
            if name in chosen:
                section(rows, size)
        rows.say("done")


# ---- models ------------------------------------------------------------------------------------------------------


def decoder(folder: Path) -> Any:
    """A causal language model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def small_decoder() -> Any:
    """A randomly initialised Llama of two layers, with the three groups of heads that pre_o cuts between."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config)


def configs() -> dict[str, MoELoraConfig]:
    """The methods, all of one activated rank."""
    heads: dict[str, Any] = {"heads": HEADS, "experts": EXPERTS, "rank": RANK // HEADS}
    sparse: dict[str, Any] = {"gate": "topk_full", "top_k": 1}
    return {
        "LoRAMoE, top-1": LoRAMoEConfig(experts=EXPERTS, rank=RANK, dropout=0.0, **sparse),
        "LoRAMoE, dense gate": LoRAMoEConfig(experts=EXPERTS, rank=RANK // EXPERTS, dropout=0.0),
        "MH-MoE, per linear": MHMoEConfig(**heads),
        "MH-MoE, block shared": MHMoEConfig(placement="block_shared", **heads),
        "MH-MoE, beside the FFN": MHMoEConfig(placement="parallel_ffn", **heads),
        "MH-MoE, beside the FFN, pre_o": MHMoEConfig(
            placement="parallel_ffn", slice_source="pre_o", heads=3, experts=EXPERTS, rank=3
        ),
    }


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that uses the same weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def adapted(model: nn.Module, name: str) -> nn.Module:
    """The decoder with the adapters of a method, its weights shared with `model`."""
    own = shared_copy(model)
    if name == PEFT:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(own, LoraConfig(r=RANK, lora_alpha=16, target_modules=list(FFN_LINEARS)))  # type: ignore[arg-type]
    if name in LOOPS:
        return with_loops(attach(own, configs()["LoRAMoE, top-1"]), LOOPS[name])
    return own if name == BARE else attach(own, configs()[name])


# ---- turns -------------------------------------------------------------------------------------------------------


def turns(sides: Mapping[str, Callable[[], None]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Processor seconds of every side's turns, after `warm` rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm + rounds):
        for name, run in sides.items():
            began = time.process_time()
            run()
            if number >= warm:
                seconds[name].append(time.process_time() - began)
    return seconds


def ratios(over: list[float], under: list[float]) -> list[float]:
    """The turns' ratios."""
    return [one / other for one, other in zip(over, under, strict=True)]


def token_ids(model: Any, shape: tuple[int, int]) -> Tensor:
    """Random ids (B, T)."""
    return torch.tensor(stream(0, "benchmark", "ids").integers(0, model.config.vocab_size, shape))


@dataclass
class Trainee:
    """A model with adapters and what trains them."""

    model: Any
    ids: Tensor
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(self) -> None:
        """One training step."""
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        if attached(self.model) is not None and not any(isinstance(m, LoopLinear) for m in self.model.modules()):
            loss = loss + routing_loss(self.model)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


# ---- whole models ------------------------------------------------------------------------------------------------


def memory(rows: Rows, model: Any, size: Size) -> None:
    """Peak of one training step above the model, in MiB."""
    import peft  # noqa: F401  here, not in the first child

    rows.data = f"random ids, {size.batch[0]} x {size.batch[1]}"
    found = {name: forked(lambda name=name: trained_once(model, name, size)) for name in (PEFT, *configs(), *LOOPS)}
    for name, value in found.items():
        rows.add("training", name, "added_peak_mb", value)
        rows.add("training", name, "peak_of_PEFT's", value / found[PEFT])
    rows.say("memory")


def trained_once(model: Any, name: str, size: Size) -> float:
    """How far one step with its adapters and optimiser raises this process's peak, in MiB."""
    before = peak_mb()
    Trainee(adapted(model, name), token_ids(model, size.batch)).step()
    return peak_mb() - before


def forked(task: Callable[[], float]) -> float:
    """The task's answer from a copy of this process, whose peak begins where this process stands."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(task()))
    child.start()
    sender.close()
    try:
        return float(receiver.recv())
    finally:
        child.join()


def training(rows: Rows, model: Any, size: Size) -> None:
    """Tokens a processor second of training steps."""
    rows.data = f"random ids, {size.batch[0]} x {size.batch[1]}"
    ids = token_ids(model, size.batch)
    sides = {name: Trainee(adapted(model, name), ids).step for name in (PEFT, *configs(), *LOOPS)}
    seconds = turns(sides, size.rounds)
    for name, found in seconds.items():
        rows.add_median("training", name, "tokens_per_cpu_s", [ids.numel() / one for one in found], seconds=sum(found))
        rows.add_median("training", name, "speed_of_PEFT's", ratios(seconds[PEFT], found))
        rows.say(f"training: {name}")


def inference(rows: Rows, model: Any, size: Size) -> None:
    """Milliseconds of a prompt and of the token after it."""
    rows.data = f"random ids, a prompt of {size.prompt}"
    ids = token_ids(model, (1, size.prompt))
    names = (BARE, PEFT, *configs())
    models: dict[str, Any] = {name: adapted(model, name).eval() for name in names}
    with torch.inference_mode():
        caches = {name: one(input_ids=ids, use_cache=True).past_key_values for name, one in models.items()}

        def prefill(name: str) -> None:
            models[name](input_ids=ids, use_cache=True, logits_to_keep=1)

        def token(name: str) -> None:
            models[name](input_ids=ids[:, :1], past_key_values=caches[name], use_cache=True)
            caches[name].crop(-1)

        for metric, run, rounds in (("prompt", prefill, size.prompt_rounds), ("token", token, size.steps)):
            seconds = turns({name: lambda name=name, run=run: run(name) for name in names}, rounds)
            for name, found in seconds.items():
                rows.add_median("inference", name, f"{metric}_cpu_ms", [1e3 * one for one in found])
                rows.add_median("inference", name, f"{metric}_over_PEFT's", ratios(found, seconds[PEFT]))
                rows.add_median("inference", name, f"{metric}_over_bare", ratios(found, seconds[BARE]))
            rows.say(f"inference: {metric}")


# ---- one layer ---------------------------------------------------------------------------------------------------


def passes(layer: Any, tokens: int, d_in: int, d_out: int) -> Callable[[], None]:
    """Forward and backward of a layer's adapter, the frozen linear's output given."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, d_in, generator=generator).requires_grad_()
    output = torch.randn(1, tokens, d_out, generator=generator).requires_grad_()
    gradient = torch.randn(1, tokens, d_out, generator=generator)

    def run() -> None:
        layer.add_delta(output, x).backward(gradient)
        for tensor in (x, output, *layer.parameters()):
            tensor.grad = None

    return run


def loramoe(d_in: int, d_out: int, experts: int, rank: int, *, dense: bool = False) -> LoRAMoELinear:
    """A LoRAMoE layer in training, top-1 or dense."""
    config = LoRAMoEConfig(experts=experts, rank=rank, dropout=0.0, gate="dense" if dense else "topk_full", top_k=1)
    return LoRAMoELinear(nn.Linear(d_in, d_out, bias=False), config).train()


def layer_alone(rows: Rows, size: Size) -> None:
    """The batched adapter beside the loops."""
    for tokens, d_in, d_out in size.layers:
        for experts in (EXPERTS, 4 * EXPERTS):
            rows.data = f"{tokens:,} tokens, {d_in} to {d_out}, {experts} experts of rank {RANK}, top-1"
            layer = loramoe(d_in, d_out, experts, RANK)
            modules = {"LoRAMoE": layer, **{name: LoopLinear(layer, style) for name, style in LOOPS.items()}}
            sides = {name: passes(module, tokens, d_in, d_out) for name, module in modules.items()}
            seconds = turns(sides, size.layer_rounds)
            for name, found in seconds.items():
                rows.add_median("adapter of one layer", name, "cpu_ms", [1e3 * one for one in found])
                rows.add_median("adapter of one layer", name, "over_LoRAMoE's", ratios(found, seconds["LoRAMoE"]))
    rows.say("layer")


def growth(rows: Rows, size: Size) -> None:
    """Milliseconds of forward and backward of one layer's adapter."""
    tokens, d_in, d_out = size.layers[0]
    rows.data = f"{tokens:,} tokens, {d_in} to {d_out}, rank {RANK}"
    sides = {}
    for experts in size.experts:
        for used in ("all_used", "two_used"):
            layer = loramoe(d_in, d_out, experts, RANK)
            if used == "two_used":
                use_two(layer)
            sides[f"{used}_cpu_ms", experts] = passes(layer, tokens, d_in, d_out)
    add_growth(rows, "growth with experts, top-1", "experts", sides, size)
    rows.data = f"{tokens:,} tokens, {d_in} to {d_out}, {min(8, *size.total_ranks)} experts, dense gate"
    ranks = {total: total // min(8, *size.total_ranks) for total in size.total_ranks}
    sides = {
        ("cpu_ms", total): passes(loramoe(d_in, d_out, total // rank, rank, dense=True), tokens, d_in, d_out)
        for total, rank in ranks.items()
    }
    add_growth(rows, "growth with total rank, dense gate", "total rank", sides, size)
    rows.say("growth")


def use_two(layer: LoRAMoELinear) -> None:
    """Make every token choose expert 0 or 1: their router rows are opposite, so one logit is positive; others are 0."""
    with torch.no_grad():
        weight = layer.own_router.rows[0]
        weight[0, 1] = -weight[0, 0]
        weight[0, 2:] = 0.0


def add_growth(
    rows: Rows, name: str, what: str, sides: Mapping[tuple[str, int], Callable[[], None]], size: Size
) -> None:
    """A line per size of what is swept, its cost relative to the first size's beside it."""
    seconds = turns({f"{metric} {number}": run for (metric, number), run in sides.items()}, size.layer_rounds)
    first = next(number for _, number in sides)
    for metric, number in sides:
        found = seconds[f"{metric} {number}"]
        rows.add_median(name, f"{number} {what}", metric, [1e3 * one for one in found])
        against = ratios(found, seconds[f"{metric} {first}"])
        rows.add_median(name, f"{number} {what}", f"{metric.removesuffix('cpu_ms')}times_the_first", against)


# ---- spectral ----------------------------------------------------------------------------------------------------


class PlainExperts(nn.Module):
    """The same experts as one stack (E, m, n), by the same grouped product."""

    def __init__(self, experts: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, side, side, generator=torch.Generator().manual_seed(0)) / side)

    def forward(self, x: Tensor, selected: Tensor, gates: Tensor) -> Tensor:
        """(N, n), (N, K), (N, K) to (N, m)."""
        grouping = group_by_expert(selected, len(self.weight))
        each = grouped_linear(x.index_select(0, grouping.token), self.weight, grouping)
        by_slot = each.index_select(0, grouping.place).view(*gates.shape, each.shape[1])
        return (by_slot * gates[..., None]).sum(1)


def spectral(rows: Rows, size: Size) -> None:
    """A training step of the split layer beside the plain one; one refresh of the bases in 16 steps is included."""
    experts = 8
    plain, split = PlainExperts(experts, size.side), SpectralDecoupledLinear(experts, size.side, size.side)
    for tokens in size.spectral:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, size.side, generator=generator).requires_grad_()
        selected = torch.randint(0, experts, (tokens, 1), generator=generator)
        gates, gradient = torch.rand(tokens, 1, generator=generator), torch.randn(x.shape, generator=generator)
        inputs = (x, selected, gates)
        sides = {"plain": step_of(plain, inputs, gradient), "spectral": step_of(split, inputs, gradient)}
        seconds = turns(sides, size.spectral_rounds)
        rows.data = f"{experts} experts of {size.side} x {size.side}, common rank 8, top-1"
        name = "step of a split expert linear"
        for side, found in seconds.items():
            rows.add_median(name, f"{tokens:,} tokens", f"{side}_cpu_ms", [1e3 * one for one in found])
        paired = [100 * (ratio - 1) for ratio in ratios(seconds["spectral"], seconds["plain"])]
        rows.add_median(name, f"{tokens:,} tokens", "overhead_percent", paired)
        means = statistics.fmean(seconds["spectral"]) / statistics.fmean(seconds["plain"])
        rows.add(name, f"{tokens:,} tokens", "overhead_percent_of_means", 100 * (means - 1), n=size.spectral_rounds)
    rows.say("spectral")


def step_of(layer: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], gradient: Tensor) -> Callable[[], None]:
    """A training step of one expert linear."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, fused=True)
    if isinstance(layer, SpectralDecoupledLinear):
        SpectralProjector(layer).attach(optimizer)

    def step() -> None:
        layer(*inputs).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
