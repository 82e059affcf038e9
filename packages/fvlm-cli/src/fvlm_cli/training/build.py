"""The parts of a training run, made from its config: model, processor, collator, trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from fvlm_cli.config.schema import LoraSection, ModelSection, TrainConfig
from fvlm_cli.data.row import Row, locate
from fvlm_cli.data.stream import RowStream
from fvlm_cli.training.arguments import TOWERS, training_arguments
from fvlm_cli.training.collate import build_collator
from fvlm_cli.training.rates import split_by_tower
from fvlm_core.errors import ConfigError, DataError, FvlmError, MissingExtraError
from fvlm_vision import FastVisionModel, FastVisionTrainer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

    from fvlm_core.arch import Tower

_PRECISIONS: dict[str | None, dict[str, Any]] = {
    None: {},
    "4bit": {"load_in_4bit": True},
    "8bit": {"load_in_8bit": True},
    "16bit": {"load_in_16bit": True},
    "full": {"full_finetuning": True},
}


def load(config: TrainConfig) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """Load the model and its processor, with adapters on it unless all of it is trained.

    Raises:
        ConfigError, CheckpointError: the model cannot be loaded or adapted as the config says.
    """
    section = config.model
    optional = {"attn_implementation": section.attn_implementation, "memory_budget": section.memory_budget}
    options: dict[str, Any] = {name: value for name, value in optional.items() if value is not None}
    model, processor = FastVisionModel.from_pretrained(
        section.name,
        max_seq_length=section.max_seq_length,
        dtype=section.dtype,
        token=section.token,
        device_map=section.device_map,
        trust_remote_code=section.trust_remote_code,
        use_gradient_checkpointing=section.gradient_checkpointing,
        revision=section.revision,
        **_PRECISIONS[section.precision],
        **options,
    )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(
            f"model.device_map={section.device_map!r} leaves weights on the disk, where nothing trains them; leave it "
            "out, or use a device with room for them."
        )
    if isinstance(model, PeftModel):
        if config.lora != LoraSection():
            raise ConfigError(f"model.name={section.name!r} is an adapter, which is trained as it is: leave lora out.")
    elif section.precision != "full":
        model = adapt(model, config.lora, section)
    FastVisionModel.for_training(model)
    return model, processor


def adapt(model: PreTrainedModel, lora: LoraSection, section: ModelSection) -> PeftModel:
    """Put the config's adapters on a model.

    Raises:
        ConfigError: they cannot be had on this model.
    """
    given = lora.model_dump()
    renamed = {"lora_alpha": given.pop("alpha"), "lora_dropout": given.pop("dropout")}
    optional = ("target_modules", "modules_to_save", "finetune_last_n_layers", "init_lora_weights")
    for name in optional:  # left to PEFT's own defaults
        if given[name] is None:
            del given[name]
    return FastVisionModel.get_peft_model(
        model, **given, **renamed, use_gradient_checkpointing=section.gradient_checkpointing
    )


def build_trainer(
    config: TrainConfig,
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    train: list[Row] | None,
    evaluate: list[Row],
    checkpoints: Path,
) -> RunTrainer:
    """Return the trainer of these rows; None: of those that the config has streamed.

    Raises:
        ConfigError: an argument of the data or train section cannot be used.
    """
    given: dict[str, Any] = {
        "model": model,
        "processing_class": processor,
        "data_collator": build_collator(config.data, model, processor, packing=config.data.packing),
        "train_dataset": RowStream(config.data, config.train.seed) if train is None else [row.sample for row in train],
        "eval_dataset": [row.sample for row in evaluate] or None,
        "args": training_arguments(config, checkpoints, bool(evaluate)),
    }
    rates = {tower: rate for tower in TOWERS if (rate := getattr(config.train, f"{tower}_learning_rate")) is not None}
    with _refusals():
        return RunTrainer(evaluate, rates, **given)


@contextmanager
def _refusals() -> Iterator[None]:
    """Say in one sentence what TRL and transformers refuse in a config whose keys are right one by one."""
    try:
        yield
    except FvlmError:
        raise
    except ImportError as error:
        raise MissingExtraError(f"this config needs what is not installed: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ConfigError(f"the trainer refuses this config: {' '.join(str(error).split())}") from error


class RunTrainer(FastVisionTrainer):
    """A trainer whose errors in evaluation name the file and row of what it evaluates on.

    Args:
        evaluation_rows: what it evaluates on.
        rates: the learning rates of the towers that have their own.
        **given: as in `FastVisionTrainer`.
    """

    def __init__(self, evaluation_rows: list[Row], rates: dict[Tower, float], **given: Any) -> None:
        self._rates = rates
        super().__init__(**given)
        self._evaluation_rows = evaluation_rows

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer, with parameter groups by tower where towers have their own learning rates."""
        made = self.optimizer is None
        with _refusals():
            optimizer = super().create_optimizer(model)
        if made and self._rates:
            split_by_tower(optimizer, self.model, self._rates, self.behind)
        return optimizer

    def create_scheduler(self, *arguments: Any, **given: Any) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule of the learning rate, as `train.lr_scheduler_type` says."""
        with _refusals():
            return super().create_scheduler(*arguments, **given)

    def evaluate(self, *arguments: Any, **given: Any) -> dict[str, float]:
        """Evaluate.

        Raises:
            DataError: a row cannot be used.
        """
        try:
            metrics: dict[str, float] = super().evaluate(*arguments, **given)
        except DataError as error:
            raise locate(error, self._evaluation_rows) from None
        return metrics
