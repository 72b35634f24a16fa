"""Make the pictures of the documentation again: python scripts/make_doc_pictures.py [NAME ...]

    curve      docs/learning-curve.png   losses, accuracy and learning rate of a fit's log
    terminal   docs/terminal.svg         that fit, as a terminal shows it
    help       docs/terminal-help.svg    all commands
    confusion  docs/confusion.png        the confusion matrix of its patch, with counts
    page       docs/server-page.png      the page of the server, three patches answering for one generated scene

All of them use the bundled backbone and data that ship with scikit-learn or are generated. `page` needs Chromium and
playwright, and trains the patches of notebooks/one_pass.ipynb; the others take two minutes on two cores. The drawings
docs/one-pass.svg, patch.svg and house.svg are written by hand.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
COMMAND = (str(Path(sys.executable).with_name("modelpatch")),)  # of the environment that runs this
FIT = "fit bundled:digits --method scale-bias --epochs 6 --batch-size 64 --fit validation=0.2 --log runs/digits"
WIDTH = 100  # columns of a terminal


def run(folder: Path, line: str) -> str:
    """What a command of modelpatch prints on a terminal of `WIDTH` columns, with its colours."""
    looks = {
        "FORCE_COLOR": "1",
        "TERM": "xterm-256color",
        "COLUMNS": str(WIDTH),
        "TTY_COMPATIBLE": "1",
        "TTY_INTERACTIVE": "0",
    }
    done = subprocess.run(
        [*COMMAND, *line.split()], cwd=folder, env={**os.environ, **looks}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"modelpatch {line} failed:\n{done.stderr}")
    return done.stdout


def save_terminal(lines: list[tuple[str, str]], path: Path, title: str) -> None:
    """Commands and what they printed, as a picture of a terminal that loads no fonts from elsewhere."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for command, printed in lines:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        console.print(Text.from_ansi(printed.rstrip()))
    svg = console.export_svg(title=title, unique_id="terminal")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    path.write_text(
        svg.replace("font-family: Fira Code,", "font-family: ui-monospace, Menlo, Consolas,"), encoding="utf-8"
    )


def train_digits(folder: Path) -> str:
    """Train the patch whose pictures these are. Returns what the fit printed."""
    return run(folder, FIT + " --force")


def draw_curve(folder: Path, printed: str) -> None:
    """The picture that the fit's log holds."""
    shutil.copy(folder / "runs" / "digits" / "curves.png", DOCS / "learning-curve.png")


def draw_terminal(folder: Path, printed: str) -> None:
    """The fit, and an evaluation."""
    evaluation = "eval bundled:digits -p digits.safetensors"
    save_terminal(
        [(f"modelpatch {FIT}", printed), (f"modelpatch {evaluation}", run(folder, evaluation))],
        DOCS / "terminal.svg",
        "modelpatch fit",
    )


def draw_confusion(folder: Path, printed: str) -> None:
    """What `modelpatch eval --plot` draws."""
    run(folder, f"eval bundled:digits -p digits.safetensors --plot {DOCS / 'confusion.png'}")


def train_scenes(folder: Path) -> Path:
    """Run the cells of the notebook up to its patches and keep them in a store. Returns a picture of a scene."""
    import modelpatch as mp

    names: dict[str, Any] = {}
    for cell in json.loads((ROOT / "notebooks" / "one_pass.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and "patches" not in names:
            exec("".join(cell["source"]), names)
    store = mp.Store(folder / "patches")
    for name, patch in names["patches"].items():
        store.publish(name, patch)
    from PIL import Image, ImageStat

    scenes = [Image.open(path) for path in sorted((names["root"] / "cars" / "images" / "test").iterdir())]
    brightest = max(scenes, key=lambda scene: sum(ImageStat.Stat(scene).mean))
    brightest.resize((480, 480)).save(folder / "scene.png")
    return folder / "scene.png"


def draw_page(folder: Path) -> None:
    """The server's page in a browser, once a picture is answered."""
    from playwright.sync_api import sync_playwright

    scene = train_scenes(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [*COMMAND, "serve", "patches", "-b", "bundled:tiny", "--port", str(port)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(f"{url}/readyz", server)
        with sync_playwright() as started:
            chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
            browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1180, "height": 1240})
            page.goto(url)
            page.locator("#patches tr").first.wait_for()
            page.locator("#all").click()
            page.locator("#file").set_input_files(scene)
            page.locator("#answers .card").nth(3).wait_for()
            page.locator("#share:visible").wait_for()
            time.sleep(1)  # the answers move into place
            shot = page.screenshot()
            browser.close()
    finally:
        server.terminate()
        server.wait()
    from PIL import Image

    small = Image.open(io.BytesIO(shot)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(DOCS / "server-page.png", optimize=True)


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers."""
    for _ in range(600):
        if server.poll() is not None:
            sys.exit("the server ended before it was ready")
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"{url} did not answer in two minutes")


def draw_help(folder: Path) -> None:
    """The commands of modelpatch."""
    save_terminal([("modelpatch -h", run(folder, "-h"))], DOCS / "terminal-help.svg", "modelpatch -h")


FROM_FIT = {"curve": draw_curve, "terminal": draw_terminal, "confusion": draw_confusion}
OTHERS = {"help": draw_help, "page": draw_page}


def main(chosen: list[str]) -> None:
    """Draw the named pictures, all of them by default."""
    if unknown := set(chosen) - FROM_FIT.keys() - OTHERS.keys():
        sys.exit(f"there is no picture {', '.join(sorted(unknown))}. Expected: {', '.join([*FROM_FIT, *OTHERS])}.")
    names = chosen or [*FROM_FIT, *OTHERS]
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        if any(name in FROM_FIT for name in names):
            printed = train_digits(folder)
            for name in names:
                if name in FROM_FIT:
                    FROM_FIT[name](folder, printed)
        for name in names:
            if name in OTHERS:
                OTHERS[name](folder)


if __name__ == "__main__":
    main(sys.argv[1:])
