"""`fvlm train --nproc N`: the same command in N processes, a GPU each, that speak as one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import IO

from fvlm_cli.exits import Exit
from fvlm_cli.output import Output
from fvlm_core.errors import ConfigError

_GRACE_S = 5.0
"""How long the others may take to end, or to say what is wrong themselves, after one has failed."""
_SAID = "fvlm: "
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def launch(count: int, words: Sequence[str], out: Output) -> int:
    """Run ``fvlm WORDS`` in several processes of this machine.

    The first speaks for all; what another says is shown where that one fails. Ctrl-C, SIGTERM and
    SIGHUP are handed on to all.

    Args:
        count: how many.
        words: the command line behind ``fvlm``.
        out: of the command that starts them.

    Returns:
        The exit code: that of the first process, or of the one that failed before it.

    Raises:
        ConfigError: there are not as many GPUs, or this process is one of several already.
        KeyboardInterrupt: a signal came before all were started.
    """
    _check(count)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as files:
        said = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count - 1)]
        processes: list[subprocess.Popen[bytes]] = []
        with _together(processes) as signals:
            for rank in range(count):
                processes.append(_start(rank, count, port, words, [None, *said][rank]))
                if signals and len(processes) < count:
                    raise KeyboardInterrupt  # those to come would not have heard it
            failed = _wait(processes)
        code = _code(processes[failed])
        if failed:
            _tell(failed, code, said[failed - 1], out)
    return code


def leave_others() -> None:
    """Close gloo's connections to the other processes, if there are any, while Python still runs.

    Its threads, left to the end of the process, were seen to abort it ("terminate called without an active exception").
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


@contextmanager
def _together(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[Sequence[int]]:
    """Hand signals on to the processes that there are, give those that came, and leave no process behind."""
    came: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for process in processes:
            process.send_signal(number)

    # A terminal that closes says so to this process alone; under nohup nobody is to hear it.
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in heard}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            process.kill()
            process.wait()


def _check(count: int) -> None:
    import torch

    if "RANK" in os.environ:
        raise ConfigError("--nproc is given to one of several processes (torchrun's); leave one of the two out.")
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and count > gpus:
        raise ConfigError(f"--nproc {count} asks for a GPU each, and there are {gpus}; ask for at most as many.")


def _start(rank: int, count: int, port: int, words: Sequence[str], said: IO[str] | None) -> subprocess.Popen[bytes]:
    # Gloo would look its interface up by the host's name, which may have none; macOS calls it something else.
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        **loopback,
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "fvlm_cli.main", *words, *(["--quiet"] if rank else [])],
        env=environment,
        stdout=subprocess.DEVNULL if rank else None,
        stderr=said,
        start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which hands it on once
    )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Return the process that failed before all others, or the first, when all have ended or one has failed."""
    failed: int | None = None
    deadline = float("inf")
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            break
        bad = [rank for rank, code in enumerate(codes) if code not in (None, Exit.OK, Exit.INTERRUPTED)]
        if bad and failed is None:
            failed, deadline = bad[0], time.monotonic() + _GRACE_S
        time.sleep(0.05)
    bad = [rank for rank, process in enumerate(processes) if process.poll() not in (None, Exit.OK, Exit.INTERRUPTED)]
    return 0 if 0 in bad or not bad else bad[0] if failed is None else failed


def _code(process: subprocess.Popen[bytes]) -> int:
    return int(Exit.FAILED) if process.returncode < 0 else process.returncode


def _tell(rank: int, code: int, said: IO[str], out: Output) -> None:
    """Say what a process said whose stderr nobody has seen."""
    said.seek(0)
    lines = said.read().splitlines()
    sentences = [line.removeprefix(_SAID) for line in lines if line.startswith(_SAID)]
    if sentences:
        out.error(code, sentences[-1])
        return
    for line in lines[-40:]:
        print(line, file=sys.stderr)
    out.error(code, f"process {rank} ended before the others.")
