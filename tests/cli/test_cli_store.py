"""modelpatch store, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Run, draft_patch, make_tiny
from modelpatch.patch.contents import Patch
from modelpatch.store.store import Store

VERBS = ("ls", "add", "show", "get", "tag", "rm", "verify", "gc", "push", "pull")


@pytest.fixture
def filled(run: Run, patches: dict[str, Path], tmp_path: Path) -> Path:
    """A store with two versions of `colors`, the first tagged `prod`."""
    root = tmp_path / "store"
    for path, tags in ((patches["linear-probe"], ["--tag", "prod"]), (patches["scale-bias"], [])):
        result = run("store", "add", root, "colors", path, *tags)
        assert result.code == 0, result.err
    return root


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(run: Run, verb: str) -> None:
    result = run("store", verb, "--help")
    assert result.code == 0
    assert f"modelpatch store {verb}" in result.out
    assert verb in run("store", "--help").out


def test_ls_and_show_say_what_is_there(run: Run, filled: Path, patches: dict[str, Path]) -> None:
    listed = run("store", "ls", filled)
    assert listed.code == 0
    for version in Store(filled).list():
        (line,) = (line for line in listed.out.splitlines() if version.hash[:12] in line)
        assert all(word in line for word in (*version.tags, version.method, version.task, f"{version.nbytes:,}"))
    figures = json.loads(run("store", "ls", filled, "colors", "--json", "-").out)
    assert figures == json.loads(json.dumps([version.as_dict() for version in Store(filled).list()]))
    shown = run("store", "show", filled, "colors@prod")
    assert Store(filled).resolve("colors@prod").hash in shown.out
    assert Patch.load(patches["linear-probe"]).backbone.fingerprint.chain in shown.out
    assert json.loads(run("store", "show", filled, "colors", "--json", "-").out)["tags"] == ["latest"]


def test_a_patch_of_another_backbone_is_refused_unless_said_twice(run: Run, filled: Path, tmp_path: Path) -> None:
    path = draft_patch(make_tiny()).save(tmp_path / "other.safetensors")
    before = Store(filled).resolve("colors")
    refused = run("store", "add", filled, "colors", path)
    assert refused.code == 1
    assert "--other-backbone" in refused.err
    assert Store(filled).resolve("colors") == before
    assert run("store", "add", filled, "colors", path, "--tag", "next", "--other-backbone").code == 0
    far = tmp_path / "far"
    Store(far).publish("colors", path)
    for verb in (
        ("tag", filled, "colors@next", "latest"),
        ("push", far, filled, "colors"),
        ("pull", filled, far, "colors"),
    ):
        refused = run("store", *verb)
        assert refused.code == 1
        assert "--other-backbone" in refused.err
        assert Store(filled).resolve("colors") == before
        assert run("store", *verb, "--other-backbone").code == 0
        assert Store(filled).resolve("colors") != before
        Store(filled).tag("colors", "latest", before, other_backbone=True)


def test_an_empty_store_says_how_to_publish(run: Run, tmp_path: Path) -> None:
    said = run("store", "ls", tmp_path).out
    assert said == f"no patches in {tmp_path}; `modelpatch store add {tmp_path} NAME FILE` publishes one\n"


@pytest.mark.parametrize(
    ("verb", "rest"),
    [
        ("ls", []),
        ("show", ["colors"]),
        ("get", ["colors", "-o", "out.safetensors"]),
        ("tag", ["colors", "prod"]),
        ("rm", ["colors"]),
        ("verify", []),
        ("gc", []),
        ("push", ["other", "colors"]),
    ],
)
@pytest.mark.parametrize("url", ["stoer", "memory://stoer"])
def test_where_no_store_is_nothing_is_read_or_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, verb: str, rest: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("store", verb, url, *rest)
    assert (result.code, result.out) == (1, "")
    assert f"there is no store at {url}. `modelpatch store add {url} NAME FILE` makes one." in result.err
    assert list(tmp_path.iterdir()) == []


def test_what_publishes_first_makes_the_store(run: Run, patches: dict[str, Path], tmp_path: Path) -> None:
    assert not Store(tmp_path / "new").exists()
    assert run("store", "add", tmp_path / "new", "colors", patches["linear-probe"]).code == 0
    assert Store(tmp_path / "new").exists()
    assert "there is no store" in run("store", "pull", tmp_path / "new", tmp_path / "missing", "colors").err


def test_get_writes_the_file_that_was_added(run: Run, filled: Path, patches: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert f"wrote {out}" in run("store", "get", filled, "colors@prod", "-o", out).out
    assert out.read_bytes() == patches["linear-probe"].read_bytes()
    assert "exists already" in run("store", "get", filled, "colors", "-o", out).err
    assert run("store", "get", filled, "colors", "-o", out, "--force").code == 0


def test_tags_are_set_and_removed(run: Run, filled: Path) -> None:
    assert "colors@best is now colors@" in run("store", "tag", filled, "colors@prod", "best").out
    assert Store(filled).resolve("colors@best").tags == ("best", "prod")
    assert "no tag best any more" in run("store", "tag", filled, "colors@best", "--delete").out
    assert "give either REFERENCE TAG" in run("store", "tag", filled, "colors@prod").err
    assert "is no name of a tag" in run("store", "tag", filled, "colors", "--delete").err


def test_rm_and_gc_remove_what_no_tag_names(run: Run, filled: Path) -> None:
    first = Store(filled).resolve("colors@prod")
    assert f"{first} is tagged prod" in run("store", "rm", filled, "colors@prod").err
    run("store", "tag", filled, "colors", "prod")
    assert f"would remove 1 versions, {first.nbytes:,} bytes" in run("store", "gc", filled, "--dry-run").out
    assert "removed 1 versions" in run("store", "gc", filled).out
    assert run("store", "rm", filled, "colors", "--force").code == 0
    assert Store(filled).list() == []


def test_verify_finds_damage(run: Run, filled: Path, tmp_path: Path) -> None:
    assert "is intact: 2 versions of 1 patches" in run("store", "verify", filled).out
    path = next(filled.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    result = run("store", "verify", filled, "--json", tmp_path / "p.json")
    assert (result.code, "1 problems" in result.err) == (1, True)
    assert path.stem in json.loads((tmp_path / "p.json").read_text())[0]["where"]


def test_push_and_pull_copy(run: Run, filled: Path, tmp_path: Path) -> None:
    assert run("store", "push", filled, tmp_path / "b", "colors@prod", "colors").code == 0
    assert run("store", "pull", tmp_path / "c", tmp_path / "b", "colors").code == 0
    assert Store(tmp_path / "b").list() == Store(filled).list()
    assert Store(tmp_path / "c").list() == [Store(filled).resolve("colors")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "STORE", "color"], "Did you mean colors?"),
        (["show", "STORE", "../colors"], "no name of a patch"),
        (["ls", "STORE", "zebra"], "there is no patch 'zebra'"),
        (["add", "STORE", "colors", "missing.safetensors"], "cannot be read"),
        (["ls", "nowhere://x"], "cannot be reached"),
        (["get", "STORE", "colors", "-o", "no/x"], "the folder of --out no/x does not exist"),
    ],
)
def test_errors_are_one_line(run: Run, filled: Path, arguments: list[str], message: str) -> None:
    result = run("store", *[str(filled) if argument == "STORE" else argument for argument in arguments])
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert len(result.err.splitlines()) == 1
