"""A server that requires a signer answers with what that signer signed and says by name why not with the rest."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from modelpatch.patch.envelope import make_statement, read_beside, signature_path
from modelpatch.patch.keys import make_key, read_private_key, sign
from modelpatch.patch.signing import Signers
from modelpatch.serve.client import Client
from modelpatch.serve.problems import Problem
from modelpatch.store.store import Store
from serving import TOKEN, Serving, drafts, picture, serving

pytestmark = pytest.mark.service
pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`flowers` signed by alice, `birds` by bob, `signs` by nobody, and a store that took all three."""
    folder = tmp_path_factory.mktemp("signed")
    store = Store(folder / "store")
    for name, signer in {"flowers": "alice", "birds": "bob", "signs": None}.items():
        path = drafts()[name].save(folder / f"{name}.safetensors")
        if signer is not None:
            make_key(folder / signer)
            statement = make_statement(path.read_bytes(), path.name, {})
            signature_path(path).write_bytes(sign(statement, read_private_key(folder / signer)))
        store.publish(name, path)
    return folder


@pytest.fixture(scope="module")
def strict(folder: Path) -> Iterator[Serving]:
    """A server of that store that requires alice."""
    signers = Signers.of(folder / "alice.pub")
    with serving(Store(folder / "store", signers=signers), signers=signers) as running:
        yield running


def test_answers_are_of_signed_patches_and_the_others_are_refused_by_name(strict: Serving) -> None:
    with strict.client() as client:
        said = client.ask([picture()])
        assert said["images"][0]["answers"].keys() == {"base", "flowers"}
        refused = {name: (problem["status"], problem["detail"]) for name, problem in said["refused"].items()}
        assert refused.keys() == {"birds", "signs"}
        assert refused["birds"][0] == refused["signs"][0] == 403
        assert "is signed by" in refused["birds"][1]
        assert "a signature by alice is required" in refused["birds"][1]
        assert "has no signature" in refused["signs"][1]
        with pytest.raises(Problem, match="has no signature"):
            client.predict([picture()], ["signs"])


def test_the_list_says_who_signed(strict: Serving, folder: Path) -> None:
    with strict.client() as client:
        said = {patch["name"]: (patch["signers"], patch["trusted"]) for patch in client.patches()}
    bob = Signers.of(folder / "bob.pub").known[0].id[:16]
    assert {name: said[name] for name in ("flowers", "birds", "signs")} == {
        "flowers": (["alice"], True),
        "birds": ([bob], False),
        "signs": ([], False),
    }


def test_a_server_without_required_signers_tells_what_signatures_claim(folder: Path) -> None:
    with serving(Store(folder / "store")) as running, running.client() as client:
        said = {patch["name"]: (patch["signers"], patch["trusted"]) for patch in client.patches()}
        assert said["birds"] == ([Signers.of(folder / "bob.pub").known[0].id[:16]], None)
        assert client.ask([picture()])["refused"] == {}


def test_the_client_publishes_a_file_with_the_signature_beside_it(strict: Serving, folder: Path) -> None:
    with strict.client() as client:
        made = client.publish("fresh", folder / "flowers.safetensors")
        assert (made["signers"], made["trusted"]) == (["alice"], True)
        assert client.predict([picture()], ["fresh"])
        for name, words in {"birds": "a signature by alice is required", "signs": "has no signature"}.items():
            with pytest.raises(Problem, match=words) as refusal:
                client.publish("other", folder / f"{name}.safetensors")
            assert (refusal.value.status, refusal.value.kind) == (403, "not-signed")
        stolen = read_beside(folder / "flowers.safetensors")
        with pytest.raises(Problem, match="is of a file flowers") as refusal:
            client.publish("other", folder / "signs.safetensors", signature=stolen)
        assert refusal.value.status == 422
        flipped = bytearray(read_beside(folder / "flowers.safetensors") or b"")
        place = flipped.index(b'"sig":"') + 10
        flipped[place] = ord("B" if flipped[place] == ord("A") else "A")
        with pytest.raises(Problem, match="not what alice signed"):
            client.publish("other", folder / "flowers.safetensors", signature=bytes(flipped))
        with pytest.raises(Problem, match="no patch 'other'"):
            client.versions("other")


def test_curl_publishes_a_signed_patch(strict: Serving, folder: Path) -> None:
    path = folder / "flowers.safetensors"
    encoded = base64.b64encode(signature_path(path).read_bytes()).decode()
    command = ["curl", "-sS", "-T", str(path), "-H", f"Authorization: Bearer {TOKEN}", "-H", "Expect:"]
    url = f"{strict.url}/v1/patches/curled"
    try:
        refused = subprocess.run([*command, url], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("curl is not installed")
    assert "urn:modelpatch:not-signed" in refused.stdout
    made = subprocess.run([*command, "-H", f"Modelpatch-Signature: {encoded}", url], capture_output=True, text=True)
    assert '"signers":["alice"]' in made.stdout


def test_a_header_that_is_no_signature_is_named(strict: Serving, folder: Path) -> None:
    with httpx.Client(base_url=strict.url, headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        for header, status in {"%%%": 422, base64.b64encode(b"{}").decode(): 422, "A" * 40_000: 422}.items():
            data = (folder / "flowers.safetensors").read_bytes()
            answer = http.put("/v1/patches/odd", content=data, headers={"Modelpatch-Signature": header})
            assert answer.status_code == status, answer.text
    with Client(strict.url) as client, pytest.raises(Problem, match="no patch 'odd'"):
        client.versions("odd")
