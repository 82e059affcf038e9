"""Every key of a training config, with its meaning. `fvlm train --schema` prints this as JSON Schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from fvlm_cli.config.secrets import Place, hide, token_reference

MergeMethod = Literal["merged_16bit", "merged_4bit", "lora"]


class Section(BaseModel):
    """A part of the config: its keys are those named here and no others, each of its own type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model is trained, and how it is loaded."""

    name: str = Field(min_length=1, description="Folder or Hub id of a model, or of an adapter to train on.")
    precision: Literal["4bit", "8bit", "16bit", "full"] | None = Field(
        default=None,
        description="How the base weights are held; full trains all of them instead of LoRA. Default: 4bit, or as an "
        "already quantized checkpoint is stored.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None,
        description="Of computation. Default: bfloat16 where the device has it, else float16; float32 on CPU.",
    )
    max_seq_length: int = Field(default=2048, ge=1, description="The longest sample, in tokens, images included.")
    gradient_checkpointing: bool | Literal["offload", "unsloth", "auto"] = Field(
        default="offload",
        description="false (fastest), true (recompute), offload (least memory; unsloth is its alias) or auto.",
    )
    memory_budget: float | None = Field(
        default=None,
        gt=0,
        description="With gradient_checkpointing auto: GiB of device memory that may be allocated in all. Default: "
        "what is free, less a tenth of the device and 1 GiB.",
    )
    device_map: str = Field(default="sequential", min_length=1, description="sequential, auto, balanced, or a device.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the Hub.")
    token: str | None = Field(
        default=None,
        exclude=True,
        repr=False,
        description="For gated repositories: ${oc.env:HF_TOKEN}. It is never saved.",
    )
    trust_remote_code: bool = Field(default=False, description="Run model code that the checkpoint brings along.")
    attn_implementation: str | None = Field(
        default=None, description="As in transformers: sdpa, eager, flash_attention_2, …"
    )


class LoraSection(Section):
    """Which parts of the model get adapters, and of what kind."""

    finetune_vision_layers: bool = Field(default=True, description="Adapters in the vision tower.")
    finetune_language_layers: bool = Field(default=True, description="Adapters in the language model.")
    finetune_attention_modules: bool = Field(default=True, description="Adapters on attention projections.")
    finetune_mlp_modules: bool = Field(default=True, description="Adapters on MLP layers.")
    finetune_projector_layers: bool = Field(
        default=False, description="Adapters between vision tower and language model."
    )
    finetune_last_n_layers: int | None = Field(
        default=None, ge=1, description="Only in the last n layers of each tower."
    )
    target_modules: list[str] | str | None = Field(
        default=None, description="Instead of the flags: names, a regular expression, or all-linear."
    )
    modules_to_save: list[str] | None = Field(
        default=None, description="Modules trained in full and saved with the adapter."
    )
    r: int = Field(default=16, ge=1, le=65_536, description="Rank.")
    alpha: float = Field(default=16, gt=0, description="The adapter is scaled by alpha / r.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout in front of the adapters.")
    bias: Literal["none", "all", "lora_only"] = Field(default="none", description="Which biases are trained.")
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(r) instead.")
    use_dora: bool = Field(default=False, description="Weight-decomposed adapters.")
    init_lora_weights: bool | str | None = Field(default=None, description="As in PEFT: gaussian, pissa, olora, …")
    random_state: int = Field(default=3407, ge=0, le=2**32 - 1, description="Seed of the adapters' initial weights.")


class SourceSection(Section):
    """One of several datasets, with what is its own."""

    path: str = Field(min_length=1, description="A file, a folder, or the id of a dataset on the Hub.")
    weight: float | None = Field(
        default=None, gt=0, description="Its share of the rows trained on, relative to the other weights."
    )
    columns: dict[str, str] | None = Field(default=None, description="Instead of data.columns.")
    image_folder: str | None = Field(default=None, description="Instead of data.image_folder.")
    caption_prompt: str | None = Field(default=None, description="Instead of data.caption_prompt.")
    split: str = Field(default="train", min_length=1, description="Of a dataset on the Hub: train, test[:200], …")
    subset: str | None = Field(default=None, description="Of a dataset on the Hub that has several: which of them.")
    revision: str | None = Field(default=None, description="Of a dataset on the Hub: branch, tag or commit.")


Name = Annotated[str, Field(min_length=1)]
Sources = Name | SourceSection | Annotated[list[Name | SourceSection], Field(min_length=1)]


class DataSection(Section):
    """What the model is trained on."""

    train: Sources = Field(
        description="JSONL, JSON, CSV or Parquet files of messages, conversations or prompt + completion; folders of "
        "images with captions (a .txt file beside each image, or metadata.jsonl or metadata.csv with file_name); ids "
        "of datasets on the Hub. Each may be {path: …} with weight, columns, image_folder, caption_prompt, split, "
        "subset or revision of its own.",
    )
    eval: Sources | None = Field(default=None, description="The same, to evaluate on, without weights.")
    mixing: Literal["oversample", "undersample"] = Field(
        default="oversample",
        description="With weights: oversample repeats rows until each dataset has its share and no row is missing; "
        "undersample leaves rows out until each has its share and no row comes twice.",
    )
    streaming: bool = Field(
        default=False,
        description="Read rows as they are needed instead of all at the start. Needs train.max_steps.",
    )
    shuffle_buffer: int = Field(
        default=1000,
        ge=1,
        description="With streaming: of how many rows the next one is drawn; 1 keeps the order.",
    )
    eval_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Or this share of the training rows, by seed."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="FVLM's name of a column: the file's name of it, as in {prompt: question, images: photo}. FVLM's "
        "names are messages, conversations, prompt, completion, images, image, videos, video.",
    )
    image_folder: str | None = Field(
        default=None, description="Relative image paths start here. Default: the folder of the file that names them."
    )
    caption_prompt: str = Field(
        default="Describe this image.", description="What is asked about the images of a folder."
    )
    limit: int | None = Field(default=None, ge=1, le=2**63 - 1, description="Use only so many rows: the first ones.")
    train_on_responses_only: bool = Field(default=False, description="Only the assistant's words are trained.")
    instruction_part: str | None = Field(
        default=None, description="What starts a user turn, where the template marks none."
    )
    response_part: str | None = Field(
        default=None, description="What starts an assistant turn, where the template marks none."
    )
    overflow: Literal["truncate", "skip", "error"] = Field(
        default="truncate", description="What happens to a sample over model.max_seq_length; no image is ever cut."
    )
    packing: bool = Field(
        default=False, description="Put a batch into one row without padding; no sample sees another. Not in Llama 3.2."
    )
    resize: int | list[int] | Literal["min", "max"] | None = Field(
        default=None,
        description="Longest side in pixels, [width, height], min (the model's own size) or max. Default: images keep "
        "their size.",
    )
    min_pixels: int | None = Field(
        default=None, ge=1, description="Smaller images (width × height) are enlarged to this."
    )
    max_pixels: int | None = Field(default=None, ge=1, description="Larger images (width × height) are shrunk to this.")
    max_image_pixels: int | None = Field(
        default=None, ge=1, description="Larger images are refused before they are decoded. Default: about 89 million."
    )
    allow_urls: bool = Field(default=False, description="Fetch images from http and https addresses.")


class TrainSection(Section):
    """How it is trained: the names are TRL's."""

    per_device_train_batch_size: int = Field(default=2, ge=1, le=1_000_000, description="Samples a step and device.")
    per_device_eval_batch_size: int = Field(default=2, ge=1, le=1_000_000, description="The same in evaluation.")
    gradient_accumulation_steps: int = Field(default=4, ge=1, description="Batches that make one optimizer step.")
    num_train_epochs: float = Field(default=1.0, gt=0, description="Passes over the data, unless max_steps is given.")
    max_steps: int | None = Field(default=None, ge=1, description="Optimizer steps.")
    learning_rate: float = Field(default=2e-4, gt=0, description="Its peak.")
    vision_learning_rate: float | None = Field(
        default=None, gt=0, description="Its peak in the vision tower, if that is another."
    )
    projector_learning_rate: float | None = Field(
        default=None, gt=0, description="Its peak in the projector, if that is another."
    )
    language_learning_rate: float | None = Field(
        default=None, gt=0, description="Its peak in the language model, if that is another."
    )
    lr_scheduler_type: str = Field(default="linear", description="As in transformers: linear, cosine, constant, …")
    warmup_steps: float = Field(default=5, ge=0, description="Steps of warm-up; below 1, the share of all steps.")
    weight_decay: float = Field(default=0.01, ge=0, description="Of the optimizer.")
    optim: str = Field(default="adamw_torch", description="As in transformers: adamw_torch, adamw_8bit, …")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Gradients are clipped to this norm; 0: never.")
    seed: int = Field(default=3407, ge=0, le=2**32 - 1, description="Of the order of the data and of dropout.")
    logging_steps: int = Field(default=1, ge=1, description="Steps between reports of the loss.")
    eval_steps: int | None = Field(
        default=None, ge=1, description="Steps between evaluations. Default: after each epoch."
    )
    save_steps: int | None = Field(
        default=None, ge=1, description="Steps between checkpoints. Default: after each epoch."
    )
    save_total_limit: int | None = Field(default=2, ge=1, description="Checkpoints kept; the oldest go first.")
    dataloader_num_workers: int = Field(default=0, ge=0, le=1024, description="Processes that prepare batches.")
    report_to: str | list[str] = Field(default="none", description="tensorboard, wandb, trackio, … as in transformers.")
    run_name: str | None = Field(default=None, description="The run's name there.")
    extra: dict[str, Any] = Field(default_factory=dict, description="Any other argument of trl.SFTConfig, by its name.")


