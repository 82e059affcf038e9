"""Keys of a config that are each right and wrong together."""

from __future__ import annotations

from fvlm_cli.config.schema import TrainConfig


def contradictions(config: TrainConfig) -> str | None:
    """Return the first contradiction in one sentence, or None where there is none."""
    data, train = config.data, config.train
    if config.model.precision == "full" and "lora" in config.model_fields_set:
        return "model.precision is full, which trains every weight, and lora is given; leave one of them out."
    if config.model.precision == "full" and config.save.merge is not None:
        return "model.precision is full, so that there is no adapter for save.merge to merge; leave save.merge out."
    if data.eval is not None and data.eval_fraction is not None:
        return "data.eval and data.eval_fraction are both given; leave one of them out."
    if train.eval_steps is not None and data.eval is None and data.eval_fraction is None:
        return "train.eval_steps is given without anything to evaluate on; give data.eval or data.eval_fraction."
    if config.eval.rows is not None and data.eval is None and data.eval_fraction is None:
        return "eval.rows is given without anything to evaluate on; give data.eval or data.eval_fraction."
    if not data.train_on_responses_only and (data.instruction_part or data.response_part):
        return "data.instruction_part and data.response_part need data.train_on_responses_only: true."
    if isinstance(data.resize, list) and (len(data.resize) != 2 or min(data.resize) < 1):
        return f"data.resize is {data.resize}; as a list it is [width, height] in pixels."
    if {"max_steps", "num_train_epochs"} <= train.model_fields_set and train.max_steps is not None:
        return "train.max_steps and train.num_train_epochs are both given; leave one of them out."
    return None
