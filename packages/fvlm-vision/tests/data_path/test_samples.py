from __future__ import annotations

import pytest

from fvlm_core.errors import DataError
from fvlm_vision.samples import read_sample

USER = {"role": "user", "content": "Read <image> and <image>."}
SAYS = {"role": "assistant", "content": "42"}


def kinds(message: dict) -> list[str]:
    return [block["type"] if block["type"] == "image" else block["text"] for block in message["content"]]


def test_inline_images_and_a_column_keep_their_order():
    sample = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "inline"}, {"type": "image"}, "text"]},
            SAYS,
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "more", "image": None}]},
            SAYS,
        ],
        "images": ["first", "second"],
    }
    conversation = read_sample(sample)
    assert conversation.images == ["inline", "first", "second"]
    assert kinds(conversation.messages[0]) == ["image", "image", "text"]
    assert kinds(conversation.messages[2]) == ["image", "more"]


def test_image_marks_stand_for_the_column_and_only_for_it():
    conversation = read_sample({"messages": [USER, SAYS], "images": ["a", "b"]})
    assert kinds(conversation.messages[0]) == ["Read ", "image", " and ", "image", "."]
    assert read_sample({"messages": [USER, SAYS]}).messages[0]["content"] == USER["content"]


def test_a_column_without_marks_goes_before_the_first_user_text():
    sample = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, SAYS], "image": "a"}
    conversation = read_sample(sample)
    assert kinds(conversation.messages[1]) == ["image", "u"]
    assert conversation.images == ["a"]
    mixed = {
        "messages": [{"role": "user", "content": [{"type": "image", "path": "inline"}, "u"]}, SAYS],
        "images": ["a", "b"],
    }
    assert read_sample(mixed).images == ["a", "b", {"path": "inline"}]


def test_sharegpt_and_prompt_completion():
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "42"}]
    conversation = read_sample({"conversations": turns, "image": "a"})
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    assert kinds(conversation.messages[0]) == ["image", "\nWhat?"]
    conversation = read_sample({"prompt": "What?", "completion": "42", "images": ["a"]})
    assert conversation.prompt_messages == 1
    assert kinds(conversation.messages[0]) == ["image", "What?"]
    conversation = read_sample({"prompt": [{"role": "system", "content": "s"}, USER], "completion": [SAYS]})
    assert conversation.prompt_messages == 2


def test_train_flags_and_formatting_func():
    turns = [{"role": "user", "content": "q"}, {**SAYS, "train": False}, {"role": "user", "content": "q"}, SAYS]
    conversation = read_sample({"messages": turns})
    assert conversation.trained == [True, False, True, True]
    assert "train" not in conversation.messages[1]
    made = read_sample(("q", "a"), lambda pair: {"prompt": pair[0], "completion": pair[1]})
    assert [m["content"] for m in made.messages] == ["q", "a"]


def test_the_sample_is_not_changed():
    content = [{"type": "text", "text": "hello <image>"}]
    sample = {"messages": [{"role": "user", "content": content}, dict(SAYS)], "images": ["a"]}
    read_sample(sample)
    assert content == [{"type": "text", "text": "hello <image>"}]
    assert sample["messages"][0]["content"] is content


@pytest.mark.parametrize(
    ("sample", "part"),
    [
        ({"messages": [USER, SAYS], "images": ["one"]}, "2 image placeholders and 1 image;"),
        (
            {"messages": [{"role": "user", "content": "<image>"}, SAYS], "images": ["a", "b"]},
            "1 image placeholder and 2 images;",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, SAYS]}, "1 image placeholder and 0 images;"),
        ({"messages": [{"role": "wizard", "content": "x"}, SAYS]}, "'wizard'"),
        ({"messages": [{"content": "x"}, SAYS]}, "None"),
        ({"messages": []}, "empty conversation"),
        ({"messages": "hello"}, "str"),
        ({"messages": [1]}, "int"),
        ({"text": "hello"}, "['text']"),
        ({"prompt": "only"}, "['prompt']"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "x"}], "images": ["a"]}, "no user turn"),
        ({"messages": [{"role": "user", "content": 3}, SAYS]}, "int"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, SAYS]}, "NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "pdf"}]}, SAYS]}, "'pdf'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a"}]}, SAYS]}, "audio block"),
        ({"messages": [USER, SAYS], "audios": ["v"]}, "'audios'"),
        (
            {"messages": [{"role": "user", "content": "<video>"}, SAYS], "videos": ["a", "b"]},
            "1 video placeholder and 2 videos;",
        ),
        ({"messages": [USER, SAYS], "videos": ["a"], "video": "a"}, "both the columns 'video'"),
        ({"messages": [USER, SAYS], "images": ["a"], "image": "a"}, "both"),
        ({"messages": [USER, {**SAYS, "train": "no"}]}, "'no'"),
        (17, "int"),
    ],
)
def test_bad_samples_get_one_sentence(sample, part):
    with pytest.raises(DataError) as caught:
        read_sample(sample)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
