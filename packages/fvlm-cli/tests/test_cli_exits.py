"""Errors → exit codes and sentences."""

from __future__ import annotations

import errno

import pytest

from fvlm_cli.exits import Exit, judge
from fvlm_cli.output import Output
from fvlm_core.errors import CheckpointError, ConfigError, DataError, ExportError, MissingExtraError, ResourceError


def caused(cause: BaseException) -> ExportError:
    error = ExportError("it failed.")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("r=0 is no rank."), Exit.USAGE),
        (DataError("no image.", 3), Exit.DATA),
        (CheckpointError("torn."), Exit.DATA),
        (MissingExtraError("install it."), Exit.RESOURCES),
        (ResourceError("memory ran out."), Exit.RESOURCES),
        (ExportError("refused."), Exit.FAILED),
        (caused(OSError(errno.ENOSPC, "No space left on device")), Exit.RESOURCES),
        (caused(ConnectionError("cut")), Exit.REMOTE),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), Exit.RESOURCES),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), Exit.DATA),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), Exit.RESOURCES),
        (TimeoutError("timed out"), Exit.REMOTE),
        (MemoryError(), Exit.RESOURCES),
    ],
)
def test_codes(error: BaseException, code: Exit) -> None:
    verdict = judge(error)
    assert verdict is not None
    assert verdict[0] == code
    assert "\n" not in verdict[1]


def test_device_memory_is_a_resource_and_other_errors_are_bugs() -> None:
    import torch

    verdict = judge(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"))
    assert verdict is not None
    assert verdict[0] == Exit.RESOURCES
    assert "per_device_train_batch_size" in verdict[1]
    assert judge(RuntimeError("a bug")) is None


def test_hub_errors_are_remote() -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    for error in (OfflineModeIsEnabled("offline"), ConnectionError("refused")):
        verdict = judge(error)
        assert verdict is not None
        assert verdict[0] == Exit.REMOTE
    hidden = CheckpointError("not to be had.")
    hidden.__context__ = LocalTokenNotFoundError("log in")  # as `raise … from None` leaves it
    verdict = judge(hidden)
    assert verdict == (Exit.REMOTE, "not to be had.")


def test_ctrl_c_in_any_verb_ends_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    import typer
    from typer.testing import CliRunner

    from fvlm_cli.verb import verb

    def wait(*, out: Output) -> None:
        out.note("waiting")
        raise KeyboardInterrupt

    app = typer.Typer()
    app.command()(verb(wait))
    done = CliRunner().invoke(app, ["--json"])
    assert done.exit_code == Exit.INTERRUPTED
    assert done.stdout == '{"error": "stopped by Ctrl-C.", "exit_code": 130}\n'
    assert "Traceback" not in done.stderr
