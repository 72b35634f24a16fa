"""The Python of README.md and of docs/ runs as it stands there, and so does every `modelpatch` command, made small.

Pages take files and names for granted (`Given`) and load networks with published weights: a small network with seeded random
ones stands in for these, in commands the bundled one (`reduce`). Commands of `LEFT_OUT` are parsed by the command itself and
run in tests of their own (`tests/serve`, `tests/patch`, `tests/train/test_actors.py`), as others than
`modelpatch` are: `curl` asks a live server; of scripts, extras and targets of make the test asks that they exist; what
`docker`, `pip` and the benchmarks do is not run here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

import modelpatch as mp
from conftest import Run, skip_without, write_folder
from dense import write_masks, write_voc
from modelpatch.cli.main import app
from modelpatch.methods import vocabulary
from modelpatch.patch.envelope import make_statement, signature_path
from modelpatch.patch.keys import make_key, read_private_key, sign

pytestmark = pytest.mark.slow

skip_without("torchmetrics", "pycocotools", "fastapi", "uvicorn", "peft", "matplotlib", "cryptography")
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LEFT_OUT = (
    "serve",
    "s3://",
    "--ray-workers",
    "--sigstore",
    "sigstore:",
)  # what keeps on running, takes an hour, a service or a cluster
SMALLER = {
    "--epochs": "1",
    "--image-size": "32",
    "--resolutions": "32,48,64",
    "--seeds": "1",
    "--sizes": "6,12",
    "--simulate": "6,12",
    "--budget": "6",
    "--max-blocks": "1",
    "--steps": "3",
    "--seconds": "0.1",
}
TRAINING = {"fit", "compare", "profile", "select", "search", "multires", "multitask", "label", "paint"}
SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
LOAD, CREATE, VOCABULARY = mp.load_backbone, timm.create_model, vocabulary.vocabulary_of


def identify(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, code) of every block of shell or Python, in the page's order."""
    text = path.read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert len(found) == len(re.findall(r"```(?:sh|python|bash|py|console)\b", text)), (
        "a block is not where one is looked for"
    )
    return found


def commands(path: Path) -> Iterator[list[str]]:
    """The words of every command of the page's shell blocks."""
    for kind, text in blocks(path):
        if kind == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words


# stand-ins ------------------------------------------------------------------------------------------------------