class EvalSection(Section):
    """How answers are judged, beside the loss: the model writes them, and they are compared with those of the data."""

    rows: int | None = Field(
        default=None,
        ge=1,
        description="How many of the first evaluation rows the model answers before and after training. Default: none "
        "in fvlm train, all of them in fvlm eval.",
    )
    metrics: list[Literal["exact_match", "cer", "wer", "anls"]] = Field(
        default=["exact_match", "cer", "wer", "anls"],
        min_length=1,
        description="exact_match, cer (character error rate), wer (word error rate), anls.",
    )
    max_new_tokens: int = Field(default=256, ge=1, description="The longest answer, in tokens.")
    batch_size: int = Field(default=8, ge=1, description="Rows that are answered together.")


class SaveSection(Section):
    """What is left when it is done."""

    output_dir: str = Field(
        default="fvlm-run", min_length=1, description="Where everything goes. It must be new or empty."
    )
    overwrite: bool = Field(default=False, description="Replace what an earlier run left in output_dir.")
    merge: MergeMethod | None = Field(default=None, description="Also save the merged model, in output_dir/merged.")
    push: str | None = Field(
        default=None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="Also upload the result to this repository on the Hub (user/name): merged as merge says, else the "
        "adapter; with model.token, HF_TOKEN or the login.",
    )
    private: bool | None = Field(
        default=None, description="Who may see a repository that push makes. Default: the account's."
    )


