"""Linear layers as PEFT and bitsandbytes hold them → what the kernels' LoRA ops take, or the reason why not.

The state of a layer may change between two calls: adapters are switched, merged, disabled, hooked. So a layer is looked
at on every call; what was made of it is kept beside it and used again while nothing has changed (a few microseconds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fvlm_kernels import LoRALinear, NF4Weight, lora_decode, lora_qkv

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

DECODING_ROWS = 8
_KEPT = "_fvlm_adapted"
_SUBSTITUTE = "_fvlm_substitute"


@dataclass(frozen=True, eq=False)
class Adapted:
    """A linear layer in the state that it is in.

    Attributes:
        layer: what the kernels take.
        compute_dtype: of the product with a quantized base, or None for the input's.
        holds: tells whether the layer is in that state still.
    """

    layer: LoRALinear
    compute_dtype: torch.dtype | None
    holds: Callable[[], bool]

    def __reduce__(self) -> tuple[Any, ...]:
        """None in a copied or pickled module, which reads its own state: ``holds`` watches the one it was made of."""
        return type(None), ()


class _UnfusedError(Exception):
    """Why a layer has no fused form in the state that it is in."""


def adapted(module: nn.Module) -> Adapted | None:
    """Return a linear layer, with the adapter that is active on it, as the kernels take it.

    Args:
        module: a plain ``torch.nn.Linear``, bitsandbytes' ``Linear4bit`` in NF4, or PEFT's LoRA layer around one.

    Returns:
        None where the layer must be called itself: see `why_unfused`.
    """
    substitute: Adapted | None = vars(module).get(_SUBSTITUTE)
    if substitute is not None:
        return substitute
    try:
        return _adapted(module)
    except _UnfusedError:
        return None


@contextmanager
def substituted(substitutes: Mapping[nn.Module, Adapted]) -> Iterator[None]:
    """A context in which `adapted` returns for some layers what it is given here."""
    for module, substitute in substitutes.items():
        vars(module)[_SUBSTITUTE] = substitute
    try:
        yield
    finally:
        for module in substitutes:
            vars(module).pop(_SUBSTITUTE, None)


def why_unfused(module: nn.Module) -> str | None:
    """Return in a few words why `adapted` returns None, or None where it does not."""
    try:
        _adapted(module)
    except _UnfusedError as reason:
        return str(reason)
    return None


def forget(module: nn.Module) -> None:
    """Drop what was kept beside a layer."""
    vars(module).pop(_KEPT, None)


def project(x: Tensor, modules: Sequence[nn.Module], training: bool) -> tuple[Tensor, ...]:
    """Apply several linear layers to one input: in one autograd function where all have a fused form, else one by one.

    Args:
        x: ``(..., in_features)``.
        modules: the layers.
        training: whether their dropout acts.

    Returns:
        ``(..., out_features)`` of each.
    """
    found = together(modules)
    if found is None:
        return tuple(module(x) for module in modules)
    layers, compute_dtype = found
    if is_decoding(x) and not training:
        return lora_decode(x, layers, compute_dtype=compute_dtype)
    return lora_qkv(x, layers, training=training, compute_dtype=compute_dtype)


def is_decoding(x: Tensor) -> bool:
    """Whether so few rows come, and no gradient is wanted, that products straight from the codes are quicker."""
    return not torch.is_grad_enabled() and x.numel() <= DECODING_ROWS * x.shape[-1]


def together(modules: Sequence[nn.Module]) -> tuple[list[LoRALinear], torch.dtype | None] | None:
    """Return layers that one op can compute, and their compute dtype; None where they must be called one by one."""
    found = [adapted(module) for module in modules]
    known = [one for one in found if one is not None]
    dtypes = {one.layer.a.dtype for one in known if one.layer.a is not None}
    if len(known) < len(found) or len(dtypes) > 1 or any(one.compute_dtype != known[0].compute_dtype for one in known):
        return None
    return [one.layer for one in known], known[0].compute_dtype


def _adapted(module: nn.Module) -> Adapted:
    kept: Adapted | None = vars(module).get(_KEPT)
    if kept is not None and kept.holds():
        return kept
    _check_called_plainly(module)
    base, adapter = _parts(module)
    weight, quant_state = base.weight, getattr(base.weight, "quant_state", None)
    compute_dtype: torch.dtype | None = None
    held: Tensor | NF4Weight
    if quant_state is not None or type(weight).__name__ == "Params4bit":
        compute_dtype, held = _nf4(base, weight, quant_state)
    else:
        held = _plain(weight)
    layer = LoRALinear(held, adapter.a, adapter.b, adapter.scaling, base.bias, adapter.dropout)
    made = Adapted(layer, compute_dtype, _watch(module, base, adapter, layer))
    vars(module)[_KEPT] = made
    return made


def _watch(module: Any, base: Any, adapter: _Adapter, layer: LoRALinear) -> Callable[[], bool]:
    """Return what tells whether a layer is still as it was read.

    It runs for every linear layer of a model in every pass, so it reads the modules' dictionaries themselves; what it
    compares is all that `_parts` reads, and where the tensors lie.
    """
    weight, bias, quant_state = base.weight, base.bias, getattr(base.weight, "quant_state", None)
    tensors = [t for t in (weight, bias, layer.a, layer.b) if t is not None]
    places = [(t, t.data_ptr(), t.requires_grad) for t in tensors]
    inside = [m for m in (module, base, *adapter.modules) if m is not None]
    hooks = [(m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks) for m in inside]
    owned = [vars(m) for m in inside]
    name, own = adapter.name, vars(base)["_parameters"]
    is_lora = module is not base
    state = (module.disable_adapters, list(module.merged_adapters), module.active_adapters) if is_lora else ()
    parts = {key: module._modules[key]._modules for key in ("lora_A", "lora_B", "lora_dropout")} if is_lora else {}
    found = [(part, part.get(name)) for part in parts.values()]
    matrices = [(m._parameters, t) for m, t in zip(adapter.modules, (layer.a, layer.b), strict=False)]

    def holds() -> bool:
        return (
            own.get("weight") is weight
            and own.get("bias") is bias
            and getattr(weight, "quant_state", None) is quant_state
            and all(t.data_ptr() == place and t.requires_grad is flag for t, place, flag in places)
            and not any(a or b or c or d for a, b, c, d in hooks)
            and not any("forward" in attributes for attributes in owned)
            and (not is_lora or lora_holds())
        )

    def lora_holds() -> bool:
        now = (module.disable_adapters, module.merged_adapters, module.active_adapters)
        return (
            vars(module)["_modules"]["base_layer"] is base
            and now == state
            and all(part.get(name) is one for part, one in found)
            and all(parameters.get("weight") is t for parameters, t in matrices)
            and (name is None or (module.scaling[name] == adapter.scaling and name not in module.lora_variant))
            and (name is None or _probability(module.lora_dropout[name]) == adapter.dropout)
        )

    return holds


def _check_called_plainly(module: nn.Module) -> None:
    """Raise unless calling the module means its class's forward and nothing else."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise _UnfusedError("has hooks")
    if "forward" in vars(module):
        raise _UnfusedError("has a forward of its own")