def load_small(spec: Any, **options: Any) -> mp.Backbone:
    """`load_backbone`, with a small network in the place of timm's with published weights."""
    if isinstance(spec, str) and spec.startswith("timm:") and options.get("pretrained", True):
        seen = mp.Preprocessing(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
        return LOAD("timm:resnet18", pretrained=False, preprocessing=seen, **SMALL)
    return LOAD(spec, **options)


def create_small(name: str, *, num_classes: int = 1000, pretrained: bool = False, **arguments: Any) -> torch.nn.Module:
    """`timm.create_model`, with the body of that network in the place of a ResNet-50's."""
    if name != "resnet50.a1_in1k":
        return CREATE(name, num_classes=num_classes, pretrained=pretrained, **arguments)
    module = CREATE("resnet18", num_classes=num_classes, **SMALL)
    body = {name: tensor for name, tensor in load_small("timm:any").module.state_dict().items() if "fc" not in name}
    module.load_state_dict(body, strict=False)
    return module


def write_tables(folder: Path) -> None:
    """Manifests of several labels and of numbers, for the pictures of birds."""
    files = sorted((folder / "birds").rglob("*.png"))
    (folder / "photo.jpg").write_bytes(files[0].read_bytes())
    tables = {
        "photos": ("label", "sky|water", "sky"),
        "faces": ("label", "31.5", "8.25"),
        "plants": ("height,width", "3.5,1", "9,2"),
    }
    for name, (columns, *cells) in tables.items():
        rows = [f"{file.relative_to(folder)},{cells[place % 2]}" for place, file in enumerate(files)]
        (folder / f"{name}.csv").write_text("\n".join([f"image,{columns}", *rows]))


@dataclass(frozen=True)
class Given:
    """A folder with the files that pages name, and the names that their code takes for granted."""

    folder: Path
    names: dict[str, Any]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("given")
    for name in ("flowers", "scenes", "gtsrb", "imagenette"):
        write_folder(folder / name)
    write_masks(folder / "streets", 4, 32)
    write_voc(folder / "cells", 3)
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        Image.new("RGB", (40, 32), "red").save(folder / name)
    (folder / "signs").mkdir()
    backbone, task = load_small("timm:any"), mp.load_task(folder / "flowers").subsample(12)
    small, middle, large = (
        mp.fit(backbone, task, "linear-probe", epochs=1, image_size=pixels, validation=0.25)
        for pixels in (96, 128, 160)
    )
    patch = mp.fit(backbone, task, "linear-probe", epochs=1)
    for name, classes in (("flowers", 102), ("birds", 200)):
        patch.save(folder / f"{name}.safetensors")
        copy = create_small("resnet50.a1_in1k", num_classes=classes).state_dict()
        copy["layer4.0.conv2.weight"] *= 1.1  # fine-tuned
        torch.save(copy, folder / f"{name}.pth")
    make_key(folder / "alice.key")
    signed, key = folder / "flowers.safetensors", read_private_key(folder / "alice.key")
    signature_path(signed).write_bytes(sign(make_statement(signed.read_bytes(), signed.name, {}), key))
    names = {"mp": mp, "backbone": backbone, "task": task, "patch": patch, "batch": torch.rand(3, 3, 32, 32)}
    names |= {"small": small, "middle": middle, "large": large, "files": [folder / "a.jpg", folder / "b.jpg"]}
    return Given(folder, names)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    "page", [path for path in PAGES if any(kind == "python" for kind, _ in blocks(path))], ids=identify
)
def test_every_python_block_runs(
    page: Path,
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    here = shutil.copytree(given.folder, tmp_path / "here")
    monkeypatch.chdir(here)
    monkeypatch.setattr(mp, "load_backbone", load_small)
    monkeypatch.setattr(timm, "create_model", create_small)
    known = dict(given.names)
    code = "".join(text for kind, text in blocks(page) if kind == "python")
    if "Client(" in code:
        server = request.getfixturevalue("server")
        server.store.tag("birds", "prod", server.store.resolve("birds"))
        monkeypatch.setattr(mp, "Client", lambda url, token=None: server.client())
    if "vocabulary_of" in code:
        known |= words_for(request, monkeypatch, here)
    for kind, text in blocks(page):
        if kind == "python":
            exec(compile(text, page.name, "exec", dont_inherit=True), known)


def words_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, here: Path) -> dict[str, Any]:
    """What the page about open vocabularies takes for granted: a sentence encoder and tasks that are told by words."""
    from modelpatch_studies.made_tasks import counting_task

    encoder = request.getfixturevalue("sentence_encoder")
    monkeypatch.setattr(vocabulary, "vocabulary_of", lambda backbone, text: VOCABULARY(backbone, f"folder:{encoder}"))
    photos = mp.load_task(here / "scenes")
    return {"task": counting_task([1, 2, 3, 4], images=6), "supported": [photos], "photos": photos}


# command lines --------------------------------------------------------------------------------------------------


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


def parse(words: list[str]) -> None:
    """Parse the arguments of `modelpatch` as the command would, without running it. Raises click's `UsageError`."""
    command, context, name = command_line(), None, "modelpatch"
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
        context.resilient_parsing = False
        name, command, words = command.resolve_command(context, words)
    command.make_context(name, list(words), parent=context)


