"""`fvlm env`: what this machine has, and what FVLM knows about a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvlm_cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

_MODEL = Annotated[str | None, typer.Option(help="A model's folder or Hub id to look at; no weights are read.")]
_TRUST = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that the checkpoint brings along.")]


def env(model: _MODEL = None, trust_remote_code: _TRUST = False, *, out: Output) -> None:
    """Show devices, free memory and versions; with --model, its towers, and which accelerations apply and why not."""
    from fvlm_cli.inspection.machine import machine
    from fvlm_cli.versions import versions

    found: dict[str, Any] = {**machine(), "versions": versions()}
    if model is not None:
        from fvlm_cli.inspection.model import look_at

        found["model"] = look_at(model, trust_remote_code, found["devices"])
    out.result(found, lambda console: _show(console, found))


def _show(console: Console, found: dict[str, Any]) -> None:
    host = found["host"]
    console.print(
        f"host    {host['platform']}, {host['cpus']} CPUs, memory {_gib(host['memory'], host['memory_free'])}"
    )
    for device in found["devices"]:
        console.print(
            f"device  {device['name']}, compute capability {device['capability']}, memory "
            f"{_gib(device['memory'], device['memory_free'])}",
            markup=False,
        )
    if not found["devices"]:
        console.print("device  none; models run on the CPU")
    console.print("versions")
    for name, number in found["versions"].items():
        console.print(f"  {name:<16} {number or '(not installed)'}")
    if "model" in found:
        _show_model(console, found["model"])


def _show_model(console: Console, model: dict[str, Any]) -> None:
    known = "facts written for it" if model["known"] else "no facts written for it: derived from its modules (generic)"
    console.print(f"model   {model['name']}, {model['model_type']}: {known}", markup=False)
    if model["quantized"]:
        console.print(f"  stored in {model['quantized']}")
    for name, tower in model["towers"].items():
        console.print(
            f"  {name:<10} {tower['parameters']:>15,} parameters in {', '.join(tower['paths']) or 'no module'}",
            markup=False,
        )
    console.print(f"  stays in 16 bit: {', '.join(model['unquantized']) or 'nothing'}", markup=False)
    console.print("accelerations of this model here")
    for item in model["accelerations"]:
        console.print(f"  {'yes' if item['applies'] else 'no ':<4} {item['name']}: {item['why']}", markup=False)


def _gib(total: int | None, free: int | None) -> str:
    def amount(value: int | None) -> str:
        return "unknown" if value is None else f"{value / 2**30:.1f} GiB"

    return f"{amount(total)}, {amount(free)} free"
