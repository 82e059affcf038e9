"""What a call of ``generate`` may ask for: recorded decoding gives what stock gives, or leaves the call to it."""

import pytest
import torch
from decoding_tools import DEVICES, GREEDY, pair_on, prompts_for, same
from transformers import AutoProcessor, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fvlm_core.decoding import decoding_report


@pytest.fixture(scope="module", params=DEVICES)
def pair(tiny, request):
    """A model that decodes by recordings and one that does as transformers has it, equal but for that."""
    return pair_on(request.param, tiny("qwen2_vl"))


def ending(pair, batch, at=4):
    """Tokens of which the likeliest answer's own is one, so that greedy decoding ends there."""
    rows = pair[2].generate(**batch, do_sample=False, max_new_tokens=at + 1, min_new_tokens=at + 1)
    return [int(token) for token in rows[:, -1]]


def test_ends_where_stock_ends(pair):
    for images in ((1,), (1, 1, 0)):
        batch = prompts_for(pair, images)
        ends = ending(pair, batch)
        rows, _ = same(pair, batch, do_sample=False, max_new_tokens=20, eos_token_id=ends, pad_token_id=3)
        assert rows.shape[1] < batch["input_ids"].shape[1] + 20  # it did end
        same(pair, batch, do_sample=False, max_new_tokens=20, eos_token_id=ends[0], pad_token_id=3)
        same(pair, batch, do_sample=False, max_new_tokens=20, eos_token_id=ends, min_new_tokens=9, pad_token_id=3)
        same(pair, batch, do_sample=False, max_length=batch["input_ids"].shape[1] + 7, eos_token_id=ends)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 20},
        {"top_p": 0.8, "top_k": 0, "repetition_penalty": 1.3},
        {"min_p": 0.05, "num_return_sequences": 3},
        {"typical_p": 0.9, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    ],
    ids=str,
)
def test_samples_what_stock_samples(pair, options):
    batch = prompts_for(pair, (1, 1))
    results = []
    for model in pair[1:]:
        torch.manual_seed(5)
        results.append(model.generate(**batch, do_sample=True, max_new_tokens=12, **options))
        results.append(torch.rand(3))  # the random state goes on alike
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_scores_logits_and_the_cache_that_is_returned(pair):
    batch = prompts_for(pair, (1, 1))
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 6}
    found, wanted = same(pair, batch, do_sample=False, repetition_penalty=1.2, **options)
    for name in ("scores", "logits"):
        for ours, theirs in zip(found[name], wanted[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert found.past_key_values.get_seq_length() == wanted.past_key_values.get_seq_length()
    for ours, theirs in zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
    found, _ = same(pair, batch, do_sample=False, return_dict_in_generate=True, max_new_tokens=6)
    kept = found.past_key_values.layers[0].keys.clone()
    same(pair, prompts_for(pair, (1, 0)), do_sample=False, max_new_tokens=6)
    assert torch.equal(kept, found.past_key_values.layers[0].keys)  # a later call leaves it alone


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        assert value.device.type == "cpu"
        assert not self.ended
        self.tokens.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 5}], ids=str)
def test_streams_what_stock_streams(pair, options):
    batch = prompts_for(pair, (1,))
    heard = []
    for model in pair[1:]:
        torch.manual_seed(3)
        heard.append(Heard())
        model.generate(**batch, **options, max_new_tokens=9, eos_token_id=ending(pair, batch), streamer=heard[-1])
    assert heard[0].tokens == heard[1].tokens
    assert heard[0].ended == heard[1].ended == 1


def test_stop_strings_and_criteria_of_ones_own(pair):
    batch = prompts_for(pair, (1,))
    tokenizer = AutoProcessor.from_pretrained(pair[0]).tokenizer
    whole = pair[2].generate(**batch, **GREEDY)
    words = [tokenizer.decode(token).strip() for token in whole[0, batch["input_ids"].shape[1] :][:-1]]
    text = next(word for word in words if word.isascii() and word.isprintable() and word)
    rows, _ = same(pair, batch, do_sample=False, max_new_tokens=12, stop_strings=[text], tokenizer=tokenizer)
    assert rows.shape[1] < whole.shape[1]

    class ThreeMore(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full_like(
                input_ids[:, 0], input_ids.shape[1] >= batch["input_ids"].shape[1] + 3, dtype=torch.bool
            )

    rows, _ = same(
        pair, batch, do_sample=False, max_new_tokens=12, stopping_criteria=StoppingCriteriaList([ThreeMore()])
    )
    assert rows.shape[1] == batch["input_ids"].shape[1] + 3


def test_arguments_by_position_and_in_a_config(pair):
    batch = dict(prompts_for(pair, (1,)))
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=3)
    found, wanted = (model.base_model.model.generate(None, config, **batch) for model in pair[1:])
    assert torch.equal(found, wanted)
    same(pair, batch, generation_config=config)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"use_cache": False}, "use_cache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"cache_implementation": "static", "disable_compile": True}, "cache_implementation"),
        ({"num_return_sequences": 9, "do_sample": True, "top_k": 1}, "larger than 8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_left_to_transformers(pair, options, reason, caplog):
    _, ours, stock = pair
    batch = prompts_for(pair, (1,))
    before = decoding_report(ours).recorded
    results = [
        model.generate(**batch, **{"do_sample": False, "max_new_tokens": 4} | options) for model in (ours, stock)
    ]
    rows = [out if isinstance(out, torch.Tensor) else out.sequences for out in results]
    assert torch.equal(*rows)
    assert decoding_report(ours).recorded == before
    assert any(reason in told for told in decoding_report(ours).left), decoding_report(ours).summary
    same(pair, batch, do_sample=False, max_new_tokens=4)  # and it leaves nothing behind
