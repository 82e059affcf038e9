"""The one error policy that every op's tests hold, and the fixtures' parts around it.

With ``exact`` the reference computed in float64 and ``low`` the reference computed in the dtype under test::

    err(ours) <= 2 * err(low) + eps(dtype) * max|exact|

for every output and every gradient, ``err`` being the largest absolute difference from ``exact``. No op has tolerances
of its own: where plain PyTorch rounds, an op may round about as much, and no more. Other packages hold their fused
layers to the same policy with :func:`check_against_reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill whatever ``torch.empty`` and its kin return with NaN, so that an element never written shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch fills only under this setting
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def randn(
    *shape: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0, scale: float = 1.0
) -> torch.Tensor:
    """Return normal numbers drawn in fp32 on the CPU and rounded to ``dtype``: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)


def strided(x: torch.Tensor, gap: int = 3) -> torch.Tensor:
    """Return a copy of ``x`` whose rows lie apart in memory, the bytes between them being NaN."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + gap), float("nan"))
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def transposed(x: torch.Tensor) -> torch.Tensor:
    """Return a copy of ``x`` (at least 2-D) whose last dimension is not the contiguous one."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def run_with_gradients(
    fn: Callable[..., Any],
    inputs: Tensors,
    wanted: Sequence[str],
    cotangents: Sequence[torch.Tensor | None] | None = None,
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Call ``fn(**inputs)`` and differentiate it.

    Args:
        fn: returns a tensor or a tuple of tensors.
        inputs: its arguments by name; strides are kept.
        wanted: the inputs to differentiate with respect to.
        cotangents: one gradient for each output, ``None`` for an output that is not used; drawn at random when absent.

    Returns:
        the outputs, and the gradients by input name.
    """
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
    result = fn(**leaves)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    if not wanted:
        return [o.detach() for o in outputs], {}
    if cotangents is None:
        cotangents = [
            randn(*o.shape, dtype=o.dtype, device=o.device, seed=1000 + i) if o.requires_grad else None
            for i, o in enumerate(outputs)
        ]
    used = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    grads = torch.autograd.grad([o for o, _ in used], [leaves[n] for n in wanted], [c for _, c in used])
    return [o.detach() for o in outputs], dict(zip(wanted, grads, strict=True))


def assert_within_policy(name: str, ours: torch.Tensor, low: torch.Tensor, exact: torch.Tensor) -> None:
    """Hold one tensor to the error policy, and to the reference's shape and dtype.

    Raises:
        AssertionError: naming the tensor, its error and the bound.
    """
    if ours.shape != low.shape or ours.dtype != low.dtype:
        raise AssertionError(
            f"{name} is {ours.dtype} {tuple(ours.shape)}, the reference's is {low.dtype} {tuple(low.shape)}"
        )
    if not ours.numel():
        return
    err = (ours.double() - exact).abs().max().item()
    err_low = (low.double() - exact).abs().max().item()
    bound = 2 * err_low + torch.finfo(low.dtype).eps * exact.abs().max().item()
    if not err <= bound:  # written so that NaN fails
        raise AssertionError(
            f"{name}: error {err:.3e} exceeds {bound:.3e} (the reference in {low.dtype}: {err_low:.3e})"
        )


def check_against_reference(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Tensors,
    wanted: Sequence[str] = (),
    *,
    unused: Sequence[int] = (),
) -> None:
    """Hold an op to the error policy, for its values and for the gradients of the inputs in ``wanted``.

    Args:
        ours: the op under test; called with ``inputs`` by name.
        reference: the same function in plain PyTorch, which stays in float64 when given float64.
        inputs: tensors by name. Floating ones are cast to float64 for ``exact``; others pass as they are.
        wanted: names of the inputs to differentiate with respect to.
        unused: indices of outputs that get no gradient.

    Raises:
        AssertionError: a value or a gradient breaks the policy, or has another shape or dtype than the reference's.
    """
    low_out, low_grad = run_with_gradients(reference, inputs, wanted)
    cotangents = None
    if wanted:
        cotangents = [
            randn(*o.shape, dtype=o.dtype, device=o.device, seed=2000 + i) if i not in unused else None
            for i, o in enumerate(low_out)
        ]
        low_out, low_grad = run_with_gradients(reference, inputs, wanted, cotangents)
    exact_inputs = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    exact_out, exact_grad = run_with_gradients(reference, exact_inputs, wanted, cotangents)
    with poisoned_memory():
        our_out, our_grad = run_with_gradients(ours, inputs, wanted, cotangents)
    if len(our_out) != len(low_out):
        raise AssertionError(f"{len(our_out)} outputs, the reference has {len(low_out)}")
    for i, (o, low, exact) in enumerate(zip(our_out, low_out, exact_out, strict=True)):
        assert_within_policy(f"output {i}", o, low, exact)
    for name in wanted:
        assert_within_policy(f"gradient of {name}", our_grad[name], low_grad[name], exact_grad[name])


def assert_same_rounding(ours: torch.Tensor, low: torch.Tensor, share: float = 0.01) -> None:
    """Check that two results of one dtype round alike: equal bits but for a small share of neighbours.

    The error policy lets an op be more exact than what it replaces; this does not. What may differ is the order of a
    sum or the last bit of an approximated function, which moves few elements over a rounding boundary.

    Raises:
        AssertionError: more than ``share`` of the elements differ, or one by more than two units in the last place.
    """
    if ours.shape != low.shape or ours.dtype != low.dtype:
        raise AssertionError(f"{ours.dtype} {tuple(ours.shape)} against {low.dtype} {tuple(low.shape)}")
    differing = (ours != low).double().mean().item() if ours.numel() else 0.0
    if differing > share:
        raise AssertionError(f"{differing:.2%} of the elements differ; {share:.2%} may")
    torch.testing.assert_close(ours, low, rtol=2 * torch.finfo(low.dtype).eps, atol=torch.finfo(low.dtype).tiny)


def assert_deterministic(fn: Callable[..., Any], inputs: Tensors, wanted: Sequence[str] = ()) -> None:
    """Check that two runs of ``fn`` give the same bits, for values and gradients.

    Raises:
        AssertionError: naming the tensor that differs.
    """
    first, second = (run_with_gradients(fn, inputs, wanted) for _ in range(2))
    pairs = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(first[0], second[0], strict=True))]
    pairs += [(f"gradient of {n}", first[1][n], second[1][n]) for n in wanted]
    for name, a, b in pairs:
        if not torch.equal(a, b):
            raise AssertionError(f"{name} differs between two runs")
