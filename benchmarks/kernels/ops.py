"""All ops that are benchmarked, and their cases."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.kernels import (
    activations,
    bench_decoding,
    bench_lora,
    bench_nf4,
    losses,
    norms,
    optimizer,
    rotations,
    vision_parts,
)
from benchmarks.kernels.case import Case

OPS: dict[str, Callable[[bool], list[Case]]] = {
    "rms_norm": norms.rms_cases,
    "layer_norm": norms.layer_cases,
    "gated": activations.gated_cases,
    "gelu": activations.plain_cases,
    "rotary": rotations.rotary_cases,
    "multimodal_rotary": rotations.multimodal_cases,
    "vision_rotary": rotations.vision_cases,
    "nf4": bench_nf4.dequantize_cases,
    "quantize_nf4": bench_nf4.quantize_cases,
    "int8": bench_nf4.int8_cases,
    "lora_linear": bench_lora.linear_cases,
    "lora_qkv": bench_lora.qkv_cases,
    "lora_mlp": bench_lora.mlp_cases,
    "linear_cross_entropy": losses.linear_cases,
    "cross_entropy": losses.loss_cases,
    "varlen_attention": vision_parts.attention_cases,
    "patch_embed": vision_parts.patch_cases,
    "adamw": optimizer.adamw_cases,
    "nf4_matvec": bench_nf4.matvec_cases,
    "lora_decode": bench_lora.decode_cases,
    "decode_attention": bench_decoding.attention_cases,
}


def thinned(cases: list[Case]) -> list[Case]:
    """Keep a case or two of an op: the first and the last, which are the smallest and one of the largest."""
    return cases if len(cases) < 3 else [cases[0], cases[-1]]
