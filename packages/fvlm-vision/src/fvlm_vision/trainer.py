"""`FastVisionTrainer`: a `trl.SFTTrainer` that takes what vision-language training has: a list, a processor, a model.

What trl adds for language models is kept out of the way, on this instance: the loss is the model's own (trl replaces
the model's forward by one with a fused head, and casts adapters of quantized models to bfloat16), and rows reach the
collator as they are.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
import transformers
from peft import PeftModel, get_peft_model

from fvlm_core.errors import ConfigError
from fvlm_core.fused import LEARNED_TOKENS
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.overflow import OverflowLog
from fvlm_vision.processes import NOTHING, counting
from fvlm_vision.repeating import RepeatingTrainer
from fvlm_vision.rows import training_rows
from fvlm_vision.training_args import align, own_copy, sequence_limit

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftConfig
    from transformers import ProcessorMixin, TrainingArguments
    from trl import SFTConfig

logger = logging.getLogger(__name__)


class FastVisionTrainer(RepeatingTrainer):
    """Trains a vision-language model. Everything that `trl.SFTTrainer` takes is taken, and:

    Args:
        model: a loaded model (of `FastVisionModel`, transformers or PEFT).
        args: `SFTConfig`, `TrainingArguments` or None; they are copied. Precision and gradient checkpointing follow a
            model that `FastVisionModel` loaded, whatever they say.
        data_collator: None makes a `FastVisionDataCollator`.
        train_dataset: a list, any sequence, a map-style or iterable torch dataset, a `datasets.Dataset` or
            `datasets.IterableDataset`.
        eval_dataset: the same, or a dict of them.
        processing_class: the processor.
        tokenizer: another name for `processing_class`.
        formatting_func: turns a row into a sample; it is handed to the trainer's own collator.
        peft_config: puts an adapter on a model that has none.
        **kwargs: as in `trl.SFTTrainer`.

    Raises:
        ConfigError: an argument cannot be used, contradicts another, a dataset is empty, or nothing would be trained.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        *,
        tokenizer: ProcessorMixin | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(f"model={model!r} is not a loaded model; load it with FastVisionModel.from_pretrained.")
        if tokenizer is not None and processing_class is not None and tokenizer is not processing_class:
            raise ConfigError("tokenizer= and processing_class= are two names of one argument and differ; pass one.")
        processor = processing_class if processing_class is not None else tokenizer
        if processor is None and isinstance(data_collator, FastVisionDataCollator):
            processor = data_collator.processor
        if processor is None:
            raise ConfigError("no processor is given; pass the one that FastVisionModel.from_pretrained returns.")
        self._numbered = data_collator is None or isinstance(data_collator, FastVisionDataCollator)
        rows = training_rows(train_dataset, "train_dataset", numbered=self._numbered)
        eval_rows = _eval_rows(eval_dataset, self._numbered)
        own = own_copy(args)
        if peft_config is not None:
            transformers.set_seed(own.seed)  # as trl does, which would then cast the new adapter
            model = get_peft_model(model, peft_config)
        _check_trainable(model)
        collator = _collator(model, processor, data_collator, own, formatting_func)
        align(own, model)
        forward = _Forward(model)
        trainable = {p: p.data for p in model.parameters() if p.requires_grad}
        super().__init__(
            model=model,
            args=own,
            data_collator=collator,
            train_dataset=_stand_in(rows),
            eval_dataset={key: _stand_in(part) for key, part in eval_rows.items()}
            if isinstance(eval_rows, dict)
            else _stand_in(eval_rows),
            processing_class=processor,
            **kwargs,
        )
        forward.restore()
        for parameter, data in trainable.items():
            if parameter.dtype != data.dtype:
                parameter.data = data  # trl's cast; the precision that PEFT chose stands
        self.train_dataset = rows
        self.eval_dataset = eval_rows
        if isinstance(collator, FastVisionDataCollator):
            self.add_callback(OverflowLog(self, collator.overflow_counts, collator.max_seq_length))
        self._counts: dict[str, list[torch.Tensor]] = defaultdict(list)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the model's own loss, normalised as `transformers.Trainer` does, not trl's fused one."""
        labels = inputs.get("labels")
        inputs = {**inputs, "use_cache": False}  # the text config may ask for one that training has no use for
        loss, outputs = transformers.Trainer.compute_loss(
            self, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        logits, counted = (
            outputs.get(key) if isinstance(outputs, dict) else None for key in ("logits", LEARNED_TOKENS)
        )
        if counted is not None:
            self._counts[self._mode()].append(counted)
        elif labels is not None and logits is not None and logits.shape[:2] == labels.shape:
            self._counts[self._mode()].append(_correct_and_all(logits.detach(), labels))
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Evaluate a batch; one whose samples were all left out counts for nothing."""
        labels = inputs.get("labels")
        if labels is None or bool((labels[:, 1:] != -100).any()):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.args.world_size == 1:
            return None, None, None
        loss, *rest = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return torch.full_like(loss, NOTHING), *rest  # the other processes' losses are gathered with it

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a dataset; what is gathered from the processes leaves out batches that count for nothing."""
        self.gather_function = counting(self.gather_function)  # the loop puts back the accelerator's when it ends
        return super().evaluation_loop(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; `eval_dataset` may be anything that the trainer itself takes."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = _eval_rows(eval_dataset, self._numbered)
        result: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load what a checkpoint holds; a whole model's weights under whatever names they were saved."""
        if not self._loaded_whole(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._loaded_whole(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _loaded_whole(self, folder: str | None) -> bool:
        from fvlm_export.reload import holds_weights, load_saved_weights

        model: Any = self.model
        if folder is None or isinstance(model, PeftModel) or not holds_weights(Path(folder)):
            return False
        load_saved_weights(model, Path(folder))
        return True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a report of the trainer's own has the share of learned tokens that the model said right since the last.

        All processes make such a report together, so that there they can sum what each has counted.
        """
        mode = self._mode()
        own = "learning_rate" in logs or any(name.endswith("_runtime") for name in logs)
        if own and (self._counts[mode] or self.args.world_size > 1):
            nothing = torch.zeros(2, dtype=torch.int64, device=self.accelerator.device)
            counts = sum(self._counts.pop(mode, []), start=nothing)
            correct, total = self.accelerator.reduce(counts, reduction="sum").tolist()
            if total:
                self._metrics[mode]["mean_token_accuracy"].append(correct / total)
        super().log(logs, start_time)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count learned tokens; at least one, so that a step with no sample left has the loss 0, not NaN."""
        count = super()._get_num_items_in_batch(batch_samples, device)
        return count.clamp(min=1) if isinstance(count, torch.Tensor) else count


def _check_trainable(model: torch.nn.Module) -> None:
    """Raise a `ConfigError` where no parameter is trained: the backward pass would fail with torch's words."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "The model has no trainable parameter: put an adapter on it with FastVisionModel.get_peft_model, or load "
            "it with full_finetuning=True."
        )


class _Forward:
    """The forward of a model's base, to be put back after trl has put its own on the instance."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.own = vars(self.base).get("forward")

    def restore(self) -> None:
        if self.own is None:
            vars(self.base).pop("forward", None)
        else:
            vars(self.base)["forward"] = self.own


def _collator(
    model: Any,
    processor: ProcessorMixin,
    collator: Any,
    args: SFTConfig,
    formatting_func: Callable[[Any], Any] | None,
) -> Any:
    if collator is None:
        responses_only, args.assistant_only_loss = args.assistant_only_loss, False
        packing, args.padding_free = args.padding_free, False  # trl refuses it beside a collator
        multiple = args.pad_to_multiple_of
        collator = FastVisionDataCollator(
            model,
            processor,
            max_seq_length=sequence_limit(args, model),
            train_on_responses_only=responses_only,
            formatting_func=formatting_func,
            pad_to_multiple_of=multiple if isinstance(multiple, int) else None,
            packing=packing,
        )
    else:
        if args.assistant_only_loss:
            raise ConfigError(
                "assistant_only_loss=True needs the trainer's own collator; give train_on_responses_only=True to yours."
            )
        if args.padding_free:
            raise ConfigError("padding_free=True needs the trainer's own collator; give packing=True to yours.")
        if formatting_func is not None:
            raise ConfigError("formatting_func is given beside a data_collator; give it to the collator.")
    if not isinstance(collator, FastVisionDataCollator):
        return collator
    if collator.ignore_index != -100:
        raise ConfigError(
            f"ignore_index={collator.ignore_index} in the collator is not -100, which is what models leave out of "
            "the loss."
        )
    return collator.for_trainer()


def _eval_rows(eval_dataset: Any, numbered: bool) -> Any:
    if eval_dataset is None:
        return None
    if isinstance(eval_dataset, dict):
        return {
            key: training_rows(part, f"eval_dataset[{key!r}]", numbered=numbered) for key, part in eval_dataset.items()
        }
    return training_rows(eval_dataset, "eval_dataset", numbered=numbered)


def _stand_in(rows: Any) -> Any:
    """Return a `datasets.Dataset` of the same length for trl to look at; for a stream, a stream."""
    if rows is None or isinstance(rows, datasets.IterableDataset):
        return rows
    if isinstance(rows, torch.utils.data.IterableDataset):
        return datasets.Dataset.from_dict({"row": [0]}).to_iterable_dataset()
    return datasets.Dataset.from_dict({"row": range(len(rows))})


def _correct_and_all(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how many learned tokens have the highest logit, and how many there are: shape (2,), int64."""
    learned = labels[:, 1:] != -100
    right = (logits[:, :-1].argmax(dim=-1) == labels[:, 1:]) & learned
    return torch.stack([right.sum(), learned.sum()])
