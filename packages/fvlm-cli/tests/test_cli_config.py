"""The training config: what it takes, and what its author is told."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import yaml
from trl import SFTConfig

from fvlm_cli.config.overrides import dot_list
from fvlm_cli.config.read import read_config
from fvlm_cli.config.schema import LoraSection, ModelSection, Section, TrainConfig
from fvlm_cli.training.arguments import training_arguments
from fvlm_core.errors import ConfigError

BASE = "model: {name: base}\ndata: {train: train.jsonl}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(write(folder, text), words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_file_then_command_line_then_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "lora: {r: 8, alpha: 4}\ntrain: {learning_rate: 2e-4}\n")
    config = read_config(path, ["lora.r=32", "--train.learning_rate", "1e-3", "--save.overwrite"])
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (32, 4, 0)
    assert config.train.learning_rate == 1e-3
    assert config.save.overwrite is True


def test_interpolation_of_keys_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVLM_TEST_TOKEN", "hf_secret")
    text = BASE + "lora: {r: 8, alpha: '${lora.r}'}\n"
    config = read_config(write(tmp_path, text), ["model.token=${oc.env:FVLM_TEST_TOKEN}"])
    assert config.lora.alpha == 8
    assert config.model.token == "hf_secret"
    assert "hf_secret" not in repr(config)
    assert "token" not in config.model_dump()["model"]


def test_a_saved_config_that_refers_to_the_token_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = BASE + "train: {extra: {project: '${model.token}'}}\n"
    config = read_config(write(tmp_path, text), ["model.token=hf_literal"])
    assert config.train.extra["project"] == "hf_literal"
    saved = config.to_save()
    assert "hf_literal" not in repr(saved)
    path = tmp_path / "saved.yaml"
    path.write_text(yaml.safe_dump(saved), encoding="utf-8")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert read_config(path).model.token is None
    monkeypatch.setenv("HF_TOKEN", "hf_later")
    assert read_config(path).train.extra["project"] == "hf_later"
    assert config.references("train") == {"project": "${model.token}"}


def test_what_a_checkpoint_depends_on_is_saved_as_what_it_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_BASE", "owner/model")
    text = "model: {name: '${oc.env:MY_BASE}', revision: '${train.run_name}'}\ndata: {train: train.jsonl}\n"
    saved = read_config(write(tmp_path, text + "train: {run_name: main}\n")).to_save()
    assert (saved["model"]["name"], saved["model"]["revision"]) == ("owner/model", "main")


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("model.name", "owner/${oc.env:MY_KEY}"),
        ("model.revision", "${train.run_name}"),
        ("lora.init_lora_weights", "${model.token}"),
        ("lora.target_modules", "[q_proj, '${oc.env:MY_KEY}']"),
    ],
)
def test_what_the_adapter_s_own_config_tells_may_be_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, written: str
) -> None:
    monkeypatch.setenv("MY_KEY", "hf_secret")
    text = BASE + "train: {run_name: 'a-${oc.env:MY_KEY}'}\n"
    message = refusal(tmp_path, text, "model.token=hf_secret", f"{key}={written}")
    assert "hf_secret" not in message
    for part in (key, "${", "model.token"):
        assert part in message


def test_arguments_are_copied_whole_and_stored_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    config = read_config(write(tmp_path, BASE + "train: {run_name: '${oc.env:MY_KEY}', extra: {project: mine}}\n"))
    made = copy.copy(training_arguments(config, tmp_path, evaluates=False))
    assert made.run_name == "secret"
    assert made.to_dict()["run_name"] == "${oc.env:MY_KEY}"
    stored = pickle.loads(pickle.dumps(made))
    assert type(stored) is SFTConfig  # to be read where fvlm-cli is not installed
    assert stored.run_name == "${oc.env:MY_KEY}"
    assert (stored.project, stored.learning_rate) == ("mine", made.learning_rate)


def test_missing_environment_variable_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path, BASE + "save: {output_dir: '${oc.env:FVLM_NOT_SET}'}\n")
    assert "save.output_dir" in message
    assert "FVLM_NOT_SET" in message


def test_an_error_shows_what_was_written_not_the_secret_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FVLM_TEST_TOKEN", "hf_secret")
    message = refusal(tmp_path, BASE + "lora: {r: '${oc.env:FVLM_TEST_TOKEN}'}\n")
    assert "hf_secret" not in message
    assert "${oc.env:FVLM_TEST_TOKEN}" in message
    assert "hf_" not in refusal(tmp_path, BASE, "model.token=[hf_abc]")


@pytest.mark.parametrize(
    ("text", "words", "parts"),
    [
        (BASE + "lora: {use_rslor: true}\n", (), ("config.yaml", "lora.use_rslor ", "did you mean lora.use_rslora?")),
        (BASE, ("lroa.r=1",), ("the command line", "did you mean lora?")),
        (BASE + "lora: {r: abc}\n", (), ("config.yaml", "lora.r is 'abc'", "a valid integer")),
        (BASE + "lora: {r: 3.5}\n", (), ("lora.r is 3.5", "a valid integer")),
        (BASE + "lora: {r: true}\n", (), ("lora.r is True", "a valid integer")),
        (BASE, ("lora.r=-1",), ("the command line", "lora.r is -1", "greater than or equal to 1")),
        (BASE, ("train.learning_rate=.nan",), ("train.learning_rate", "a finite number")),
        (BASE, ("lora=1",), ("the command line", "lora is 1", "a section")),
        (BASE, ("lora.target_modules=[q_proj,3]",), ("lora.target_modules is ['q_proj', 3]",)),
        (BASE, ("model.gradient_checkpointing=maybe",), ("'maybe'", "'offload'")),
        ("data: {train: a}\n", (), ("model is missing", "name")),
        ("data: {train: a\nx", (), ("config.yaml, line ", "not valid YAML")),
        (BASE + "model: {name: again}\n", (), ("line 3", "duplicate key")),
        ("- a\n", (), ("holds a list",)),
        ("3", (), ("cannot be read",)),
        (BASE, ("resume",), ("'resume'", "key=value")),
        (BASE, ("=3",), ("'=3'", "lora.r=32")),
        (BASE, ("lora.r=[1,",), ("lora.r", "cannot be read")),
        (BASE + "model.precision: full\n", (), ("model.precision is not a key",)),
        (BASE + "lora: {r: 2}\n", ("model.precision=full",), ("model.precision is full", "lora")),
        (BASE, ("data.eval=a", "data.eval_fraction=0.5"), ("data.eval and data.eval_fraction",)),
        (BASE, ("train.eval_steps=3",), ("train.eval_steps", "data.eval")),
        (BASE, ("train.max_steps=3", "train.num_train_epochs=2"), ("train.max_steps and train.num_train_epochs",)),
        (BASE, ("data.resize=[3]",), ("data.resize is [3]", "[width, height]")),
        (BASE, ("data.resize=[0,3]",), ("data.resize is [0, 3]", "[width, height]")),
        (BASE, ("data.response_part=x",), ("data.train_on_responses_only",)),
        (BASE, ("model.memory_budget=20",), ("model.memory_budget", "model.gradient_checkpointing: auto")),
    ],
)
def test_refusals_name_place_value_and_remedy(
    tmp_path: Path, text: str, words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    message = refusal(tmp_path, text, *words)
    for part in parts:
        assert part in message


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: there is no such config file"):
        read_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_config(tmp_path / "config.yaml")


def test_dot_list_takes_all_four_spellings() -> None:
    assert dot_list(["a.b=1", "--c=2", "--d", "3", "--e", "--f"]) == ["a.b=1", "c=2", "d=3", "e=true", "f=true"]
    assert dot_list(["--a", "-3"]) == ["a=-3"]
    assert dot_list(["a=b=c"]) == ["a=b=c"]


def test_every_key_is_documented() -> None:
    for section in Section.__subclasses__():
        for name, field in section.model_fields.items():
            if section is not TrainConfig:
                assert field.description, f"{section.__name__}.{name}"
    assert ModelSection.__doc__
    assert LoraSection.__doc__