@pytest.fixture(scope="module")
def shop(small_bundled: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that commands name: data, patches of the bundled network, copies of it that were trained."""
    folder = tmp_path_factory.mktemp("shop")
    for name in ("flowers", "gtsrb", "imagenette", "caltech101", "cifar10", "digits", "photos", "cub80_2010"):
        write_folder(folder / name)
    for name in ("imagenet-val", "imagenet-sample"):
        write_folder(folder / name, ("cat", "ship", "truck"))
    write_masks(folder / "streets", 4, 32)
    write_voc(folder / "cells", 3)
    (folder / "names.txt").write_text("red\ngreen\nblue\n")
    (folder / "words.json").write_text(json.dumps({"red": "bird", "green": "dog", "blue": "cat"}))
    write_folder(folder / "birds", ("crow", "finch", "swan"))
    write_tables(folder)
    backbone = mp.load_backbone("bundled:tiny")
    for data, names in (("flowers", ("flowers", "signs", "a", "b", "c")), ("birds", ("birds",))):
        patch = mp.fit(backbone, mp.load_task(folder / data), "scale-bias", epochs=1)
        for name in names:
            patch.save(folder / f"{name}.safetensors")
    return folder


def write_copy(path: Path) -> None:
    """The weights of a copy of the bundled network with three classes, whose filters have moved."""
    module = mp.load_backbone("bundled:tiny").module
    state = {name: 1.1 * tensor if tensor.ndim > 1 else tensor.clone() for name, tensor in module.state_dict().items()}
    state |= {name: state[name][:3] for name in ("head.fc.weight", "head.fc.bias")}
    save = torch.save if path.suffix == ".pth" else save_file
    save(state, path)


def reduce(words: list[str], encoder: Path) -> list[str]:
    """The same command on the bundled network, with little to do, and with its patterns of files expanded."""
    words = [re.sub(r"^(timm:.*|file:mobilenetv2_100_imagenet.safetensors)$", "bundled:tiny", word) for word in words]
    words = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    words = [{"bundled:digits": "digits/", "minilm": f"folder:{encoder}"}.get(word, word) for word in words]
    if words[0] in TRAINING and "--epochs" not in words:
        words += ["--epochs", "1"]
    if words[0] in ("fit", "extract"):
        words += ["--force"]  # pages show one file made in several ways
    words += ["--seconds", "0.1"] if words[0] == "tune" else []
    words += ["--tries", "1", "--methods", "linear-probe,scale-bias"] if words[0] == "search" else []
    words += ["--calibrate", "2"] if words[0] == "extract" and "--data" in words else []
    words += ["--text", f"folder:{encoder}"] if "--labels" in words else []  # files do not name folders
    return [found for word in words for found in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]


@pytest.mark.parametrize(
    "page", [path for path in PAGES if any("modelpatch" in words[:1] for words in commands(path))], ids=identify
)
def test_every_command_runs(
    page: Path, shop: Path, sentence_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    here = shutil.copytree(shop, tmp_path / "here")
    monkeypatch.chdir(here)
    monkeypatch.setattr("modelpatch.select.budget.PATIENCE", 1)  # latencies of a small network say nothing anyway
    for words in commands(page):
        elsewhere = any(word.startswith(LEFT_OUT) for word in words)
        if words[0] == "modelpatch" and not elsewhere:
            words = reduce(words[1:], sentence_encoder)
            if "--finetuned" in words:
                write_copy(Path(words[words.index("--finetuned") + 1]))
            done = run(*words)
            assert done.code == 0, (words, done.err)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "serve.md"], ids=identify)
def test_every_question_to_the_server_is_answered(page: Path, server: Any, tmp_path: Path) -> None:
    from serving import TOKEN

    server.store.tag("birds", "prod", server.store.resolve("birds"))
    (tmp_path / "flowers.safetensors").write_bytes(server.store.read(server.store.resolve("flowers")))
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        Image.new("RGB", (40, 32), "red").save(tmp_path / name)
    text = "\n".join(text.replace("\\\n", " ") for kind, text in blocks(page) if kind == "sh")
    lines = [line for line in text.splitlines() if line.startswith("curl ")]
    assert lines
    for line in lines:
        asked = line.replace("localhost:8000", server.url).replace("curl ", "curl --silent --show-error --fail ", 1)
        done = subprocess.run(
            ["bash", "-c", asked],
            cwd=tmp_path,
            env=os.environ | {"MODELPATCH_TOKEN": TOKEN},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, (line, done.stderr)


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_every_command_line_is_one_that_the_command_takes(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in commands(page):
        if "modelpatch" in words and "--config" not in words:  # a file of options is read as it is parsed
            parse(words[words.index("modelpatch") + 1 :])
        for word in words:
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), word
            if named := re.fullmatch(r"modelpatch\[(.*)\]", word):
                assert extras.keys() >= set(named[1].split(","))
        if words[0] == "make":
            assert words[1] in targets


@pytest.mark.parametrize(
    "line", ["fits flowers/", "fit flowers/ --epoch 3", "fit", "store lst patches/", "fit flowers/ --epochs many"]
)
def test_a_command_line_with_a_slip_is_seen(line: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  click's, whichever copy of it typer brings
        parse(shlex.split(line))
    assert any(kind.__name__ == "UsageError" for kind in type(caught.value).__mro__)
