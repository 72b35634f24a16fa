"""The `modelpatch` command. Errors this library raises on purpose end in one line and exit status 1.

A verb's module is imported when the verb is asked for; the help of the command itself needs this file alone.
"""

import errno
import importlib
import os
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

import modelpatch
from modelpatch.errors import DataWarning, ModelpatchError, TrainingWarning, UncheckedComputationWarning
from modelpatch.text import nearest

PANELS = {  # of the verbs, by the module that has them
    "using": "Use a patch",
    "data": "Look at data",
    "training": "Train a patch",
    "selecting": "Choose what to patch",
    "many": "Many tasks, many resolutions",
    "converting": "Convert",
    "networks": "Convert",
    "signing": "Store and serve",
    "serving": "Store and serve",
}
VERBS = {  # by name: its module and a line about it
    "predict": ("using", "Answer for images with one or several patches in one pass."),
    "eval": ("using", "Measure a patch on the test images of its task."),
    "inspect": ("using", "Show the contents of a patch file: bytes, hashes, settings, measured figures."),
    "verify": ("using", "Check every byte of patch files, and that they belong to a backbone."),
    "data": ("data", "Show what is read from data before anything is trained on it."),
    "fit": ("training", "Train a patch for a task and measure it on the task's test images."),
    "compare": ("training", "Train several methods on one task and show one table."),
    "methods": ("training", "List the methods, a method's hyperparameters or the settings of a fit."),
    "demo": ("training", "Train every method on bundled handwritten digits and write a report."),
    "profile": ("selecting", "Train each block alone and show its gain on held-out images."),
    "select": ("selecting", "Choose blocks greedily by cross-validation and train a patch of them."),
    "search": ("selecting", "Find the best method, blocks and settings within limits on bytes and time."),
    "label": ("selecting", "List the unlabelled images whose labels would help most."),
    "multitask": ("many", "Train several tasks together over shared weights."),
    "paint": ("many", "Patch a model on new tasks while it keeps its accuracy on others (PAINT)."),
    "multires": ("many", "Train one network for several resolutions."),
    "cascade": ("many", "Build an early-exit cascade of patches of one task."),
    "extract": ("converting", "Turn a fine-tuned checkpoint into a patch of its base."),
    "merge": ("converting", "Combine several patches of one backbone into one."),
    "diff": ("converting", "Compare two patches tensor by tensor."),
    "export": ("converting", "Write the patched model as an ordinary model or an ONNX graph."),
    "backbone": ("networks", "Show a frozen network, or write it with its weights as one file."),
    "sign": ("signing", "Sign patch files, so that others can check who made them."),
    "store": ("serving", "Keep patches by name, version and tag."),
    "tune": ("serving", "Measure which settings of an engine are fastest on this machine."),
    "serve": ("serving", "Answer over HTTP with the patches of a store."),
}


class Verbs(TyperGroup):
    """The verbs, imported by name; Ctrl-C ends one with a line about resuming it."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb's name, panel and summary, for lists of verbs; None for an unknown name."""
        module, summary = VERBS.get(cmd_name, ("", ""))
        return TyperCommand(cmd_name, help=summary, rich_help_panel=PANELS[module]) if module else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb itself, whose module is imported now, its name and its arguments."""
        if args[0] == "reproduce":
            now = "`modelpatch-studies run` now, a project of its own"
            raise ModelpatchError(f"`modelpatch reproduce` is {now}: clone the repository and `pip install ./studies`.")
        if args[0] not in VERBS and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}.{nearest(args[0], VERBS)}")
        name, found, rest = super().resolve_command(ctx, args)
        return name, found and load_verb(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; typer alone would end an interrupted one silently."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            typer.echo("; ".join(["interrupted", *map(str, stop.args)]), err=True)
            raise typer.Exit(130) from None


def load_verb(name: str) -> Any:
    """The command of a verb, from its module."""
    from modelpatch.cli.verb import command

    module = importlib.import_module(f"modelpatch.cli.{VERBS[name][0]}")
    verb = getattr(module, "evaluate" if name == "eval" else name)
    return typer.main.get_command(verb) if isinstance(verb, typer.Typer) else command(verb, name)


app = typer.Typer(
    name="modelpatch",
    cls=Verbs,
    help="One frozen vision backbone, many tasks: each task is a small patch file instead of a copy of the model.",
    epilog="Start with `modelpatch fit bundled:digits`. Options of a verb: `modelpatch VERB -h`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if show:
        typer.echo(f"modelpatch {modelpatch.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; an error becomes one line on standard error."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app()
    except ModelpatchError as error:
        _say("red", "error", str(error))
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output went away (`modelpatch ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("MODELPATCH_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for {error.filename}" if error.filename else ""
            _say("red", "error", f"the disk has no room left{where}. Make room and give the same command again.")
            sys.exit(1)
        detail = f"{type(error).__name__}: {error}".rstrip(": ")
        _say("red", "error", f"{detail}. This was not foreseen; MODELPATCH_TRACEBACK=1 shows where it happened.")
        sys.exit(1)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Print warnings that are meant for the user in one line; those of libraries are not."""
    if issubclass(category, TrainingWarning | DataWarning | UncheckedComputationWarning):
        _say("yellow", "warning", str(message))


def _say(color: str, word: str, text: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[{color}]{word}:[/{color}] {escape(text)}")
