"""What a model is asked: a conversation that ends with the user, and its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fvlm_cli.data.row import Row
from fvlm_core.errors import DataError


@dataclass
class Question:
    """One conversation to be continued.

    Attributes:
        messages: as a chat template takes them; image blocks hold no source.
        images: their sources, in order.
        place: where it was read, for errors.
        truth: what the data say the answer is, or None.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    place: str
    truth: str | None = None

    @property
    def asked(self) -> str:
        """The text of the last user message."""
        return text_of(self.messages[-1]["content"])


@dataclass
class Conversation:
    """A dialogue that grows: what was said, and the images that were shown.

    Attributes:
        messages: so far.
        images: so far.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)

    def ask(self, text: str, images: Sequence[Any], system: str | None = None) -> Question:
        """Add what the user says, after some images, and return the question.

        Args:
            text: the user's words.
            images: shown with them.
            system: what is said to the model first, where nothing was said yet.
        """
        if system and not self.messages:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        blocks: list[dict[str, Any]] = [{"type": "image"} for _ in images]
        self.messages.append({"role": "user", "content": [*blocks, {"type": "text", "text": text}]})
        self.images.extend(images)
        return Question(list(self.messages), list(self.images), "the conversation")

    def hear(self, text: str) -> None:
        """Add what the model said."""
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})

    def take_back(self) -> None:
        """Forget the last question, which was not answered."""
        question = self.messages.pop()
        shown = sum(block["type"] == "image" for block in question["content"])
        del self.images[len(self.images) - shown :]


def question_of(row: Row) -> Question:
    """Return what a row of data asks, and its answer where it has one.

    A row is in any of the shapes that training takes; the answer may be missing. Of a dialogue the last assistant turn
    is the answer, and all before it the question.

    Raises:
        DataError: the row is in none of these shapes.
    """
    from fvlm_vision.samples import read_sample

    sample, answered = _completed(row.sample)
    try:
        conversation = read_sample(sample)
    except DataError as error:
        raise row.refuse(error.reason) from None
    if conversation.videos:
        raise row.refuse("it has a video, and models are asked about images only; leave the row out.")
    last = max(number for number, message in enumerate(conversation.messages) if message["role"] == "assistant")
    before = conversation.messages[:last]
    if not before or before[-1]["role"] == "assistant":
        raise row.refuse("nothing is asked before its last answer; put a user turn there.")
    shown = sum(_images(message) for message in before)
    truth = text_of(conversation.messages[last]["content"]) if answered else None
    return Question(before, conversation.images[:shown], row.place, truth)


def text_of(content: Any) -> str:
    """Return the text of a message's content, images left out."""
    if isinstance(content, str):
        return content
    return "".join(block.get("text", "") for block in content)


def _completed(sample: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return a sample that ends with an assistant turn, and whether that turn is its own."""
    whole = dict(sample)
    for name in ("messages", "conversations"):
        turns = whole.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            last = turns[-1].get("role", turns[-1].get("from"))
            if last in ("user", "human"):
                whole[name] = [*turns, {"role": "assistant", "content": "-"}]
                return whole, False
            return whole, True
    if whole.get("prompt") is not None and whole.get("completion") is None:
        return {**whole, "completion": "-"}, False
    return whole, True


def _images(message: Mapping[str, Any]) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(block["type"] == "image" for block in content)
