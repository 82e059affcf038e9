"""Reading a model's structure from its module tree: towers, lists of blocks, mergers, what a linear does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, TypeAlias

from fvlm_core.arch.facts import Part, Tower
from fvlm_core.arch.tree import is_under

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

Modules: TypeAlias = "dict[str, nn.Module]"
"""Every module of a model by its name, in tree order."""

_CONFIG_WORDS = {"image": ("vision",), "audio": ("audio", "speech")}  # what the names of their configs hold
_ATTENTION_WORDS = ("attn", "attention")
_MLP_NAMES = frozenset(
    {"mlp", "ffn", "feed_forward", "intermediate", "output", "experts", "shared_expert", "shared_experts"}
    | {"fc1", "fc2", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
    | {"linear_fc1", "linear_fc2", "block_sparse_moe", "moe", "ffn_block"}
)
_ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})  # they choose experts


def linear_names(modules: Modules) -> list[str]:
    """Return the names of all linear layers."""
    from torch import nn

    return [name for name, module in modules.items() if isinstance(module, nn.Linear)]


def inert_attention(modules: Modules) -> list[str]:
    """Return the names of torch's own attention modules, whose output projection is read and never called."""
    from torch import nn

    return [name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)]


def is_router(name: str) -> bool:
    """Tell whether a linear chooses experts."""
    return name.rsplit(".", 1)[-1] in _ROUTER_NAMES


def find_towers(
    model: PreTrainedModel, modules: Modules, modality: Literal["image", "audio"], avoid: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the encoders of one modality: the outermost submodels built from one of its configs, else the accessor's.

    Args:
        model: the task model.
        modules: its modules.
        modality: whose encoders.
        avoid: towers already known; what contains one of them is no tower.
    """
    from transformers import PreTrainedModel

    kinds = {type(config) for config in _sub_configs(model.config, _CONFIG_WORDS[modality])}
    found: list[str] = []
    for name, module in modules.items():
        if not isinstance(module, PreTrainedModel) or type(module.config) not in kinds:
            continue
        if _is_new_tower(name, avoid) and not any(is_under(name, path) for path in found):
            found.append(name)
    if found:
        return tuple(found)
    encoder = model.get_encoder(modality)
    name = next((name for name, module in modules.items() if module is encoder), "")
    return (name,) if _is_new_tower(name, avoid) else ()


def _is_new_tower(name: str, known: tuple[str, ...]) -> bool:
    return name != "" and not any(is_under(path, name) for path in known)


def _sub_configs(config: PretrainedConfig, words: tuple[str, ...]) -> Iterator[PretrainedConfig]:
    from transformers import PretrainedConfig

    for key in config.sub_configs:
        value = getattr(config, key, None)  # a model may come without this tower
        if isinstance(value, PretrainedConfig):
            if any(word in key for word in words):
                yield value
            else:
                yield from _sub_configs(value, words)


def owner_of(name: str, owners: dict[str, Tower]) -> Tower | None:
    """Return whose module this is: the tower with the longest path above it."""
    paths = [path for path in owners if is_under(name, path)]
    return owners[max(paths, key=len)] if paths else None


def find_layers(modules: Modules, owners: dict[str, Tower]) -> dict[Tower, tuple[str, ...]]:
    """Return each tower's outermost lists of blocks: those with attention inside, else those with linears."""
    from torch import nn

    linears = linear_names(modules)
    layers: dict[Tower, tuple[str, ...]] = {}
    for tower in dict.fromkeys(owners.values()):
        lists = [
            name
            for name, module in modules.items()
            if isinstance(module, nn.ModuleList) and owner_of(name, owners) == tower
        ]
        filled = [path for path in lists if any(is_under(name, path) for name in linears)]
        outer = [path for path in filled if not any(other != path and is_under(path, other) for other in filled)]
        attending = [path for path in outer if _attends(path, modules)]
        if outer:
            layers[tower] = tuple(attending or outer)
    return layers


def _attends(path: str, modules: Modules) -> bool:
    inside = (name[len(path) :] for name in modules if name.startswith(f"{path}."))
    return any(word in name.lower() for name in inside for word in _ATTENTION_WORDS)


def find_outside(modules: Modules, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return the outermost modules with parameters that neither lie in a known path nor contain one."""
    found: dict[str, None] = {}
    for name, module in modules.items():
        if next(module.parameters(recurse=False), None) is None or any(is_under(name, path) for path in known):
            continue
        pieces = name.split(".") if name else []
        prefixes = [".".join(pieces[:i]) for i in range(1, len(pieces) + 1)]
        outermost = next((p for p in prefixes if not any(is_under(path, p) for path in known)), None)
        if outermost is not None:
            found[outermost] = None
    return tuple(found)


def find_mergers(
    modules: Modules, vision: tuple[str, ...], blocks: tuple[str, ...], *, width: int | None
) -> tuple[str, ...]:
    """Return what, after the blocks of a vision tower, ends in the language model's width."""
    from torch import nn

    order = {name: i for i, name in enumerate(modules)}
    found: list[str] = []
    for tower in vision:
        inner = [path for path in blocks if is_under(path, tower)]
        for candidate in find_outside(modules, (*inner, *_siblings(modules, tower))):
            last = [name for name in linear_names(modules) if is_under(name, candidate)][-1:]
            late = all(order[candidate] > order[path] for path in inner[:1])
            module = modules[last[0]] if last else None
            if late and isinstance(module, nn.Linear) and module.out_features == width:
                found.append(candidate)
    return tuple(found)


def _siblings(modules: Modules, tower: str) -> list[str]:
    """Return every module that neither lies in a tower nor contains it, so that only the tower remains to search."""
    return [name for name in modules if name and not is_under(name, tower) and not is_under(tower, name)]


def part_in_block(name: str, path: str, modules: Modules) -> Part:
    """Return what a linear inside a block does, by the names and classes of what holds it within the block."""
    pieces = name[len(path) + 1 :].split(".")
    holders = [f"{path}.{'.'.join(pieces[:i])}" for i in range(2, len(pieces))]
    words = [*pieces[1:], *(type(modules[holder]).__name__ for holder in holders)]
    if is_router(name):
        return "other"
    if any(word in candidate.lower() for candidate in words for word in _ATTENTION_WORDS):
        return "attention"
    return "mlp" if _MLP_NAMES.intersection(pieces[1:]) else "other"
