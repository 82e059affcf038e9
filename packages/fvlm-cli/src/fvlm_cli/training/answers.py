"""What the model answers to evaluation rows before training, and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fvlm_cli.config.schema import TrainConfig
from fvlm_cli.data.row import Row
from fvlm_cli.output import Output
from fvlm_cli.training.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import ProcessorMixin


class Answers:
    """Asks the model of a run, where `eval.rows` says so.

    Args:
        config: of the run.
        model: in training mode, and left in it.
        processor: its processor.
        rows: to evaluate on.
        folder: of the run; of several processes only the one that writes into it asks.
        out: told what is going on.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        processor: ProcessorMixin,
        rows: list[Row],
        folder: RunFolder,
        out: Output,
    ) -> None:
        self._config = config
        self._model = model
        self._processor = processor
        self._rows = rows
        self._folder = folder
        self._out = out

    def take(self, when: Literal["before", "after"]) -> dict[str, dict[str, float]]:
        """Let the model answer; return the record's part about it, which is empty where nothing is asked.

        What was answered before training, a resumed run takes from its folder.

        Raises:
            DataError: a row has no answer to compare with, or cannot be used.
        """
        section = self._config.eval
        if section.rows is None or not self._folder.writes:
            return {}
        from fvlm_cli.evaluation.rows import answer_rows, scores_of
        from fvlm_cli.generate.answer import Decoding
        from fvlm_cli.training.collate import build_answerer
        from fvlm_vision import FastVisionModel

        path = self._folder.evaluation / f"{when}.jsonl"
        name = f"answers_{when}"
        if when == "before" and path.is_file():
            return {name: scores_of(path, section)}
        self._out.note(f"answering {min(section.rows, len(self._rows))} evaluation rows {when} training")
        decoding = Decoding(max_new_tokens=section.max_new_tokens)
        answerer = build_answerer(self._config.data, self._model, self._processor, decoding)
        FastVisionModel.for_inference(self._model)
        try:
            return {name: answer_rows(answerer, self._rows, section, path, self._out)}
        finally:
            FastVisionModel.for_training(self._model)
