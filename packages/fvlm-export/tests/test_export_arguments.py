"""No argument of the two public functions is lost on its way to what does the work; what each does is tested there."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fvlm_export import push as push_module
from fvlm_export import read_report, save_pretrained_merged
from fvlm_export import save as save_module

JOB = {
    "processor": object(),
    "save_method": "merged_4bit",
    "base": "some/base",
    "adapters": {"default": 0.5},
    "token": "hf_token",
    "trust_remote_code": True,
}
TRAINING: dict[str, Any] = {"data": ("rows.jsonl",), "metrics": {"loss": 0.5}}
OPTIONS: dict[str, Any] = {"max_shard_size": "3MB", "dtype": torch.float16, "verify": False, "progress": False}


class _Enough(Exception):
    """All that was to be seen has been seen."""


@pytest.mark.parametrize("module", [save_module, push_module], ids=["save", "push"])
def test_every_argument_arrives(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def options(*given: Any, **more: Any) -> None:
        seen["options"] = given
        raise _Enough

    monkeypatch.setattr(module, "Job", lambda *given: seen.update(job=given))
    monkeypatch.setattr(module, "Options", options)
    function = module.save_pretrained_merged if module is save_module else module.push_to_hub_merged
    with pytest.raises(_Enough):
        function("model", str(tmp_path / "out"), **JOB, **TRAINING, **OPTIONS)
    assert seen["job"] == ("model", *JOB.values())
    *plain, training = seen["options"]
    assert plain[-4:] == [3_000_000, torch.float16, False, False]
    assert (tuple(training.data), dict(training.metrics)) == (("rows.jsonl",), {"loss": 0.5})


def test_verification_and_the_bar_are_left_out_as_asked(
    tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tools.adapted(tools.load(tools.checkpoint()))
    capsys.readouterr()
    seen = {}
    for asked in (True, False):
        out = save_pretrained_merged(model, tmp_path / str(asked), verify=asked, progress=asked)
        seen[asked] = "weights" in read_report(out).verified, "Merging" in capsys.readouterr().err
    assert seen == {True: (True, True), False: (False, False)}
