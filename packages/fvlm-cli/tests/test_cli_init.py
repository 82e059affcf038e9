"""`fvlm init`: what it writes can be trained as it stands, and says what every key means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fvlm_cli.commands.init import Family, Format
from fvlm_cli.config.read import read_config
from fvlm_cli.config.schema import TrainConfig
from fvlm_cli.config.starts import FAMILIES, FORMATS, WHAT
from fvlm_cli.config.write import start_config
from fvlm_cli.main import app
from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_cli.quickstart.handwriting import writings


def test_init_then_train_on_a_folder_of_images(fvlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scans").mkdir()
    for number, writing in enumerate(writings(6, 0, test=False)):
        writing.image.save(tmp_path / f"scans/{number}.png")
        (tmp_path / f"scans/{number}.txt").write_text(writing.text, encoding="utf-8")
    words = ("--model", str(shipped_checkpoint()), "--data", "folder", "--train", "scans")
    done = fvlm("init", *words, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"config": "config.yaml", "family": "qwen2_vl", "data": "folder"}
    quick = ("model.precision=16bit", "eval.rows=1", "eval.max_new_tokens=4", "data.eval_fraction=0.2")
    monkeypatch.chdir(tmp_path)
    trained = CliRunner().invoke(app, ["train", "config.yaml", *quick, "--train.max_steps", "1", "--json"])
    assert trained.exit_code == 0, trained.stderr
    assert json.loads(trained.stdout)["status"] == "finished"


@pytest.mark.parametrize("data", FORMATS)
@pytest.mark.parametrize("family", [*FAMILIES, None])
def test_every_start_is_a_config_with_every_key(tmp_path: Path, family: str | None, data: str) -> None:
    text = start_config(family, data, None if family else "user/name", "elsewhere")
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    config = read_config(tmp_path / "config.yaml")
    assert config.data.train == "elsewhere"
    assert config.data.train_on_responses_only is (family is not None)
    if family is not None:
        assert (config.data.instruction_part, config.data.response_part) == FAMILIES[family].turns
        assert config.model.name == FAMILIES[family].model
    # With every comment mark taken off the keys, it is still a config, and has all of them.
    whole = []
    for line in text.splitlines():
        key, colon, _ = line.removeprefix("  # ").partition(":")
        is_key = line.startswith("  # ") and colon and any(key in s.annotation.model_fields for s in fields())
        whole.append(f"  {line.removeprefix('  # ')}" if is_key and not key.startswith(("Of ", "As ")) else line)
    found = yaml.safe_load("\n".join(whole))
    for name, field in TrainConfig.model_fields.items():
        assert list(found[name]) == list(field.annotation.model_fields), name
        for key, value in found[name].items():
            assert getattr(getattr(config, name), key) == value, f"{name}.{key}"


def fields():
    return TrainConfig.model_fields.values()


def test_the_command_offers_what_there_is() -> None:
    assert set(Family.__args__) == set(FAMILIES)
    assert set(Format.__args__) == set(FORMATS) == set(WHAT)
