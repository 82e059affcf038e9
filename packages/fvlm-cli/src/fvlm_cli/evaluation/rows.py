"""The answers of a model to evaluation rows, with their scores and pictures, as files that a report is made of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvlm_cli.bars import track
from fvlm_cli.checked import ANSWERS, check
from fvlm_cli.config.schema import EvalSection
from fvlm_cli.data.row import Row
from fvlm_cli.evaluation.metrics import METRICS, Score, score, summary
from fvlm_cli.generate.questions import Question, question_of
from fvlm_cli.output import Output
from fvlm_core.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

    from fvlm_cli.generate.answer import Answerer

_LARGEST = 768  # pixels a side of a kept picture
_SMALL = 65_536  # pixels up to which a picture is kept without loss


def answer_rows(
    answerer: Answerer, rows: Sequence[Row], section: EvalSection, path: Path, out: Output
) -> dict[str, float]:
    """Let a model answer rows, and write what it said.

    Args:
        answerer: the model.
        rows: with answers.
        section: the config's; its `rows` limits how many of the first are asked.
        path: of the JSONL file: a line a row with place, prompt, truth, prediction, every metric, and the names of its
            pictures, which are put into a folder `images` beside it.
        out: shows progress.

    Returns:
        The metrics that the section names, over all rows.

    Raises:
        DataError: a row cannot be used; it names the place. Nothing is written then.
    """
    questions = [question_of(row) for row in rows[: section.rows]]
    for question in questions:
        if question.truth is None:
            raise DataError(f"{question.place}: it has no answer to compare with; end it with an assistant turn.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    scores: list[Score] = []
    with partial.open("w", encoding="utf-8") as lines:
        answered = _answered(answerer, questions, section.batch_size)
        for number, (question, answer) in enumerate(track(out, answered, len(questions), "answering")):
            scores.append(score(answer, question.truth or ""))
            pictures = _keep_pictures(answerer, question, number, path.parent / "images")
            lines.write(json.dumps(_line(question, answer, scores[-1], pictures), ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return summary(scores, section.metrics)


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read what `answer_rows` wrote.

    Raises:
        DataError: the file is damaged.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise DataError(f"{path} is damaged; put back what the run wrote, or run it anew.") from None
    answers: list[dict[str, Any]] = check(path, lines, ANSWERS)
    return answers


def scores_of(path: Path, section: EvalSection) -> dict[str, float]:
    """Return the metrics over the answers that a file holds."""
    return summary([score(line["prediction"], line["truth"]) for line in read_answers(path)], section.metrics)


def _answered(answerer: Answerer, questions: Sequence[Question], size: int) -> Iterator[tuple[Question, str]]:
    for start in range(0, len(questions), size):
        batch = questions[start : start + size]
        yield from zip(batch, answerer.answer(batch), strict=True)


def _line(question: Question, answer: str, scored: Score, pictures: list[str]) -> dict[str, Any]:
    values: dict[str, float] = {metric: round(scored.value(metric), 6) for metric in METRICS}
    return {
        "place": question.place,
        "prompt": question.asked,
        "images": pictures,
        "truth": question.truth,
        "prediction": answer,
        **values,
    }


def _keep_pictures(answerer: Answerer, question: Question, number: int, folder: Path) -> list[str]:
    """Keep a question's pictures, shrunk where they are large, unless an earlier evaluation has; return their names."""
    names = []
    for place, source in enumerate(question.images):
        picture: Image.Image = answerer.open(source, question)
        small = picture.width * picture.height <= _SMALL
        name = f"{number:05}-{place}.{'png' if small else 'jpg'}"
        names.append(f"{folder.name}/{name}")
        if not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            if small:
                picture.save(folder / name)
            else:
                shrunk = picture.copy()
                shrunk.thumbnail((_LARGEST, _LARGEST))
                shrunk.save(folder / name, quality=85)
    return names
