"""`fvlm chat`: a dialogue with a model in the terminal, with images."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvlm_cli.commands import asking
from fvlm_cli.config.nearest import hint
from fvlm_cli.output import Output
from fvlm_core.errors import DataError

if TYPE_CHECKING:
    from fvlm_cli.generate.answer import Answerer

_IMAGE = Annotated[list[str] | None, typer.Option(help="Shown with the first question; may be given several times.")]

_COMMANDS = {
    "/image": "/image PATH shows an image with the next question",
    "/clear": "/clear forgets what was said and shown",
    "/help": "/help lists these",
    "/quit": "/quit ends, as does the end of input",
}


def chat(
    model: asking.MODEL,
    image: _IMAGE = None,
    system: asking.SYSTEM = None,
    precision: asking.PRECISION = None,
    max_new_tokens: asking.MAX_NEW_TOKENS = 512,
    temperature: asking.TEMPERATURE = 0.0,
    top_p: asking.TOP_P = 1.0,
    seed: asking.SEED = 0,
    resize: asking.RESIZE = None,
    trust_remote_code: asking.TRUST = False,
    *,
    out: Output,
) -> None:
    """Talk with a model about images. A line is a question; /help lists what else there is.

    Ctrl-C stops an answer. Questions may also come through a pipe; with --json each turn is one JSON object.
    """
    from fvlm_cli.generate.answer import Decoding
    from fvlm_cli.generate.load import load_to_answer, quiet_libraries
    from fvlm_cli.generate.open import answerer

    decoding = Decoding(max_new_tokens, temperature, top_p, seed)
    quiet_libraries(out.debug)
    out.note(f"loading {model}")
    loaded, processor = load_to_answer(model, precision, trust_remote_code=trust_remote_code)
    session = Session(answerer(loaded, processor, decoding, resize), system, out)
    for path in image or []:
        session.show(path)  # one that cannot be shown ends it before anything is asked
    out.note("; ".join(_COMMANDS.values()))
    for line in _lines(out):
        if not session.take(line):
            break


class Session:
    """A dialogue.

    Args:
        answerer: asks the model.
        system: what the model is told first.
        out: how it is spoken with.
    """

    def __init__(self, answerer: Answerer, system: str | None, out: Output) -> None:
        from fvlm_cli.generate.questions import Conversation

        self._answerer = answerer
        self._system = system
        self._out = out
        self._talk = Conversation()
        self._pending: list[str] = []

    def take(self, line: str) -> bool:
        """Do what a line says; return whether the dialogue goes on."""
        line = line.strip()
        word, _, rest = line.partition(" ")
        if not line:
            return True
        if word == "/quit":
            return False
        if word == "/image":
            self._show_if_there_is_one(rest.strip())
        elif word == "/clear":
            self._talk.messages.clear()
            self._talk.images.clear()
            self._pending.clear()
            self._out.note("forgotten")
        elif word == "/help":
            self._out.stderr.print("\n".join(_COMMANDS.values()), markup=False)
        elif word.startswith("/"):
            self._complain(f"{word} is no command; {hint(word, _COMMANDS)}")
        else:
            self._answer(line)
        return True

    def _show_if_there_is_one(self, path: str) -> None:
        if not path:
            self._complain("/image shows nothing; write its path behind it: /image photo.png.")
            return
        try:
            self.show(path)
        except DataError as error:
            self._complain(error.reason)

    def show(self, path: str) -> None:
        """Show an image with the next question.

        Raises:
            DataError: there is none, or it cannot be opened.
        """
        from fvlm_vision.media import ImageReader

        size = ImageReader().read(path).size
        self._pending.append(path)
        self._out.note(f"{path}: {size[0]}×{size[1]} pixels, shown with the next question")

    def _answer(self, text: str) -> None:
        images, self._pending = self._pending, []
        question = self._talk.ask(text, images, self._system)
        pieces: list[str] = []

        def say(piece: str) -> None:
            pieces.append(piece)
            if not self._out.json:
                print(piece, end="", flush=True)

        try:
            answer = self._answerer.stream(question, say)
        except KeyboardInterrupt:
            answer = "".join(pieces).strip()
            self._out.note("\n(stopped)")
        except DataError as error:
            self._talk.take_back()
            self._pending = images
            self._complain(error.reason)
            return
        self._talk.hear(answer)
        if self._out.json:
            turn: dict[str, Any] = {"user": text, "images": images, "assistant": answer}
            print(json.dumps(turn, ensure_ascii=False), flush=True)
        else:
            print()

    @staticmethod
    def _complain(sentence: str) -> None:
        print(f"fvlm: {sentence}", file=sys.stderr)


def _lines(out: Output) -> Iterator[str]:
    """Yield what is typed, line by line, or what comes through a pipe; Ctrl-C at the prompt ends it.

    Raises:
        DataError: what came is not in the encoding that it is read in.
    """
    if sys.stdin is None:  # the shell closed it
        return
    try:
        yield from _typed("" if out.json else "> ") if sys.stdin.isatty() else sys.stdin
    except UnicodeDecodeError as error:
        raise DataError(
            f"a question is not in the encoding of stdin, {sys.stdin.encoding} ({error.reason}); set "
            "PYTHONIOENCODING=utf-8, or write it in that encoding."
        ) from None


def _typed(prompt: str) -> Iterator[str]:
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        yield line
