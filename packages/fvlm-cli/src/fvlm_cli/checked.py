"""What the files of a run must hold to be reported on or gone on from; anyone may have edited or torn them since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fvlm_core.errors import DataError


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Record(_Open):
    """`run.json`."""

    status: str | None = None
    started: str | None = None
    rows: int | None = None
    eval_rows: int | None = None
    steps: int | None = None
    seconds: float | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    versions: dict[str, str | None] = {}
    answers_before: dict[str, float] = {}
    answers_after: dict[str, float] = {}


class Entry(_Open):
    """A report in `history.json`."""

    step: int
    loss: float = 0.0
    eval_loss: float = 0.0
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    seconds_per_step: float = 0.0
    device_memory_gib: float = 0.0
    host_memory_gib: float = 0.0
    mean_token_accuracy: float = 0.0


class Answered(_Open):
    """A line of `eval/before.jsonl` or `eval/after.jsonl`."""

    place: str
    prompt: str
    images: list[str]
    truth: str
    prediction: str
    exact_match: float
    cer: float
    wer: float
    anls: float


RECORD: TypeAdapter[Any] = TypeAdapter(Record)
HISTORY: TypeAdapter[Any] = TypeAdapter(list[Entry])
ANSWERS: TypeAdapter[Any] = TypeAdapter(list[Answered])
CONFIG: TypeAdapter[Any] = TypeAdapter(dict[str, dict[str, Any] | None])


def check(path: Path, content: Any, kind: TypeAdapter[Any]) -> Any:
    """Return the content of a run's file as it is.

    Raises:
        DataError: it is not what a run writes; it says where.
    """
    try:
        kind.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise DataError(f"{path} is damaged ({what}); put back what the run wrote, or run it anew.") from None
    return content
