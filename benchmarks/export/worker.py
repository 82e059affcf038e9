"""Merge once and print what it took as one line of JSON; `run` starts it.

    python -m benchmarks.export.worker ADAPTER BASE OUTPUT [--no-verify] [--save-method merged_16bit]

A process of its own, so that its peak memory is that of one merge.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import threading
import time
from pathlib import Path

STARTED = time.time()


def anonymous() -> int:
    """Return the bytes of this process that no file backs, which is what a full machine cannot take back."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Seconds(logging.Handler):
    """Keeps what fvlm_export says of where the time went."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the seconds that a record brings."""
        self.found = record.__dict__.get("seconds", self.found)


class Watch:
    """Notes the largest anonymous memory, a hundred times a second."""

    def __init__(self) -> None:
        self.peak = self.before = anonymous()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(0.01):
            self.peak = max(self.peak, anonymous())

    def stop(self) -> None:
        """Stop noting."""
        self._end.set()
        self._thread.join()


def main() -> None:
    """Parse the arguments, merge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--save-method", default="merged_16bit")
    options = parser.parse_args()
    import torch

    from fvlm_export import read_report
    from fvlm_export.save import save_pretrained_merged

    imported = time.time() - STARTED
    seconds, talk = Seconds(), logging.getLogger("fvlm_export.build")
    talk.addHandler(seconds)
    talk.setLevel(logging.DEBUG)
    watch = Watch()
    begun = time.perf_counter()
    save_pretrained_merged(
        options.adapter,
        options.output,
        base=options.base,
        save_method=options.save_method,
        verify=not options.no_verify,
        progress=False,
        overwrite=True,
    )
    took = time.perf_counter() - begun
    watch.stop()
    report = read_report(options.output)
    row = {
        "merge_s": took,
        "import_s": imported,
        "seconds": seconds.found,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "peak_anonymous_gb": watch.peak / 1e9,
        "anonymous_before_gb": watch.before / 1e9,
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "verify": not options.no_verify,
        "save_method": options.save_method,
        "tensors": report.tensors,
        "merged": report.merged,
        "largest_error": report.verified.get("weights", {}).get("largest_error"),
    }
    print("RESULT " + json.dumps(row))


if __name__ == "__main__":
    main()
