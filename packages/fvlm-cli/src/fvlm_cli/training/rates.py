"""A learning rate of its own for each tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fvlm_core.arch import Tower, facts_for
from fvlm_core.arch.linears import tower_of
from fvlm_core.errors import ConfigError


def split_by_tower(
    optimizer: Any, model: Any, rates: Mapping[Tower, float], behind: Callable[[Any], Sequence[Any]] = lambda p: [p]
) -> None:
    """Give the parameters of some towers their own learning rates, in parameter groups of their own.

    Must be called before a scheduler looks at the groups. What belongs to no tower that is named keeps its rate and
    comes first, so that the rate which is logged is `train.learning_rate` where anything has it.

    Args:
        optimizer: a torch optimizer that has taken no step; its groups are replaced.
        model: the model whose parameters it has.
        rates: tower → learning rate.
        behind: optimizer's parameter → the model's that lie in it, all of one tower.

    Raises:
        ConfigError: nothing of a tower is trained.
    """
    facts = facts_for(model)
    towers: dict[int, Tower | None] = {}
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "").partition(".lora_")[0]
        towers[id(parameter)] = tower_of(plain, facts)

    def tower_behind(parameter: Any) -> Tower | None:
        return towers[id(behind(parameter)[0])]

    kept: list[dict[str, Any]] = []
    own: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for tower in (None, *rates):
            chosen = [p for p in group["params"] if (t if (t := tower_behind(p)) in rates else None) == tower]
            if chosen and tower is None:
                kept.append({**group, "params": chosen})
            elif chosen and tower is not None:
                own.append({**group, "params": chosen, "lr": rates[tower]})
    trained = {tower_behind(parameter) for group in own for parameter in group["params"]}
    for tower in rates:
        if tower not in trained:
            raise ConfigError(
                f"train.{tower}_learning_rate is given, and nothing of the {tower} tower is trained; leave it out, or "
                "put adapters there."
            )
    optimizer.param_groups[:] = kept + own
