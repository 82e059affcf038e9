"""Loading quantizes tensor by tensor as shards are read: the host holds the quantized model and about one shard."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText

from fvlm_core.testing.checkpoint import blueprint

SHARD = 48 << 20
_LOAD = """
import json, sys, threading, time
import torch
from fvlm_core import Precision, load_model

def held():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) << 10

seen, done = [], threading.Event()
def watch():
    while not done.wait(0.002):
        seen.append(held())

torch.set_num_threads(1)
load_model(sys.argv[2], precision=Precision.NF4, dtype=torch.float32, device_map="cpu")  # imports, and what is kept
before = held()
thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[1], precision=Precision.NF4, dtype=torch.float32, device_map="cpu")
done.set(); thread.join()
stored = sum(p.nbytes for p in model.parameters())
print(json.dumps([max(seen) - before, stored]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of some 0.4 GB in shards of 48 MiB, the head and the embedding small."""
    plan = blueprint("qwen2_vl")
    values = plan.config.to_dict()
    values["text_config"] |= {"intermediate_size": 8192, "num_hidden_layers": 32, "layer_types": None}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(type(plan.config).from_dict(values), dtype=torch.float32)
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder, max_shard_size=SHARD)
    plan.processor.save_pretrained(folder)
    return folder, sum(p.nbytes for p in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_the_host_never_holds_the_model_in_full_precision(large, tiny):
    folder, whole = large
    assert len(list(folder.glob("*.safetensors"))) >= 8
    command = [sys.executable, "-c", _LOAD, str(folder), str(tiny("qwen2_vl"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, stored = json.loads(done.stdout.splitlines()[-1])
    assert stored < whole / 5
    assert stored < peak < stored + 1.5 * SHARD
