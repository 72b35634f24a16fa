"""The lock files, the image and the workflows agree with pyproject.toml and with each other."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(r"^([a-z0-9][a-z0-9._-]*)==(\S+)(?: ; ([^\\]+))?(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
LOCKS = {"ci": ("test",), "server": ("serve", "compress", "sign")}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@cache
def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(name: str) -> dict[str, list[tuple[Version, str]]]:
    """The versions of a lock's packages, with the rest of their entries; several where systems differ."""
    found: dict[str, list[tuple[Version, str]]] = {}
    for package, version, _, rest in ENTRY.findall((ROOT / "requirements" / f"{name}.txt").read_text()):
        found.setdefault(canonicalize_name(package), []).append((Version(version), rest))
    return found


def wanted(extras: tuple[str, ...]) -> list[Requirement]:
    """The requirements of the package with these extras, those of its own extras in their place."""
    given = list(map(Requirement, project()["dependencies"]))
    for extra in extras:
        for requirement in map(Requirement, project()["optional-dependencies"][extra]):
            own = requirement.name == project()["name"]
            given += wanted(tuple(requirement.extras)) if own else [requirement]
    return given


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_every_requirement_within_its_bounds_and_a_hash_of_every_package(name: str) -> None:
    packages = locked(name)
    apart = {"torch", "torchvision"} if name == "server" else set()  # from an index of their own
    for requirement in wanted(LOCKS[name]):
        package = canonicalize_name(requirement.name)
        if package not in apart:
            assert package in packages, f"make lock: {requirement}"
            assert all(version in requirement.specifier for version, _ in packages[package]), (
                f"make lock: {requirement}"
            )
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", rest) for entries in packages.values() for _, rest in entries)
    assert not apart & packages.keys()


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_place_to_download_from(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert "://" not in text
    assert "--index" not in text


def test_libraries_of_libraries_have_a_floor() -> None:
    """Starlette before 0.49.1 takes quadratic time for a header (CVE-2025-62727); FastAPI alone lets it in."""
    (floor,) = (one for one in wanted(("serve",)) if one.name == "starlette")
    assert Version("0.49.0") not in floor.specifier
    assert Version("0.49.1") in floor.specifier


def test_the_image_has_the_versions_of_the_lock() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for package in ("torch", "torchvision"):
        (version,) = {version for version, _ in locked("ci")[package]}
        assert f" {package}=={version} " in text
    assert "--require-hashes -r requirements/server.txt" in text
    named = set(re.findall(r"requirements/[\w.]+", text))
    assert named <= {f"requirements/{one.name}" for one in (ROOT / "requirements").iterdir()}


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_actions_by_commit_and_take_the_rights_they_need(path: Path) -> None:
    described = yaml.safe_load(path.read_text())
    assert described["permissions"] == {"contents": "read"}
    for step in steps(path):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]) if "uses" in step else step["run"]
        assert "${{ github.event" not in step.get("run", ""), "text of strangers in a shell"
    assert all(job["timeout-minutes"] <= 120 for job in described["jobs"].values())


def test_the_matrix_has_every_python_that_the_package_takes() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    versions = jobs["quick"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13", "3.14"]
    assert Requirement(f"python{project()['requires-python']}").specifier.contains(versions[0])


def test_a_release_is_published_without_a_token() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()
    version = re.search(r'^__version__ = "(.*)"$', (ROOT / "src/modelpatch/version.py").read_text(), re.MULTILINE)
    assert version, "the step that compares it with the tag reads it so"


def test_forms_and_pages_of_the_repository_are_there() -> None:
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        yaml.safe_load(form.read_text())
    text = (ROOT / "SECURITY.md").read_text()
    for page in re.findall(r"\]\((docs/[\w-]+\.md)", text):
        assert (ROOT / page).is_file(), page
