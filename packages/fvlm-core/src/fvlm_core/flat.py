"""Many small parameters as one: one launch for the optimizer's step, few for the gradients' norm.

An adapter is about a thousand small matrices. An optimizer that works on each element alone (AdamW, in 32 bit or with
bitsandbytes' blockwise 8-bit state) gives the same values if they lie one behind another in a single long parameter.
Every matrix starts at a multiple of `BLOCK` elements there, so that no block of an 8-bit state spans two of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BLOCK = 256
"""Elements that share a scale in bitsandbytes' 8-bit optimizer states."""
LEAST = 4096
"""bitsandbytes keeps the state of smaller parameters in 32 bit, so they stay on their own."""


class FlatParameters:
    """Parameters moved into one piece of memory, of which they are views from then on.

    Their values, names and modules stay; what reads or changes a parameter in place reads or changes the flat one.

    Args:
        parameters: of one dtype and one device, none twice; all of them trained.

    Raises:
        ValueError: there is none, or they differ in dtype or device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        if len({(p.dtype, p.device) for p in parameters}) != 1:
            raise ValueError("flat parameters must be of one dtype and on one device, and at least one")
        self.parameters = list(parameters)
        first = self.parameters[0]
        rooms = [-(-p.numel() // BLOCK) * BLOCK for p in self.parameters]
        flat = torch.zeros(sum(rooms), dtype=first.dtype, device=first.device)
        self._rooms, self._views = rooms, list[Tensor]()
        for parameter, place in zip(self.parameters, self._places_in(flat), strict=True):
            place.copy_(parameter.data)
            parameter.data = place
        self.parameter = nn.Parameter(flat)
        """``(n,)``: all of them; what the optimizer is given."""

    def _places_in(self, flat: Tensor) -> list[Tensor]:
        """Return the parts of a flat tensor that belong to the parameters, in their shapes."""
        parts = zip(self.parameters, flat.split(self._rooms), strict=True)
        return [part[: p.numel()].view(p.shape) for p, part in parts]

    def gather(self) -> None:
        """Copy the parameters' gradients to the flat one's, which is made for it and held until `release`.

        Where no parameter has a gradient the flat one has none either, and the optimizer passes it over. Where some
        have none they count as zero.
        """
        grads = [p.grad for p in self.parameters]
        if all(g is None for g in grads):
            self.release()
            return
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
            self._views = self._places_in(self.parameter.grad)
        missing = [view for view, g in zip(self._views, grads, strict=True) if g is None]
        if missing:
            torch._foreach_zero_(missing)
        pairs = [(view, g) for view, g in zip(self._views, grads, strict=True) if g is not None]
        torch._foreach_copy_([view for view, _ in pairs], [g for _, g in pairs])

    def release(self) -> None:
        """Free the flat gradient, which would lie beside the parameters' own while the next ones are computed."""
        self.parameter.grad, self._views = None, []

    def scatter(self) -> None:
        """Copy the flat one's gradient, as `gather` left it, to those parameters that have a gradient."""
        if not self._views:
            return
        pairs = [(p.grad, view) for p, view in zip(self.parameters, self._views, strict=True) if p.grad is not None]
        if pairs:
            torch._foreach_copy_([g for g, _ in pairs], [view for _, view in pairs])


def flatten(parameters: Sequence[nn.Parameter]) -> tuple[list[FlatParameters], list[nn.Parameter]]:
    """Move the parameters that are worth it into flat ones, by dtype and device.

    Returns:
        The flat ones, and the parameters that stay on their own: small ones, and those that are not floating or not
        dense.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    alone: list[nn.Parameter] = []
    for parameter in parameters:
        fits = type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.is_contiguous()
        if fits and parameter.numel() >= LEAST:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        else:
            alone.append(parameter)
    for group in [group for group in groups.values() if len(group) == 1]:
        alone += group
    return [FlatParameters(group) for group in groups.values() if len(group) > 1], alone


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients together so that their norm is at most ``max_norm``.

    Computes what `torch.nn.utils.clip_grad_norm_` does with its default arguments.

    Args:
        parameters: flat ones, after `FlatParameters.gather`, and others.
        max_norm: above 0; infinity leaves them as they are.

    Returns:
        The norm before, a 0-d tensor on the device.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    total: Tensor = torch.linalg.vector_norm(torch.stack([g.to(grads[0].device) for g in torch._foreach_norm(grads)]))
    if max_norm != float("inf"):
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for device in {g.device for g in grads}:  # a model may lie on several
            torch._foreach_mul_([g for g in grads if g.device == device], scale.to(device))
    return total
