"""What `fvlm infer` is asked on the command line → questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvlm_cli.data.files import read_file
from fvlm_cli.data.folder import image_files
from fvlm_cli.data.images import check_images, resolve_images
from fvlm_cli.data.row import Row
from fvlm_cli.generate.questions import Conversation, Question, question_of
from fvlm_core.errors import ConfigError, DataError

_KINDS = (".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class Request:
    """One question, and what its answer is written beside.

    Attributes:
        question: what is asked.
        line: the keys of the output line, but for the answer.
    """

    question: Question
    line: dict[str, Any]


def requests(images: Sequence[str], prompt: str | None, rows: Path | None, system: str | None) -> list[Request]:
    """Return what is asked.

    Args:
        images: files, which are asked about together; or one folder, each image of which is asked about.
        prompt: the question; needed unless `rows` is given.
        rows: a JSONL, JSON or CSV file of questions, in the shapes that training takes.
        system: what the model is told first.

    Raises:
        ConfigError: the options do not go together.
        DataError: a file or row cannot be used.
    """
    if rows is not None:
        if images or prompt is not None or system is not None:
            raise ConfigError("--input brings its own questions; leave --image, --prompt and --system out.")
        return _from_rows(rows)
    if prompt is None:
        raise ConfigError("nothing is asked; give --prompt, or a file of questions with --input.")
    folders = [image for image in images if Path(image).expanduser().is_dir()]
    if not folders:
        return [_asked(prompt, list(images), system, "--image")]
    if len(images) > 1:
        raise ConfigError(
            f"--image {folders[0]} is a folder, each image of which is asked about; leave the others out."
        )
    found = image_files(Path(folders[0]).expanduser())
    if not found:
        raise DataError(f"{folders[0]} holds no image; give a folder that does.")
    return [_asked(prompt, [str(path)], system, str(path)) for path in found]


def _asked(prompt: str, images: list[str], system: str | None, place: str) -> Request:
    paths = [str(Path(image).expanduser()) if "://" not in image else image for image in images]
    check_images(Row({}, place), list(paths))
    return Request(Conversation().ask(prompt, paths, system), {"images": images, "prompt": prompt})


def _from_rows(path: Path) -> list[Request]:
    if path.suffix.lower() not in _KINDS:
        raise ConfigError(f"--input {path} is none of {', '.join(_KINDS)}; convert it.")
    found = []
    for row in read_file(path):
        resolved = Row(resolve_images(row.sample, path.parent), row.place)
        question = question_of(resolved)
        check_images(resolved, question.images)
        found.append(Request(question, row.sample))
    return found
