"""Write the lock files: every package with its version and the hashes of its files.

    make lock            # newer versions, within the bounds of pyproject.toml
    make lock KEEP=1     # the versions that are installed in .venv, where they fit

`requirements/ci.txt` is what tests and documentation need on all systems and versions of Python; `requirements/server.txt` is
what the image of the server has beside PyTorch, whose builds for the CPU come from an index of its own. Both have what builds
the package.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = {"ci": ["test"], "server": ["serve", "compress", "sign"]}  # the extras of each
PYTHON = "3.11.9"  # the least; some packages do not support the first releases of 3.11
CUDA = re.compile(r"(torch|torchvision|triton|cuda-\w+|nvidia-[\w-]+)==")  # left out of the image
HEAD = "# Written by `make lock`: change pyproject.toml, then run it again.\n"


def installed() -> str:
    """The versions that are installed here, as constraints."""
    found = {one.metadata["Name"].lower(): one.version for one in distributions()}
    return "\n".join(f"{name}=={version}" for name, version in sorted(found.items()) if "modelpatch" not in name)


def lock(extras: list[str], constraints: Path) -> str:
    """The text of a lock file. Raises `CalledProcessError` where the versions do not fit together."""
    options = [
        "--universal",
        "--python-version",
        PYTHON,
        "--generate-hashes",
        "--no-header",
        "--no-annotate",
        "--quiet",
    ]
    for extra in extras:
        options += ["--extra", extra]
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "pyproject.toml",
        "requirements/build.in",
        *options,
        "-c",
        str(constraints),
    ]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def leave_out(text: str, names: re.Pattern[str]) -> str:
    """A lock without the packages of these names."""
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)
    return "".join(entry for entry in entries if not names.match(entry))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the versions that are installed here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(installed() if given.keep else "")
        for name, extras in LOCKS.items():
            text = lock(extras, constraints)
            text = leave_out(text, CUDA) if name == "server" else text
            (ROOT / "requirements" / f"{name}.txt").write_text(HEAD + text)
            print(f"wrote requirements/{name}.txt: {text.count('==')} packages")


if __name__ == "__main__":
    main()
