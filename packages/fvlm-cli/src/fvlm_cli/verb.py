"""What every verb has: `--debug`, `--quiet` and `--json`, an `Output`, and errors in one sentence."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fvlm_cli.exits import HANDLED, Exit, judge
from fvlm_cli.output import Output
from fvlm_cli.usage import check_settings

_PANEL = "Every verb"
_OPTIONS = {
    "debug": Annotated[bool, typer.Option("--debug", help="Show tracebacks and details.", rich_help_panel=_PANEL)],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Only the result.", rich_help_panel=_PANEL)],
    "json": Annotated[bool, typer.Option("--json", help="The result as JSON.", rich_help_panel=_PANEL)],
}


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Make a typer command of a function that takes `out: Output` beside its own arguments and options.

    The command has the options that every verb has. What the function raises and a user can mend becomes one sentence
    on stderr and an exit code; anything else is a bug, of which `fvlm_cli.main` says what it is.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "out"]
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in _OPTIONS.items()
    ]

    # Of a name `batch_size` and an annotation that gives its options no others, Typer makes --batch-size.
    options = [f"--{parameter.name.replace('_', '-')}" for parameter in [*own, *common] if parameter.name != "settings"]

    @functools.wraps(function)
    def command(**given: Any) -> None:
        out = Output(**{name: given.pop(name) for name in _OPTIONS})
        out.start_log()
        try:
            if given.get("settings"):
                check_settings(given["settings"], options)
            function(**given, out=out)
        except BrokenPipeError:  # whoever read our output has had enough: `fvlm_cli.main` ends quietly
            raise
        except HANDLED as error:
            raise typer.Exit(_report(error, out)) from None
        except KeyboardInterrupt:
            out.error(Exit.INTERRUPTED, "stopped by Ctrl-C.")
            raise typer.Exit(Exit.INTERRUPTED) from None

    del command.__wrapped__  # typer would read the inner signature
    command.__signature__ = signature.replace(parameters=[*own, *common])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *common]}
    return command


def _report(error: BaseException, out: Output) -> Exit:
    verdict = judge(error)
    if verdict is None:
        raise error
    if out.debug:
        traceback.print_exception(error)
    out.error(*verdict)
    return verdict[0]
