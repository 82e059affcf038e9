"""A layer's input waits in pinned host memory, and comes back as it was."""

import copy
import pickle

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fvlm_core import apply_checkpointing, offload
from fvlm_core.offload import Offloader, _OnHost


def test_tensors_on_the_cpu_stay_where_they_are():
    tensor = torch.randn(1 << 19, requires_grad=True)
    with Offloader().one(tensor):
        out = tensor * tensor
    assert out.grad_fn._saved_self.data_ptr() == tensor.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1024, 513), (513, 1024)])
def test_a_tensor_waits_in_pinned_host_memory(shape):
    tensor = torch.randn(shape, device="cuda", dtype=torch.bfloat16).t().requires_grad_()
    hooks = Offloader().one(tensor)
    with hooks:
        out = tensor.sin()
    packed = hooks.pack_hook(tensor)
    assert isinstance(packed, _OnHost)
    assert packed.copy.is_pinned()
    assert packed.copy.stride() == tensor.stride()
    assert torch.equal(hooks.unpack_hook(packed), tensor)
    (found,) = torch.autograd.grad(out.sum(), tensor)
    torch.testing.assert_close(found, tensor.detach().cos(), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["small", "integer", "other"])
def test_what_is_not_worth_a_copy_stays_on_the_device(kind):
    tensor = torch.randn(2048, 1024, device="cuda")
    saved = {"small": tensor[:16], "integer": tensor.int(), "other": tensor.clone()}[kind]
    hooks = Offloader().one(tensor if kind == "other" else saved)
    assert hooks.pack_hook(saved) is saved


@pytest.fixture
def fetched(monkeypatch):
    """Let tensors on the CPU be moved too; return a list of what is called for, in order."""
    order = []

    class Held(_OnHost):
        def fetch(self):
            if self.back is None:
                order.append(self.copy)
                self.back = self.copy

    monkeypatch.setattr(offload, "_worth", lambda *_: True)
    monkeypatch.setattr(offload, "_to_host", lambda tensor, before: Held(tensor, tensor.device, None, before))
    return order


def unpacked(held):
    """What the backward pass does first with a tensor that it wants."""
    held.fetch()
    held.back, held.used = None, True
    offload._fetch_next(held)


def test_each_model_calls_for_its_own_tensors_only(fetched):
    models = Offloader(), Offloader()
    tensors = [[torch.full((2,), 10.0 * layer + model) for model in (0, 1)] for layer in range(3)]
    held = [[models[m].every().pack_hook(tensors[layer][m]) for m in (0, 1)] for layer in range(3)]
    unpacked(held[2][0])
    assert [int(tensor[0]) for tensor in fetched] == [20, 10]
    unpacked(held[2][1])
    unpacked(held[1][1])
    assert [int(tensor[0]) for tensor in fetched] == [20, 10, 21, 11, 1]
    unpacked(held[1][0])
    assert [int(tensor[0]) for tensor in fetched] == [20, 10, 21, 11, 1, 0]


def test_what_a_model_holds_is_neither_copied_nor_stored_with_it(fetched):
    first = Offloader()
    held = first.every().pack_hook(torch.ones(2))
    for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert other.every().pack_hook(torch.ones(3)).before is None
    assert first.every().pack_hook(torch.ones(3)).before() is held


def step(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_equals_recompute_on_a_gpu_and_peaks_lower(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=512,
        attn_implementation="eager",  # the fused kernels' backward adds in no fixed order
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.train()
    batch = {"input_ids": torch.randint(0, 512, (4, 2048), device="cuda")}
    batch["labels"] = batch["input_ids"]
    results, peaks = {}, {}
    for mode in (True, "offload"):
        apply_checkpointing(model, mode)
        step(model, batch)
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        results[mode] = step(model, batch)
        torch.cuda.synchronize()
        peaks[mode] = torch.cuda.max_memory_allocated()
    assert results[True][0] == results["offload"][0]
    for name, expected in results[True][1].items():
        torch.testing.assert_close(results["offload"][1][name], expected, rtol=0, atol=0, msg=name)
    # 16 layers keep one hidden state each; at least 12 of them must be gone from the device.
    hidden = 4 * 2048 * 1024 * torch.empty((), dtype=dtype).element_size()
    assert peaks[True] - peaks["offload"] > 12 * hidden
