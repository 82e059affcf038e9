"""Cases of ``patch_embed`` and ``varlen_attention``, which are bound by arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from benchmarks.kernels.case import Case, Inputs, normal, present

from fvlm_kernels import patch_embed, varlen_attention

PATCHES = {  # shape of x, shape of weight
    "Qwen2-VL-2B vision, ocr": ((2592, 3, 2, 14, 14), (1280, 3, 2, 14, 14)),
    "Qwen2-VL-2B vision, doc": ((20480, 3, 2, 14, 14), (1280, 3, 2, 14, 14)),
    "Llama-3.2-11B-Vision vision": ((16, 3, 560, 560), (1280, 3, 14, 14)),
    "Gemma 3 4B vision": ((4, 3, 896, 896), (1152, 3, 14, 14)),
}
SEGMENTS = {  # lengths, heads, key heads, head width, causal
    "Qwen2-VL-2B vision, ocr": ([1296] * 2, 16, 16, 80, False),
    "Qwen2-VL-2B vision, doc": ([5120] * 4, 16, 16, 80, False),
    "Qwen2.5-VL-7B vision windows, doc": ([64] * 320, 16, 16, 80, False),
    "Qwen2-VL-2B text, packed": ([1947] * 4, 12, 2, 128, True),
    "Qwen2.5-VL-7B text, packed": ([1947] * 4, 28, 4, 128, True),
    "Llama-3.2-11B-Vision text, packed": ([512, 1024, 2048, 4608], 32, 8, 128, True),
    "Gemma 3 4B text, packed": ([512, 1024, 2048, 4608], 8, 4, 256, True),
}


def _convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    conv: Any = torch.nn.functional.conv3d if weight.dim() == 5 else torch.nn.functional.conv2d
    out: torch.Tensor = conv(x, weight, stride=weight.shape[2:]).movedim(1, -1)
    return out


def patch_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``patch_embed``."""
    cases = []
    for name, (x_shape, weight_shape) in PATCHES.items():
        if tiny:
            x_shape, weight_shape = (2, 3, *(28 if n > 14 else n for n in x_shape[2:])), (8, *weight_shape[1:])

        def make(device: torch.device, x: tuple[int, ...] = x_shape, w: tuple[int, ...] = weight_shape) -> Inputs:
            return {"x": normal(device, *x), "weight": normal(device, *w, seed=1) * 0.03}

        numbers = torch.Size(x_shape).numel()
        cases.append(
            Case(
                "patch_embed", name, make, present(torch=_convolve, compile=torch.compile(_convolve), fvlm=patch_embed),
                _convolve, ["weight"], forward_flops=2 * numbers * weight_shape[0],
                backward_flops=2 * numbers * weight_shape[0], shape={"numbers": numbers, "width": weight_shape[0]},
            )
        )  # fmt: skip
    return cases


def _by_segment(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool
) -> torch.Tensor:
    """What stock SDPA does: one call for each image, window or document."""
    lengths = cu_seqlens.diff().tolist()
    pieces = zip(*(t.transpose(0, 1).split(lengths, dim=1) for t in (q, k, v)), strict=True)
    options = {"is_causal": causal, "enable_gqa": q.shape[1] != k.shape[1]}
    attend = partial(torch.nn.functional.scaled_dot_product_attention, **options)
    outs = [attend(*(t.unsqueeze(0) for t in piece)).squeeze(0) for piece in pieces]
    return torch.cat(outs, dim=1).transpose(0, 1)


def attention_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``varlen_attention``."""
    cases = []
    for name, (full, h, hk, d, causal) in SEGMENTS.items():
        lengths = [3, 5] if tiny else full

        def make(
            device: torch.device, lengths: list[int] = lengths, heads: tuple[int, ...] = (h, hk, hk), d: int = d
        ) -> Inputs:
            total, ends = sum(lengths), torch.tensor(lengths).cumsum(0)
            tensors: Inputs = {n: normal(device, total, heads[i], d, seed=i) for i, n in enumerate("qkv")}
            cu = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).to(torch.int32).to(device)
            return tensors | {"cu_seqlens": cu}

        flops = 4 * h * d * sum(n * n for n in lengths) // (2 if causal else 1)
        ours = partial(varlen_attention, max_seqlen=max(lengths), causal=causal)
        cases.append(
            Case(
                "varlen_attention", name, make, present(torch=partial(_by_segment, causal=causal), fvlm=ours),
                partial(varlen_attention, impl="torch", causal=causal), ["q", "k", "v"],
                forward_flops=flops, backward_flops=flops * 5 // 2,
                shape={"segments": len(lengths), "longest": max(lengths), "heads": h, "key_heads": hk, "width": d},
            )
        )  # fmt: skip
    return cases
