"""The kernels compile for an H100, at real widths, without spilling registers; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")
KERNELS = {
    "_rms_norm_fwd_kernel",
    "_rms_norm_bwd_kernel",
    "_layer_norm_fwd_kernel",
    "_layer_norm_bwd_kernel",
    "_sum_shares_kernel",
    "_activation_fwd_kernel",
    "_activation_bwd_kernel",
    "_gated_fwd_kernel",
    "_gated_bwd_kernel",
    "_rotary_kernel",
    "_nf4_quantize_kernel",
    "_nf4_dequantize_kernel",
    "_nf4_matvec_kernel",
    "_int8_dequantize_kernel",
    "_loss_rows_kernel",
    "_loss_bwd_kernel",
    "_adamw_kernel",
    "_narrow_kernel",
    "_products_kernel",
    "_partial_kernel",
    "_join_kernel",
}


CAPABILITY = "90"  # 80 passes as well, and takes as long again
# A trained layer norm with a residual fills a thread's 255 registers with its rows and sums, and lacks one.
SPILLED = {"_layer_norm_bwd_kernel": 4}
if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9):  # the loss with softcap, statistics and gradient
    SPILLED["_loss_rows_kernel"] = 4  # one register, outside the loop


def test_compiles_without_spills(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_for_gpu.py")
    done = subprocess.run(
        [sys.executable, str(script), CAPABILITY], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    variants = [json.loads(line) for line in done.stdout.splitlines()]
    assert {v["kernel"] for v in variants} == KERNELS
    assert not [v for v in variants if v["spilled"] > SPILLED.get(v["kernel"], 0)]
