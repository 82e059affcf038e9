"""Memory does not grow over 200 steps whose shapes vary: what is held is what the shapes need, not what steps leave."""

import gc

import pytest
import torch
from fused_tools import adapted_model, recorded, step
from test_graphs_fit import sized_batch
from torch._subclasses.fake_tensor import is_fake

from fvlm_core import Precision
from fvlm_core.fused import fuse_model

STEPS = 200
SIDES = (2, 4, 6, 8)


def sizes_of(number):
    """Two images of sizes that come back only every 16th step, and seldom in one order."""
    first, second = SIDES[number % 4], SIDES[(number // 4) % 4]
    return [(first, second), (second, SIDES[(number * 7) % 4])]


def held(device):
    """Bytes of tensors that live: on the device, or of those that the collector finds."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if _is_tensor(t)}
    return sum(storages.values())


def _is_tensor(found):
    # not those that stand for one, which compiling leaves to the tests after it
    return issubclass(type(found), torch.Tensor) and not is_fake(found) and found.device.type == "cpu"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", [True, "offload", "auto"])
def test_memory_does_not_grow(tiny, mode, device):
    precision = Precision.NF4 if device == "cuda" else Precision.HALF
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = adapted_model(tiny("qwen2_vl"), precision, dtype=dtype, device=device)
    fuse_model(model)
    graphs = recorded(model, mode)
    seen = []
    for number in range(STEPS):
        batch = sized_batch(model, sizes_of(number), number)
        batch = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        step(model, batch)
        model.zero_grad()
        del batch
        if number % 20 == 19:
            seen.append((held(device), graphs.recorded))
    settled = seen[len(seen) // 2 :]
    assert graphs.replayed > STEPS
    assert {recordings for _, recordings in settled} == {settled[0][1]}  # no shape is new any more
    sizes = [size for size, _ in settled]
    assert max(sizes) - min(sizes) <= 1 << 16, sizes
