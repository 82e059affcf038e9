"""Compile the kernels for a GPU that need not be there, at real widths; print one JSON line for each variant.

Triton's compiler and ptxas run on the CPU. Only Triton's notion of the current device is replaced, and launching by
compiling, in this process alone: ``test_compiles_for_gpu.py`` starts it. The interpreter accepts programs that the
compiler does not, and says nothing of registers, so that this is where a machine without a GPU sees both.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from inspect import signature

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CAPABILITY = int(sys.argv[1]) if len(sys.argv) > 1 else 90


class OneDevice:
    """Answers what Triton asks of a driver before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def assembler() -> str:
    """Return the path of the ptxas that Triton itself would run; which one it is goes by the GPU since Triton 3.6."""
    return get_ptxas(*[CAPABILITY][: len(signature(get_ptxas).parameters)]).path


def spills_of(ptx: str) -> tuple[int, int]:
    """Assemble; return registers a thread and bytes spilled."""
    arch = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler(), "-v", f"--gpu-name={arch}", "-o", "/dev/null", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", said)[1]), int(re.search(r"(\d+) bytes spill stores", said)[1])


def compile_only(self, grid):
    def start(*args, **keywords):
        kernel = self.run(*args, grid=grid, warmup=True, **keywords)
        registers, spilled = spills_of(kernel.asm["ptx"])
        print(json.dumps({"kernel": self.__name__, "registers": registers, "spilled": spilled, "meta": keywords}))

    return start


def launch_everything():
    """Call each operator once for each variant that real models use."""
    ops, dtype = torch.ops.fvlm, torch.bfloat16

    def random(*shape):
        return torch.randn(shape, dtype=dtype)

    for width in (1280, 3584, 8192):
        x, weight = random(300, width), random(width)
        ops.rms_norm_fwd(x, weight, 1e-6, 0.0, True)
        ops.add_rms_norm_fwd(x, x, weight, 1e-6, 1.0, False)
        ops.rms_norm_bwd(x, None, x, weight, 1e-6, 0.0, True, False)
        ops.rms_norm_bwd(x, x, x, weight, 1e-6, 1.0, False, True)
    for width in (1152,):
        x, weight = random(300, width), random(width)
        ops.layer_norm_fwd(x, weight, weight, 1e-6, dtype)
        ops.add_layer_norm_fwd(x, x, weight, None, 1e-6, dtype)
        ops.layer_norm_bwd(x, None, x, weight, 1e-6, False, False, dtype)
        ops.layer_norm_bwd(x, None, x, weight, 1e-6, True, True, dtype)
        ops.layer_norm_bwd(x, x, x, weight, 1e-6, True, True, dtype)
    x = random(300, 4304)
    for act in ("gelu_erf", "gelu_tanh", "quick_gelu"):
        ops.activation_fwd(x, act)
        ops.activation_bwd(x, x, act)
    for act in ("silu", "gelu_tanh"):
        ops.gated_fwd(x, x, act)
        ops.gated_bwd(x, x, x, act, True, True)
    for heads, key_heads, width in ((32, 8, 128), (8, 4, 256)):
        q, k = random(2, 9, heads, width).transpose(1, 2), random(2, 9, key_heads, width).transpose(1, 2)
        table = random(1, 2, 9, width)
        for backward in (False, True):
            ops.rotary(q, k, table, table, [], False, not backward, backward, dtype)
    patches, angles = random(1, 9, 16, 80).transpose(1, 2), torch.randn(1, 1, 9, 80)
    ops.rotary(patches, patches, angles, angles, [], False, False, False, dtype)
    q, tables = random(2, 9, 12, 128).transpose(1, 2), random(3, 2, 9, 64)
    for interleaved, sections in ((False, [16, 24, 24]), (True, [24, 20, 20])):
        ops.rotary(q, q, tables, tables, sections, interleaved, True, False, dtype)


