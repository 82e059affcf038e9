"""A whole training run: data, model, training, saving."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvlm_cli.bars import track
from fvlm_cli.config.schema import TrainConfig
from fvlm_cli.data.read import read_data
from fvlm_cli.data.row import Row, locate
from fvlm_cli.data.sources import sources_of
from fvlm_cli.generate.load import quiet_libraries
from fvlm_cli.output import Output
from fvlm_cli.training.reporting import check_reporting
from fvlm_cli.training.resume import last_complete
from fvlm_cli.training.run_folder import RunFolder, whole
from fvlm_cli.versions import git_state, versions
from fvlm_core.errors import ConfigError, DataError
from fvlm_vision.processes import is_first_process

if TYPE_CHECKING:
    from fvlm_cli.training.build import RunTrainer


def run(config: TrainConfig, out: Output, *, resume: bool) -> dict[str, Any]:
    """Train as the config says.

    Args:
        config: the checked config.
        out: told what is going on.
        resume: go on from the last complete checkpoint in the output folder.

    Returns:
        The run's record, which `run.json` holds too; its `status` is "finished" or "interrupted".

    Raises:
        FvlmError: the config, the data or the model cannot be used.
    """
    start = time.monotonic()
    train, evaluate = _read(config, out)
    folder = RunFolder(Path(config.save.output_dir).expanduser(), writes=is_first_process())
    checkpoint = _checkpoint(folder, out) if resume else None
    folder.check(config, resume)
    record: dict[str, Any] = {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "output_dir": str(folder.root),
        "rows": None if train is None else len(train),
        "eval_rows": len(evaluate),
        "resumed_from": None if checkpoint is None else str(checkpoint),
        "versions": versions(),
        "git": git_state(),
    }
    out.note(f"loading {config.model.name}")
    from fvlm_cli.training.build import build_trainer, load  # torch and all: only once the data are known to be good

    quiet_libraries(out.debug)
    check_reporting(config.train.report_to)
    model, processor = load(config)
    _describe(model, out)
    try:
        trainer = build_trainer(config, model, processor, train, evaluate, folder.checkpoints)
    except BaseException:
        folder.leave_empty()
        raise
    folder.prepare(config, resume)
    folder.write_record(record)
    try:
        _carry_out(config, trainer, processor, (train or [], evaluate), folder, checkpoint, record, out)
    except BaseException:
        folder.break_off(record)
        raise
    record["seconds"] = round(time.monotonic() - start, 3)
    folder.write_record(record)
    folder.forget_earlier()
    if config.save.push is not None and record["status"] == "finished" and folder.writes:
        record["pushed_to"] = _push(config, folder, out)
        folder.write_record(record)
    return record


def _carry_out(
    config: TrainConfig,
    trainer: RunTrainer,
    processor: Any,
    rows: tuple[list[Row], list[Row]],
    folder: RunFolder,
    checkpoint: Path | None,
    record: dict[str, Any],
    out: Output,
) -> None:
    """Train and save, noting in the record what comes of it."""
    from fvlm_cli.training.answers import Answers

    model, (train, evaluate) = trainer.model, rows
    answers = Answers(config, model, processor, evaluate, folder, out)
    record |= answers.take("before")
    interrupted = _train(trainer, train, checkpoint, out)
    state = trainer.state
    folder.write_history(state.log_history)
    record |= {"steps": state.global_step, "epochs": state.epoch, **_losses(state.log_history)}
    if interrupted:
        last, _ = last_complete(folder.checkpoints)
        record |= {"status": "interrupted", "checkpoint": None if last is None else str(last)}
        return
    if folder.writes:
        record |= _save(config, folder, model, processor, out)
    record |= answers.take("after")
    if folder.writes:
        record |= _tell(config, folder, model, processor, record, out)
    record["status"] = "finished"


def _read(config: TrainConfig, out: Output) -> tuple[list[Row] | None, list[Row]]:
    """Return the rows to train on, None where they will be streamed, and those to evaluate on."""
    data = config.data
    train, evaluate = read_data(
        data, config.train.seed, lambda rows, total: track(out, rows, total, "checking rows"), streamed=1
    )
    if data.streaming:
        out.note(f"rows to train on are read as they are needed, {len(evaluate)} to evaluate on")
        return None, evaluate
    out.note(f"{len(train)} rows to train on, {len(evaluate)} to evaluate on")
    return train, evaluate


def _checkpoint(folder: RunFolder, out: Output) -> Path:
    checkpoint, torn = last_complete(folder.checkpoints)
    for path in torn:
        out.note(f"{path} was not written to its end and is passed over")
    if checkpoint is None:
        raise ConfigError(
            f"{folder.root} holds no complete checkpoint to resume from; leave --resume out, with save.overwrite=true "
            "where an earlier run was stopped before its first checkpoint."
        )
    out.note(f"going on from {checkpoint}")
    return checkpoint


def _describe(model: Any, out: Output) -> None:
    trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    out.note(f"training {trained:,} of {total:,} parameters")


def _train(trainer: RunTrainer, rows: list[Row], checkpoint: Path | None, out: Output) -> bool:
    """Train to the end or to an interruption; return whether it was the latter."""
    from transformers import PrinterCallback, ProgressCallback

    from fvlm_cli.training.figures import Figures
    from fvlm_cli.training.interrupt import Interruption
    from fvlm_cli.training.progress import TrainingProgress

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    progress = TrainingProgress(out)
    interruption = Interruption(out)
    trainer.add_callback(Figures())
    trainer.add_callback(progress)
    trainer.add_callback(interruption)
    try:
        with interruption:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except DataError as error:
        raise locate(error, rows) from None
    finally:
        progress.stop()
    return interruption.requested and trainer.state.global_step < trainer.state.max_steps


def _losses(history: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the run's mean training loss and its last evaluation loss, as logged; None for what was not."""
    found: dict[str, float | None] = {"train_loss": None, "eval_loss": None}
    for entry in history:
        found |= {name: entry[name] for name in found if name in entry}
    return found


