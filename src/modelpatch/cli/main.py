"""The `modelpatch` command. Errors this library raises on purpose end in one line and exit status 1."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import modelpatch
from modelpatch.cli.cascade import cascade
from modelpatch.cli.compare import compare
from modelpatch.cli.demo import demo
from modelpatch.cli.evaluate import evaluate
from modelpatch.cli.export import export
from modelpatch.cli.extract import extract
from modelpatch.cli.fit import fit
from modelpatch.cli.inspect import inspect
from modelpatch.cli.label import label
from modelpatch.cli.merge import diff, merge
from modelpatch.cli.multires import multires
from modelpatch.cli.multitask import multitask
from modelpatch.cli.paint import paint
from modelpatch.cli.predict import predict
from modelpatch.cli.profile import profile
from modelpatch.cli.reproduce import reproduce
from modelpatch.cli.search import search
from modelpatch.cli.select import select
from modelpatch.cli.serve import serve
from modelpatch.cli.store import store
from modelpatch.cli.verify import verify
from modelpatch.errors import ModelpatchError, TrainingWarning


class Verbs(TyperGroup):
    """The verbs, stopped by Ctrl-C with a word on what comes next where a verb has one to say."""

    def invoke(self, ctx: Any) -> Any:  # typer itself would end without a word
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            typer.echo("; ".join(["interrupted", *map(str, stop.args)]), err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="modelpatch",
    cls=Verbs,
    help="One frozen vision backbone, many tasks: each task is a small patch file instead of a copy of the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(fit)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(inspect)
app.command()(verify)
app.command()(compare)
app.command()(extract)
app.command()(merge)
app.command()(diff)
app.command()(multitask)
app.command()(paint)
app.command()(multires)
app.command()(cascade)
app.command()(export)
app.command()(profile)
app.command()(select)
app.command()(search)
app.command()(label)
app.command(hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(reproduce)
app.add_typer(store)
app.command()(serve)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if show:
        typer.echo(f"modelpatch {modelpatch.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; a `ModelpatchError` becomes one line on standard error."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app()
    except ModelpatchError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error:[/red] {_escape(str(error))}")
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output went away (`modelpatch ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """One line for warnings that are meant for the user; libraries' own are not."""
    if issubclass(category, TrainingWarning):
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"[yellow]warning:[/yellow] {_escape(str(message))}"
        )


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
