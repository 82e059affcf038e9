"""Whether hooks on modules do anything in a call that is made now: a recording would leave out what they do.

After a call that returned hidden states or attentions, transformers leaves hooks on layers, for good. They do nothing
but while such outputs are being collected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

_CAPTURING = "transformers.utils.output_capturing"

Hooks = Mapping[int, Callable[..., Any]]


def forward_hooks(module: nn.Module) -> tuple[Hooks, Hooks]:
    """Return the hooks of a module's own calls; they stay the same objects when hooks come and go."""
    return module._forward_hooks, module._forward_pre_hooks


def hooks_inside(module: nn.Module) -> list[Hooks]:
    """Return the hooks of a module and of all in it, those of backward passes too; likewise."""
    return [hooks for m in module.modules() for hooks in (*forward_hooks(m), m._backward_hooks, m._backward_pre_hooks)]


def hooks_act(found: Sequence[Hooks]) -> bool:
    """Tell whether any of these hooks does something in a call that is made now."""
    return any(found) and any(_acts(hook) for hooks in found for hook in hooks.values())


def _acts(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "__module__", None) != _CAPTURING or _is_capturing()


def _is_capturing() -> bool:
    """Tell whether transformers is collecting outputs; a release in which that cannot be told is taken to be."""
    from transformers.utils import output_capturing

    collector = vars(output_capturing).get("_active_collector")
    return collector is None or bool(collector.get())
