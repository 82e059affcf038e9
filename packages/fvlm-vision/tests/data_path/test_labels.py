from __future__ import annotations

import re

import pytest
import torch

from fvlm_core.errors import ConfigError, DataError
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.labels import label_rows, make_labels
from fvlm_vision.render import ResponseMarks, response_spans
from fvlm_vision.spans import complement, insertion, intersect, move, tokens_in

USER_MARK, REPLY_MARK = "<|im_start|>user\n", "<|im_start|>assistant\n"


def learned(collator, sample) -> str:
    """What the labels of a one-sample batch spell."""
    row = collator([sample])["labels"][0]
    return collator.processor.tokenizer.decode(row[row != -100])


def turns(*texts, **flags):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


@pytest.fixture
def parts(shared_model_of, processor_of):
    return shared_model_of("qwen2_vl"), processor_of("qwen2_vl")


def test_spans():
    assert intersect([(0, 5), (8, 12)], [(3, 9)]) == [(3, 5), (8, 9)]
    assert complement([(2, 4), (4, 6)], 8) == [(0, 2), (6, 8)]
    assert move([(0, 1), (2, 6), (7, 9)], [((3, 5), (3, 10))]) == [(0, 1), (2, 11), (12, 14)]
    assert insertion("ab", "ab") == ((2, 2), (2, 2))
    assert insertion("<i><i>text", "<i><i><bos>text\n") == ((6, 6), (6, 11))
    assert insertion("ab", "ba") is None
    offsets = torch.tensor([[0, 0], [0, 3], [3, 3], [3, 5], [5, 9]])
    assert tokens_in([(3, 5)], offsets).tolist() == [False, False, True, True, False]


def test_padding_is_told_by_the_mask_and_not_by_its_id():
    ids = torch.tensor([[5, 2, 9, 2, 2]])  # 2 ends turns and pads
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    assert make_labels(ids, mask, {9}, None, -100).tolist() == [[5, 2, -100, 2, -100]]


def test_response_spans_by_marks():
    text = "U:q A:one U:q A:two A:three"
    spans = response_spans(text, ResponseMarks("U:", "A:"))
    assert [text[a:b] for a, b in spans] == ["one ", "two ", "three"]


def test_every_text_token_is_learned_by_default_and_no_media(parts, ask):
    collator = FastVisionDataCollator(*parts)
    batch = collator([ask(images=2), ask(images=0)])
    ids, labels = batch["input_ids"], batch["labels"]
    specials = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    media = torch.isin(ids, torch.tensor(collator.processor.tokenizer.convert_tokens_to_ids(specials)))
    assert media.any()
    torch.testing.assert_close(labels == -100, media | (batch["attention_mask"] == 0))
    assert torch.equal(labels[labels != -100], ids[labels != -100])


@pytest.mark.parametrize("by_marks", [False, True])
def test_only_responses_are_learned(parts, ask, by_marks):
    marks = {"instruction_part": USER_MARK, "response_part": REPLY_MARK} if by_marks else {}
    collator = FastVisionDataCollator(*parts, train_on_responses_only=True, **marks)
    sample = ask("total 7", images=2)
    sample["messages"] += turns("And the date?", "page 3")["messages"]
    # The template's own marks leave out the newline that follows a turn's end.
    expected = "total 7<|im_end|>\npage 3<|im_end|>\n" if by_marks else "total 7<|im_end|>page 3<|im_end|>"
    assert learned(collator, sample) == expected


def test_marks_are_found_whatever_surrounds_them(parts):
    """A mark without special tokens is tokenized together with its neighbours; the text is searched, not the tokens."""
    model, processor = parts
    processor.chat_template = (
        "{% for m in messages %}{{ 'ASK:' if m.role == 'user' else 'SAY:' }}{{ m.content }}{% endfor %}"
    )
    collator = FastVisionDataCollator(
        model, processor, train_on_responses_only=True, instruction_part="ASK:", response_part="SAY:"
    )
    assert learned(collator, turns("total", "12ASKed", "q", "SAYing 5")) == "12ASKedSAYing 5"


def test_marks_of_the_family_are_used_where_the_template_writes_them(parts, ask, caplog):
    model, processor = parts
    processor.chat_template = re.sub(r"\{%-\s*(end)?generation\s*-%\}", "", processor.chat_template)
    with caplog.at_level("INFO", logger="fvlm_vision"):
        collator = FastVisionDataCollator(model, processor, train_on_responses_only=True)
    assert [REPLY_MARK in (record.args or ()) for record in caplog.records] == [True]
    sample = ask("total 7", images=2)
    sample["messages"] += turns("And the date?", "page 3")["messages"]
    assert learned(collator, sample) == "total 7<|im_end|>\npage 3<|im_end|>\n"
    # A template that opens users' turns otherwise would teach their questions too.
    processor.chat_template = processor.chat_template.replace("<|im_start|>user", "<|im_start|>human")
    with pytest.raises(ConfigError, match="pass instruction_part and response_part"):
        FastVisionDataCollator(model, processor, train_on_responses_only=True)