def launch_quantized():
    """The same for 4-bit and 8-bit weights."""
    ops, dtype, (n, k) = torch.ops.fvlm, torch.bfloat16, (64, 3584)
    packed, absmax = ops.nf4_quantize(torch.randn(n, k, dtype=dtype), 64)
    nested = torch.ones(absmax.numel(), dtype=torch.uint8), torch.ones(14), torch.ones(256), torch.ones(1)
    ops.nf4_dequantize(packed, absmax, None, None, None, 64, (n, k), dtype)
    ops.nf4_dequantize(packed, *nested, 64, (n, k), dtype)
    for rows in (1, 2, 8):
        for size in (n, 18944):  # a program takes one row of a small weight, and several of a large one
            ops.nf4_matvec(torch.randn(rows, k, dtype=dtype), packed, *nested, 64, size)
    ops.int8_dequantize(torch.ones(n, k, dtype=torch.int8), torch.ones(n), dtype)


def launch_decoding():
    """The same for the products and the attention of decoding."""
    ops, dtype, (n, k) = torch.ops.fvlm, torch.bfloat16, (64, 3584)
    packed, absmax = ops.nf4_quantize(torch.randn(n, k, dtype=dtype), 64)
    nested = torch.ones(absmax.numel(), dtype=torch.uint8), torch.ones(14), torch.ones(256), torch.ones(1)
    for size in (n, 8192):  # a program takes one row of a small weight, and four of a large one
        adapter = torch.ones(size, dtype=dtype), torch.ones(16, k), torch.ones(size, 16)
        for tensors in ([packed, *nested, *adapter], [packed, absmax, None, None, None, None, None, None]):
            for rows in (1, 2, 8):
                x = torch.randn(rows, k, dtype=dtype)
                for layers in (1, 3):
                    ops.lora_decode(x, x, tensors * layers, [2.0] * layers, [size] * layers, 64, dtype, "")
                ops.lora_decode(x, x, tensors * 2, [2.0] * 2, [size] * 2, 64, dtype, "silu")
    length = torch.ones(1, dtype=torch.int64)
    for heads, key_heads, width, window in ((12, 2, 128, 0), (8, 4, 256, 1024)):
        cache = torch.ones(2, key_heads, 1024, width, dtype=dtype)
        for visible in (None, torch.ones(2, 1024, dtype=torch.bool)):
            given = torch.ones(2, heads, width, dtype=dtype), cache, cache, length, visible, window, 0.1
            ops.decode_attention(*given)
            ops.decode_attention_(*given, cache[:, :, 0], cache[:, :, 0])


def launch_losses():
    """The same for the cross entropies."""
    ops, dtype, labels, ones = torch.ops.fvlm, torch.bfloat16, torch.zeros(2, dtype=torch.int64), torch.ones(2, 2)
    for vocabulary, scale, cap in ((152064, 1.0, None), (262208, 1.0, 30.0), (262208, 0.0625, None)):
        logits = torch.ones(2, vocabulary, dtype=dtype)
        ops.cross_entropy_fwd(logits, labels, -100, scale, cap, 0.0)
        ops.cross_entropy_bwd(ones[0], logits, labels, ones, -100, scale, cap, 0.0)
    hidden, weight = torch.ones(2, 64, dtype=dtype), torch.ones(152064, 64, dtype=dtype)
    for cap in (None, 30.0):
        for gradient in (True, False):
            for stats in (True, False):
                ops.linear_cross_entropy(hidden, weight, None, labels, None, -100, cap, gradient, False, False, stats)
        ops.linear_cross_entropy(hidden, weight, None, labels, ones[0], -100, cap, True, False, False, False)


def launch_optimizer():
    """The same for the optimizer's step."""
    moments, scalar = torch.ones(2, 9999), torch.ones(())
    for dtype in (torch.float32, torch.bfloat16):
        for norm in (None, scalar):
            parameters = torch.ones(2, 9999, dtype=dtype)
            torch.ops.fvlm.adamw_flat_(*parameters, *moments, scalar, norm, 1.0, 1e-4, 0.9, 0.999, 1e-8, 0.01)


if __name__ == "__main__":
    driver.set_active(OneDevice())
    JITFunction.__getitem__ = compile_only
    import fvlm_kernels  # noqa: F401  (registers the operators)

    for module in ("_norms", "_row_pieces"):  # loops are pipelined on a GPU alone, which has the memory for it
        sys.modules[f"fvlm_kernels.{module}"].stages_for = lambda *_: 3
    launch_everything()
    launch_quantized()
    launch_decoding()
    launch_losses()
    launch_optimizer()
