"""The `fvlm` command: one file for each verb in `fvlm_cli.commands`."""

from __future__ import annotations

import typer

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
from fvlm_cli.verb import verb

_HELP = "Fine-tune vision-language models fast and in little memory. Start with: fvlm quickstart"

# Pretty exceptions would print local variables, tokens included.
app = typer.Typer(name="fvlm", help=_HELP, no_args_is_help=True, pretty_exceptions_enable=False)

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