class _Adapter(NamedTuple):
    """The active adapter of a layer; the defaults are those of a layer without one."""

    name: str | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    modules: tuple[nn.Module, ...] = ()


def _parts(module: nn.Module) -> tuple[Any, _Adapter]:
    """Return a layer's base and its active adapter."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return _base(module), _Adapter()
    if not _is_plain_lora(module):
        raise _UnfusedError(f"is PEFT's {type(module).__name__}, not a plain LoRA layer")
    inner = module.base_layer
    _check_called_plainly(inner)
    base = _base(inner)
    if module.disable_adapters:
        if module.merged:
            raise _UnfusedError("is merged and disabled at once")
        return base, _Adapter()
    if module.merged:
        return base, _Adapter()
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return base, _Adapter()
    if len(names) > 1:
        raise _UnfusedError("has several active adapters")
    return base, _adapter(module, names[0])


def _adapter(module: LoraLayer, name: str) -> _Adapter:
    if name in module.lora_variant:
        raise _UnfusedError(f"uses {type(module.lora_variant[name]).__name__}")
    first, second, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if second.bias is not None:
        raise _UnfusedError("has a bias in its adapter")
    if not getattr(module, "cast_input_dtype_enabled", True):
        raise _UnfusedError("does not cast its input")
    for part in (first, second):
        if type(part) is not nn.Linear:
            raise _UnfusedError(f"has a {type(part).__name__} in its adapter")
        _check_called_plainly(part)
    if not isinstance(dropout, nn.Dropout | nn.Identity):
        raise _UnfusedError(f"has {type(dropout).__name__} in its adapter")
    return _Adapter(name, first.weight, second.weight, module.scaling[name], _probability(dropout), (first, second))


def _probability(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0


def _is_plain_lora(module: nn.Module) -> bool:
    from peft.tuners.lora import Linear

    if type(module) is Linear:
        return not module.fan_in_fan_out
    return f"{type(module).__module__}.{type(module).__name__}" == "peft.tuners.lora.bnb.Linear4bit"


def _base(module: nn.Module) -> nn.Module:
    """Return the module if its class is one whose weight is read here."""
    name = f"{type(module).__module__}.{type(module).__name__}"
    if type(module) is nn.Linear or name == "bitsandbytes.nn.modules.Linear4bit":
        return module
    raise _UnfusedError(f"is a {type(module).__name__}")


def _plain(weight: Tensor) -> Tensor:
    if weight.requires_grad:
        raise _UnfusedError("has a base weight that is trained")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta:
        raise _UnfusedError(f"has a weight of type {type(weight).__name__} and dtype {weight.dtype}")
    return weight


def _nf4(base: Any, weight: Any, quant_state: Any) -> tuple[torch.dtype | None, NF4Weight]:
    """Return a bitsandbytes weight as the kernels read it, and the dtype of its product."""
    if quant_state is None:
        raise _UnfusedError("is not quantized yet")
    if quant_state.quant_type != "nf4":
        raise _UnfusedError(f"is quantized to {quant_state.quant_type}")
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise _UnfusedError("is packed for the CPU's own kernels")
    if not base.compute_type_is_set:
        raise _UnfusedError("has no compute dtype yet")
    if base.compute_dtype is not None and quant_state.dtype != base.compute_dtype:
        raise _UnfusedError(f"stores {quant_state.dtype} and computes in {base.compute_dtype}")  # stock rounds to both
    nested = quant_state.state2
    parts = (None, None, None) if nested is None else (nested.absmax, nested.code, quant_state.offset)
    if nested is not None and nested.blocksize != 256:
        raise _UnfusedError(f"nests absmaxes in blocks of {nested.blocksize}")
    packed = NF4Weight(
        weight.data, quant_state.absmax, tuple(quant_state.shape), quant_state.dtype, quant_state.blocksize, *parts
    )
    return base.compute_dtype, packed
