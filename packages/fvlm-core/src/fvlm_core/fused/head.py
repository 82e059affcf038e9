"""The language model's head and its loss, without logits for tokens whose label is ignored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from fvlm_core.fused.cache import cache_of
from fvlm_core.fused.media import MEDIA_ROWS, MEDIA_SIZES
from fvlm_kernels import linear_cross_entropy

LABEL_ROWS = "label_rows"
"""Key of a batch that holds where the learned tokens lie, as the collator counted them."""
IGNORE_INDEX = -100


@dataclass
class FusedCausalLMOutput(CausalLMOutputWithPast):
    """What a training step gets: the loss, and no logits.

    Attributes:
        learned_tokens: ``(2,)`` int64: how many learned tokens had the highest logit, and how many there are.
    """

    learned_tokens: Tensor | None = None


def task_model_unfit(module: nn.Module) -> str | None:
    """Say why a task model's head cannot be fused, or None."""
    head = module._modules.get("lm_head")
    if head is None or "model" not in module._modules:
        return "has no head of the usual kind"
    return None


def gemma_task_model_unfit(module: nn.Module) -> str | None:
    """Say why the head of Gemma 3 cannot be fused, or None.

    In older transformers (5.15) its loss leaves out padding even where it has labels, and is never divided by a number
    that the trainer gives; its class says so.
    """
    if not getattr(type(module), "accepts_loss_kwargs", True):
        return "has a loss of its own"
    return task_model_unfit(module)


def task_model_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the model; in training, with labels, compute the loss from the learned tokens' rows alone.

    It is what the class's forward computes in every other case: without labels, in evaluation, with arguments that ask
    for logits, or with a head that is adapted or hooked.
    """
    if not _is_training_call(module, args, kwargs):
        for name in (LABEL_ROWS, MEDIA_ROWS, MEDIA_SIZES):
            kwargs.pop(name, None)
        return type(module).forward(module, *args, **kwargs)
    labels, rows = kwargs.pop("labels"), kwargs.pop(LABEL_ROWS, None)
    num_items = kwargs.pop("num_items_in_batch", None)
    for name in ("return_dict", "logits_to_keep"):
        kwargs.pop(name, None)
    outputs = module.model(**kwargs)
    loss, counts = causal_loss(outputs.last_hidden_state, module.lm_head, labels, rows, num_items)
    return FusedCausalLMOutput(
        loss=cast("Any", loss),
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        learned_tokens=counts,
        **cache_of(outputs),
    )


def causal_loss(
    hidden: Tensor, head: nn.Module, labels: Tensor, rows: Tensor | None, num_items: Tensor | int | None
) -> tuple[Tensor, Tensor]:
    """Return the loss of predicting each token from the ones before it, as transformers' ``ForCausalLMLoss`` does.

    Args:
        hidden: ``(batch, tokens, width)``, what goes into the head.
        head: the head, a ``torch.nn.Linear``.
        labels: ``(batch, tokens)`` int64, not shifted; -100 where nothing is learned.
        rows: ``(learned,)`` int64, the flat indices of the tokens whose *next* token is learned; None: found here, at
            the price of one synchronization with the device.
        num_items: what the sum is divided by; None: how many tokens are learned.

    Returns:
        The loss, fp32, and ``(2,)`` int64: how many learned tokens had the highest logit, and how many there are.
    """
    shifted = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    loss, stats = linear_cross_entropy(
        hidden,
        cast("Tensor", head.weight),
        shifted,
        cast("Tensor | None", head.bias),
        IGNORE_INDEX,
        num_items=num_items,
        rows=rows,
        return_stats=True,
    )
    return loss, torch.stack([stats.correct.long(), stats.items])


def _is_training_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    head = module.lm_head
    asks_for_logits = (
        kwargs.get("return_dict") is False or kwargs.get("logits_to_keep", 0) != 0 or "shift_labels" in kwargs
    )
    return (
        module.training
        and torch.is_grad_enabled()
        and not args
        and kwargs.get("labels") is not None
        and not asks_for_logits
        and type(head) is nn.Linear
        and "forward" not in vars(head)
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
    )
