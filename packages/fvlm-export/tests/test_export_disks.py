"""Real file systems that are small, full or read-only: a tmpfs, mounted where only the test's own process sees it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from fvlm_core.errors import ExportError
from fvlm_export import save_pretrained_merged
from fvlm_export.safetensor_writer import SafetensorWriter

pytestmark = pytest.mark.filterwarnings("ignore")
NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000
READ_ONLY, REMOUNT, PRIVATE = 1, 32, 0x44000  # with everything below it
SIZE = 6 << 20
Scenario = Callable[[Path, Path, Path], None]


def system(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def mount(folder: Path, options: int = 0) -> None:
    system("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", options, f"size={SIZE}".encode())


def own_mounts() -> None:
    """Leave the machine's mounts alone from here on; without root's rights, by being root in a space of one's own."""
    user, group = os.getuid(), os.getgid()
    system("unshare", NEW_MOUNTS if user == 0 else NEW_MOUNTS | NEW_USER)
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    system("mount", None, b"/", None, PRIVATE, None)


def child(scenario: Scenario, disk: Path, adapter: Path, base: Path, say: Connection) -> None:
    try:
        own_mounts()
        mount(disk)
    except OSError as error:
        say.send(("no rights", str(error)))
        return
    try:
        scenario(disk, adapter, base)
        say.send(("made", None))
    except ExportError as error:
        left = sorted(str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file())
        say.send((str(error), left))


def on_small_disk(scenario: Scenario, tmp_path: Path, adapter: Path, base: Path) -> tuple[str, Any]:
    """Run a scenario in a process of its own and return its error with the files that it left on the disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    context = multiprocessing.get_context("fork")
    hear, say = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(scenario, disk, adapter, base, say))
    process.start()
    say.close()
    message, left = hear.recv()
    process.join()
    if message == "no rights":
        pytest.skip(f"a file system cannot be mounted here: {left}")
    return message, left


def earlier(disk: Path) -> Path:
    """An older output, which must outlive what goes wrong."""
    (disk / "out").mkdir()
    (disk / "out" / "config.json").write_bytes(b"{}")
    (disk / "out" / "model.safetensors").write_bytes(b"old")
    return disk / "out"


def merge(disk: Path, adapter: Path, base: Path) -> None:
    out = earlier(disk)
    save_pretrained_merged(adapter, out, base=base, overwrite=True, max_shard_size="500KB", progress=False)


def too_small(disk: Path, adapter: Path, base: Path) -> None:
    (disk / "mine").write_bytes(bytes(SIZE - (600 << 10)))
    merge(disk, adapter, base)


def fills_up(disk: Path, adapter: Path, base: Path) -> None:
    """Somebody else writes a large file when the merge begins its first shard: the check beforehand saw room."""
    begun: list[Path] = []
    real = SafetensorWriter.__init__

    def meanwhile(self: SafetensorWriter, path: Path, infos: Any, *, durable: bool) -> None:
        begun.append(path)
        if len(begun) == 1:
            (disk / "mine").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - (100 << 10)))
        real(self, path, infos, durable=durable)

    SafetensorWriter.__init__ = meanwhile  # type: ignore[method-assign]  # the process ends with the scenario
    merge(disk, adapter, base)


def fills_up_and_is_emptied(disk: Path, adapter: Path, base: Path) -> None:
    """As above at the fourth shard; then there is room again, and the same merge is run once more."""
    begun: list[str] = []
    real = SafetensorWriter.__init__

    def meanwhile(self: SafetensorWriter, path: Path, infos: Any, *, durable: bool) -> None:
        begun.append(path.name)
        if len(begun) == 4:
            (disk / "mine").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - (50 << 10)))
        real(self, path, infos, durable=durable)

    SafetensorWriter.__init__ = meanwhile  # type: ignore[method-assign]  # the process ends with the scenario
    out = earlier(disk)
    with pytest.raises(ExportError, match=r"No space left on device\); 3 finished shards stay in .*/\.out\.unfinished"):
        save_pretrained_merged(adapter, out, base=base, overwrite=True, max_shard_size="300KB", progress=False)
    work = disk / ".out.unfinished"
    left = {path.name for path in work.iterdir()}
    assert left == {".journal.jsonl", ".lock", *begun[:3]}, "what was written before is proved"
    with pytest.raises(ExportError, match="GB free and the result needs"):  # still full: what is there stays
        save_pretrained_merged(adapter, out, base=base, overwrite=True, max_shard_size="300KB", progress=False)
    assert {path.name for path in work.iterdir()} == left
    assert (out / "model.safetensors").read_bytes() == b"old"

    (disk / "mine").unlink()
    before = list(begun)
    save_pretrained_merged(adapter, out, base=base, overwrite=True, max_shard_size="300KB", progress=False)
    assert begun[len(before) :][:1] == before[3:], "the three finished ones are not written again"
    assert not work.exists()
    assert len(list(out.glob("*.safetensors"))) == len(begun) - 1


def read_only(disk: Path, adapter: Path, base: Path) -> None:
    earlier(disk)
    mount(disk, READ_ONLY | REMOUNT)
    save_pretrained_merged(adapter, disk / "out", base=base, overwrite=True, progress=False)


@pytest.mark.parametrize(
    ("scenario", "sentence", "left"),
    [
        (too_small, "GB free and the result needs", ["mine", "out/config.json", "out/model.safetensors"]),
        (
            fills_up,
            "cannot be written (No space left on device); nothing was left",
            ["mine", "out/config.json", "out/model.safetensors"],
        ),
        (
            read_only,
            "cannot be written (Read-only file system); nothing was left",
            ["out/config.json", "out/model.safetensors"],
        ),
    ],
)
def test_what_cannot_be_written_is_said_and_leaves_the_old_output(
    tools: Any, adapter: Path, tmp_path: Path, scenario: Scenario, sentence: str, left: list[str]
) -> None:
    message, found = on_small_disk(scenario, tmp_path, adapter, tools.checkpoint())
    assert sentence in message
    assert "\n" not in message
    assert found == left


def test_the_same_disk_takes_the_result_when_there_is_room(tools: Any, adapter: Path, tmp_path: Path) -> None:
    assert on_small_disk(merge, tmp_path, adapter, tools.checkpoint()) == ("made", None)


def test_finished_shards_outlive_a_full_disk(tools: Any, adapter: Path, tmp_path: Path) -> None:
    assert on_small_disk(fills_up_and_is_emptied, tmp_path, adapter, tools.checkpoint()) == ("made", None)
