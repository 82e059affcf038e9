"""`fvlm estimate`: what a run will need, before it is started and without its weights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvlm_cli.exits import Exit
from fvlm_cli.output import Output
from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fvlm_cli.config.schema import TrainConfig
    from fvlm_cli.estimate.gpus import Gpu
    from fvlm_cli.estimate.plan import Estimate
    from fvlm_cli.estimate.workload import Load
    from fvlm_cli.inspection.opened import Opened

_CONFIG = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="A training config.")]
_SETTINGS = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE | --KEY VALUE]...", help="Keys that replace the config's.")
]
_GPU = Annotated[
    str | None, typer.Option(help="A card: h200, h100, a100, 4090, t4, … or here. Default: all of the table.")
]
_ROWS = Annotated[int, typer.Option(min=1, help="How many of the first rows are looked at.")]
_IMAGE = Annotated[
    str | None, typer.Option(help="Do without data: rows with a blank image of this size, such as 1120x896.")
]
_IMAGES = Annotated[int, typer.Option(min=0, max=1000, help="With --image: how many of them a row has.")]
_QUESTION = Annotated[int, typer.Option(min=0, max=10_000_000, help="With --image: tokens of text that are asked.")]
_ANSWER = Annotated[int, typer.Option(min=1, max=10_000_000, help="With --image: tokens of text that are answered.")]


def estimate(
    config: _CONFIG,
    settings: _SETTINGS = None,
    gpu: _GPU = None,
    rows: _ROWS = 50,
    image: _IMAGE = None,
    images: _IMAGES = 1,
    question: _QUESTION = 32,
    answer: _ANSWER = 128,
    *,
    out: Output,
) -> None:
    """Estimate parameters, memory by part, and time of a run; say what fits on a card, and the largest batch.

    Needs the model's config and processor, not its weights, and no GPU. The exit code is 4 where the run does not fit
    on the card that --gpu names.
    """
    from fvlm_cli.config.read import read_config
    from fvlm_cli.estimate.gpus import find_gpu
    from fvlm_cli.estimate.plan import estimate as work_out
    from fvlm_cli.generate.load import quiet_libraries
    from fvlm_cli.inspection.opened import open_model

    read = read_config(config, settings or [])
    card = None if gpu is None else find_gpu(gpu)
    size = None if image is None else _size(image)
    section = read.model
    quiet_libraries(out.debug)
    opened = open_model(section.name, section.trust_remote_code, section.revision, section.token)
    vars(opened.skeleton)["max_seq_length"] = section.max_seq_length
    loads = (
        _from_data(read, opened, rows, out)
        if size is None
        else [_made_up(read, opened, size, images, question, answer)]
    )
    found = work_out(read, opened, loads)
    data = _data(found, card, opened)
    out.result(data, lambda console: _show(console, found, card, data))
    if card is not None and not data["gpu"]["fits"]:
        raise typer.Exit(Exit.RESOURCES)


def _size(text: str) -> tuple[int, int]:
    from fvlm_vision.media import MAX_IMAGE_PIXELS

    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if match is None or 0 in (int(match[1]), int(match[2])):
        raise ConfigError(f"--image {text} is no size; write width and height in pixels, such as 1120x896.")
    width, height = int(match[1]), int(match[2])
    if width * height > MAX_IMAGE_PIXELS:
        raise ConfigError(
            f"--image {text} has more than the {MAX_IMAGE_PIXELS} pixels that training takes; make it less."
        )
    return width, height


def _from_data(config: TrainConfig, opened: Opened, count: int, out: Output) -> list[Load]:
    from fvlm_cli.bars import track
    from fvlm_cli.data.read import read_data
    from fvlm_cli.estimate.plan import loads_of

    train, _ = read_data(
        config.data,
        config.train.seed,
        lambda rows, total: track(out, rows, total, "checking rows"),
        streamed=count,
    )
    return loads_of(config, opened, train[:count])


def _made_up(
    config: TrainConfig, opened: Opened, size: tuple[int, int], images: int, question: int, answer: int
) -> Load:
    from fvlm_cli.config.schema import DataSection
    from fvlm_cli.estimate.workload import load_of_image
    from fvlm_cli.training.collate import build_collator

    # Of the config's data section, what decides over the size of images.
    sizing = config.data.model_dump(include={"resize", "min_pixels", "max_pixels"})
    collator = build_collator(DataSection(train="-", **sizing), opened.skeleton, opened.processor())
    return load_of_image(collator, opened, size, images, question, answer)


def _data(found: Estimate, card: Gpu | None, opened: Opened) -> dict[str, Any]:
    from dataclasses import asdict

    shapes = found.shapes
    memory_gib = found.memory.as_data()
    if found.mode == "auto":
        memory_gib["needed_keeping_nothing"] = found.least(found.batch).as_data()["needed"]
    data: dict[str, Any] = {
        "model": opened.source.name,
        "model_type": opened.facts.model_type,
        "parameters": {"total": shapes.total, **shapes.parameters},
        "trainable": {"total": shapes.trained, **shapes.trainable},
        "precision": found.held,
        "checkpointing": found.mode,
        "fused": found.fused,
        "batch": found.batch,
        "rows_looked_at": len(found.loads),
        "longest_row": asdict(found.longest),
        "typical_row": asdict(found.typical),
        "memory_gib": memory_gib,
        "modes_gib": {
            held: {mode: memory.as_data()["needed"] for mode, memory in modes.items()}
            for held, modes in found.modes().items()
        },
        "fits": found.fitting(),
    }
    if card is not None:
        step = found.step_on(card)
        data["gpu"] = {
            **asdict(card),
            "fits": found.fits(card),
            "peak_gib": round(found.memory_on(card).peak / 2**30, 3),
            "largest_batch": found.largest_batch(card),
            "largest_images": found.largest_images(card),
            "step_seconds": step.seconds,
            "step_bound_by": step.bound,
            "step_tflop": step.operations / 1e12,
        }
    return data


def _show(console: Console, found: Estimate, card: Gpu | None, data: dict[str, Any]) -> None:
    console.print(f"{data['model']}, {data['model_type']}", markup=False)
    for name, count in data["parameters"].items():
        trained = data["trainable"].get(name, 0)
        console.print(f"  {name:<10} {count:>15,} parameters, {trained:>13,} trained")
    row = found.longest
    console.print(
        f"longest of {len(found.loads)} rows: {row.tokens} tokens, {row.learned} learned, {row.patches} patches; "
        f"{found.batch} a batch, {found.held}, checkpointing {found.mode}"
    )
    for name, value in data["memory_gib"].items():
        if value:
            console.print(f"  {name.replace('_', ' '):<10} {value:>9.2f} GiB")
    console.print("needed GiB by precision and checkpointing:")
    for held, modes in data["modes_gib"].items():
        console.print(f"  {held:<6} " + ", ".join(f"{mode} {value:.1f}" for mode, value in modes.items()))
    if card is None:
        fitting = [name for name, fits in data["fits"].items() if fits]
        console.print(f"fits on: {', '.join(fitting) or 'none of the cards of the table'}")
        return
    gpu = data["gpu"]
    verdict = "fits" if gpu["fits"] else "does not fit"
    larger = "" if gpu["largest_images"] is None else f", or images of {gpu['largest_images']:g} times the pixels"
    console.print(
        f"{card.name} ({card.memory:.1f} GiB): it {verdict}; largest batch {gpu['largest_batch']}{larger}; about "
        f"{gpu['step_seconds']:.2f} s a step, bound by {gpu['step_bound_by']}",
        markup=False,
    )
