"""A dataset row, in any of the accepted shapes, as one `Conversation`.

The accepted shapes: `messages` (with images inline, or in an `images` column), `conversations` (ShareGPT roles),
`prompt` + `completion` (strings or messages), or whatever a `formatting_func` turns into one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fvlm_core.errors import DataError
from fvlm_vision.places import Kind, Places

FormattingFunc = Callable[[Any], Any]

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    # ShareGPT's names for them
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
_PAYLOAD_KEYS = ("bytes", "path", "url", "base64")
_BLOCK_KINDS: dict[Any, Kind] = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}


@dataclass(frozen=True)
class Conversation:
    """One sample, ready for a chat template.

    Args:
        messages: dicts with `role` and `content`; content is a string or a list of `{"type": "text", "text": …}`,
            `{"type": "image"}` and `{"type": "video"}` blocks, as its author wrote it; other keys (tool calls, …) are
            kept for the template.
        images: the image sources in the order of the image blocks.
        videos: the video sources in the order of the video blocks.
        trained: for each message, False where its author set `"train": false`.
        prompt_messages: how many leading messages are the prompt of a prompt + completion sample; None for others.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    videos: list[Any]
    trained: list[bool]
    prompt_messages: int | None

    def texts(self) -> Iterator[str]:
        """Yield every text that its author wrote."""
        for message in self.messages:
            content = message["content"]
            if isinstance(content, str):
                yield content
            else:
                yield from (block["text"] for block in content if block["type"] == "text")


def read_sample(sample: Any, formatting_func: FormattingFunc | None = None) -> Conversation:
    """Return the sample as a `Conversation`.

    Args:
        sample: a mapping in one of the shapes that the module names, or what `formatting_func` takes. A list of
            messages alone is taken as `{"messages": …}`. It is not changed.
        formatting_func: turns the sample into one of the accepted shapes first.

    Raises:
        DataError: the columns, roles, content or number of images cannot be used.
    """
    if formatting_func is not None:
        sample = formatting_func(sample)
    if isinstance(sample, list):
        sample = {"messages": sample}
    if not isinstance(sample, Mapping):
        raise DataError(
            f"a sample is {type(sample).__name__}; give a mapping with messages, conversations or prompt + completion "
            "(a formatting_func can make one)."
        )
    columns = {key: value for key, value in sample.items() if value is not None}
    places = Places(columns)
    prompt_messages: int | None = None
    if "messages" in columns:
        raw = _turns(columns["messages"], "messages")
    elif "conversations" in columns:
        raw = _turns(columns["conversations"], "conversations")
    elif "prompt" in columns and "completion" in columns:
        prompt = _side(columns["prompt"], "user", "prompt")
        raw = prompt + _side(columns["completion"], "assistant", "completion")
        prompt_messages = len(prompt)
    else:
        raise DataError(
            f"a sample has the columns {sorted(map(str, sample))}, none of which can be trained on; it needs messages, "
            "conversations, or prompt and completion (or pass a formatting_func)."
        )
    for key in ("audio", "audios"):
        if columns.get(key):
            raise DataError(f"the column {key!r} is not supported; give images or videos, or drop the column.")
    messages = [_message(turn, places) for turn in raw]
    places.close(messages)
    trained = [_train_flag(turn) for turn in raw]
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("a sample has no assistant turn to learn from; add one, or drop the sample.")
    return Conversation(messages, places.media("image"), places.media("video"), trained, prompt_messages)


def _turns(value: Any, column: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"the column {column!r} holds {type(value).__name__}; it needs a list of messages.")
    if not value:
        raise DataError(f"the column {column!r} is an empty conversation; drop the sample.")
    for turn in value:
        if not isinstance(turn, Mapping):
            raise DataError(f"the column {column!r} holds a {type(turn).__name__} where a message should be.")
    return list(value)


def _side(value: Any, role: str, column: str) -> list[Mapping[str, Any]]:
    """Return a prompt or completion as messages: a plain string is one turn of the given role."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        return [value]
    return _turns(value, column)


def _message(turn: Mapping[str, Any], places: Places) -> dict[str, Any]:
    sharegpt = "from" in turn and turn.get("from") is not None and turn.get("role") is None
    role = turn.get("from") if sharegpt else turn.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"a message has the role {role!r}; use one of {', '.join(_ROLES)}.")
    content = turn.get("value" if sharegpt else "content")
    extra = {
        key: value
        for key, value in turn.items()
        if value is not None and key not in ("role", "from", "value", "content", "train")
    }
    return {"role": _ROLES[role], "content": _content(content, role, places, bool(extra)), **extra}


def _content(content: Any, role: str, places: Places, may_be_empty: bool) -> str | list[dict[str, Any]]:
    if content is None and may_be_empty:
        return ""  # an assistant turn that only calls a tool
    if isinstance(content, str):
        blocks = places.split(content)
        return content if all(block["type"] == "text" for block in blocks) else blocks
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise DataError(
            f"a {role} message holds {type(content).__name__} as its content; give text or a list of blocks."
        )
    result: list[dict[str, Any]] = []
    for block in content:
        result.extend(_blocks(block, role, places))
    return result


def _blocks(block: Any, role: str, places: Places) -> list[dict[str, Any]]:
    if isinstance(block, str):
        return places.split(block)
    if not isinstance(block, Mapping):
        raise DataError(f"a {role} message holds a block of type {type(block).__name__}; give mappings with a 'type'.")
    kind = block.get("type")
    if kind == "text":
        text = block.get("text")
        if not isinstance(text, str):
            raise DataError(f"a text block of a {role} message holds {type(text).__name__}; give a string.")
        return places.split(text)
    if isinstance(kind, str) and kind in _BLOCK_KINDS:
        return [places.block(_BLOCK_KINDS[kind], _payload(block, _BLOCK_KINDS[kind]))]
    if kind == "audio":
        raise DataError(f"a {role} message holds an audio block, which is not supported; drop it.")
    raise DataError(f"a block of a {role} message has the type {kind!r}; use 'text', 'image' or 'video'.")


def _payload(block: Mapping[str, Any], kind: Kind) -> Any:
    """Return the source in a block, or None where its medium comes from a column."""
    given = {key: block[key] for key in (kind, f"{kind}_url", *_PAYLOAD_KEYS) if block.get(key) is not None}
    if not given:
        return None
    if kind == "video" and block.get("fps") is not None:
        given["fps"] = block["fps"]
    return given[kind] if list(given) == [kind] else given


def _train_flag(turn: Mapping[str, Any]) -> bool:
    flag = turn.get("train")
    if flag is not None and not isinstance(flag, bool):
        raise DataError(f'a message has "train": {flag!r}; give true or false.')
    return flag is not False
