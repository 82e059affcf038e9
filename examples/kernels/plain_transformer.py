"""Train a plain PyTorch transformer, then the same with its norm, rotary, MLP and loss from fvlm_kernels.

    python examples/kernels/plain_transformer.py [--steps 8] [--device cuda]

It needs torch and fvlm_kernels alone. Both runs start from the same weights and see the same batches; the program
prints their losses side by side and what each held at most, and fails where the losses part. On a GPU the kernels run,
on a CPU their PyTorch references.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fvlm_kernels import linear_cross_entropy, rms_norm, rotary, swiglu

TOLERANCE = 1e-4  # relative, over a few steps in fp32: what differs is the order of sums


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys."""

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turn(q), turn(k)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gated activation of the MLP."""
    return functional.silu(gate) * up


def plain_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The head and its loss: logits for every token."""
    return functional.cross_entropy(functional.linear(hidden, head).flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Ops:
    """The four operations that are exchanged; everything else of the model stays."""

    norm: Callable[..., Tensor] = plain_norm
    rotary: Callable[..., tuple[Tensor, Tensor]] = plain_rotary
    swiglu: Callable[..., Tensor] = plain_swiglu
    loss: Callable[..., Tensor] = plain_loss


PLAIN, FUSED = Ops(), Ops(rms_norm, rotary, swiglu, linear_cross_entropy)


@dataclass(frozen=True)
class Sizes:
    """Of the model and its batches."""

    width: int
    heads: int
    layers: int
    vocabulary: int
    batch: int
    tokens: int


SIZES = {"cpu": Sizes(64, 2, 2, 4096, 2, 48), "cuda": Sizes(1024, 8, 4, 131072, 8, 512)}


class Block(nn.Module):
    """Attention and a gated MLP, each after a norm and inside a residual."""

    def __init__(self, sizes: Sizes, ops: Ops):
        super().__init__()
        width, self.heads, self.ops = sizes.width, sizes.heads, ops
        self.first_norm, self.second_norm = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map ``(batch, tokens, width)`` to the same."""
        q, k, v = self.qkv(self.ops.norm(x, self.first_norm, 1e-6)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = self.ops.rotary(q, k, cos, sin)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.ops.norm(x, self.second_norm, 1e-6)
        return x + self.down(self.ops.swiglu(self.gate(y), self.up(y)))


class Transformer(nn.Module):
    """A decoder that returns its loss."""

    def __init__(self, sizes: Sizes, ops: Ops):
        super().__init__()
        self.ops = ops
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, ops) for _ in range(sizes.layers))
        self.norm = nn.Parameter(torch.ones(sizes.width))
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        half = sizes.width // sizes.heads // 2
        angles = torch.arange(sizes.tokens).unsqueeze(1) * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", torch.cat((angles, angles), dim=-1).cos())
        self.register_buffer("sin", torch.cat((angles, angles), dim=-1).sin())

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of predicting each labelled token from those before it."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        targets = functional.pad(labels[:, 1:], (0, 1), value=-100)
        return self.ops.loss(self.ops.norm(x, self.norm, 1e-6), self.head.weight, targets)


def batch(sizes: Sizes, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids that count upwards from a random start, and labels for the last third of them."""
    start = torch.randint(0, 64, (sizes.batch, 1), generator=torch.Generator().manual_seed(step))
    ids = ((start + torch.arange(sizes.tokens)) % 64).to(device)
    labels = ids.clone()
    labels[:, : sizes.tokens * 2 // 3] = -100
    return ids, labels


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned: the measure of memory where there is no GPU."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returned = result if isinstance(result, tuple | list) else (result,)
        self.nbytes = max([self.nbytes, *(t.nbytes for t in returned if isinstance(t, Tensor))])
        return result


def train(ops: Ops, sizes: Sizes, steps: int, device: torch.device) -> tuple[list[float], int]:
    """Return the losses, and the peak of memory in bytes (on a CPU: the largest tensor that a step made)."""
    torch.manual_seed(0)
    model = Transformer(sizes, ops).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses, largest = [], Largest()
    for step in range(steps):
        ids, labels = batch(sizes, step, device)
        if device.type == "cuda" and step == 1:  # the first step makes the gradients and the optimizer's state
            torch.cuda.reset_peak_memory_stats(device)
        optimizer.zero_grad()
        if device.type == "cuda":
            loss = model(ids, labels)
            loss.backward()
        else:
            with largest:
                loss = model(ids, labels)
                loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else largest.nbytes


def main(arguments: list[str] | None = None) -> int:
    """Train both ways and compare; return 1 where the losses part or memory was not saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error(f"--steps is {options.steps}; two are needed to see a loss change")
    device = torch.device(options.device)
    runs = [train(ops, SIZES[options.device], options.steps, device) for ops in (PLAIN, FUSED)]
    (plain, plain_bytes), (fused, fused_bytes) = runs
    print("step       plain       fused")
    for step, pair in enumerate(zip(plain, fused, strict=True)):
        print(f"{step:4d}  {pair[0]:10.6f}  {pair[1]:10.6f}")
    what = "peak memory" if device.type == "cuda" else "largest tensor"
    print(f"{what}: plain {plain_bytes / 2**20:.1f} MiB, fused {fused_bytes / 2**20:.1f} MiB")
    apart = max(abs(a - b) / abs(a) for a, b in zip(plain, fused, strict=True))
    print(f"the losses differ by {apart:.1e} at most; {TOLERANCE:.0e} is allowed")
    return int(not apart <= TOLERANCE or fused_bytes >= plain_bytes)


if __name__ == "__main__":
    sys.exit(main())
