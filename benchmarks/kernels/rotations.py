"""Cases of ``rotary``, ``multimodal_rotary`` and ``vision_rotary``."""

from __future__ import annotations

from functools import partial

import torch
from benchmarks.kernels.case import Case, Inputs, liger, normal, present, size

from fvlm_kernels import multimodal_rotary, rotary, vision_rotary

TEXT = {  # batch, length, heads, key heads, head width
    "Qwen2-VL-2B text, ocr": (2, 518, 12, 2, 128),
    "Qwen2-VL-2B text, doc": (4, 1947, 12, 2, 128),
    "Qwen2.5-VL-7B text, doc": (4, 1947, 28, 4, 128),
    "Llama-3.2-11B-Vision text": (4, 2048, 32, 8, 128),
    "Gemma 3 4B text": (4, 2048, 8, 4, 256),
}
SECTIONS = (16, 24, 24)  # of both Qwen models: frequencies of time, height and width
VISION = {  # patches, heads, head width
    "Qwen2-VL-2B vision, ocr": (2592, 16, 80),
    "Qwen2-VL-2B vision, doc": (20480, 16, 80),
}


def _half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def hf_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What apply_rotary_pos_emb launches."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half(q) * sin, k * cos + _half(k) * sin


def hf_vision(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What apply_rotary_pos_emb_vision launches."""
    cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
    wide_q, wide_k = q.float(), k.float()
    turned_q, turned_k = wide_q * cos + _half(wide_q) * sin, wide_k * cos + _half(wide_k) * sin
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def _angles(device: torch.device, *shape: int) -> torch.Tensor:
    return normal(device, *shape, seed=7, dtype=torch.float32).repeat(*[1] * (len(shape) - 1), 2) * 3


def rotary_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``rotary``."""
    theirs = liger("liger_rope")
    theirs = theirs and partial(lambda q, k, cos, sin, fn: fn(q, k, cos, sin), fn=theirs)
    cases = []
    for name, shape in TEXT.items():
        b, s, h, hk, d = (1, 4, *shape[2:]) if tiny else shape

        def make(device: torch.device, b: int = b, s: int = s, h: int = h, hk: int = hk, d: int = d) -> Inputs:
            angles = _angles(device, b, s, d // 2)
            return {
                "q": normal(device, b, s, h, d).transpose(1, 2),
                "k": normal(device, b, s, hk, d, seed=1).transpose(1, 2),
                "cos": angles.cos().bfloat16(),
                "sin": angles.sin().bfloat16(),
            }

        moved = size(2, b, s, h + hk, d) + size(2, b, s, d)
        cases.append(
            Case(
                "rotary", name, make,
                present(torch=hf_rotary, compile=torch.compile(hf_rotary), liger=theirs, fvlm=rotary),
                partial(rotary, impl="torch"), ["q", "k"], forward_bytes=moved, backward_bytes=moved,
                shape={"rows": b * s, "batch": b, "length": s, "heads": h, "key_heads": hk, "width": d},
            )
        )  # fmt: skip
    return cases


def hf_multimodal(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What apply_multimodal_rotary_pos_emb launches."""
    chosen = [
        torch.cat([part[i % 3] for i, part in enumerate(table.split(SECTIONS * 2, dim=-1))], dim=-1).unsqueeze(1)
        for table in (cos, sin)
    ]
    return q * chosen[0] + _half(q) * chosen[1], k * chosen[0] + _half(k) * chosen[1]


def multimodal_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``multimodal_rotary``: the text shapes of the Qwen models, positions on three axes."""
    theirs = liger("liger_qwen2vl_mrope")
    theirs = theirs and partial(lambda q, k, cos, sin, fn: fn(q, k, cos, sin, list(SECTIONS)), fn=theirs)
    ours = partial(multimodal_rotary, sections=SECTIONS)
    cases = []
    for name, shape in TEXT.items():
        if not name.startswith("Qwen"):
            continue
        b, s, h, hk, d = (1, 4, *shape[2:]) if tiny else shape

        def make(device: torch.device, b: int = b, s: int = s, h: int = h, hk: int = hk, d: int = d) -> Inputs:
            angles = _angles(device, 3, b, s, d // 2)
            q, k = normal(device, b, s, h, d).transpose(1, 2), normal(device, b, s, hk, d, seed=1).transpose(1, 2)
            return {"q": q, "k": k, "cos": angles.cos().bfloat16(), "sin": angles.sin().bfloat16()}

        moved = size(2, b, s, h + hk, d) + size(2, b, s, d)  # of the three tables one value a channel is needed
        cases.append(
            Case(
                "multimodal_rotary", name, make,
                present(torch=hf_multimodal, compile=torch.compile(hf_multimodal), liger=theirs, fvlm=ours),
                partial(ours, impl="torch"), ["q", "k"], forward_bytes=moved, backward_bytes=moved,
                shape={"rows": b * s, "batch": b, "length": s, "heads": h, "key_heads": hk, "width": d},
            )
        )  # fmt: skip
    return cases


def vision_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``vision_rotary``, on slices of a fused QKV projection."""
    cases = []
    for name, shape in VISION.items():
        s, h, d = (4, *shape[1:]) if tiny else shape

        def make(device: torch.device, s: int = s, h: int = h, d: int = d) -> Inputs:
            qkv, angles = normal(device, s, 3, h, d), _angles(device, s, d // 2)
            return {"q": qkv[:, 0], "k": qkv[:, 1], "cos": angles.cos(), "sin": angles.sin()}

        moved = size(2, 2, s, h, d) + size(2, s, d, itemsize=4)
        cases.append(
            Case(
                "vision_rotary", name, make,
                present(torch=hf_vision, compile=torch.compile(hf_vision), fvlm=vision_rotary),
                partial(vision_rotary, impl="torch"), ["q", "k"], forward_bytes=moved, backward_bytes=moved,
                shape={"rows": s, "heads": h, "width": d},
            )
        )  # fmt: skip
    return cases
