"""Questions → answers, in batches or token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fvlm_cli.generate.questions import Question, text_of
from fvlm_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image
    from transformers import ProcessorMixin

    from fvlm_vision.media import ImageReader
    from fvlm_vision.resize import ResizePolicy


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen.

    Attributes:
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        top_p: draw from the likeliest tokens that make up this share.
        seed: of the drawing.

    Raises:
        ConfigError: the temperature is of no use.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature and not 1e-3 <= self.temperature <= 1e3:
            raise ConfigError(
                f"a temperature of {self.temperature} is of no use; give 0 for the likeliest token each time, or "
                "a number from 0.001 to 1000."
            )

    def options(self) -> dict[str, Any]:
        """Return the arguments of `generate`; what they leave out is not taken from the checkpoint either."""
        if self.temperature == 0:
            return {
                "max_new_tokens": self.max_new_tokens,
                "do_sample": False,
                "temperature": None,
                "top_p": None,
                "top_k": None,
            }
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


class Answerer:
    """Asks one model.

    Args:
        model: in inference mode.
        processor: its processor.
        decoding: how answers are chosen.
        images: opens images; None: with the limits of training.
        resize: gives them their size; None: the processor alone does.
    """

    def __init__(
        self,
        model: Any,
        processor: ProcessorMixin,
        decoding: Decoding,
        images: ImageReader | None = None,
        resize: ResizePolicy | None = None,
    ) -> None:
        from fvlm_core.arch import facts_for, media_token_ids
        from fvlm_vision.media import ImageReader
        from fvlm_vision.media_tokens import media_text_pattern
        from fvlm_vision.render import chat_template_of

        self.model = model
        self.processor: Any = processor
        self.decoding = decoding
        self._images = images or ImageReader()
        self._resize = resize
        self._template = chat_template_of(processor)
        media = media_token_ids(facts_for(model), model.config, processor).all
        self._media_text = media_text_pattern(processor, media)

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Answer a batch of questions.

        Those with and without images are asked apart, since some families' processors do not take them together. What a
        question is answered does not depend on its neighbours beyond rounding.

        Raises:
            DataError: a question's image or text cannot be used; it names the place.
        """
        answers: list[str] = [""] * len(questions)
        for with_images in (True, False):
            places = [place for place, question in enumerate(questions) if bool(question.images) == with_images]
            if places:
                texts = self._generate([questions[place] for place in places])
                for place, text in zip(places, texts, strict=True):
                    answers[place] = text
        return answers

    def stream(self, question: Question, say: Callable[[str], None]) -> str:
        """Answer one question, saying each piece of the answer as it comes; return the whole.

        Raises:
            DataError: the question's image or text cannot be used.
        """
        return self._generate([question], _Speaker(self.processor.tokenizer, say))[0]

    def open(self, source: Any, question: Question) -> Image.Image:
        """Open one of a question's images, at the size that the model's processor is given.

        Raises:
            DataError: it cannot be used; it names the question's place.
        """
        try:
            image = self._images.read(source)
        except DataError as error:
            raise DataError(f"{question.place}: {error.reason}") from None
        return image if self._resize is None else self._resize.apply(image)

    def _generate(self, questions: Sequence[Question], streamer: Any = None) -> list[str]:
        import torch

        inputs = self._inputs(questions)
        if self.decoding.temperature > 0:
            torch.manual_seed(self.decoding.seed)
        tokenizer = self.processor.tokenizer
        try:
            with torch.inference_mode():
                tokens = self.model.generate(
                    **inputs, **self.decoding.options(), pad_token_id=tokenizer.pad_token_id, streamer=streamer
                )
        except ValueError as error:  # as where a damaged chat template leaves the images out
            raise DataError(f"{_places(questions)}: the model refuses it ({' '.join(str(error).split())}).") from error
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _inputs(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Return the processor's tensors, padded on the left, where the model is."""
        texts = [self._text(question) for question in questions]
        images = [[self.open(source, question) for source in question.images] for question in questions]
        text_kwargs: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        bos = self.processor.tokenizer.bos_token
        if bos is not None and texts[0].startswith(bos):  # the template wrote it
            text_kwargs["add_special_tokens"] = False
        arguments: dict[str, Any] = {"text": texts, "text_kwargs": text_kwargs}
        if any(images):
            arguments |= {"images": images, "images_kwargs": {"return_tensors": "pt"}}
        try:
            inputs = self.processor(**arguments)
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            raise DataError(
                f"{_places(questions)}: the processor refuses it ({' '.join(str(error).split())})."
            ) from error
        moved = {name: value.to(self.model.device) for name, value in inputs.items()}
        return {name: v.to(self.model.dtype) if v.is_floating_point() else v for name, v in moved.items()}

    def _text(self, question: Question) -> str:
        import jinja2

        for message in question.messages:
            found = self._media_text.search(text_of(message["content"])) if self._media_text is not None else None
            if found:
                raise DataError(
                    f"{question.place}: a text holds {found.group()!r}, which stands for an image; remove it."
                )
        if self._template is None:
            parts = [message["content"] for message in question.messages]
            blocks = [block for part in parts for block in ([{"text": part}] if isinstance(part, str) else part)]
            return "".join(block.get("text", self.processor.image_token) for block in blocks)
        try:
            text: str = self.processor.apply_chat_template(
                question.messages, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"{question.place}: the chat template refuses the conversation ({error}).") from error
        return text


def _places(questions: Sequence[Question]) -> str:
    return questions[0].place if len(questions) == 1 else f"{questions[0].place} to {questions[-1].place}"


class _Speaker:
    """A streamer of `generate` that says text as soon as it is whole characters."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._say = say
        self._ids: list[int] = []
        self._said = ""
        self._prompt_passed = False

    def put(self, value: Any) -> None:
        """Take the prompt, and then one token at a time."""
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        self._ids.extend(value.reshape(-1).tolist())
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self._speak(text)

    def end(self) -> None:
        """Say what is left."""
        self._speak(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _speak(self, text: str) -> None:
        if text.startswith(self._said) and len(text) > len(self._said):
            self._say(text[len(self._said) :])
            self._said = text
