"""`train.report_to` and secrets: what a run reports to, what it refuses, and what is never written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fvlm_cli.config.read import read_config
from fvlm_cli.training.reporting import check_reporting
from fvlm_core.errors import ConfigError, MissingExtraError

# What transformers' TensorBoardCallback uses of the package, writing lines of JSON.
WRITER = """
import json, os
class SummaryWriter:
    def __init__(self, log_dir=None):
        self.path = os.environ["SCALARS"]
    def add_scalar(self, name, value, step):
        with open(self.path, "a") as file:
            file.write(json.dumps([name, float(value), step]) + "\\n")
    def add_text(self, *words):
        with open(self.path + ".text", "a") as file:
            file.write(repr(words))
    def add_hparams(self, *_): pass
    def flush(self): pass
    def close(self): pass
"""
CONFIG = """
model: {name: base, precision: 16bit, token: "${oc.env:HF_TOKEN}"}
lora: {r: 2}
data:
  {train: "${oc.env:WHERE}/train.jsonl", limit: 2,
   caption_prompt: "${train.run_name} ${oc.env:UNNAMED} ${model.token}"}
train:
  {max_steps: 2, per_device_train_batch_size: 1, gradient_accumulation_steps: 1, warmup_steps: 0,
   run_name: "run-${oc.env:MY_API_KEY}"}  # its name says what it is; WHERE's does not
save: {output_dir: reported}
"""


@pytest.mark.parametrize(
    ("value", "kind", "part"),
    [
        ("wandbb", ConfigError, "did you mean wandb?"),
        (["none", "tensorbord"], ConfigError, "did you mean tensorboard?"),
    ],
)
def test_what_is_not_known_is_refused(value: str | list[str], kind: type[Exception], part: str) -> None:
    with pytest.raises(kind) as caught:
        check_reporting(value)
    assert part in str(caught.value)


def test_what_is_not_installed_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["wandb"])
    check_reporting("none")
    check_reporting(["wandb"])
    with pytest.raises(MissingExtraError, match="pip install comet-ml"):
        check_reporting("comet_ml")


def test_a_run_reports_and_writes_no_secret(fvlm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "site/tensorboardX").mkdir(parents=True)
    (workplace / "site/tensorboardX/__init__.py").write_text(WRITER, encoding="utf-8")
    (workplace / "reported.yaml").write_text(CONFIG, encoding="utf-8")
    import os

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(workplace / "site"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("SCALARS", str(workplace / "scalars.jsonl"))
    monkeypatch.setenv("HF_TOKEN", "hf_nobodymayreadthis")
    monkeypatch.setenv("WHERE", str(workplace))
    monkeypatch.setenv("UNNAMED", "nobodymayreadthis")
    monkeypatch.setenv("MY_API_KEY", "nobodymayreadthiseither")
    done = fvlm("train", "reported.yaml", "--train.report_to", "tensorboard", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (workplace / "scalars.jsonl").read_text().splitlines()]
    reported = [value for name, value, _ in lines if name == "train/loss"]
    history = json.loads((workplace / "reported/history.json").read_text())
    assert reported == [entry["loss"] for entry in history if "loss" in entry]
    assert len(reported) == 2

    saved = yaml.safe_load((workplace / "reported/config.yaml").read_text())
    assert saved["train"]["run_name"] == "run-${oc.env:MY_API_KEY}"
    assert saved["data"]["train"] == "${oc.env:WHERE}/train.jsonl"
    assert saved["data"]["caption_prompt"] == "${train.run_name} ${oc.env:UNNAMED} ${model.token}"
    assert saved["model"]["token"] == "${oc.env:HF_TOKEN,null}"  # for caption_prompt refers to it
    again = read_config(workplace / "reported/config.yaml")
    assert again.train.run_name == "run-nobodymayreadthiseither"
    assert again.data.caption_prompt == "run-nobodymayreadthiseither nobodymayreadthis hf_nobodymayreadthis"
    own = [path for path in (workplace / "reported").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in own)
    arguments = (workplace / "scalars.jsonl.text").read_text()
    assert "max_steps" in arguments, "trackers are told the arguments"
    for path in (*own, workplace / "scalars.jsonl.text"):
        assert b"nobodymayreadthis" not in path.read_bytes(), path
    assert "nobodymayread" not in done.stdout + done.stderr
