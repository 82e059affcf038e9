"""A merge holds a tensor or two, not the model: the most memory it takes, of a model many times as large."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig

from fvlm_export import save_pretrained_merged
from fvlm_export.skeleton import skeleton_of

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(sys.platform != "linux", reason="a process's own memory is asked of Linux"),
]
LAYERS, WIDE = 8, 1 << 16


def own() -> int:
    """Return how many bytes are this process's own; pages of files that it maps are the system's to take back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def merge(adapter: Path, base: Path, out: Path, say: Connection) -> None:
    save_pretrained_merged(adapter, out.with_name("first"), base=base, max_shard_size="40MB", progress=False)
    before = most = own()  # with all that is made once
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, own())

    watching = threading.Thread(target=watch)
    watching.start()
    save_pretrained_merged(adapter, out, base=base, max_shard_size="40MB", progress=False)
    done.set()
    watching.join()
    say.send(most - before)


def test_memory_is_that_of_a_shard_and_not_of_the_model(tools: Any, tmp_path: Path) -> None:
    base = shutil.copytree(tools.checkpoint(), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"] |= {
        "num_hidden_layers": LAYERS,
        "intermediate_size": WIDE,
        "layer_types": ["full_attention"] * LAYERS,
    }
    (base / "config.json").write_text(json.dumps(config))
    model = skeleton_of(AutoConfig.from_pretrained(base)).model
    tensors = {name: torch.full(tensor.shape, 0.5) for name, tensor in model.state_dict().items()}
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, base / "model.safetensors")
    del tensors
    size = (base / "model.safetensors").stat().st_size
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj", "down_proj"]), low_cpu_mem_usage=True)
    factors = {name: torch.ones(p.shape) for name, p in peft.named_parameters() if "lora_" in name}
    adapter = tmp_path / "adapter"
    peft.peft_config["default"].save_pretrained(adapter)
    save_file({name.replace(".default", ""): p for name, p in factors.items()}, adapter / "adapter_model.safetensors")
    context = multiprocessing.get_context("fork")
    hear, say = context.Pipe(duplex=False)
    process = context.Process(target=merge, args=(adapter, base, tmp_path / "out", say))
    process.start()
    say.close()
    grown = hear.recv()
    process.join()
    assert size > 8e8
    # Tensors of 34 MB are read, merged, written and read back side by side, in threads that get on as they can, with
    # buffers of a fixed size: 100 to 330 MB, whatever the model's size is
    assert 3e7 < grown < 500e6, f"{grown / 1e6:.0f} MB, for shards of 40 MB, out of {size / 1e6:.0f}"
    shutil.rmtree(tmp_path)  # two gigabytes, which pytest would keep
