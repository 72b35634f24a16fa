"""modelpatch sign, verify --signer and stores that require one, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Run
from modelpatch.provenance import COMMAND, describe_making, spell_command
from modelpatch.store.store import Store

pytest.importorskip("cryptography")


@pytest.fixture
def signed(run: Run, patches: dict[str, Path], tmp_path: Path) -> Path:
    """A patch that alice signed."""
    path = tmp_path / "colors.safetensors"
    path.write_bytes(patches["scale-bias"].read_bytes())
    made = run("sign", path, "--new-key", tmp_path / "alice.key", "--key", tmp_path / "alice.key")
    assert made.code == 0, made.err
    assert f"signed {path}" in made.out
    return path


def test_verify_says_who_signed_and_inspect_shows_it(run: Run, signed: Path, tmp_path: Path) -> None:
    good = run("verify", signed, "--signer", tmp_path / "alice.key.pub")
    assert (good.code, "signed by alice" in good.out) == (0, True)
    shown = json.loads(run("inspect", signed, "--signer", tmp_path / "alice.key.pub", "--json", "-").out)["signature"]
    assert (shown["signed_by"], shown["checked"]) == (["alice"], True)
    assert "as the signature says" in run("inspect", signed).out
    stated = shown["statement"]["predicate"]
    assert len(stated["created"]["data_sha256"]) == 64
    assert stated["created"]["command"].startswith("modelpatch fit ")


def test_no_signature_another_key_and_a_flipped_one_are_each_refused_by_name(
    run: Run, signed: Path, patches: dict[str, Path], tmp_path: Path
) -> None:
    assert run("sign", "--new-key", tmp_path / "bob.key").code == 0
    other = run("verify", signed, "--signer", tmp_path / "bob.key.pub")
    assert (other.code, "OtherSignerError" in other.out) == (1, True)
    none = run("verify", patches["scale-bias"], "--signer", tmp_path / "alice.key.pub", "--json", "-")
    assert (none.code, json.loads(none.out)[0]["error"]) == (1, "UnsignedPatchError")
    beside = Path(f"{signed}.sig")
    raw = bytearray(beside.read_bytes())
    place = raw.index(b'"sig":"') + 10
    raw[place] = ord("B" if raw[place] == ord("A") else "A")
    beside.write_bytes(raw)
    flipped = run("verify", signed, "--signer", tmp_path / "alice.key.pub")
    assert (flipped.code, "DamagedSignatureError" in flipped.out) == (1, True)
    assert "not what alice signed" in run("inspect", signed, "--signer", tmp_path / "alice.key.pub").err


def test_a_store_takes_and_gives_what_is_signed_alone(run: Run, signed: Path, tmp_path: Path) -> None:
    assert run("sign", "--new-key", tmp_path / "bob.key").code == 0
    alice, bob = (["--require-signer", tmp_path / f"{name}.key.pub"] for name in ("alice", "bob"))
    assert "a signature by bob is required" in run("store", "add", tmp_path / "st", "colors", signed, *bob).err
    assert not (tmp_path / "st").exists()
    assert run("store", "add", tmp_path / "st", "colors", signed, *alice).code == 0
    assert (
        Store(tmp_path / "st").resolve("colors").signers[0][:16] in run("store", "show", tmp_path / "st", "colors").out
    )
    out = tmp_path / "out.safetensors"
    assert run("store", "get", tmp_path / "st", "colors", "-o", out, *bob).code == 1
    assert run("store", "get", tmp_path / "st", "colors", "-o", out, *alice).code == 0
    assert run("verify", out, "--signer", tmp_path / "alice.key.pub").code == 0
    assert run("store", "pull", tmp_path / "mine", tmp_path / "st", "colors", *bob).code == 1
    assert run("store", "pull", tmp_path / "mine", tmp_path / "st", "colors", *alice).code == 0
    assert run("store", "verify", tmp_path / "mine", *alice).code == 0
    assert "is signed by" in run("store", "verify", tmp_path / "mine", *bob).out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "give files"), (["{patch}"], "give files"), (["{patch}", "--key", "no.key"], "no.key cannot be read"),
     (["{patch}", "--key", "{patch}"], "is no private key"), (["no.safetensors", "--key", "{key}"], "cannot be read"),
     (["{patch}", "--key", "{key}", "--sigstore"], "give files"), (["{key}", "--key", "{key}"], "not a patch file")],
)  # fmt: skip
def test_mistakes_end_in_one_line(run: Run, signed: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    names = {"{patch}": signed, "{key}": tmp_path / "alice.key"}
    result = run("sign", *(names.get(word, word) for word in arguments))
    assert result.code == 1
    assert words in result.err
    assert "not foreseen" not in result.err


def test_a_cascade_is_signed_as_well(run: Run, signed: Path, tmp_path: Path) -> None:
    from modelpatch.engine.cascade import Cascade, Confidence
    from modelpatch.patch.contents import Patch

    path = Cascade(patches=(Patch.load(signed),), confidences=(Confidence(),)).save(tmp_path / "cascade.json")
    assert run("sign", path, "--key", tmp_path / "alice.key").code == 0
    served = ["serve", tmp_path / "none", "-b", "bundled:tiny", "--token", "12345678", "--cascade", path]
    assert run("sign", "--new-key", tmp_path / "bob.key").code == 0
    refused = run(*served, "--require-signer", tmp_path / "bob.key.pub")
    assert (refused.code, "a signature by bob is required" in refused.err) == (1, True)


@pytest.mark.parametrize(
    ("word", "kept"),
    [("/home/me/flowers/", "flowers"), ("--out=/home/me/a.safetensors", "--out=a.safetensors"), ("hf:org/name", "hf:org/name"),
     ("timm:resnet18.a1_in1k", "timm:resnet18.a1_in1k"), ("file:/home/me/net.safetensors", "file:net.safetensors"),
     (r"C:\Users\me\flowers", "flowers"), ("../flowers", "flowers"), ("data/flowers", "flowers"), ("lr=0.1", "lr=0.1"),
     ("bundled:digits", "bundled:digits"), ("--epochs", "--epochs"), ("~/flowers", "flowers"), ("", "''")],
)  # fmt: skip
def test_a_recorded_command_names_no_folder(word: str, kept: str) -> None:
    assert spell_command([word]).replace("'" * (word != ""), "") == f"modelpatch {kept}"


def test_a_patch_made_in_python_records_no_command() -> None:
    assert COMMAND.get() is None or "command" in describe_making()
    assert {"modelpatch", "torch", "torchvision", "timm"} <= describe_making().keys()
