"""A conversation as the text that the processor gets, with the character spans that are trained.

Spans are found in the text and mapped to tokens through the tokenizer's offsets, so they do not depend on how a piece
of text happens to be tokenized beside its neighbours.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from fvlm_core.errors import ConfigError, DataError
from fvlm_vision.paligemma import prompt_end
from fvlm_vision.spans import Span, complement, intersect

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from fvlm_vision.samples import Conversation

logger = logging.getLogger(__name__)
_GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Rendered:
    """A sample's text.

    Args:
        text: with one placeholder for each image, not yet expanded.
        trained: the character spans that are trained, ordered and disjoint; None for all of them.
    """

    text: str
    trained: list[Span] | None


@dataclass(frozen=True)
class ResponseMarks:
    """The strings that open an instruction and a response in the rendered text."""

    instruction_part: str
    response_part: str


class Renderer:
    """Renders conversations with a processor's chat template.

    Args:
        processor: its template is used, else its tokenizer's; with neither, prompt + completion samples are joined as
            they are, closed by the end-of-sequence token, and others are refused.
        responses_only: whether only what the assistant says is trained.
        marks: where responses start and end; None uses the template's `{% generation %}` marks.
        usual: the marks of the family's templates, which take the place of either where this template writes them.

    Raises:
        ConfigError: `responses_only` without marks from either side.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        responses_only: bool = False,
        marks: ResponseMarks | None = None,
        usual: ResponseMarks | None = None,
    ) -> None:
        self.processor: Any = processor  # Any: what each family declares is not in the base class
        self.template = chat_template_of(processor)
        self.responses_only = responses_only
        self.marks, self.usual = marks, usual
        if responses_only and marks is None and not self.marks_assistant():
            if usual is not None and self._writes(usual):
                self.marks = usual
                logger.info("Learning what stands behind %r, up to %r.", usual.response_part, usual.instruction_part)
                return
            raise ConfigError(
                "train_on_responses_only needs to know where responses start: this chat template has no {% "
                "generation %} "
                "marks, so pass instruction_part and response_part, the text that opens a user and an assistant turn."
            )

    def _writes(self, marks: ResponseMarks) -> bool:
        """Whether the chat template opens turns with these marks: they find both answers of a conversation, alone."""
        if self.template is None:
            return False
        said = [("user", "first question"), ("assistant", "first answer")]
        said += [("user", "second question"), ("assistant", "second answer")]
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
        try:
            text = self._text(messages)
        except DataError:
            return False
        found = [text[start:end] for start, end in response_spans(text, marks)]
        answers = ["first answer", "second answer"]
        return len(found) == 2 and all(a in f and "question" not in f for a, f in zip(answers, found, strict=True))

    def marks_assistant(self) -> bool:
        """Return whether the chat template marks what the assistant says."""
        return self.template is not None and _GENERATION_MARK.search(self.template) is not None

    def render(self, conversation: Conversation) -> Rendered:
        """Return the conversation's text and its trained spans.

        Raises:
            DataError: the template refuses the conversation, or nothing in it would be trained.
        """
        if self.template is None:
            return self._joined(conversation)
        text = self._text(conversation.messages)
        spans: list[list[Span]] = []
        if conversation.prompt_messages is not None:
            spans.append([(self._prompt_end(conversation, text), len(text))])
        if self.responses_only:
            spans.append(self._responses(conversation, text))
        if not all(conversation.trained):
            spans.append(complement(self._untrained(conversation, text), len(text)))
        if not spans:
            return Rendered(text, None)
        trained = spans[0]
        for others in spans[1:]:
            trained = intersect(trained, others)
        if not trained:
            raise DataError(self._nothing_trained(conversation))
        return Rendered(text, trained)

    def _text(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        try:
            text: str = self.processor.apply_chat_template(
                messages, chat_template=self.template, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(
                f"the chat template refuses the conversation ({error}); correct its roles or content."
            ) from error
        return text

    def _responses(self, conversation: Conversation, text: str) -> list[Span]:
        if self.marks is not None:
            return response_spans(text, self.marks)
        rendered, spans = self._marked(conversation)
        if rendered != text:
            raise ConfigError(
                "this processor renders conversations in its own way, so the template's {% generation %} marks "
                "cannot be "
                "used; pass instruction_part and response_part."
            )
        return [(start, end) for start, end in spans if end > start]

    def _marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        from transformers.utils import chat_template_utils

        template: Any = chat_template_utils.render_jinja_template  # its annotation, `str`, is not what it returns
        rendered, spans = template(
            [conversation.messages],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self.processor.tokenizer.special_tokens_map,
        )
        return rendered[0], spans[0]

    def _prompt_end(self, conversation: Conversation, text: str) -> int:
        """Return where the completion starts: after what the model is given at inference."""
        prompt = conversation.messages[: conversation.prompt_messages]
        for opened in (True, False):
            opening = self._text(prompt, add_generation_prompt=opened)
            if text.startswith(opening):
                return len(opening)
        raise DataError(
            "the chat template does not render the prompt as the start of prompt + completion; use messages."
        )

    def _untrained(self, conversation: Conversation, text: str) -> list[Span]:
        """Return the spans of the messages with `"train": false`, their role marks included."""
        spans = []
        for number, trained in enumerate(conversation.trained):
            if not trained:
                before = self._text(conversation.messages[:number]) if number else ""
                after = self._text(conversation.messages[: number + 1])
                if not (text.startswith(after) and after.startswith(before)):
                    raise DataError(
                        f'message {number} has "train": false, but the chat template does not render it apart from '
                        "later "
                        "messages; use train_on_responses_only or prompt + completion instead."
                    )
                spans.append((len(before), len(after)))
        return spans

    def _joined(self, conversation: Conversation) -> Rendered:
        texts = [message["content"] for message in conversation.messages]
        if conversation.prompt_messages != 1 or len(texts) != 2:
            raise DataError(
                "the processor has no chat template, so a conversation cannot be rendered; set "
                "processor.chat_template, or "
                "give a prompt and a completion as strings."
            )
        prompt, completion = (self._flat(text) for text in texts)
        prompt += prompt_end(self.processor)
        text = prompt + completion + (self.processor.tokenizer.eos_token or "")
        return Rendered(text, [(len(prompt), len(text))])

    def _flat(self, content: str | list[dict[str, Any]]) -> str:
        if isinstance(content, str):
            return content
        image_token: str = self.processor.image_token
        return "".join(image_token if block["type"] == "image" else block["text"] for block in content)

    def _nothing_trained(self, conversation: Conversation) -> str:
        if not any(conversation.trained):
            return 'every message of a sample has "train": false, so nothing would be trained; drop the sample.'
        if self.marks is not None:
            return (
                f"nothing would be trained: {self.marks.response_part!r} opens no response in the sample; pass the "
                "response_part that the chat template writes."
            )
        return 'nothing of a sample would be trained; check its assistant turns and its "train" flags.'


def response_spans(text: str, marks: ResponseMarks) -> list[Span]:
    """Return the spans of `text` from the end of each response mark to the next instruction mark, or the end."""
    spans: list[Span] = []
    at = 0
    while (opened := text.find(marks.response_part, at)) >= 0:
        start = opened + len(marks.response_part)
        closed = text.find(marks.instruction_part, start)
        # A later response mark before any instruction is a second response: its own mark is not trained.
        again = text.find(marks.response_part, start)
        end = min((place for place in (closed, again) if place >= 0), default=len(text))
        if end > start:
            spans.append((start, end))
        at = end
    return spans


def chat_template_of(processor: ProcessorMixin) -> str | None:
    """Return the processor's default chat template, else its tokenizer's, else None.

    Raises:
        ConfigError: several templates are named and none of them is the default.
    """
    for owner in (processor, processor.tokenizer):
        template = owner.chat_template
        if isinstance(template, dict):
            if "default" not in template:
                raise ConfigError(
                    f"the processor has the chat templates {sorted(template)} and none named 'default'; set "
                    "processor.chat_template to the one to train with."
                )
            template = template["default"]
        if template is not None:
            return str(template)
    return None
