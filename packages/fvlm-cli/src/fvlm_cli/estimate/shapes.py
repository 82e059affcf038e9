"""The sizes of a model that memory and time follow from, read off its module tree on the meta device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fvlm_core.arch import LinearModule, Tower, linear_modules
from fvlm_core.arch.linears import tower_of
from fvlm_core.arch.tree import is_under, plain_modules

if TYPE_CHECKING:
    from fvlm_core.arch import ArchFacts

TOWERS: tuple[Tower, ...] = ("vision", "projector", "language")


@dataclass(frozen=True)
class Block:
    """The widths of one block, in numbers a token.

    Attributes:
        hidden: of the residual stream.
        query: of the queries, and of what attention gives.
        values: of keys and values together.
        joint: whether queries, keys and values are one matrix product.
        inner: of the feed-forward net.
        gated: whether that has a gate.
        norms: how many there are over the residual stream.
        head_norms: whether queries and keys have norms of their own.
        ranks: how many of its linears have adapters.
    """

    hidden: int
    query: int
    values: int
    joint: bool
    inner: int
    gated: bool
    norms: int
    head_norms: bool
    ranks: int


@dataclass
class Shapes:
    """A model in numbers.

    Attributes:
        blocks: tower → its blocks in order.
        linears: tower → parameters of its linear layers, the head's under "head".
        parameters: tower → all its parameters; "embedding" and "other" for what lies in none.
        trainable: tower → parameters that are trained.
        quantizable: parameters of the linear layers that 4- and 8-bit loading quantizes.
        rows: output rows of these layers, each with a scale of its own in 8 bit.
        largest: parameters of the largest of them.
        vocabulary, width: of the output layer.
        rank: of the adapters; 0 without any.
        between: numbers that go into and come out of the projector's linear layers, for a media token.
        small: trained parameters in tensors too small for an 8-bit optimizer to quantize.
        joined: how many layers' results a tower puts side by side (Llama 3.2 Vision); 0: it gives the last one's.
    """

    blocks: dict[Tower, list[Block]] = field(default_factory=dict)
    linears: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    parameters: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    trainable: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    quantizable: int = 0
    rows: int = 0
    largest: int = 0
    vocabulary: int = 0
    width: int = 0
    rank: int = 0
    between: int = 0
    small: int = 0
    joined: int = 0

    @property
    def total(self) -> int:
        """All parameters of the base model."""
        return sum(self.parameters.values())

    @property
    def trained(self) -> int:
        """All parameters that are trained."""
        return sum(self.trainable.values())


_SMALL = 4096  # bitsandbytes keeps the states of smaller tensors in 32 bit


def read_shapes(model: Any, facts: ArchFacts) -> Shapes:
    """Read a model's sizes.

    Args:
        model: on the meta device, with its adapters and its parameters' `requires_grad` as training will have them.
        facts: of its family.
    """
    shapes = Shapes()
    modules = dict(plain_modules(model))
    linears = linear_modules(model, facts)
    adapted = _adapted(model)
    for linear in linears:
        shapes.linears[linear.tower] += linear.parameters
        if linear.tower == "projector":
            between: Any = modules[linear.name]
            shapes.between += between.in_features + between.out_features
        if not any(is_under(linear.name, path) for path in facts.unquantized):
            weight: Any = modules[linear.name]
            shapes.quantizable += weight.in_features * weight.out_features
            shapes.rows += weight.out_features
            shapes.largest = max(shapes.largest, weight.in_features * weight.out_features)
    for tower in TOWERS:
        blocks: dict[int, list[LinearModule]] = defaultdict(list)
        for linear in linears:
            if linear.tower == tower and linear.block is not None:
                blocks[linear.block].append(linear)
        lists = facts.layers.get(tower, ())
        shapes.blocks[tower] = [_block(blocks[number], lists, modules, adapted) for number in sorted(blocks)]
    _count(model, facts, shapes)
    shapes.rank = model.active_peft_config.r if adapted else 0
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "tiled_tower" in facts.fused.values():
        vision = base.config.vision_config
        shapes.joined = vision.vision_output_dim // vision.hidden_size
    head = base.get_output_embeddings()
    if head is not None:
        shapes.vocabulary, shapes.width = head.weight.shape
    return shapes


def _adapted(model: Any) -> set[str]:
    """Return the names of the layers with adapters, as the model without PEFT would call them."""
    names = getattr(getattr(model, "base_model", None), "targeted_module_names", None)
    return set(names or ())


def _block(linears: list[LinearModule], lists: tuple[str, ...], modules: dict[str, Any], adapted: set[str]) -> Block:
    attention = [modules[linear.name] for linear in linears if linear.part == "attention"]
    mlp = [modules[linear.name] for linear in linears if linear.part == "mlp"]
    hidden = attention[0].in_features if attention else mlp[0].in_features
    joint = any(module.out_features >= 3 * module.in_features for module in attention)
    if joint:
        fused = max(attention, key=lambda module: module.out_features)
        query, values = fused.out_features // 3, 2 * fused.out_features // 3
    else:
        # Queries, keys, values and the output projection, in the order in which every family has them.
        query = attention[0].out_features if attention else 0
        values = sum(module.out_features for module in attention[1:3])
    inner = max((module.out_features for module in mlp), default=0)
    norms = _norms(linears[0].name, lists, modules)
    return Block(
        hidden=hidden,
        query=query,
        values=values,
        joint=joint,
        inner=inner,
        gated=sum(module.out_features == inner for module in mlp) > 1,
        norms=norms.count(hidden) or 2,
        head_norms=any(0 < width < hidden for width in norms),
        ranks=sum(linear.name in adapted for linear in linears),
    )


def _norms(linear: str, lists: tuple[str, ...], modules: dict[str, Any]) -> list[int]:
    """Return the widths of the norms in the block that a linear lies in."""
    (path,) = (path for path in lists if linear.startswith(f"{path}."))
    block = f"{path}.{linear.removeprefix(path).split('.')[1]}."
    inside = [module for name, module in modules.items() if name.startswith(block)]
    weights = [module._parameters.get("weight") for module in inside if "norm" in type(module).__name__.lower()]
    return [weight.numel() for weight in weights if weight is not None]


def _count(model: Any, facts: ArchFacts, shapes: Shapes) -> None:
    """Count parameters by tower; those that PEFT added count as trainable only."""
    seen: set[int] = set()
    base_names = {id(p) for _, module in plain_modules(model) for p in module._parameters.values() if p is not None}
    for name, parameter in model.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        tower = tower_of(plain.rpartition(".")[0].partition(".lora_")[0], facts) or "other"
        tower_name = "embedding" if tower == "language" and "embed" in plain else tower
        if id(parameter) in base_names:
            shapes.parameters[tower_name] += parameter.numel()
        if parameter.requires_grad:
            shapes.trainable[tower_name] += parameter.numel()
            shapes.small += parameter.numel() if parameter.numel() < _SMALL else 0
