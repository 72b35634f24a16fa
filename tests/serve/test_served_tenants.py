"""Tenants of a running server: keys, budgets, and answers for one while another floods it."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from modelpatch.serve.tenants import Tenants
from modelpatch.store.store import Store
from serving import TOKEN, picture, serving, wait_until

httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.service
KEYS = {"alice": "alice-has-this-key", "bob": "bob-has-another-key"}
PNG = {"content-type": "image/png"}


def tenants(folder: Path, more: str = "") -> Tenants:
    file = folder / "tenants.toml"
    rows = (f'[{name}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n' for name, key in KEYS.items())
    file.write_text("".join(rows) + more, encoding="utf-8")
    return Tenants.read(file)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys_are_checked_and_strangers_kept_out(store: Store, tmp_path: Path) -> None:
    known = tenants(tmp_path, "[strangers]\nadmitted = false\n")
    with serving(store, tenants=known) as server, httpx.Client(base_url=server.url, timeout=300) as http:
        for headers, status, kind in (
            ({}, 401, "no-key"),
            (bearer("nobody's"), 403, "wrong-key"),
            ({"authorization": "Basic eDp5"}, 401, "no-key"),
            (bearer(KEYS["bob"]), 200, ""),
            (bearer(TOKEN), 200, ""),
        ):
            answer = http.post("/v1/predict?tasks=signs", content=picture(), headers=PNG | headers)
            assert answer.status_code == status, answer.text
            assert answer.json().get("type", ":").rpartition(":")[2] == kind
            assert ("www-authenticate" in answer.headers) == (status == 401)
        assert http.get("/v1/plan").status_code == 401
        counts = http.get("/metrics").text
        assert 'modelpatch_macs_total{tenant="bob"}' in counts
        assert 'tenant="admin"' in counts
        data = store.read(store.resolve("signs"))
        assert http.put("/v1/patches/new", content=data, headers=bearer(TOKEN)).status_code == 201
        assert http.put("/v1/patches/new", content=b"x", headers=bearer(KEYS["bob"])).status_code == 403


def test_a_budget_that_is_used_up_says_until_when(store: Store, tmp_path: Path) -> None:
    known = tenants(tmp_path, "gmacs = 0.000001\n")  # of bob, the last of the file: a thousand multiply-adds a second
    with serving(store, tenants=known) as server, httpx.Client(base_url=server.url, timeout=300) as http:

        def ask(name: str) -> Any:
            return http.post("/v1/predict?tasks=base", content=picture(), headers=PNG | bearer(KEYS[name]))

        assert ask("bob").status_code == 200
        spent = server.service.batcher._prices["base",] / 1000
        answer = ask("bob")
        assert answer.status_code == 429
        assert answer.json()["type"].endswith("over-budget")
        assert spent - 5 - 300 <= int(answer.headers["retry-after"]) <= spent - 5 + 1
        assert ask("alice").status_code == 200


def test_a_flood_leaves_places_and_turns_for_others(store: Store, tmp_path: Path) -> None:
    with (
        serving(store, tenants=tenants(tmp_path), queue=64, images=16) as server,
        httpx.Client(base_url=server.url, timeout=300) as http,
    ):
        stop, seen = threading.Event(), Counter[int]()
        images = [("images", (f"{n}.png", picture(n), "image/png")) for n in range(16)]

        def flood() -> None:
            with httpx.Client(base_url=server.url, timeout=300) as greedy:
                while not stop.is_set():
                    seen[greedy.post("/v1/predict", files=images, headers=bearer(KEYS["bob"])).status_code] += 1

        threads = [threading.Thread(target=flood) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: seen[200] > 0)
            for number in range(8):
                answer = http.post(
                    "/v1/predict?tasks=signs", content=picture(number), headers=PNG | bearer(KEYS["alice"])
                )
                assert answer.status_code == 200, answer.text
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert seen.keys() <= {200, 429}
        assert seen[200]
