"""Merge a synthetic checkpoint of any size and report time, throughput and peak memory, beside a plain copy of it.

    python packages/fvlm-export/benchmarks/merge_memory.py FOLDER --gigabytes 12

FOLDER gets the checkpoint, the adapter and the result, and needs about three times the size. The model is a Qwen2-VL
with as many layers as the size asks for; its weights are drawn once and repeated: their values do not matter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from fvlm_core.testing import tiny_checkpoint
from fvlm_export import read_report, save_pretrained_merged
from fvlm_export.plan import parse_size
from fvlm_export.safetensor_file import SafetensorWriter, TensorInfo, as_bytes
from fvlm_export.skeleton import skeleton_of

HIDDEN, MLP, VOCAB, RANK = 3584, 18944, 152064, 16
SHARD = parse_size("4GB")


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Write a bf16 Qwen2-VL of about that size."""
    tiny_checkpoint("qwen2_vl", folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    layer = (2 * HIDDEN * HIDDEN + 2 * HIDDEN * 512 + 3 * HIDDEN * MLP) * 2
    layers = max(1, round((gigabytes * 1e9 - VOCAB * HIDDEN * 2) / layer))
    config["text_config"].update(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        layer_types=["full_attention"] * layers,
    )
    config["text_config"]["rope_parameters"]["mrope_section"] = [16, 24, 24]
    config["vision_config"]["hidden_size"] = HIDDEN
    config["dtype"] = config["text_config"]["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    skeleton = skeleton_of(AutoConfig.from_pretrained(folder))
    names = [name for name in skeleton.shapes if name not in skeleton.tied]
    infos = [TensorInfo(name, torch.bfloat16, skeleton.shapes[name]) for name in names]
    shards: list[list[TensorInfo]] = [[]]
    for info in infos:
        if shards[-1] and sum(i.nbytes for i in shards[-1]) + info.nbytes > SHARD:
            shards.append([])
        shards[-1].append(info)
    noise = torch.randn(1 << 24).mul_(0.02).bfloat16()
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorWriter(folder / name, shard) as writer:
            for info in shard:
                count = info.nbytes // 2
                value = noise.repeat(-(-count // noise.numel()))[:count]
                writer.write(info.name, [as_bytes(value)])
                weight_map[info.name] = name
            writer.finish()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_adapter(folder: Path, base: Path) -> None:
    """Write a LoRA of rank 16 on every linear layer of the language model."""
    skeleton = skeleton_of(AutoConfig.from_pretrained(base))
    tensors = {}
    for name, shape in skeleton.shapes.items():
        if ".layers." in name and name.endswith("_proj.weight"):
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, shape[1]) * 0.01
            tensors[f"{path}.lora_B.weight"] = torch.randn(shape[0], RANK) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": targets, "task_type": None}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))


def peak_resident() -> int:
    """The peak resident set of this process since it was last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measured(send: Connection, adapter: Path, out: Path, verify: bool) -> None:
    """Merge in this process and send the seconds and the peak resident set before and during it."""
    import fvlm_export.save  # noqa: F401  the import is not part of the merge

    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which a child inherits from its parent
    before = peak_resident()
    begin = time.perf_counter()
    save_pretrained_merged(adapter, out, verify=verify, progress=False)
    send.send((time.perf_counter() - begin, before, peak_resident()))


def run(adapter: Path, out: Path, verify: bool) -> tuple[float, int, int]:
    """Run one merge in a fresh process."""
    hear, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=measured, args=(send, adapter, out, verify))
    process.start()
    result: tuple[float, int, int] = hear.recv()
    process.join()
    return result


def main() -> None:
    """Make what is missing, copy, merge, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=12)
    arguments = parser.parse_args()
    base, adapter = arguments.folder / "base", arguments.folder / "adapter"
    if not base.exists():
        make_checkpoint(base, arguments.gigabytes)
        make_adapter(adapter, base)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    rows = {}
    begin = time.perf_counter()
    shutil.copytree(base, arguments.folder / "copy", copy_function=lambda a, b: os.system(f"cp '{a}' '{b}'"))
    os.sync()
    rows["cp and sync"] = (time.perf_counter() - begin, 0, 0)
    shutil.rmtree(arguments.folder / "copy")
    for verify in (False, True):
        out = arguments.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        rows[f"merge, verify={verify}"] = run(adapter, out, verify)
    print(json.dumps(read_report(arguments.folder / "out").verified))
    print(f"{size / 1e9:.2f} GB, {os.cpu_count()} cores, cuda {torch.cuda.is_available()}, torch {torch.__version__}")
    for name, (seconds, before, peak) in rows.items():
        rate = size / seconds / 1e9
        print(f"{name:22} {seconds:7.1f} s {rate:6.2f} GB/s   peak RSS {before / 1e9:.2f} → {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