def _save(config: TrainConfig, folder: RunFolder, model: Any, processor: Any, out: Output) -> dict[str, Any]:
    """Save what was trained; return the record's part about it."""
    full = config.model.precision == "full"
    final = folder.model if full else folder.adapter
    with whole(final) as partial:
        model.save_pretrained(str(partial))
        processor.save_pretrained(str(partial))
    out.note(f"saved {final}")
    return {"model_dir" if full else "adapter_dir": str(final), "merged_dir": None}


def _tell(
    config: TrainConfig, folder: RunFolder, model: Any, processor: Any, record: dict[str, Any], out: Output
) -> dict[str, Any]:
    """Note beside the adapter what it was trained on and how well, for the cards of what is made of it; merge it.

    Args:
        config: of the run.
        folder: where the adapter was saved.
        model: as it was saved.
        processor: its processor.
        record: with the run's losses and the scores of its answers.
        out: told what is going on.

    Returns:
        The record's part about the merge, which is empty where the config asks for none.
    """
    from fvlm_export import note_training

    data = [source.name for source in sources_of(config.data, config.data.train, "data.train")]
    metrics = {name: record[name] for name in ("train_loss", "eval_loss") if record[name] is not None}
    metrics |= record.get("answers_after", {})
    if config.model.precision != "full":
        note_training(folder.adapter, data, metrics)
    if config.save.merge is None:
        return {}
    out.note(f"merging into {folder.merged}")
    model.save_pretrained_merged(
        folder.merged,
        processor,
        save_method=config.save.merge,
        data=data,
        metrics=metrics,
        progress=out.interactive,
        overwrite=True,  # prepare() has settled that; a resumed run replaces what it left before
    )
    return {"merged_dir": str(folder.merged)}


def _push(config: TrainConfig, folder: RunFolder, out: Output) -> str:
    """Upload what was saved last; return the address."""
    from fvlm_export import push_to_hub_merged

    repository = str(config.save.push)
    if config.save.merge is not None:
        path, method = folder.merged, str(config.save.merge)
    elif config.model.precision == "full":
        path, method = folder.model, "merged_16bit"
    else:
        path, method = folder.adapter, "lora"
    out.note(f"pushing {path} to {repository}")
    return push_to_hub_merged(
        path,
        repository,
        save_method=method,
        token=config.model.token,
        private=config.save.private,
        progress=out.interactive,
    )
