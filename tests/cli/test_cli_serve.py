"""modelpatch serve: what cannot work is said in one line, before anything listens."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from conftest import Run
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.engine import Engine

pytestmark = pytest.mark.service

pytest.importorskip("fastapi")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-b", "bundled:nothing"], "bundles no backbone"),
        (["-b", "bundled:tiny", "--token", "short"], "shorter than 8"),
        (["-b", "bundled:tiny", "--host", "256.256.256.256"], "cannot listen"),
        (["-b", "bundled:tiny", "--device", "tpu"], "no device"),
        (["-b", "bundled:tiny", "--ray", "--workers", "2"], "--replicas"),
    ],
)
def test_mistakes_end_in_one_line(run: Run, tmp_path: Path, options: list[str], words: str) -> None:
    result = run("serve", tmp_path, "--port", 0, *options)
    assert result.code == 1
    assert words in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("options", [[], ["--ray"]])
def test_a_store_that_is_not_there_is_a_slip_unless_somebody_may_publish(
    run: Run, tmp_path: Path, options: list[str]
) -> None:
    if options:
        pytest.importorskip("ray.serve")
    result = run("serve", tmp_path / "stoer", "-b", "bundled:tiny", "--port", 0, *options)
    assert result.code == 1
    assert f"there is no store at {tmp_path / 'stoer'}" in result.err


def test_a_port_that_is_taken_is_named(run: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", tmp_path, "-b", "bundled:tiny", "--port", port)
    assert result.code == 1
    assert f"port {port}" in result.err


def test_tune_writes_settings_that_an_engine_takes(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    assert "channels_last: " in run("tune", "-b", "bundled:tiny", "-o", path, "--seconds", 0.1).out
    assert Engine(load_backbone("bundled:tiny"), tuning=path).tuning == Tuning.load(path)
    assert "exists already. Give --force" in run("tune", "-b", "bundled:tiny", "-o", path).err
    refused = run("serve", tmp_path, "-b", "bundled:tiny", "--tuning", tmp_path / "nothing.json")
    assert (refused.code, "nothing.json holds no settings" in refused.err) == (1, True)
