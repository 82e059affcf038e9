"""The whole of ``fvlm quickstart``: load, read, train, read again, save, merge, check, report."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fvlm_cli.quickstart import STEPS
from fvlm_cli.quickstart.folders import fresh_folder, shipped_checkpoint
from fvlm_cli.quickstart.handwriting import writings
from fvlm_cli.quickstart.merged import read_with_transformers
from fvlm_cli.quickstart.reading import exact_match, transcribe
from fvlm_cli.quickstart.threads import single_thread
from fvlm_cli.quickstart.training import BATCH, add_adapter, train
from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    from fvlm_cli.quickstart.handwriting import Writing
    from fvlm_cli.quickstart.training import Training

TEST_IMAGES = 256
MERGE_BASE = "dequantized"


class Watcher(Protocol):
    """Who is told how far a run is."""

    def begin(self, task: str, total: int) -> None:
        """A task of ``total`` units starts, and the one before it has ended."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """So many more units of the current task are done."""


@dataclass(frozen=True)
class Settings:
    """What a run may be told.

    Attributes:
        output: folder for everything that the run makes; an earlier run there is kept (see `fresh_folder`).
        steps: optimizer steps.
        seed: of the adapter's weights, the training strings and their order.
        test_images: held-out images that accuracy is measured on.
    """

    output: Path
    steps: int = STEPS
    seed: int = 0
    test_images: int = TEST_IMAGES

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--steps {self.steps} trains nothing: give at least 1.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed {self.seed} cannot be used: give a number from 0 to {2**32 - 1}.")


@dataclass(frozen=True)
class Summary:
    """What ``summary.json`` holds.

    Attributes:
        accuracy_before: fraction of the test images that were read exactly before training.
        accuracy_after: the same after training.
        merged_agreement: fraction of the test images that the merged model reads as the adapter model does.
        train_seconds: wall clock of the training steps.
        total_seconds: wall clock of the whole run, up to the writing of the report.
        device: the GPU's name, or ``"cpu"``.
        output_dir: where everything lies.
        accuracy_merged: fraction that the merged model reads exactly.
        merge_base: what the adapter was merged onto (see `fvlm_export.save_pretrained_merged`).
        test_images: how many.
        steps: optimizer steps.
        batch_size: images a step.
        seed: as asked for.
        parameters: of the model without its adapter.
        trainable_parameters: of the adapter.
        final_loss: of the last step, in nats a token.
    """

    accuracy_before: float
    accuracy_after: float
    merged_agreement: float
    train_seconds: float
    total_seconds: float
    device: str
    output_dir: str
    accuracy_merged: float
    merge_base: str
    test_images: int
    steps: int
    batch_size: int
    seed: int
    parameters: int
    trainable_parameters: int
    final_loss: float


@dataclass(frozen=True)
class Readings:
    """What was read on the test images: by the model as shipped, after training, and after merging."""

    truth: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    merged: tuple[str, ...]


def run(settings: Settings, watcher: Watcher, *, checkpoint: Path | None = None) -> Summary:
    """Fine-tune a tiny VLM on handwriting and write adapter, merged model, report and summary.

    Args:
        settings: see `Settings`.
        watcher: told how far the run is.
        checkpoint: another base than the shipped one.

    Returns:
        What ``summary.json`` in the output folder holds.

    Raises:
        ConfigError: a setting cannot be used.
        CheckpointError: the base checkpoint is missing or damaged.
        ExportError: the merge failed.
    """
    with single_thread():
        return _run(settings, watcher, shipped_checkpoint() if checkpoint is None else checkpoint)


def _run(settings: Settings, watcher: Watcher, base: Path) -> Summary:
    begun = time.perf_counter()
    watcher.begin("Load in 4 bit", 1)
    model, processor = _load(base)
    folder = fresh_folder(settings.output)  # after all that can be wrong, so that nothing is left behind
    test = writings(settings.test_images, settings.seed, test=True)
    lessons = writings(settings.steps * BATCH, settings.seed, test=False)
    before = _read(model, processor, test, "Read before training", watcher)
    model = add_adapter(model, settings.seed, checkpointing_for(model))
    watcher.begin("Train", settings.steps)
    training = train(
        model,
        processor,
        lessons,
        steps=settings.steps,
        seed=settings.seed,
        on_step=lambda loss: watcher.advance(note=f"loss {loss:.3f}"),
    )
    after = _read(model, processor, test, "Read after training", watcher)
    merged = _save_and_reload(model, processor, folder, test, watcher)
    readings = Readings(tuple(writing.text for writing in test), tuple(before), tuple(after), tuple(merged))
    return _write_down(settings, folder, model, test, training, readings, begun, watcher)


def _load(base: Path) -> tuple[Any, Any]:
    import torch

    from fvlm_vision import FastVisionModel

    # On a GPU too, a model this small is held up by the number of launches, not by arithmetic: fp32 saves autocast's
    # casts, and the readings before and after the merge then differ by the merge alone.
    return FastVisionModel.from_pretrained(
        str(base), load_in_4bit=True, dtype=torch.float32, use_gradient_checkpointing=False
    )


def checkpointing_for(model: Any) -> bool | str:
    """Return how to train: on a GPU in whatever way runs layers as CUDA graphs, on a CPU plainly."""
    return "auto" if model.device.type == "cuda" else False


def _read(model: Any, processor: Any, test: list[Writing], task: str, watcher: Watcher) -> list[str]:
    watcher.begin(task, len(test))
    return transcribe(model, processor, [writing.image for writing in test], progress=watcher.advance)


def _save_and_reload(model: Any, processor: Any, folder: Path, test: list[Writing], watcher: Watcher) -> list[str]:
    watcher.begin("Save and merge", 2)
    model.save_pretrained(folder / "adapter")
    processor.save_pretrained(folder / "adapter")
    watcher.advance()
    # The adapter was trained over NF4 weights, and a model this small feels their difference from the 16-bit ones. Of
    # 512 test images, a model merged onto the original weights read 98.8 % as the adapter model did; merged onto what
    # training saw, all of them (fp32 on a CPU; in bf16 98.0 % and 99.8 %).
    model.save_pretrained_merged(
        folder / "merged", processor, save_method="merged_16bit", base=MERGE_BASE, dtype="float16", progress=False
    )
    watcher.begin("Read merged", len(test))
    images = [writing.image for writing in test]
    return read_with_transformers(
        folder / "merged", images, device=model.device, dtype=model.dtype, progress=watcher.advance
    )


def _write_down(
    settings: Settings,
    folder: Path,
    model: Any,
    test: list[Writing],
    training: Training,
    readings: Readings,
    begun: float,
    watcher: Watcher,
) -> Summary:
    import torch

    from fvlm_cli.report import write_quickstart_report

    watcher.begin("Write report", 1)
    trainable = model.num_parameters(only_trainable=True)
    on_gpu = model.device.type == "cuda"
    summary = Summary(
        accuracy_before=exact_match(readings.before, readings.truth),
        accuracy_after=exact_match(readings.after, readings.truth),
        merged_agreement=exact_match(readings.merged, readings.after),
        train_seconds=round(training.seconds, 2),
        total_seconds=round(time.perf_counter() - begun, 2),
        device=torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
        output_dir=str(folder),
        accuracy_merged=exact_match(readings.merged, readings.truth),
        merge_base=MERGE_BASE,
        test_images=len(test),
        steps=settings.steps,
        batch_size=BATCH,
        seed=settings.seed,
        parameters=model.num_parameters() - trainable,
        trainable_parameters=trainable,
        final_loss=training.losses[-1],
    )
    images = [writing.image for writing in test]
    write_quickstart_report(folder / "report.html", asdict(summary), training.losses, images, readings)
    # Last, so that a folder with a summary is a finished run.
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    watcher.advance()
    return summary
