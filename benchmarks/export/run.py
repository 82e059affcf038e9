"""Time a merge beside `cp` of the same checkpoint on the same disk, or measure its memory under a limit.

    python -m benchmarks.export.run FOLDER [--gb 16] [--device cpu cuda] [--cores 8] [--cold] [--repeat 1]
        [--no-verify-too] [--replace] [--out FILE.jsonl] [--commit HASH]
    python -m benchmarks.export.run FOLDER --gb 12 --limit 2 [--out FILE.jsonl]

A checkpoint of Qwen2.5-VL-7B's shapes (28 text layers are 16.6 GB) and an adapter for all its linear layers are written
into FOLDER if they are not there, and everything that a measurement writes there is removed after it. The disk is idle
before each (`sync`); the checkpoint is in the page cache as far as that holds it, or with --cold not at all. Neither
`cp` nor a merge into a new folder waits until all is on the disk; a merge that replaces an older output does
(--replace). It copies before the merges and after them, and compares with the quicker copy: `cp` alone, and `cp` with
the `sync` after it. What the merge's threads spent their time on is printed too.

With --limit (GB) the merge runs in a memory cgroup, where going over the limit is death; page cache counts, but is
taken back first. Without rights to make one, the run ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.export.checkpoint import write_adapter, write_base
from benchmarks.kernels.card import ROOT, append_row, provenance

from fvlm_core.checkpoint import CONFIG

CGROUPS = Path("/sys/fs/cgroup")


def settle(base: Path, cold: bool) -> None:
    """Leave the disk idle, and the checkpoint in the page cache or out of it."""
    os.sync()
    for path in base.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                buffer = bytearray(1 << 24)
                while file.readinto(buffer):
                    pass


def time_copy(base: Path, target: Path, cores: set[int]) -> tuple[float, float]:
    """Return the seconds that `cp` takes, and those with the disk's."""
    begun = time.perf_counter()
    # A copy that shares its blocks with the original would time nothing
    command = ["cp", "-r", "--reflink=never", str(base), str(target)]
    subprocess.run(command, check=True, preexec_fn=lambda: os.sched_setaffinity(0, cores))
    copied = time.perf_counter() - begun
    os.sync()
    synced = time.perf_counter() - begun
    shutil.rmtree(target)
    return copied, synced


@contextmanager
def memory_group(limit: int | None) -> Iterator[Path | None]:
    """Make a memory cgroup with a limit in bytes (version 1 or 2), and remove it afterwards."""
    if limit is None:
        yield None
        return
    first = (CGROUPS / "memory").is_dir()
    group = (CGROUPS / "memory" if first else CGROUPS) / f"fvlm-export-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def merge(options: argparse.Namespace, device: str, verify: bool, group: Path | None, cores: set[int]) -> Any:
    """Run one worker and return its figures; None where it died."""
    output = options.folder / "merged"
    command = [sys.executable, "-m", "benchmarks.export.worker"]
    command += [str(options.folder / "adapter"), str(options.folder / "base"), str(output)]
    command += ["--save-method", options.save_method, *([] if verify else ["--no-verify"])]
    if options.replace:
        output.mkdir()
        (output / CONFIG).touch()  # by which it is a model that may be replaced

    def prepare() -> None:
        os.sched_setaffinity(0, cores)
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, preexec_fn=prepare, capture_output=True, text=True, check=False
    )
    for folder in (output, output.parent / f".{output.name}.unfinished"):
        shutil.rmtree(folder, ignore_errors=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        print(f"the merge ended with {done.returncode}: {done.stderr.strip()[-2000:]}", file=sys.stderr)
        return None
    return json.loads(found[-1].removeprefix("RESULT "))


def breakdown(took: float, seconds: dict[str, float]) -> str:
    """Say what a merge's seconds went into: the shards' by the clock, and the threads' kinds of work in them."""
    shards = seconds["shards"]
    work = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items() if name != "shards")
    return f"shards {shards:.1f} s, before and after them {took - shards:.1f} s; threads in the shards: {work}"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and store; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=16.6)
    parser.add_argument("--device", nargs="+", default=["cpu"], choices=["cpu", "cuda"])
    parser.add_argument("--cores", type=int, default=8)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--no-verify-too", action="store_true")
    parser.add_argument("--replace", action="store_true")
    parser.add_argument("--save-method", default="merged_16bit")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    base = options.folder / "base"
    if not base.exists():
        write_base(options.gb, base)
        write_adapter(base, options.folder / "adapter")
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    cores = set(sorted(os.sched_getaffinity(0))[: options.cores])
    status = 0
    for _ in range(options.repeat):
        status |= measure(options, base, size, cores)
    return status


def measure(options: argparse.Namespace, base: Path, size: int, cores: set[int]) -> int:
    """Merge in every way asked for, between two copies; print and store; return 1 if a merge died."""
    made: list[dict[str, Any]] = []
    copies: list[tuple[float, float]] = []
    ways = [(device, verify) for device in options.device for verify in ((True, False)[: 1 + options.no_verify_too])]

    def copy() -> None:
        if options.limit is None:
            settle(base, options.cold)
            copies.append(time_copy(base, options.folder / "copy", cores))
            print("cp of {:.1f} GB: {:.1f} s, on the disk after {:.1f} s".format(size / 1e9, *copies[-1]), flush=True)

    copy()
    for device, verify in ways:
        settle(base, options.cold)
        with memory_group(None if options.limit is None else int(options.limit * 1e9)) as group:
            figures = merge(options, device, verify, group, cores)
        if figures is not None:
            made.append(figures)
            took = figures["merge_s"]
            print(
                f"merge on {figures['device']}, verify={verify}: {took:.1f} s, {size / 1e6 / took:,.0f} MB/s; "
                f"peak RSS {figures['peak_rss_gb']:.2f} GB, {figures['peak_anonymous_gb']:.2f} GB of it anonymous\n"
                f"  {breakdown(took, figures['seconds'])}",
                flush=True,
            )
    copy()
    row: dict[str, Any] = {"gb": size / 1e9, "cores": len(cores), "cold": options.cold, "replaced": options.replace}
    row["limit_gb"] = options.limit
    if copies:  # the quicker one, so that no merge looks good beside a slow moment of the disk
        row |= {"cp_s": min(c for c, _ in copies), "cp_sync_s": min(s for _, s in copies), "copies_s": copies}
    for figures in made:
        store({"op": "merge", **row, **figures, "mb_s": size / 1e6 / figures["merge_s"]}, options)
    return int(len(made) < len(ways))


def store(row: dict[str, Any], options: argparse.Namespace) -> None:
    """Print how a merge compares with the copies, and append its row to the file asked for."""
    if "cp_s" in row:
        took = row["merge_s"]
        print(
            f"{row['device']}, verify={row['verify']}: {took / row['cp_s']:.2f} x cp, "
            f"{took / row['cp_sync_s']:.2f} x cp + sync"
        )
    append_row({**row, **provenance(torch.device(row["device"]), options.commit)}, options.out)


if __name__ == "__main__":
    sys.exit(main())
