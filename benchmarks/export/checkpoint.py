"""A checkpoint of any size and an adapter for it, written shard by shard: neither is ever in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.training.sizes import real_config
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from fvlm_core.testing import tiny_checkpoint
from fvlm_export.safetensor_file import TensorInfo, as_bytes
from fvlm_export.safetensor_writer import SafetensorWriter

MODEL = "qwen2_5_vl-7b"
SHARD = 5 * 10**9
_NOISE = 1 << 25
_TARGETS = r".*\.(q_proj|k_proj|v_proj|o_proj|qkv|proj|gate_proj|up_proj|down_proj)"


def cut_config(gigabytes: float) -> Any:
    """Return Qwen2.5-VL-7B's config with as many text layers as come to that size."""
    config, _ = real_config(MODEL)

    def size(layers: int) -> int:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = ["full_attention"] * layers
        return 2 * int(_skeleton(config).num_parameters())

    none, one = size(1), size(2)
    layers = max(1, round((gigabytes * 1e9 - none) / (one - none)) + 1)
    size(layers)
    return config


def write_base(gigabytes: float, folder: Path) -> int:
    """Write a checkpoint of normally distributed bf16 weights; return its bytes.

    Args:
        gigabytes: about how large; the embedding, the head and the vision tower alone take 3.5. 0: a tiny model, for
            the test of the benchmark itself.
        folder: where.
    """
    if gigabytes == 0:
        tiny_checkpoint("qwen2_vl", folder, dtype=torch.bfloat16)
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    folder.mkdir(parents=True)
    config = cut_config(gigabytes)
    config.dtype = "bfloat16"
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)
    model = _skeleton(config)
    infos = [TensorInfo(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards = list(_shards(infos))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorWriter(folder / name, shard) as writer:
            for info in shard:
                writer.write(info.name, _pieces(info, noise))
                weight_map[info.name] = name
            writer.finish().result()
    total = sum(info.nbytes for info in infos)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def write_adapter(base: Path, folder: Path, rank: int = 16) -> None:
    """Write a LoRA adapter for every linear layer of both towers, with values as training leaves them."""
    from transformers import AutoConfig

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_TARGETS, base_model_name_or_path=str(base))
    model = get_peft_model(_skeleton(AutoConfig.from_pretrained(base)), config, low_cpu_mem_usage=True)
    generator = torch.Generator().manual_seed(1)
    shapes = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: 0.01 * torch.randn(value.shape, generator=generator) for name, value in shapes.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


def _pieces(info: TensorInfo, noise: torch.Tensor) -> Iterator[memoryview]:
    start, left = sum(info.name.encode()) * 4096 % (_NOISE // 2), info.nbytes // 2
    while left:  # another stretch of the noise for every tensor, so that no two are alike
        piece = noise[start : start + left]
        yield as_bytes(piece)
        left, start = left - len(piece), 0


def _shards(infos: list[TensorInfo]) -> Iterator[list[TensorInfo]]:
    shard: list[TensorInfo] = []
    for info in infos:
        if shard and sum(held.nbytes for held in shard) + info.nbytes > SHARD:
            yield shard
            shard = []
        shard.append(info)
    yield shard
