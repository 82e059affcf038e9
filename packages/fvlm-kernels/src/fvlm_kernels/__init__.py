"""Triton kernels for training vision-language models, with PyTorch references.

Every op is a function on tensors; see the module of its name for its maths, gradients and numerics. ``impl=None`` runs
Triton on a GPU and plain PyTorch elsewhere, ``impl="torch"`` and ``impl="triton"`` choose.
"""

from ._losses import LossStats
from .activations import gelu, quick_gelu
from .adamw import adamw_flat_
from .attention_residuals import AttentionResiduals, attention_from_residuals, attention_with_residuals
from .cross_entropy import cross_entropy
from .decode_attention import decode_attention
from .gated import geglu, swiglu
from .int8 import Int8Weight, dequantize_int8
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy
from .lora import lora_linear, lora_qkv
from .lora_decode import lora_decode, lora_decode_gated
from .lora_layer import LoRALinear
from .lora_mlp import lora_mlp
from .multimodal_rotary import multimodal_rotary
from .nf4 import dequantize_nf4
from .nf4_format import NF4Weight
from .nf4_matvec import nf4_matvec
from .nf4_quantize import quantize_nf4
from .packed_rotary import packed_vision_rotary
from .patch_embed import patch_embed
from .rms_norm import rms_norm
from .rotary import rotary, vision_rotary
from .varlen_attention import varlen_attention

__all__ = [
    "AttentionResiduals",
    "Int8Weight",
    "LoRALinear",
    "LossStats",
    "NF4Weight",
    "__version__",
    "adamw_flat_",
    "attention_from_residuals",
    "attention_with_residuals",
    "cross_entropy",
    "decode_attention",
    "dequantize_int8",
    "dequantize_nf4",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "lora_decode",
    "lora_decode_gated",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "multimodal_rotary",
    "nf4_matvec",
    "packed_vision_rotary",
    "patch_embed",
    "quantize_nf4",
    "quick_gelu",
    "rms_norm",
    "rotary",
    "swiglu",
    "varlen_attention",
    "vision_rotary",
]

__version__ = "0.1.0"