class TrainConfig(Section):
    """A training run."""

    model: ModelSection
    lora: LoraSection = Field(default_factory=LoraSection)
    data: DataSection
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    save: SaveSection = Field(default_factory=SaveSection)
    _secrets: dict[Place, str] = PrivateAttr(default_factory=dict)

    def remember(self, secrets: dict[Place, str]) -> None:
        """Remember which values come from secrets, and how they were written."""
        self._secrets = secrets

    def to_save(self) -> dict[str, Any]:
        """Return every key, defaults included, with secrets as they were written, and without the token.

        Where another key refers to the token, its place holds a reference to the environment, to be read again.
        """
        plain = self.model_dump(mode="json")
        hide(plain, self._secrets)
        if (token := token_reference(self._secrets)) is not None:
            plain["model"]["token"] = token
        return plain

    def references(self, section: str) -> dict[str, Any]:
        """Return the keys of a section, those of its `extra` too, that were written as references to others.

        Returns:
            What was written, by name; those that stand for numbers are not among them, since they hold no secret.
        """
        plain, written = self.model_dump(mode="json")[section], self.to_save()[section]
        pairs = ((plain, written), (plain.get("extra") or {}, written.get("extra") or {}))
        return {
            name: text
            for values, texts in pairs
            for name, text in texts.items()
            if name != "extra" and text != values.get(name) and not isinstance(values.get(name), int | float)
        }
