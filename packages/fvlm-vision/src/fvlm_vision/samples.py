"""A dataset row, in any of the accepted shapes, as one `Conversation`.

The accepted shapes: `messages` (with images inline, or in an `images` column), `conversations` (ShareGPT roles),
`prompt` + `completion` (strings or messages), or whatever a `formatting_func` turns into one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fvlm_core.errors import DataError

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
_PAYLOAD_KEYS = ("image", "bytes", "path", "url", "base64", "image_url")
_IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Conversation:
    """One sample, ready for a chat template.

    Args:
        messages: dicts with `role` and `content`; content is a string or a list of `{"type": "text", "text": …}` and
            `{"type": "image"}` blocks, as its author wrote it; other keys (tool calls, …) are kept for the template.
        images: the image sources in the order of the image blocks.
        trained: for each message, False where its author set `"train": false`.
        prompt_messages: how many leading messages are the prompt of a prompt + completion sample; None for others.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
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
    pool = _ImagePool(columns)
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
    for key in ("videos", "video", "audio", "audios"):
        if columns.get(key):
            raise DataError(f"the column {key!r} is not supported; give images, or drop the column.")
    messages = [_message(turn, pool) for turn in raw]
    pool.place(messages)
    trained = [_train_flag(turn) for turn in raw]
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("a sample has no assistant turn to learn from; add one, or drop the sample.")
    return Conversation(messages, pool.images, trained, prompt_messages)


class _ImagePool:
    """The images of one sample: those inline, and those of its `images` column, in the order of their places."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        if "images" in columns and "image" in columns:
            raise DataError("a sample has both an 'image' and an 'images' column; keep one.")
        column = columns.get("images", columns.get("image"))
        self.column: list[Any] = _as_list(column)
        self.has_column = column is not None
        self.images: list[Any] = []
        self.places = 0  # image blocks without a source of their own
        self._next = 0

    def take(self) -> None:
        self.places += 1
        if self._next < len(self.column):
            self.images.append(self.column[self._next])
            self._next += 1

    def place(self, messages: list[dict[str, Any]]) -> None:
        """Put a column's images before the first user text when no place for them was marked; check the numbers."""
        if self.column and self.places == 0:
            first = next((m for m in messages if m["role"] == "user"), None)
            if first is None:
                raise DataError(
                    f"a sample has {_number(len(self.column), 'image')} and no user turn to put them in; add one."
                )
            content = first["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            first["content"] = [{"type": "image"} for _ in self.column] + blocks
            # Inline images of earlier turns come first, those of this turn and later ones after the column's.
            before = sum(_image_blocks(m) for m in messages[: messages.index(first)])
            self.images[before:before] = self.column
        elif self.places != len(self.column):
            raise DataError(
                f"a sample has {_number(self.places, 'image placeholder')} and {_number(len(self.column), 'image')}; "
                "give one image for each placeholder."
            )


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


def _message(turn: Mapping[str, Any], pool: _ImagePool) -> dict[str, Any]:
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
    return {"role": _ROLES[role], "content": _content(content, role, pool, bool(extra)), **extra}


def _content(content: Any, role: str, pool: _ImagePool, may_be_empty: bool) -> str | list[dict[str, Any]]:
    if content is None and may_be_empty:
        return ""  # an assistant turn that only calls a tool
    if isinstance(content, str):
        blocks = _split_marks(content, pool)
        return content if all(block["type"] == "text" for block in blocks) else blocks
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise DataError(
            f"a {role} message holds {type(content).__name__} as its content; give text or a list of blocks."
        )
    result: list[dict[str, Any]] = []
    for block in content:
        result.extend(_blocks(block, role, pool))
    return result


def _blocks(block: Any, role: str, pool: _ImagePool) -> list[dict[str, Any]]:
    if isinstance(block, str):
        return _split_marks(block, pool)
    if not isinstance(block, Mapping):
        raise DataError(f"a {role} message holds a block of type {type(block).__name__}; give mappings with a 'type'.")
    kind = block.get("type")
    if kind == "text":
        text = block.get("text")
        if not isinstance(text, str):
            raise DataError(f"a text block of a {role} message holds {type(text).__name__}; give a string.")
        return _split_marks(text, pool)
    if kind in ("image", "image_url"):
        source = _payload(block)
        if source is None:
            pool.take()
        else:
            pool.images.append(source)
        return [{"type": "image"}]
    if kind in ("video", "audio"):
        raise DataError(f"a {role} message holds a {kind} block, which is not supported; give images.")
    raise DataError(f"a block of a {role} message has the type {kind!r}; use 'text' or 'image'.")


def _payload(block: Mapping[str, Any]) -> Any:
    """Return the image source of a block, or None where its image comes from the `images` column."""
    given = {key: block[key] for key in _PAYLOAD_KEYS if block.get(key) is not None}
    if not given:
        return None
    return given["image"] if list(given) == ["image"] else given


def _split_marks(text: str, pool: _ImagePool) -> list[dict[str, Any]]:
    """Cut `<image>` marks out of a text, but only where the sample has an `images` column that they can stand for."""
    if not pool.has_column or _IMAGE_MARK not in text:
        return [{"type": "text", "text": text}]
    blocks: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(_IMAGE_MARK)):
        if number:
            blocks.append({"type": "image"})
            pool.take()
        if piece:
            blocks.append({"type": "text", "text": piece})
    return blocks


def _train_flag(turn: Mapping[str, Any]) -> bool:
    flag = turn.get("train")
    if flag is not None and not isinstance(flag, bool):
        raise DataError(f'a message has "train": {flag!r}; give true or false.')
    return flag is not False


def _image_blocks(message: Mapping[str, Any]) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(block["type"] == "image" for block in content)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
