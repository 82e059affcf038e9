"""`fvlm train --nproc 2`: one run, one record, one voice; on the CPU, where the processes speak through gloo."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from safetensors.torch import load_file

from fvlm_cli.training.launch import leave_others

CONFIG = """
model: {name: base, precision: 16bit, max_seq_length: 256}
lora: {r: 4, alpha: 8, dropout: 0}
data: {train: train.jsonl, eval_fraction: 0.25}
train:
  per_device_train_batch_size: 1
  max_steps: 4
  learning_rate: 1e-2
  warmup_steps: 0
  save_steps: 100
"""


@pytest.fixture(scope="module")
def place(workplace: Path) -> Path:
    (workplace / "several.yaml").write_text(CONFIG, encoding="utf-8")
    return workplace


def history(run: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((run / "history.json").read_text()) if "loss" in entry]


def test_two_processes_leave_the_run_of_one(fvlm, place: Path) -> None:
    words = ["train", "several.yaml", "--json", "eval.rows=2", "save.merge=merged_16bit"]
    two = fvlm(*words, "save.output_dir=two", "--nproc", "2", cwd=place)
    assert two.returncode == 0, two.stderr
    record = json.loads(two.stdout)
    assert (record["status"], record["steps"]) == ("finished", 4)
    assert json.loads((place / "two/run.json").read_text()) == record
    assert {"answers_before", "answers_after"} <= set(record)
    assert (place / "two/merged/model.safetensors").is_file()
    one = fvlm(*words, "save.output_dir=one", "train.per_device_train_batch_size=2", cwd=place)
    assert one.returncode == 0, one.stderr
    assert history(place / "two") == pytest.approx(history(place / "one"), rel=1e-4)
    ours, theirs = (load_file(place / name / "adapter/adapter_model.safetensors") for name in ("two", "one"))
    assert all((ours[name] - theirs[name]).abs().max() < 1e-3 for name in theirs)


def test_what_is_wrong_is_said_once(fvlm, fvlm_command: list[str], place: Path) -> None:
    (place / "full").mkdir()
    (place / "full/file").touch()
    done = fvlm("train", "several.yaml", "save.output_dir=full", "--nproc", "2", cwd=place)
    assert done.returncode == 2
    assert done.stderr.count("is not empty; name another folder") == 1
    inside = subprocess.run(
        [*fvlm_command, "train", "several.yaml", "--nproc", "2"],
        cwd=place,
        env={**os.environ, "RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert inside.returncode == 2
    assert "--nproc is given to one of several processes" in inside.stderr


def test_ctrl_c_stops_all_after_one_step_with_one_checkpoint(fvlm, fvlm_command: list[str], place: Path) -> None:
    words = ["train", "several.yaml", "save.output_dir=halted", "train.max_steps=400", "train.logging_steps=1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*fvlm_command, *words, "--nproc", "2"],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_interrupts,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGINT)
            break
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "fvlm train several.yaml save.output_dir=halted" in stdout
    assert "--nproc 2 --resume" in stdout
    record = json.loads((place / "halted/run.json").read_text())
    assert record["status"] == "interrupted"
    assert (place / record["checkpoint"] / "rng_state_1.pth").is_file()
    done = fvlm(*words, "--resume", "--nproc", "2", f"train.max_steps={record['steps'] + 2}", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr


def _hear_interrupts() -> None:
    """A shell's background job, which a run of the tests may be, is started with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(programs: list[str]) -> Callable[..., subprocess.Popen[bytes]]:
    """A stand-in for `launch._start` whose processes run these programs."""

    def start(rank: int, count: int, port: int, words: object, said: IO[str] | None) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", programs[rank]], stdout=subprocess.DEVNULL, stderr=said)

    return start


@pytest.mark.parametrize(
    ("programs", "code", "said"),
    [
        (["import time; time.sleep(60)", "raise SystemExit('fvlm: row 7: broken.')"], 1, "fvlm: row 7: broken.\n"),
        (["import time; time.sleep(60)", "import os; os.abort()"], 1, "fvlm: process 1 ended before the others.\n"),
        (["raise SystemExit(3)", "raise SystemExit(2)"], 3, ""),
        (["raise SystemExit(130)", "raise SystemExit(130)"], 130, ""),
        (["", ""], 0, ""),
    ],
)
def test_the_process_that_failed_speaks_and_none_is_left(
    programs: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fvlm_cli.output import Output
    from fvlm_cli.training import launch

    monkeypatch.setattr(launch, "_GRACE_S", 0.5)
    monkeypatch.setattr(launch, "_start", started(programs))
    begun = time.monotonic()
    assert launch.launch(2, [], Output()) == code
    assert time.monotonic() - begun < 30
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("cause", [signal.SIGTERM, signal.SIGHUP, None])
def test_none_is_left_when_not_all_can_be_started(
    cause: signal.Signals | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fvlm_cli.output import Output
    from fvlm_cli.training import launch

    processes: list[subprocess.Popen[bytes]] = []

    def start(rank: int, *given: object) -> subprocess.Popen[bytes]:
        if cause is None and rank == 1:
            raise OSError(errno.EAGAIN, "too many processes")
        processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"]))
        if cause is not None:
            signal.raise_signal(cause)
        return processes[-1]

    monkeypatch.setattr(launch, "_start", start)
    monkeypatch.delenv("RANK", raising=False)
    # Where the launcher does not listen, the test fails instead of being ended.
    before = {number: signal.signal(number, lambda number, frame: None) for number in launch._SIGNALS}
    try:
        with pytest.raises(OSError if cause is None else KeyboardInterrupt):
            launch.launch(2, [], Output())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert [process.poll() is not None for process in processes] == [True]


def test_under_nohup_a_closed_terminal_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fvlm_cli.output import Output
    from fvlm_cli.training import launch

    def start(rank: int, *given: object) -> subprocess.Popen[bytes]:
        signal.raise_signal(signal.SIGHUP)
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(launch, "_start", start)
    monkeypatch.delenv("RANK", raising=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launch.launch(2, [], Output()) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fvlm_cli.output import Output
    from fvlm_cli.training.launch import launch
    from fvlm_core.errors import ConfigError

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--nproc 2 asks for a GPU each, and there are 1"):
        launch(2, [], Output())


def test_a_process_leaves_the_others_before_it_ends(tmp_path: Path) -> None:
    import torch.distributed as dist

    leave_others()  # there are none
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    leave_others()
    assert not dist.is_initialized()
