"""Which modules a choice of towers and parts selects for LoRA."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from fvlm_core.arch import PARTS, TOWERS, ArchFacts, LinearModule, Part, Tower, facts_for, linear_modules
from fvlm_core.errors import ConfigError
from fvlm_core.options import check_flag
from fvlm_vision.arguments import is_positive
from fvlm_vision.selection import Selection, TargetRow, TargetTable

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

_FLAGS: dict[Tower, str] = {
    "vision": "finetune_vision_layers",
    "projector": "finetune_projector_layers",
    "language": "finetune_language_layers",
}
_PART_FLAGS: dict[Part, str] = {"attention": "finetune_attention_modules", "mlp": "finetune_mlp_modules"}


def select_targets(
    model: nn.Module,
    *,
    vision: bool,
    language: bool,
    attention: bool,
    mlp: bool,
    projector: bool = False,
    last_n_layers: int | None = None,
    target_modules: Sequence[str] | str | None = None,
) -> Selection:
    """Select the linear layers that a choice names.

    Without ``target_modules``, these are the attention and MLP linears (as ``attention`` and ``mlp`` say) in the blocks
    of the vision and language towers (as ``vision`` and ``language`` say), and with ``projector`` every linear of the
    projector. Audio towers are never selected, and the head only when ``target_modules`` names it.

    ``target_modules`` replaces ``attention`` and ``mlp``; the towers still bind, so that ``vision=False`` means that
    nothing in the vision tower is trained, whatever the names. It is one of

    * a list of names with PEFT's meaning: a module is meant when its full name is, or ends in, an entry (``"q_proj"``,
      ``"self_attn.q_proj"``, ``"model.visual.blocks.0.attn.qkv"``);
    * a regular expression that must match the whole name, as in PEFT;
    * ``"all-linear"``: every linear of the chosen towers, those outside their blocks too.

    A name or expression that says the projector's or the head's own name (``"lm_head"``, ``"merger.mlp.0"``), or that
    matches nothing outside it, selects there without a flag.

    Args:
        model: a loaded model, wrapped by PEFT or not.
        vision: take the vision tower.
        language: take the language tower, cross-attention layers included.
        attention: take attention linears.
        mlp: take feed-forward linears.
        projector: take what carries image features into the language model.
        last_n_layers: of each chosen tower take only the last so many blocks; what lies outside its blocks is left
            out. The projector and the head have no blocks and are not affected.
        target_modules: names, a regular expression or ``"all-linear"``, see above.

    Raises:
        ConfigError: an argument is of the wrong kind, or a tower, part, name or expression selects nothing.
        CheckpointError: the model does not fit the facts of its family.
    """
    chosen: dict[Tower, bool] = {"vision": vision, "projector": projector, "language": language}
    _check_flags(chosen, {"attention": attention, "mlp": mlp})
    towers = tuple(tower for tower, wanted in chosen.items() if wanted)
    facts = facts_for(model)
    linears = linear_modules(model, facts)
    if target_modules is None:
        wanted_parts: dict[Part, bool] = {"attention": attention, "mlp": mlp}
        parts = tuple(part for part, wanted in wanted_parts.items() if wanted)
        selected = _by_parts(linears, towers, parts, facts)
    elif isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        selected = _all_linear(linears, towers, facts)
    elif isinstance(target_modules, str):
        selected = _by_regex(linears, towers, target_modules, facts)
    else:
        selected = _by_names(linears, towers, target_modules, facts)
    if last_n_layers is not None:
        selected = _last_blocks(linears, selected, last_n_layers)
    names = {linear.name for linear in selected}
    modules = tuple(linear.name for linear in linears if linear.name in names)
    return Selection(modules, _table(linears, names))


def table_of(adapted: PeftModel) -> TargetTable:
    """Return on which linears of each tower a model's adapters are, however they came there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = adapted.get_base_model().named_modules()
    targeted = {name for name, module in modules if isinstance(module, BaseTunerLayer)}
    return _table(linear_modules(adapted, facts_for(adapted)), targeted)


def _check_flags(towers: dict[Tower, bool], parts: dict[Part, bool]) -> None:
    flags = {_FLAGS[tower]: value for tower, value in towers.items()}
    flags |= {_PART_FLAGS[part]: value for part, value in parts.items()}
    for name, value in flags.items():
        check_flag(name, value)


def _by_parts(
    linears: Sequence[LinearModule], towers: tuple[Tower, ...], parts: tuple[Part, ...], facts: ArchFacts
) -> list[LinearModule]:
    """Select what the four flags and the projector's name."""
    blocks = tuple(tower for tower in towers if tower != "projector")
    if not towers:
        raise ConfigError(
            f"{_FLAGS['vision']}=False and {_FLAGS['language']}=False leave nothing to train: set one of them to True."
        )
    if blocks and not parts:
        attention, mlp = _PART_FLAGS["attention"], _PART_FLAGS["mlp"]
        raise ConfigError(f"{attention}=False and {mlp}=False leave nothing to train: set one of them to True.")
    selected = [x for x in linears if x.tower == "projector" or x.part in parts]
    selected = [x for x in selected if x.tower in towers]
    _check_towers(selected, towers, linears, facts)
    for part in parts if blocks else ():
        if not any(linear.part == part for linear in selected):
            raise ConfigError(
                f"{_PART_FLAGS[part]}=True selects nothing in {_listed(blocks)} of this {facts.model_type!r} model: "
                f"set it to False; {_has(linears)}."
            )
    return selected


