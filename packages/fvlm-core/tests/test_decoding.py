"""Recorded decoding: the tokens that stock gives, for every family and whatever changes between two calls.

Without a GPU the recordings run the step's own code again over the same memory, which tests all but CUDA itself.
"""

import copy

import pytest
import torch
from decoding_tools import DEVICES, GREEDY, fast, pair_on, prompts, prompts_for, same, stock_answer
from fused_tools import adapted_model

from fvlm_core import Precision
from fvlm_core.decoding import decoding_report, disable_decoding, enable_decoding
from fvlm_core.fused import fuse_model, unfuse_model

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "pixtral", "mistral3", "gemma3")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", [Precision.HALF, Precision.NF4], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_stocks(tiny, family, precision, device):
    folder = tiny(family)
    model = adapted_model(folder, precision, targets=("language",), device=device).eval()
    batches = [prompts(folder, images, device) for images in ((1,), (2,), (0,), (1, 1, 1))]
    expected = [stock_answer(model, batch, **GREEDY) for batch in batches]
    fast(model)
    for batch, wanted in zip(batches, expected, strict=True):
        assert torch.equal(model.generate(**batch, **GREEDY), wanted)
    assert decoding_report(model).recorded == 4, decoding_report(model).summary


@pytest.fixture(scope="module", params=DEVICES)
def pair(tiny, request):
    """A model that decodes by recordings and one that does as transformers has it, equal but for that."""
    return pair_on(request.param, tiny("qwen2_vl"))


def test_answers_longer_than_the_memory_that_was_made_first(pair, monkeypatch):
    from fvlm_core.decoding import engine, loop

    monkeypatch.setattr(loop, "BUCKET", 8)
    monkeypatch.setattr(engine, "_FIRST_ROOM", 4)
    _, ours, _ = pair
    disable_decoding(ours)
    fast(ours)
    batch = prompts_for(pair, (1, 1))
    same(pair, batch, do_sample=False, max_new_tokens=70, min_new_tokens=70)
    assert decoding_report(ours).recordings > 1
    same(pair, batch, do_sample=True, top_k=1, max_new_tokens=70, min_new_tokens=70)


def test_later_calls_of_other_lengths_and_sizes(pair):
    _, ours, _ = pair
    disable_decoding(ours)
    fast(ours)
    for images, tokens in (((1,), 12), ((2,), 3), ((0,), 20), ((1, 1), 5), ((1,), 1), ((1, 0), 9), ((1,), 8)):
        same(pair, prompts_for(pair, images), do_sample=False, max_new_tokens=tokens)
    assert decoding_report(ours).recordings == 2  # one for each number of rows


@pytest.mark.parametrize("device", DEVICES)
def test_what_changes_between_two_calls_is_noticed(tiny, device):
    folder = tiny("qwen2_vl")
    model = fast(adapted_model(folder, targets=("language",), device=device).eval())
    batch = prompts(folder, (1, 1), device)

    def both():
        before = decoding_report(model).recorded
        ours = model.generate(**batch, **GREEDY)
        assert decoding_report(model).recorded == before + 1, decoding_report(model).summary
        wanted = type(model.get_base_model()).generate(model.get_base_model(), **batch, **GREEDY)
        assert torch.equal(ours, wanted)
        return ours.tolist()

    seen = [both()]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-3)
    seen.append(both())
    with model.disable_adapter():
        seen.append(both())
    model.add_adapter("other", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "other" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.3)
    model.set_adapter("other")
    seen.append(both())
    model.merge_adapter()
    assert both() == seen[-1]
    model.unmerge_adapter()
    model.set_adapter("default")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0)
    for _ in range(3):
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    seen.append(both())
    assert len({str(rows) for rows in seen}) == len(seen)  # every change changed the answer


def test_states_that_are_left_to_transformers(tiny):
    folder = tiny("qwen2_vl")
    batch = prompts(folder, (1,))

    def answer(model):
        rows = model.generate(**batch, **GREEDY)
        assert torch.equal(rows, type(model.get_base_model()).generate(model.get_base_model(), **batch, **GREEDY))
        return decoding_report(model)

    dora = answer(fast(adapted_model(folder, targets=("language",), use_dora=True).eval()))
    assert (dora.recorded, list(dora.left)) == (0, ["a linear layer uses DoraLinearVariant"])
    model = fast(adapted_model(folder, targets=("language",)).eval())
    assert answer(model).recorded == 1
    language = model.get_base_model().model.language_model
    handle = language.layers[0].register_forward_hook(lambda module, args, output: output * 0.5)
    assert list(answer(model).left) == ["the language model has hooks"]
    handle.remove()
    assert answer(model).recorded == 2
    model.train()
    assert "the model is in training mode" in answer(model).left
    model.eval()
    language.layers[1].mlp.up_proj = language.layers[0].mlp.up_proj  # other modules, with recordings of the old ones
    assert answer(model).recorded == 3
    unfuse_model(model)
    assert "its layers are not fused" in answer(model).left


