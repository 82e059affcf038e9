"""The installed `fvlm` script: quick help, machine output, and one sentence with an exit code for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

CONFIG = "model: {name: base}\ndata: {train: train.jsonl}\ntrain: {max_steps: 1}\n"


def test_the_command_line_is_built_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from fvlm_cli.main import app; from typer.main import get_command; get_command(app); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_help_names_every_verb_without_colour(fvlm, tmp_path: Path) -> None:
    done = fvlm("--help", cwd=tmp_path)
    assert done.returncode == 0
    verbs = "quickstart init preview estimate train infer chat eval report merge push env version"
    for verb in verbs.split():
        assert f" {verb} " in done.stdout
    assert "\x1b[" not in done.stdout


def test_shells_complete_verbs(fvlm_command: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "_FVLM_COMPLETE": "complete_bash", "COMP_WORDS": "fvlm pre", "COMP_CWORD": "1"}
    done = subprocess.run(fvlm_command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["preview"]
    source = {**os.environ, "_FVLM_COMPLETE": "source_zsh"}
    done = subprocess.run(fvlm_command, cwd=tmp_path, env=source, capture_output=True, text=True, check=False)
    assert "#compdef fvlm" in done.stdout


def test_version_as_json(fvlm, tmp_path: Path) -> None:
    done = fvlm("version", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    for name in ("fvlm-cli", "fvlm-vision", "fvlm-export", "fvlm-core", "fvlm-kernels", "torch", "transformers"):
        assert found[name] == version(name)


def test_schema_is_json_schema_with_every_key_explained(fvlm, tmp_path: Path) -> None:
    schema = json.loads(fvlm("train", "--schema", cwd=tmp_path).stdout)
    assert schema["$defs"]["LoraSection"]["properties"]["r"]["description"] == "Rank."
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (("train", "nowhere.yaml"), 2, ("nowhere.yaml", "no such config file")),
        (("train", "config.yaml", "lora.rr=3"), 2, ("the command line", "lora.rr")),
        (("train", "config.yaml", "--lora.r", "many"), 2, ("lora.r is 'many'", "a valid integer")),
        (("train", "config.yaml", "data.train=nowhere.jsonl"), 3, ("nowhere.jsonl", "No such file")),
        (("train", "config.yaml", "data.train=bad.jsonl"), 3, ("bad.jsonl, line 2",)),
        (("train", "config.yaml", "--resume", "save.output_dir=new"), 2, ("new", "no complete checkpoint")),
        (("train", "config.yaml", "save.output_dir=."), 2, ("save.output_dir", "not empty", "--resume")),
    ],
)
def test_bad_input_gets_one_sentence_and_a_code(
    fvlm, tmp_path: Path, words: tuple[str, ...], code: int, parts: tuple[str, ...]
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    good = json.dumps({"prompt": "q", "completion": "a"})
    (tmp_path / "train.jsonl").write_text(good, encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text(good + "\n" + json.dumps({"prompt": "q"}), encoding="utf-8")
    done = fvlm(*words, "--quiet", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part in lines[0]
    assert done.stdout == ""


def test_an_error_as_json_and_its_traceback_under_debug(fvlm, tmp_path: Path) -> None:
    done = fvlm("train", "nowhere.yaml", "--json", "--debug", cwd=tmp_path)
    assert done.returncode == 2
    assert json.loads(done.stdout)["exit_code"] == 2
    assert "no such config file" in json.loads(done.stdout)["error"]
    assert "Traceback" in done.stderr


def test_a_missing_model_is_bad_data(fvlm, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.replace("base", "./nowhere"), encoding="utf-8")
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a"}), encoding="utf-8")
    done = fvlm("train", "config.yaml", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_env_looks_at_a_model(fvlm, workplace: Path) -> None:
    done = fvlm("env", "--model", "base", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["host"]["cpus"] >= 1
    model = found["model"]
    assert (model["model_type"], model["known"], model["quantized"]) == ("qwen2_vl", True, None)
    from safetensors import safe_open

    with safe_open(workplace / "base" / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    merger = sum(size for name, size in stored.items() if ".merger." in name)
    assert model["towers"]["projector"]["parameters"] == merger
