"""Put adapters on a decoder and take them off again.

`attach(model, config)` replaces the linears that `config.target_modules` names by wrapped ones, in place; every other
parameter is frozen.  The attention mask reaches the routers through a pre-hook of the decoder, which keeps it until
the next pass: gradient checkpointing (non-reentrant) and `generate` work unchanged.
Not covered: saving (`saving`), growing (`growth`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from recollect.continual.adapters.config import FFN_LINEARS, MoELoraConfig
from recollect.continual.adapters.lora import PlainLoraLinear
from recollect.continual.adapters.loramoe import LoRAMoELinear
from recollect.continual.adapters.mh_moe import AdapterFFN, AttentionTap, MHMoELinear, SharedRoutes, check_head_groups
from recollect.continual.adapters.routing import MaskHolder, Router
from recollect.continual.adapters.wrapped import AdapterLinear, check_heads, make_router, routing_loss_of
from recollect.errors import ConfigError, InputError

SHARED_ROUTER = "adapter_router"  # the submodule of an FFN that holds its shared routers
WEIGHED = ("moelora", "sapt")  # kinds whose experts are weighed once for the whole model, see `weighed`
_FUSED = ("gate_up_proj", *FFN_LINEARS)  # 3-D expert parameters of transformers 5


class Removable(Protocol):
    """What undoes something: a hook's handle."""

    def remove(self) -> None: ...


@dataclass
class Attached:
    """What `attach` did to a model."""

    config: MoELoraConfig
    mask: MaskHolder
    adapters: tuple[str, ...] = ()
    shared_routers: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()  # further modules of the method
    were_trainable: tuple[str, ...] = ()
    handles: list[Removable] = field(default_factory=list)


def attach(model: nn.Module, config: MoELoraConfig) -> nn.Module:
    """Put the adapters of `config` on `model`, in place, and freeze everything else; the same model is returned.

    All B are zero, so the outputs are those of the bare model, bit for bit.

    Raises:
        ConfigError: adapters are attached already; no linear has a target's name; the heads do not divide a width; the
            experts of a native mixture are fused 3-D parameters.
    """
    if attached(model) is not None:
        raise ConfigError("the model has adapters already; detach(model) first")
    _refuse_fused_experts(model, config)
    targets = _targets(model, config)
    _check_widths(model, config, targets)
    state = Attached(config, MaskHolder())
    state.were_trainable = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.requires_grad_(False)
    try:
        if config.placement == "parallel_ffn":
            _attach_beside(model, config, state, targets)
        else:
            _attach_linears(model, config, state, targets)
    except ConfigError:  # a layer refused before any was replaced
        _make_trainable(model, state.were_trainable)
        raise
    state.handles.append(_decoder(model).register_forward_pre_hook(state.mask.before_forward, with_kwargs=True))
    model.recollect_adapters = state  # type: ignore[assignment]
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take the adapters off again; the model is the bare one, with the gradients it wanted before `attach`."""
    state = _attached(model)
    for handle in state.handles:
        handle.remove()
    for name in state.adapters:
        _replace(model, name, model.get_submodule(name).base)  # type: ignore[arg-type]
    for name in state.shared_routers + state.extras:
        parent, _, last = name.rpartition(".")
        delattr(model.get_submodule(parent), last)
    _make_trainable(model, state.were_trainable)
    del model.recollect_adapters
    return model


def _make_trainable(model: nn.Module, names: tuple[str, ...]) -> None:
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)


def attached(model: nn.Module) -> Attached | None:
    """What `attach` left on the model, or None."""
    found = getattr(model, "recollect_adapters", None)
    return found if isinstance(found, Attached) else None


def _attached(model: nn.Module) -> Attached:
    state = attached(model)
    if state is None:
        raise InputError(f"{type(model).__name__} has no adapters; attach(model, config) or from_pretrained first")
    return state


def attached_config(model: nn.Module) -> MoELoraConfig:
    """The options of the adapters on a model.

    Raises:
        InputError: it has none.
    """
    return _attached(model).config


def adapters(model: nn.Module) -> dict[str, Any]:
    """The wrapped modules by name, in the model's order."""
    return {name: model.get_submodule(name) for name in _attached(model).adapters}


