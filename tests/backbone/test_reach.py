"""Downloads without a network: one try, one line, and the cache still counts."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
from huggingface_hub import constants

from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.reach import HUB, find_obstacle, reaching
from modelpatch.errors import BackboneError, UnknownBackboneError


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """No connection, and an empty cache; the list grows by the address of every connection that is tried."""
    tried: list[Any] = []

    def refuse(address: Any, *rest: Any, **more: Any) -> Any:
        tried.append(address)
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: refuse(address))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
    return tried


@pytest.mark.parametrize(
    ("spec", "host"),
    [
        ("timm:test_resnet.r160_in1k", "huggingface.co"),
        ("timm:hf-hub:someone/something", "huggingface.co"),
        ("torchvision:shufflenet_v2_x0_5", "download.pytorch.org"),
    ],
)
def test_a_published_name_without_a_network_is_one_try_and_one_line(blocked: list[Any], spec: str, host: str) -> None:
    with pytest.raises(BackboneError) as caught:
        load_backbone(spec)
    text = str(caught.value)
    assert spec in text
    assert f"{host} cannot be reached: Network is unreachable" in text
    assert "--weights PATH" in text
    assert "\n" not in text
    assert [address[0] for address in blocked[:1]] == [host]
    assert len(blocked) <= 2  # ours, and of a library without an offline switch one of its own


def test_what_is_wrong_with_the_name_is_said_first(blocked: list[Any]) -> None:
    with pytest.raises(UnknownBackboneError, match="no model 'resnet5000'"):
        load_backbone("timm:resnet5000")
    load_backbone("timm:test_resnet", pretrained=False)
    assert len(blocked) == 1  # random weights need no network


def test_the_switch_of_the_hub_is_put_back(blocked: list[Any]) -> None:
    with reaching(HUB, "timm:x"):
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(ValueError, match="another"), reaching(HUB, "timm:x"):
        raise ValueError("another")
    assert not constants.HF_HUB_OFFLINE


def test_offline_mode_tries_no_connection(blocked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match="offline mode is on"):
        load_backbone("timm:test_resnet.r160_in1k")
    assert not blocked


def test_a_resolver_that_never_answers_does_not_hold_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *rest: released.wait())
    monkeypatch.setattr("modelpatch.backbone.reach.PATIENCE", 0.01)
    assert "no answer from" in find_obstacle("https://example.invalid")
    released.set()


def test_a_proxy_is_tried_in_place_of_the_host(blocked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert find_obstacle("https://huggingface.co")
    assert blocked == [("proxy.example", 3128)]