def test_calls_within_inference_mode_and_outside_of_it(tiny):
    folder = tiny("qwen2_vl")
    model = fast(adapted_model(folder, targets=("language",)).eval())
    batch = prompts(folder, (1, 0))
    wanted = type(model.get_base_model()).generate(model.get_base_model(), **batch, **GREEDY)
    for inside in (True, False, True, False):
        with torch.inference_mode(inside):
            assert torch.equal(model.generate(**batch, **GREEDY), wanted)
    assert (decoding_report(model).recorded, decoding_report(model).recordings) == (4, 2)


def test_a_model_that_left_the_gpu_is_left_to_transformers(tiny):
    """A CUDA graph of work on a CPU is empty: replaying it would leave the old logits."""
    from fvlm_core.decoding import engine

    folder = tiny("qwen2_vl")
    model = fast(adapted_model(folder, targets=("language",)).eval())
    inner, batch = model.get_base_model(), prompts(folder, (1,))
    vars(inner)[engine._DECODER] = engine.Decoder(inner, rehearse=False)  # as if enabled where it was on a GPU
    rows = model.generate(**batch, **GREEDY)
    assert torch.equal(rows, type(inner).generate(inner, **batch, **GREEDY))
    assert list(decoding_report(model).left) == ["the model is not on a CUDA device"]


def test_a_fully_finetuned_model_too(tiny):
    from fvlm_core import load_model

    folder = tiny("qwen2_vl")
    model = load_model(folder, precision=Precision.FULL, dtype=torch.float32, fused_layers=True).eval()
    enable_decoding(model, rehearse=True)
    batch = prompts(folder, (1, 0))
    rows = []
    for _ in range(2):
        rows.append(model.generate(**batch, **GREEDY))
        assert torch.equal(rows[-1], type(model).generate(model, **batch, **GREEDY))
        with torch.no_grad():
            for parameter in model.model.language_model.parameters():
                parameter.mul_(1.5)
    assert not torch.equal(*rows)
    assert (decoding_report(model).recorded, decoding_report(model).recordings) == (2, 1)
    language = model.model.language_model
    language.norm.weight = torch.nn.Parameter(torch.randn_like(language.norm.weight))  # another one in its place
    rows.append(model.generate(**batch, **GREEDY))
    assert torch.equal(rows[-1], type(model).generate(model, **batch, **GREEDY))
    assert not torch.equal(*rows[1:])
    assert decoding_report(model).recordings == 2


def test_disabling_undoes_everything(tiny):
    model = adapted_model(tiny("qwen2_vl"), targets=("language",)).eval()
    fuse_model(model)
    inner = model.get_base_model()
    before = dict(vars(inner))
    fast(model)
    model.generate(**prompts(tiny("qwen2_vl")), **GREEDY)
    copied = copy.deepcopy(model)
    assert torch.equal(*(m.generate(**prompts(tiny("qwen2_vl")), **GREEDY) for m in (model, copied)))
    assert decoding_report(copied).recorded == 1
    disable_decoding(model)
    assert {n: v for n, v in vars(inner).items() if n != "generation_config"} == {
        n: v for n, v in before.items() if n != "generation_config"
    }
    assert decoding_report(model).recorded == 0
    assert enable_decoding(model) is not None or model.device.type == "cuda"  # on a CPU it stays as it was


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_step_gives_the_logits_of_an_ordinary_one_in_bf16(tiny, family):
    folder = tiny(family)
    model = adapted_model(folder, Precision.NF4, targets=("language",), dtype=torch.bfloat16, device="cuda").eval()
    batch = prompts(folder, (1, 1), "cuda")
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    with torch.autocast("cuda", torch.bfloat16):
        stock = stock_answer(model, batch, **options)
        found = fast(model).generate(**batch, **options)
        found = model.generate(**batch, **options)  # by replays alone
    assert decoding_report(model).recorded == 2, decoding_report(model).summary
    same_so_far = 1 + int((found.sequences == stock.sequences).all(dim=0)[-12:].long().cumprod(0).sum())
    assert same_so_far > 1
    for ours, theirs in list(zip(found.logits, stock.logits, strict=True))[:same_so_far]:
        assert (ours - theirs).norm() < 0.06 * theirs.norm()


@pytest.mark.gpu
def test_steps_do_not_wait_for_the_device(tiny, monkeypatch):
    from fvlm_core.decoding.engine import DecodingStep

    folder = tiny("qwen2_vl")
    model = fast(adapted_model(folder, Precision.NF4, targets=("language",), device="cuda").eval())
    batch = prompts(folder, (1,), "cuda")
    model.generate(**batch, **GREEDY)
    replay, seen = DecodingStep.run, []

    def watched(step):
        torch.cuda.set_sync_debug_mode("error" if len(seen) < 8 else "default")
        seen.append(step)
        replay(step)

    monkeypatch.setattr(DecodingStep, "run", watched)
    try:
        model.generate(**batch, **GREEDY)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 11
