"""What the kernels are to reach, and whether rows of results reach it.

Element-wise ops and norms: 85 % of copy bandwidth at 4,096 rows or more. ``dequantize_nf4`` with nested absmaxes: 80 %,
and 1.5 times bitsandbytes; ``nf4_matvec``: 60 %. ``linear_cross_entropy``: 70 % of the matmul rate on the rows kept,
and 1.5 times Liger with two thirds of the labels ignored. ``lora_qkv`` and ``lora_mlp``, forward and backward: 1.5
times PEFT and bitsandbytes at 512 rows, 1.2 times at 8,192. And no op is slower than PyTorch at any shape.

Speeds are compared twice: on the device, as in a recorded step, and in eager mode, where the host may be the slower.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
ELEMENTWISE = (
    "rms_norm", "layer_norm", "swiglu", "geglu", "gelu", "rotary", "multimodal_rotary", "vision_rotary",
)  # fmt: skip
SHARES = {**dict.fromkeys(ELEMENTWISE, 0.85), "nf4": 0.8, "nf4_matvec": 0.6, "linear_cross_entropy": 0.7}
MANY_ROWS = 4096
CLOCKS = {"device": "device_us", "eager": "eager_us"}


@dataclass(frozen=True)
class Verdict:
    """One thing to be reached by one pass of one case: what it is, its value, and the least that it should be."""

    op: str
    case: str
    mode: str
    what: str
    value: float
    needed: float

    @property
    def reached(self) -> bool:
        """Whether the value is enough."""
        return self.value >= self.needed


def latest(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """Return the last row of every case, pass and provider, by provider; no peer's of another card than ours."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if "p50_us" in row:
            found.setdefault((row["op"], row["case"], row["pass"]), {})[row["provider"]] = row
    return {key: _of_one_card(by_provider) for key, by_provider in found.items()}


def _of_one_card(by_provider: dict[str, Row]) -> dict[str, Row]:
    card = by_provider["fvlm"].get("card") if "fvlm" in by_provider else None
    return {name: row for name, row in by_provider.items() if card is None or row.get("card") == card}


def microseconds(row: Row, clock: str) -> float:
    """Return a row's time by a clock; behind a busy GPU where it was too long to be recorded."""
    taken = row.get(CLOCKS[clock])
    return float(row["p50_us"] if taken is None else taken)


def _least_speedups(op: str, mode: str, shape: dict[str, int]) -> dict[str, float]:
    """Return how many times faster than whom an op is to be."""
    needed = {"torch": 1.0}
    if op == "nf4":
        needed["bnb"] = 1.5
    if op == "linear_cross_entropy" and mode == "both" and 3 * shape["kept"] <= shape["rows"] + 3:
        needed["liger"] = 1.5
    if op in ("lora_qkv", "lora_mlp") and mode == "both" and shape["rows"] in (512, 8192):
        needed["peft"] = 1.5 if shape["rows"] == 512 else 1.2
    return needed


def verdicts(rows: Iterable[Row]) -> Iterator[Verdict]:
    """Hold rows of results to what is to be reached.

    Args:
        rows: as :mod:`.run` writes them; of equal cases, passes and providers the last counts.
    """
    for (op, case, mode), by_provider in latest(rows).items():
        ours = by_provider.get("fvlm")
        if ours is None:
            continue
        shape = ours["shape"]
        if op in SHARES and (op not in ELEMENTWISE or shape["rows"] >= MANY_ROWS):
            yield Verdict(op, case, mode, "of ceiling", ours["of_ceiling"], SHARES[op])
        for peer, needed in _least_speedups(op, mode, shape).items():
            if peer not in by_provider:
                continue
            for clock in CLOCKS:
                faster = microseconds(by_provider[peer], clock) / microseconds(ours, clock)
                yield Verdict(op, case, mode, f"x {peer}, {clock}", round(faster, 3), needed)


def report(rows: Iterable[Row], *, everything: bool) -> tuple[list[str], int]:
    """Return the lines of a table of verdicts, of all or of what is not reached, and how many are not reached."""
    rows = list(rows)
    found = list(verdicts(rows))
    missed = [v for v in found if not v.reached]
    lines = [
        f"{'reached' if v.reached else 'NOT    '} {v.op:20s} {v.case:46s} {v.mode:8s} {v.what:18s} {v.value:7.3f}"
        f" of {v.needed:4.2f}{'' if v.reached else f', {1 - v.value / v.needed:.0%} short'}"
        for v in (found if everything else missed)
    ]
    lines += [
        f"FAILED  {r['op']} {r['case']} {r['pass']}: {r['provider']}, {r['failed']}" for r in rows if "failed" in r
    ]
    lines += [f"REFUSED {r['op']} {r['case']}: {r['refused']}" for r in rows if "refused" in r]
    by_op: dict[str, list[Verdict]] = {}
    for v in found:
        by_op.setdefault(v.op, []).append(v)
    lines += [f"{op}: {sum(v.reached for v in some)} of {len(some)} reached" for op, some in by_op.items()]
    return [*lines, f"{len(found) - len(missed)} of {len(found)} reached"], len(missed)