def routers(model: nn.Module) -> dict[str, Router]:
    """Every router once, by the name of its linear or FFN."""
    state = _attached(model)
    found = {
        name: router
        for name, module in adapters(model).items()
        if isinstance(router := getattr(module, "own_router", None), Router)
    }
    for name in state.shared_routers:
        router = model.get_submodule(name)
        assert isinstance(router, Router)
        found[name.removesuffix(f".{SHARED_ROUTER}")] = router
    return found


def routing_loss(model: nn.Module, sample_types: Tensor | None = None) -> Tensor:
    """The weighted routing losses of the last pass over all routers; add it to the task's loss.

    Args:
        model: with adapters.
        sample_types: (B,) 0 or 1 per sample, for the localised balancing constraint.

    Raises:
        ConfigError: see `AdapterLinear.routing_loss`, `routing.bank_loss`.
    """
    return routing_loss_of(list(routers(model).values()), attached_config(model), sample_types)


@contextlib.contextmanager
def token_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Use `mask` (B, T), 1 = real token, for passes inside the block, whatever attention mask they get.

    The backward pass belongs inside too when layers are checkpointed.
    """
    holder = _attached(model).mask
    before = (holder.mask, holder.pinned)
    holder.mask, holder.pinned = mask, True
    try:
        yield
    finally:
        holder.mask, holder.pinned = before


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The bare model inside the block."""
    modules = adapters(model).values()
    before = [module.enabled for module in modules]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of adapters and routers, frozen or not, by their names in the model."""
    wanted = set(adapter_state_dict(model))
    return {name: parameter for name, parameter in model.named_parameters() if name in wanted}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of adapters and routers alone, by their names in the model (detached views)."""
    state = _attached(model)
    tensors = {}
    for prefix in state.adapters + state.shared_routers + state.extras:
        for name, tensor in model.get_submodule(prefix).state_dict().items():
            if not name.startswith("base."):
                tensors[f"{prefix}.{name}"] = tensor.detach()
    return tensors


def load_adapter_state_dict(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of `adapter_state_dict`.

    Raises:
        InputError: a tensor is missing, unknown or of another shape; the message names it.
    """
    extras: dict[str, Any] = {name: model.get_submodule(name) for name in _attached(model).extras}
    for prefix, module in (adapters(model) | extras).items():
        own = {
            name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")
        }
        module.resize_for(own)
    live = adapter_state_dict(model)
    differing = sorted(live.keys() ^ tensors.keys())
    if differing:
        where = "is missing in" if differing[0] in live else "is unknown to the model but stands in"
        raise InputError(f"{differing[0]!r} {where} the saved adapters ({len(differing)} names differ)")
    for name, tensor in live.items():
        if tensor.shape != tensors[name].shape:
            raise InputError(
                f"{name!r} has shape {tuple(tensors[name].shape)} in the saved adapters, {tuple(tensor.shape)} here"
            )
    for name, tensor in live.items():
        tensor.copy_(tensors[name])


def linear_class(config: MoELoraConfig) -> type[AdapterLinear]:
    """The wrapped linear of a method."""
    if config.kind == "sd_lora_moe":
        from recollect.continual.adapters.sd_lora_moe import SDLoraMoELinear

        return SDLoraMoELinear
    if config.kind == "hydra_lora":
        from recollect.continual.adapters.hydra_lora import HydraLoraLinear

        return HydraLoraLinear
    if config.kind in WEIGHED:
        from recollect.continual.adapters.weighed import WeighedLinear

        return WeighedLinear
    return {"lora": PlainLoraLinear, "loramoe": LoRAMoELinear, "mh_moe": MHMoELinear}.get(config.kind, AdapterLinear)


def _decoder(model: nn.Module) -> nn.Module:
    """The module that every pass goes through with the attention mask: a transformers model's inner decoder."""
    inner = getattr(model, "base_model", None)
    return inner if isinstance(inner, nn.Module) else model


def _targets(model: nn.Module, config: MoELoraConfig) -> dict[str, nn.Linear]:
    wanted = set(config.target_modules)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted
    }
    absent = sorted(wanted - {name.rpartition(".")[2] for name in found})
    if absent:
        known = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"no linear of {type(model).__name__} is called {absent[0]!r}; its linears: {', '.join(known)}"
        )
    return found


