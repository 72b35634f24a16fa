"""Verbs: groups of options, their panels, files of options, and advice for unknown ones."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from conftest import Result, Run
from modelpatch.cli.options import Network, PatchFile, Training
from modelpatch.cli.runs import write_run
from modelpatch.cli.selecting import Limits, Study
from modelpatch.cli.verb import command, verb
from modelpatch.errors import ConfigError, ModelpatchError
from modelpatch.methods.registry import METHODS
from modelpatch.train.settings import FitSettings


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


# panels, files and advice -----------------------------------------------------------------------------------


@verb(first="color", panel="Looks", config=True)
def render(
    name: Annotated[str, typer.Argument(help="A name.")],
    size: Size,
    color: Annotated[str, typer.Option(help="A color.")] = "red",
    tag: Annotated[list[str] | None, typer.Option("--tag", help="A tag.")] = None,
    bold: Annotated[bool, typer.Option(help="Bold.")] = False,
    out: Annotated[Path, typer.Option(help="A folder.")] = Path("."),
) -> None:
    """Render it."""
    typer.echo(f"{name} {size.width}x{size.height} {color} {tag} {bold}")
    write_run(out)


rendering = command(render, "render")


def invoke(*arguments: object) -> Any:
    return rendering.main(list(map(str, arguments)), "render", standalone_mode=False)


def test_first_options_lead_and_others_stand_in_panels(capsys: pytest.CaptureFixture[str]) -> None:
    invoke("--help")
    shown = capsys.readouterr().out
    places = [
        shown.index(text)
        for text in ("NAME", "Options", "--color", "Looks", "--wide", "Files", "--out", "Run", "--quiet")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
def test_a_run_is_given_as_a_file_and_repeated_from_the_one_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    given = tmp_path / f"given{suffix}"
    lines = {"name": "box", "wide": 4, "tag": ["a", "b=1"], "bold": True, "out": str(tmp_path)}
    equal = "=" if suffix == ".toml" else ":"
    given.write_text("".join(f"{key} {equal} {json.dumps(value)}\n" for key, value in lines.items()))
    invoke("--config", given, "--color", "blue")
    assert capsys.readouterr().out == "box 4x3 blue ['a', 'b=1'] True\n"
    invoke("--config", tmp_path / "run.yaml")
    assert capsys.readouterr().out == "box 4x3 blue ['a', 'b=1'] True\n"
    invoke("crate", "--config", tmp_path / "run.yaml", "--no-bold")
    assert capsys.readouterr().out == "crate 4x3 blue ['a', 'b=1'] False\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour: red", "has no option 'colour'. Did you mean 'color'?"),
        ("verb: fit\n", "is a run of `fit`. Run: modelpatch fit --config"),
        ("color: [red, blue]", "color is ['red', 'blue']. Expected one value"),
        ("bold: perhaps", "bold is 'perhaps'. Expected true or false"),
        ("tag: [[a]]", "tag is [['a']]. Expected a list of values"),
        ("just words", "holds str. Expected options"),
        ("a: [", "is not valid YAML or TOML"),
        ("quiet: true", "has no option 'quiet'"),
    ],
)
def test_a_file_that_is_no_run_of_the_verb_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        invoke("box", "--wide", 4, "--config", tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        invoke("box", "--wide", 4, "--config", tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fit", "x", "--lr", "0.1"), "Write --set lr=0.1"),
        (("fit", "x", "--label-smoothing=0.2"), "Write --fit label_smoothing=0.2"),
        (("fit", "x", "--epoch", "3"), "Did you mean '--epochs'?"),
        (("fits", "x"), "Did you mean 'fit'?"),
        (("inspect", "--speed"), "No such option: --speed."),
        (("search", "x", "--trials", "8"), "--trials 8: expected a file"),
        (("fit", "x", "-m", "scal-bias"), "'scale-bias'"),
        (("methods", "scal-bias"), "'scale-bias'"),
        (("fit", "x", "--fit", "lr=0.1"), "no setting 'lr'. Write --set lr=0.1"),
        (("search", "x", "--fit", "lr=0.1"), "no setting 'lr'. --fit takes"),
        (("fit", "x", "--set", "epochs=3"), "no hyperparameter 'epochs'. Write --epochs 3"),
        (("fit", "x", "--set", "cache=false"), "no hyperparameter 'cache'. Write --no-cache"),
        (("profile", "x", "--set", "views=3"), "no hyperparameter 'views'. Write --fit views=3"),
        (("fit", "bundled:digits", "-b", "bundled:tinny"), "Did you mean 'tiny'?"),
        (("fit", "x", "--fit", "label_smothing=1"), "Did you mean 'label_smoothing'?"),
    ],
)
def test_a_slip_is_answered_with_the_nearest_name(run: Run, arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.code in (1, 2)
    assert words in " ".join(result.err.replace("│", " ").split())
    assert "Traceback" not in result.err


def test_a_quiet_run_prints_its_errors_alone(run: Run, folder: Path, patches: dict[str, Path], tmp_path: Path) -> None:
    assert run("verify", "-q", *patches.values()) == Result(0, "", "")
    assert run("eval", folder, "-p", patches["linear-probe"], "-q") == Result(0, "", "")
    refused = run("verify", "-q", folder / "test" / "red" / "000.png", tmp_path / "missing")
    assert (refused.code, refused.out) == (1, "")
    assert run("inspect", patches["linear-probe"]).out != "", "the next command is not quiet"


def test_a_full_disk_is_named_by_whatever_finds_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("modelpatch.report.tables.new_table", fail)
    stopped = run("methods")
    assert stopped.code == 1
    assert stopped.err == "error: the disk has no room left. Make room and give the same command again.\n"


# methods ----------------------------------------------------------------------------------------------------


def test_methods_lists_every_method_its_hyperparameters_and_the_settings_of_a_fit(run: Run, tmp_path: Path) -> None:
    listed = run("methods", "--json", tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text()).keys() == set(METHODS)
    assert all(name in listed.out for name in METHODS)
    names = {row["name"] for row in json.loads(run("methods", "scale-bias", "--json", "-").out)}
    assert names >= {"lr", "head_lr"}
    assert "losses" not in names, "a command line cannot give them"
    assert "or `last`, the last block" in run("methods", "subset").out
    rows = {row["name"]: row for row in json.loads(run("methods", "--settings", "--json", "-").out)}
    assert rows.keys() == set(FitSettings.__dataclass_fields__)
    assert rows["dtype"] == {"name": "dtype", "default": "float32", "values": "float32, float16, bfloat16, int8"}