def test_prompt_and_completion_learns_the_completion(parts, picture):
    collator = FastVisionDataCollator(*parts)
    sample = {"prompt": "What is it?", "completion": "invoice 9", "images": [picture()]}
    assert learned(collator, sample) == "invoice 9<|im_end|>\n"
    prompt, completion = turns("q", "a", "q2")["messages"], [{"role": "assistant", "content": "b"}]
    assert learned(collator, {"prompt": prompt, "completion": completion}) == "b<|im_end|>\n"


def test_messages_with_train_false_are_not_learned(parts):
    sample = turns("one?", "first", "two?", "second")
    sample["messages"][1]["train"] = False
    whole = learned(FastVisionDataCollator(*parts), sample)
    assert "first" not in whole
    assert all(text in whole for text in ("one?", "two?", "second"))
    assert learned(FastVisionDataCollator(*parts, train_on_responses_only=True), sample) == "second<|im_end|>"


@pytest.mark.parametrize("silent", range(4))
def test_train_false_reaches_a_message_anywhere(parts, silent):
    texts = ("one?", "first", "two?", "second")
    sample = turns(*texts)
    sample["messages"][silent]["train"] = False
    whole = learned(FastVisionDataCollator(*parts), sample)
    assert [text in whole for text in texts] == [number != silent for number in range(4)]
    role = "user" if silent % 2 == 0 else "assistant"
    assert whole.count(f"{role}\n") == 1  # of two turns, this one's mark is not learned either


def test_a_sample_that_learns_its_first_token_alone_is_an_error(parts):
    model, processor = parts
    processor.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}x{% endgeneration %}"
        "{% else %} and a question{% endif %}{% endfor %}"
    )
    collator = FastVisionDataCollator(model, processor, train_on_responses_only=True)
    asked, answered = turns("q", "a")["messages"]
    assert learned(collator, {"messages": [asked, answered]}) == "x"
    with pytest.raises(DataError, match="holds no token to learn"):  # nothing stands before it to predict it from
        collator([{"messages": [answered, asked]}])


def test_nothing_to_learn_is_an_error(parts):
    sample = turns("one?", "first")
    sample["messages"][1]["train"] = False
    with pytest.raises(DataError, match="nothing of a sample would be trained"):
        FastVisionDataCollator(*parts, train_on_responses_only=True)([sample])
    sample["messages"][0]["train"] = False
    with pytest.raises(DataError, match='every message of a sample has "train": false'):
        FastVisionDataCollator(*parts)([sample])
    with pytest.raises(DataError, match="opens no response"):
        FastVisionDataCollator(
            *parts, train_on_responses_only=True, instruction_part="### Ask", response_part="### Say"
        )([turns("q", "a")])


def test_responses_need_marks_from_one_side(parts):
    model, processor = parts
    processor.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="pass instruction_part and response_part"):
        FastVisionDataCollator(model, processor, train_on_responses_only=True)
    with pytest.raises(ConfigError, match="response_part=None"):
        FastVisionDataCollator(model, processor, train_on_responses_only=True, instruction_part="user:")
    with pytest.raises(ConfigError, match="do nothing without"):
        FastVisionDataCollator(model, processor, instruction_part="user:", response_part="assistant:")


def test_a_base_model_without_template_learns_completion_and_end(parts, picture):
    model, processor = parts
    processor.chat_template = processor.tokenizer.chat_template = None
    collator = FastVisionDataCollator(model, processor)
    sample = {"prompt": "<image>total:", "completion": "12", "images": [picture()]}
    assert learned(collator, sample) == "12<|im_end|>"
    with pytest.raises(DataError, match="no chat template"):
        collator([turns("q", "a")])


@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_over_the_planned_rows_is_the_models_own(parts, ask, packing):
    model, processor = parts
    options = {"train_on_responses_only": True, "packing": packing}
    samples = [ask(answer="total 5"), ask(images=0, answer="one two three four", seed=1)]
    batch = FastVisionDataCollator(model, processor, plan_loss=True, **options)(samples)
    rows = batch.pop("label_rows")
    assert rows.dtype == torch.int64
    plain = FastVisionDataCollator(model, processor, **options)(samples)
    assert set(batch) <= set(plain)
    with torch.no_grad():
        outputs = model(**batch)
    kept, targets = outputs.logits.flatten(0, 1)[rows], batch["labels"].flatten()[rows + 1]
    assert len(rows) == int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(torch.nn.functional.cross_entropy(kept, targets), outputs.loss, rtol=1e-6, atol=0)


def test_planned_rows_stay_within_their_sample():
    labels = torch.tensor([[5, -100, 7], [8, 9, -100], [-100, -100, -100]])
    assert label_rows(labels, -100).tolist() == [1, 3]
    assert label_rows(labels[2:], -100).shape == (0,)