def _refuse_fused_experts(model: nn.Module, config: MoELoraConfig) -> None:
    if config.placement != "parallel_ffn" and not set(config.target_modules) & set(FFN_LINEARS):
        return
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and name.rpartition(".")[2] in _FUSED:
            raise ConfigError(
                f"{name} is a fused 3-D parameter of {parameter.shape[0]} experts, not a linear: adapters on linears "
                "would skip it silently; split the experts with recollect.continual.spectral, use PEFT's "
                "target_parameters, or adapt the attention's linears (target_modules=('q_proj', 'v_proj'))"
            )


def _ffns(targets: dict[str, nn.Linear]) -> list[str]:
    """The modules that hold the target linears, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in targets))


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ConfigError(f"placement 'parallel_ffn' needs a transformers decoder, got {type(model).__name__}")
    return config.get_text_config()


def _check_widths(model: nn.Module, config: MoELoraConfig, targets: dict[str, nn.Linear]) -> None:
    """Refuse before anything is changed."""
    if config.placement != "parallel_ffn":
        for name, linear in targets.items():
            check_heads(config.heads, linear.in_features, name)
        return
    text = _text_config(model)
    for name in _ffns(targets):
        if config.slice_source == "pre_o":
            projection = _output_projection(model, name)
            key_value_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            check_head_groups(config.heads, text.num_attention_heads, key_value_heads, projection)
        else:
            check_heads(config.heads, text.hidden_size, name)


def _attach_linears(model: nn.Module, config: MoELoraConfig, state: Attached, targets: dict[str, nn.Linear]) -> None:
    layer = linear_class(config)
    shared: dict[str, Router] = {}
    if config.placement == "block_shared":
        for name in _ffns(targets):
            first = next(linear for target, linear in targets.items() if target.rpartition(".")[0] == name)
            shared[name] = make_router(config, first.in_features, name, state.mask, first.weight.device)
    wrapped = {
        name: layer(linear, config, name=name, mask=state.mask, router=shared.get(name.rpartition(".")[0]))
        for name, linear in targets.items()
    }
    if config.kind in WEIGHED:
        _weigh(model, config, state, list(wrapped.values()))  # may refuse: before anything is replaced
    for name, router in shared.items():
        ffn = model.get_submodule(name)
        ffn.add_module(SHARED_ROUTER, router.train(model.training))
        state.handles.append(ffn.register_forward_pre_hook(SharedRoutes(router).before_forward))
    for name, module in wrapped.items():
        _replace(model, name, module)
    if config.kind == "mixlora":
        from recollect.continual.adapters.mixlora import mix_experts

        state.handles += [mix_experts(model.get_submodule(name), name) for name in shared]
    state.adapters = tuple(targets)
    state.shared_routers = tuple(f"{name}.{SHARED_ROUTER}" for name in shared)


def _weigh(model: nn.Module, config: MoELoraConfig, state: Attached, wrapped: list[Any]) -> None:
    """Give the linears of a `WEIGHED` kind what weighs their experts."""
    from recollect.continual.adapters.weighed import TaskAttention, make_weigher

    device = wrapped[0].base.weight.device
    name, weigher = make_weigher(config, model, device)
    model.add_module(name, weigher.train(model.training))
    for linear in wrapped:
        linear.weigh_by(weigher)
    if isinstance(weigher, TaskAttention):
        state.handles.append(_decoder(model).register_forward_pre_hook(weigher.before_forward, with_kwargs=True))
    state.extras = (name,)


def _attach_beside(model: nn.Module, config: MoELoraConfig, state: Attached, targets: dict[str, nn.Linear]) -> None:
    width = _text_config(model).hidden_size
    names = _ffns(targets)
    for name in names:
        tap, in_features = None, width
        if config.slice_source == "pre_o":
            tap = AttentionTap()
            projection = model.get_submodule(_output_projection(model, name))
            assert isinstance(projection, nn.Linear)
            in_features = projection.in_features
            state.handles.append(projection.register_forward_pre_hook(tap.before_forward))
        ffn = AdapterFFN(model.get_submodule(name), config, in_features, width, name=name, mask=state.mask, tap=tap)
        _replace(model, name, ffn)
    state.adapters = tuple(names)


def _output_projection(model: nn.Module, ffn: str) -> str:
    """The name of the attention's output projection in the layer that holds the FFN."""
    layer = ffn.rpartition(".")[0]
    for name, module in model.get_submodule(layer).named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] == "o_proj":
            return f"{layer}.{name}"
    raise ConfigError(f"{layer} has no linear 'o_proj', whose inputs slice_source 'pre_o' reads; use 'post_attn'")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module.train(model.training))
