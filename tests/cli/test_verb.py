"""Verbs: groups of options, their panels, files of options, and advice for unknown ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from modelpatch.cli.options import Network, PatchFile, Training
from modelpatch.cli.study import Limits, Study
from modelpatch.cli.verb import verb
from modelpatch.errors import ModelpatchError


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option("--wide", help="How wide.")]
    height: int = 3

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ModelpatchError("too narrow")


@verb(first="color", panel="Looks", config=True)
def draw(name: str, size: Size, color: str = "red") -> None:
    """Draw it."""
    typer.echo(f"{name} {size.width}x{size.height} {color}")


app = typer.Typer()
app.command()(draw)


def test_fields_are_options_with_their_names_help_and_defaults() -> None:
    assert CliRunner().invoke(app, ["box", "--wide", "4"]).output == "box 4x3 red\n"
    assert (
        CliRunner().invoke(app, ["box", "--wide", "4", "--height", "5", "--color", "blue"]).output == "box 4x5 blue\n"
    )
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100", "NO_COLOR": "1"}).output
    assert all(text in shown for text in ("--wide", "How wide.", "--height", "Draw it."))
    assert CliRunner().invoke(app, ["box"]).exit_code == 2  # --wide has no default


def test_a_group_raises_before_the_verb_begins() -> None:
    result = CliRunner().invoke(app, ["box", "--wide", "-1"])
    assert isinstance(result.exception, ModelpatchError)
    assert result.output == ""


def test_an_option_is_in_one_group_only() -> None:
    def twice(width: int, size: Size) -> None: ...

    with pytest.raises(TypeError, match="twice: two of its options are called 'width'"):
        verb()(twice)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Network(device="cuda:99"), "no device 'cuda:99'"),
        (lambda: Network(argument=["spec=x"]), "--backbone"),
        (lambda: PatchFile(out=Path("/nowhere/p.safetensors")), "does not exist"),
        (lambda: Study(ray_address="auto"), "without --ray"),
        (lambda: Study(disk="much"), "no number of bytes"),
        (lambda: Limits(max_bytes="200XB"), "no number of bytes"),
        (lambda: Limits(max_latency="slow"), "no added latency"),
        (lambda: Training(option=["epochs=3"]).settings(), "an option of its own: --epochs 3"),
    ],
)
def test_what_cannot_be_is_said_by_the_group_it_is_in(make: object, words: str) -> None:
    with pytest.raises(ModelpatchError, match=words):
        make()  # type: ignore[operator]
