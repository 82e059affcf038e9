"""`fvlm infer`: what a model answers about images."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from fvlm_cli.commands import asking
from fvlm_cli.commands.places import check_parents
from fvlm_cli.output import Output
from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    from fvlm_cli.generate.answer import Answerer
    from fvlm_cli.generate.requests import Request

_IMAGE = Annotated[
    list[str] | None,
    typer.Option(help="An image; several are asked about together. Or a folder, each image of which is asked about."),
]
_PROMPT = Annotated[str | None, typer.Option(help="What is asked.")]
_INPUT = Annotated[
    Path | None, typer.Option(help="A JSONL, JSON or CSV file of questions, in the shapes that training takes.")
]
_OUTPUT = Annotated[
    Path | None, typer.Option("--output", "-o", help="A JSONL file for the answers, which must not exist.")
]
_BATCH = Annotated[int, typer.Option(min=1, help="Questions that are answered together.")]


def infer(
    model: asking.MODEL,
    image: _IMAGE = None,
    prompt: _PROMPT = None,
    input: _INPUT = None,
    output: _OUTPUT = None,
    system: asking.SYSTEM = None,
    precision: asking.PRECISION = None,
    max_new_tokens: asking.MAX_NEW_TOKENS = 256,
    temperature: asking.TEMPERATURE = 0.0,
    top_p: asking.TOP_P = 1.0,
    seed: asking.SEED = 0,
    batch_size: _BATCH = 8,
    resize: asking.RESIZE = None,
    trust_remote_code: asking.TRUST = False,
    *,
    out: Output,
) -> None:
    """Ask a model about an image, a folder of images, or everything in a file of questions.

    One answer is printed as it comes. Several are lines of JSON, each with its question and `answer`, on stdout or in
    --output.
    """
    from fvlm_cli.generate.answer import Decoding
    from fvlm_cli.generate.load import load_to_answer, quiet_libraries
    from fvlm_cli.generate.open import answerer
    from fvlm_cli.generate.requests import requests

    decoding = Decoding(max_new_tokens, temperature, top_p, seed)
    asked = requests(image or [], prompt, input, system)
    if output is not None and output.exists():
        raise ConfigError(f"--output {output} exists already; name another file, or remove it.")
    if output is not None:
        check_parents("--output", output)
    quiet_libraries(out.debug)
    out.note(f"loading {model}")
    loaded, processor = load_to_answer(model, precision, trust_remote_code=trust_remote_code)
    asks = answerer(loaded, processor, decoding, resize)
    started = time.monotonic()
    if len(asked) == 1 and input is None and output is None:
        _one(asks, asked[0], out, started)
    else:
        _many(asks, asked, output, batch_size, out, started)


def _one(asks: Answerer, request: Request, out: Output, started: float) -> None:
    if out.json:
        answer = asks.answer([request.question])[0]
        seconds = round(time.monotonic() - started, 3)
        out.result({**request.line, "answer": answer, "seconds": seconds}, lambda console: None)
        return

    def say(text: str) -> None:
        print(text, end="", flush=True)

    asks.stream(request.question, say)
    print()


def _many(
    asks: Answerer, asked: list[Request], output: Path | None, batch_size: int, out: Output, started: float
) -> None:
    from fvlm_cli.bars import track

    answered = _answered(asks, asked, batch_size)
    lines: list[dict[str, Any]] = []
    with _destination(output) as destination:
        for line in track(out, answered, len(asked), "answering"):
            lines.append(line)
            if output is not None or not out.json:
                print(json.dumps(line, ensure_ascii=False), file=destination, flush=True)
    seconds = time.monotonic() - started
    out.note(f"{len(lines)} answers in {seconds:.1f} s")
    data: dict[str, Any] = {"answers": len(lines), "seconds": round(seconds, 3)}
    data |= {"lines": lines} if output is None else {"output": str(output)}
    if out.json:
        out.result(data, lambda console: None)


def _answered(asks: Answerer, asked: list[Request], size: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        for request, answer in zip(batch, asks.answer([one.question for one in batch]), strict=True):
            yield {**request.line, "answer": answer}


@contextmanager
def _destination(output: Path | None) -> Iterator[TextIO]:
    """Give what answers are written to: stdout, or a file that appears only when all of them are in it."""
    if output is None:
        yield sys.stdout
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