def _all_linear(linears: Sequence[LinearModule], towers: tuple[Tower, ...], facts: ArchFacts) -> list[LinearModule]:
    if not towers:
        raise ConfigError(
            f"target_modules='all-linear' selects nothing with {_FLAGS['vision']}=False and "
            f"{_FLAGS['language']}=False: set one of them to True."
        )
    selected = [linear for linear in linears if linear.tower in towers]
    _check_towers(selected, towers, linears, facts)
    return selected


def _check_towers(
    selected: Sequence[LinearModule], towers: Iterable[Tower], linears: Sequence[LinearModule], facts: ArchFacts
) -> None:
    for tower in towers:
        if not any(linear.tower == tower for linear in selected):
            raise ConfigError(
                f"{_FLAGS[tower]}=True selects nothing in this {facts.model_type!r} model: set it to False; "
                f"{_has(linears)}."
            )


def _by_regex(
    linears: Sequence[LinearModule], towers: tuple[Tower, ...], pattern: str, facts: ArchFacts
) -> list[LinearModule]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"target_modules={pattern!r} is not a regular expression ({error}): mend it, or pass a list of names."
        ) from None
    return _by_pattern(linears, towers, pattern, lambda name: compiled.fullmatch(name) is not None, facts)


def _by_names(
    linears: Sequence[LinearModule], towers: tuple[Tower, ...], names: Sequence[str], facts: ArchFacts
) -> list[LinearModule]:
    if not isinstance(names, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"target_modules={names!r} is not a choice of modules: pass a list of names, a regular expression or "
            "'all-linear'."
        )
    if not names:
        raise ConfigError("target_modules=[] selects nothing: name at least one module, or leave it out.")
    selected: list[LinearModule] = []
    for entry in names:
        selected += _by_pattern(linears, towers, entry, _ends_in(entry), facts)
    return selected


def _ends_in(entry: str) -> Callable[[str], bool]:
    return lambda name: name == entry or name.endswith(f".{entry}")


def _by_pattern(
    linears: Sequence[LinearModule],
    towers: tuple[Tower, ...],
    text: str,
    matches: Callable[[str], bool],
    facts: ArchFacts,
) -> list[LinearModule]:
    """Select what one name or expression means within the chosen towers."""
    matched = [linear for linear in linears if matches(linear.name)]
    if not matched:
        endings = sorted({linear.name.rsplit(".", 1)[-1] for linear in linears if linear.tower != "audio"})
        raise ConfigError(
            f"target_modules: {text!r} matches no linear layer of this {facts.model_type!r} model: their names end in "
            f"{', '.join(endings)}."
        )
    alone = {linear.tower for linear in matched}
    allowed = set(towers)
    for tower in ("projector", "head"):
        if alone == {tower} or _says_name(text, facts.towers()[tower]):
            allowed.add(tower)
    selected = [linear for linear in matched if linear.tower in allowed]
    if not selected:
        raise ConfigError(f"target_modules: {text!r} matches only {_listed(alone)} modules, {_refusal(alone)}.")
    return selected


def _says_name(text: str, paths: Sequence[str]) -> bool:
    """Tell whether a name or expression says what a projector or head is called."""
    return any(path.rsplit(".", 1)[-1] in re.split(r"\W+", text) for path in paths)


def _refusal(towers: set[Tower]) -> str:
    flags = [f"{_FLAGS[tower]}=False" for tower in TOWERS if tower in towers and tower in _FLAGS]
    if not flags:
        return "which are never trained: leave it out"
    return f"left out by {' and '.join(flags)}: set one to True or drop the name"


def _last_blocks(
    linears: Sequence[LinearModule], selected: Sequence[LinearModule], last_n_layers: int
) -> list[LinearModule]:
    """Keep what lies in the last blocks of its tower, and what lies in a tower without blocks."""
    if not is_positive(last_n_layers):
        raise ConfigError(
            f"finetune_last_n_layers={last_n_layers!r} is not a number of layers: pass a whole number of at least 1."
        )
    counts: dict[Tower, int] = {}
    for linear in linears:
        if linear.block is not None:
            counts[linear.tower] = max(counts.get(linear.tower, 0), linear.block + 1)
    chosen = {linear.tower for linear in selected} & set(counts)
    if chosen and last_n_layers > max(counts[tower] for tower in chosen):
        sizes = " and ".join(f"{tower} has {counts[tower]}" for tower in TOWERS if tower in chosen)
        raise ConfigError(
            f"finetune_last_n_layers={last_n_layers} is more than there are ({sizes}): take fewer, or leave it out."
        )
    kept = []
    for linear in selected:
        first = counts.get(linear.tower, 0) - last_n_layers
        if linear.tower not in counts or (linear.block is not None and linear.block >= first):
            kept.append(linear)
    if not kept:
        raise ConfigError(
            f"finetune_last_n_layers={last_n_layers} leaves nothing of target_modules: take more layers or other names."
        )
    return kept


def _table(linears: Sequence[LinearModule], names: set[str]) -> TargetTable:
    rows = []
    for tower in TOWERS:
        for part in PARTS:
            here = [linear for linear in linears if (linear.tower, linear.part) == (tower, part)]
            taken = [linear for linear in here if linear.name in names]
            if here:
                parameters = sum(linear.parameters for linear in taken)
                rows.append(TargetRow(tower, part, len(taken), len(here), parameters))
    return TargetTable(tuple(rows))


def _has(linears: Sequence[LinearModule]) -> str:
    """Say in words which towers and parts a model has linears in."""
    found = dict.fromkeys((linear.tower, linear.part) for linear in linears if linear.tower != "audio")
    return "the model has " + ", ".join(f"{tower} {part}" for tower, part in found)


def _listed(towers: Iterable[Tower]) -> str:
    wanted = set(towers)
    return " and ".join(tower for tower in TOWERS if tower in wanted)
