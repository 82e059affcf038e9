"""Keys of a config that are each right and wrong together.

A key at its default says nothing: a run's saved config has every key, and can be read again.
"""

from __future__ import annotations

from fvlm_cli.config.schema import DataSection, LoraSection, Section, SourceSection, TrainConfig, TrainSection


def contradictions(config: TrainConfig) -> str | None:
    """Return the first contradiction in one sentence, or None where there is none."""
    data, train = config.data, config.train
    if config.model.precision == "full" and config.lora != LoraSection():
        return "model.precision is full, which trains every weight, and lora is given; leave one of them out."
    if config.model.precision == "full" and config.save.merge is not None:
        return "model.precision is full, so that there is no adapter for save.merge to merge; leave save.merge out."
    if config.model.memory_budget is not None and config.model.gradient_checkpointing != "auto":
        return "model.memory_budget is for model.gradient_checkpointing: auto, which chooses by it; give both or none."
    if config.save.private is not None and config.save.push is None:
        return "save.private is given without save.push, which names the repository that it is for."
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
    if train.max_steps is not None and train.num_train_epochs != _default(TrainSection, "num_train_epochs"):
        return "train.max_steps and train.num_train_epochs are both given; leave one of them out."
    return _of_sources(config)


def _of_sources(config: TrainConfig) -> str | None:
    data = config.data
    if data.streaming and config.train.max_steps is None:
        return "data.streaming reads rows that nobody has counted; give train.max_steps instead of epochs."
    if data.streaming and data.eval_fraction is not None:
        return "data.eval_fraction needs rows that are counted, and data.streaming counts none; give data.eval."
    sources = data.train if isinstance(data.train, list) else [data.train]
    weighted = [isinstance(source, SourceSection) and source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        return f"data.train[{weighted.index(False)}] has no weight and others have; give every dataset one, or none."
    if data.mixing != _default(DataSection, "mixing") and not any(weighted):
        return "data.mixing is given and no dataset of data.train has a weight; give them some: {path: …, weight: 2}."
    if data.shuffle_buffer != _default(DataSection, "shuffle_buffer") and not data.streaming:
        return "data.shuffle_buffer needs data.streaming: true; without it all rows are shuffled."
    evaluated = data.eval if isinstance(data.eval, list) else [data.eval]
    if any(isinstance(source, SourceSection) and source.weight is not None for source in evaluated):
        return "data.eval has a weight, which is for data.train; leave it out."
    return None


def _default(section: type[Section], key: str) -> object:
    return section.model_fields[key].default
