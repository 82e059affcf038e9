"""The `fvlm` command: one file for each verb in `fvlm_cli.commands`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from fvlm_cli.commands.chat import chat
from fvlm_cli.commands.env import env
from fvlm_cli.commands.estimate import estimate
from fvlm_cli.commands.evaluate import evaluate
from fvlm_cli.commands.infer import infer
from fvlm_cli.commands.init import init
from fvlm_cli.commands.merge import merge
from fvlm_cli.commands.preview import preview
from fvlm_cli.commands.push import push
from fvlm_cli.commands.quickstart import quickstart
from fvlm_cli.commands.report import report
from fvlm_cli.commands.train import train
from fvlm_cli.commands.version import version
from fvlm_cli.exits import Exit
from fvlm_cli.output import Output, flush, leave_quietly, print_anything
from fvlm_cli.usage import UsageError, asks_for, explain_usage, unknown_verb
from fvlm_cli.verb import verb
from fvlm_core.errors import ConfigError

_HELP = "Fine-tune vision-language models fast and in little memory. Start with: fvlm quickstart"


class Verbs(TyperGroup):
    """All verbs. However one ends, the shell gets an exit code, and its user one sentence and no traceback."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **named: Any) -> NoReturn:
        """Run the verb that `args` name, by default the process's own; raise `SystemExit`, or what is a bug."""
        words = list(sys.argv[1:] if args is None else args)
        out = Output(json=asks_for("--json", words), debug=asks_for("--debug", words))
        hook, sys.excepthook = sys.excepthook, partial(_report_bug, out)
        print_anything()
        named["standalone_mode"] = False  # errors come here instead of becoming a box on stderr
        try:
            code = super().main(args if words else ["--help"], *rest, **named)
            flush()
        except UsageError as error:
            code = _refuse(error, explain_usage(error, words, self.commands), out)
        except ConfigError as error:
            code = _refuse(error, str(error), out)
        except typer.Abort as error:
            code = _refuse(error, "the input ended before there was an answer.", out)
        except BrokenPipeError:  # whoever read our output has had enough
            code = leave_quietly()
        sys.excepthook = hook
        sys.exit(code or (Exit.OK if words else Exit.USAGE))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the verb that the first word names, and the other words."""
        if self.get_command(ctx, args[0]) is None:
            raise ConfigError(unknown_verb(args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fvlm {installed('fvlm-cli')}")
        raise typer.Exit(Exit.OK)


def _refuse(error: Exception, sentence: str, out: Output) -> Exit:
    if out.debug:
        traceback.print_exception(error)
    out.error(Exit.USAGE, sentence)
    return Exit.USAGE


def _report_bug(out: Output, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say what nobody foresaw; Python then ends with code 1."""
    if out.debug:
        sys.__excepthook__(kind, error, trace)
    place = traceback.extract_tb(trace)[-1]
    what = " ".join(f"{kind.__name__}: {error}".split())
    where = f"{Path(place.filename).name}, line {place.lineno}"
    out.error(Exit.FAILED, f"a bug of fvlm ({what}; {where}): please report what the same command says with --debug.")


# Pretty exceptions would print local variables, tokens included.
app = typer.Typer(name="fvlm", cls=Verbs, help=_HELP, pretty_exceptions_enable=False)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print fvlm's version.")
    ] = False,
) -> None:
    pass


app.command("quickstart")(verb(quickstart))
app.command("init")(verb(init))
# What these do not know as an option is a key of the config: --lora.r 32.
_CONFIGURED = {"ignore_unknown_options": True}
app.command("train", context_settings=_CONFIGURED)(verb(train))
app.command("preview", context_settings=_CONFIGURED)(verb(preview))
app.command("estimate", context_settings=_CONFIGURED)(verb(estimate))
app.command("infer")(verb(infer))
app.command("chat")(verb(chat))
app.command("eval", context_settings=_CONFIGURED)(verb(evaluate))
app.command("report")(verb(report))
app.command("merge")(verb(merge))
app.command("push")(verb(push))
app.command("env")(verb(env))
app.command("version")(verb(version))

if __name__ == "__main__":
    app()
