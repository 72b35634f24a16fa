"""Patches travel to the hub and back through its real client, over HTTP, against a hub that this file runs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from conftest import draft_patch
from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import DamagedPatchError, PatchError
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch, encode_patch
from modelpatch.patch.hub import FILE
from tolerance import close

REPO = "someone/flowers"
TOKEN = "hf_test"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """What the client needs of the hub: repositories of files, large ones uploaded apart, a token, one commit each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def reply(self, code: int, body: bytes = b"", head_only: bool = False, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head_only:
            self.wfile.write(body)

    def reply_json(self, value: object, code: int = 200) -> None:
        self.reply(code, json.dumps(value).encode(), Content_Type="application/json")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply_json({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.reply_json({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": f, "shouldIgnore": False, "uploadMode": "lfs" if f == FILE else "regular"} for f in files]
            self.reply_json({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            uploads = [{**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in objects]
            self.reply_json({"transfer": "basic", "objects": uploads})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.reply_json({"error": f"no such page: {self.path}"}, 404)

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.server.repos
        self.server.repos.setdefault(name, {})
        self.server.settings.setdefault(name, asked)
        self.reply_json({"url": f"{self.server.url}/{name}", "name": name, "id": name}, 409 if known else 200)

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "lfsFile":
                self.server.repos[repo][value["path"]] = self.server.objects[value["oid"]]
            else:
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
        url = f"{self.server.url}/{repo}/commit/{COMMIT}"
        self.reply_json({"success": True, "commitUrl": url, "commitOid": COMMIT, "commitMessage": "", "hookOutput": ""})

    def do_PUT(self) -> None:
        body = self.body()
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.server.objects[self.path.rpartition("/")[2]] = body
        self.reply(200)

    def do_HEAD(self) -> None:
        self.do_GET(head_only=True)

    def do_GET(self, head_only: bool = False) -> None:
        match = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", self.path)
        repo = self.server.repos.get(match[1]) if match else None
        if match is None or repo is None:
            self.reply(404, b"{}", head_only, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif match[2] not in ("main", COMMIT):
            self.reply(404, b"{}", head_only, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        elif match[3] not in repo:
            self.reply(404, b"{}", head_only, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            data = repo[match[3]]
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self.server.downloads += [] if head_only else [self.path]
            self.reply(200, data, head_only, ETag=etag, X_Repo_Commit=COMMIT)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub that the client's settings point to; the client's cache and tokens are in `tmp_path`."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def patch(tiny: Backbone) -> Patch:
    return draft_patch(tiny, ScaleBias()).with_metrics(top1=0.87654321, images=24)


def test_a_patch_comes_back_as_it_was_pushed(hub: Hub, patch: Patch, tiny: Backbone) -> None:
    url = patch.push_to_hub(REPO, token=TOKEN)
    assert url == f"{hub.url}/{REPO}/commit/{COMMIT}"
    assert hub.repos[REPO].keys() == {FILE, "README.md"}
    assert hub.repos[REPO][FILE] == encode_patch(patch)
    again = Patch.from_pretrained(REPO)
    assert again.metrics == patch.metrics
    images = torch.randn(2, 3, 16, 16)
    assert close(tiny.patched(again)(images), tiny.patched(patch)(images))


def test_a_second_download_comes_from_the_cache(hub: Hub, patch: Patch, tmp_path: Path) -> None:
    patch.push_to_hub(REPO, token=TOKEN)
    for _ in range(2):
        assert Patch.from_pretrained(REPO, revision=COMMIT).content_hash == patch.content_hash
    assert len(hub.downloads) == 1
    assert any((tmp_path / "cache").rglob(FILE))


def test_a_repository_may_be_private_and_may_be_there_already(hub: Hub, patch: Patch) -> None:
    patch.push_to_hub(REPO, private=True, token=TOKEN)
    assert "private" in (hub.settings[REPO].get("visibility"), hub.settings[REPO].get("private") and "private")
    patch.with_metrics(top1=0.9).push_to_hub(REPO, token=TOKEN)
    assert Patch.from_pretrained(REPO).metrics["top1"] == 0.9
    assert hub.messages == ["Add the patch draft (scale-bias)"] * 2


def test_the_model_card_holds_the_measured_figures_and_how_to_use_the_patch(hub: Hub, patch: Patch) -> None:
    patch.push_to_hub(REPO, token=TOKEN)
    card = hub.repos[REPO]["README.md"].decode()
    assert "| top1 | 0.8765 |" in card
    assert "| images | 24 |" in card
    assert f'Patch.from_pretrained("{REPO}")' in card
    assert f"{len(hub.repos[REPO][FILE]):,} bytes" in card
    assert patch.content_hash in card
    assert patch.backbone.fingerprint.whole in card
    assert "class 0, class 1, class 2" in card
    assert card.startswith('---\nlibrary_name: "modelpatch"\n')


def refusal(error: pytest.ExceptionInfo[PatchError]) -> str:
    """The message, which must fit on one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("token", ["hf_wrong", None])
def test_a_push_without_the_right_token_is_refused_in_one_line(token: str | None, hub: Hub, patch: Patch) -> None:
    with pytest.raises(PatchError) as caught:
        patch.push_to_hub(REPO, token=token)
    assert f"cannot push {FILE} to {REPO}" in refusal(caught)
    assert "401" in refusal(caught)
    assert not hub.repos


def test_a_repository_a_revision_or_a_file_that_is_missing_is_refused_in_one_line(hub: Hub, patch: Patch) -> None:
    with pytest.raises(PatchError) as caught:
        Patch.from_pretrained(REPO)
    assert f"cannot download {FILE} from {REPO}" in refusal(caught)
    assert "404" in refusal(caught)
    patch.push_to_hub(REPO, token=TOKEN)
    with pytest.raises(PatchError) as caught:
        Patch.from_pretrained(REPO, revision="nonsense")
    assert "404" in refusal(caught)
    del hub.repos[REPO][FILE]
    with pytest.raises(PatchError) as caught:
        Patch.from_pretrained(REPO)
    assert "404" in refusal(caught)


def test_an_impossible_name_is_refused_in_one_line(hub: Hub, patch: Patch) -> None:
    for act in (lambda: patch.push_to_hub("a/b/c", token=TOKEN), lambda: Patch.from_pretrained("a/b/c")):
        with pytest.raises(PatchError) as caught:
            act()
        assert "a/b/c" in refusal(caught)


def test_a_hub_that_does_not_answer_is_refused_in_one_line(
    hub: Hub, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:9"  # the discard port, where nothing listens
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again and again, ever slower
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    for act in (lambda: patch.push_to_hub(REPO, token=TOKEN), lambda: Patch.from_pretrained(REPO)):
        with pytest.raises(PatchError) as caught:
            act()
        assert REPO in refusal(caught)


def test_a_damaged_download_is_refused_by_the_name_of_its_repository(hub: Hub, patch: Patch) -> None:
    patch.push_to_hub(REPO, token=TOKEN)
    damaged = bytearray(hub.repos[REPO][FILE])
    damaged[-1] ^= 1
    hub.repos[REPO][FILE] = bytes(damaged)
    with pytest.raises(DamagedPatchError, match=f"{REPO}/{FILE}"):
        Patch.from_pretrained(REPO)
