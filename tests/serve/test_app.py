"""The routes: answers, patches, tokens, limits, and an error that helps for everything else."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.routing import APIRoute

from conftest import draft_patch
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import encode_patch
from modelpatch.serve import app as application
from modelpatch.serve import question
from modelpatch.serve.problems import MEDIA_TYPE, Problem
from modelpatch.serve.schemas import PIXEL
from modelpatch.store.store import Store
from serving import TOKEN, Serving, close, damage, drafts, fill, network, picture, serving, wait_until

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for all tests that change nothing."""
    network(1)
    with serving(fill(tmp_path_factory.mktemp("steady"))) as running:
        yield running


@pytest.fixture
def there(steady: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=steady.url, timeout=300) as opened:
        yield opened


@pytest.fixture
def http(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300) as opened:
        yield opened


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (f"{place}.png", image)) for place, image in enumerate(images)]


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem, which says what to do."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == MEDIA_TYPE
    problem = answer.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return dict(problem)


# answers ----------------------------------------------------------------------------------------------------


def test_every_task_answers_as_its_patch_alone(there: httpx.Client, steady: Serving, image: bytes) -> None:
    answer = there.post("/v1/predict", files=files(image), data={"top": "9"}).json()
    (found,) = answer["images"]
    assert found["answers"].keys() == {"base", *drafts()}
    for name, patch in drafts().items():
        expected = steady.truth(patch, image)
        top = found["answers"][name]["top"]
        assert [guess["class"] for guess in top] == [patch.task.classes[guess["index"]] for guess in top]
        assert all(close(guess["probability"], expected[guess["index"]]) for guess in top)
        assert found["answers"][name]["version"] == steady.store.resolve(name).hash


def test_json_and_forms_say_the_same(there: httpx.Client, image: bytes) -> None:
    question = {"images": [base64.b64encode(image).decode()], "tasks": ["flowers", "birds@latest"], "top": 2}
    as_json = there.post("/v1/predict", json=question).json()
    as_form = there.post(
        "/v1/predict", files=files(image), data={"tasks": ["flowers", "birds@latest"], "top": 2}
    ).json()
    commas = there.post("/v1/predict", files=files(image), data={"tasks": "flowers, birds@latest", "top": "2"}).json()
    as_body = there.post(
        "/v1/predict?tasks=flowers,birds@latest&top=2", content=image, headers={"content-type": "image/png"}
    ).json()
    assert as_json == as_form == commas == as_body
    assert as_json["images"][0]["answers"].keys() == {"flowers", "birds@latest"}


def test_every_image_may_have_a_task_of_its_own(there: httpx.Client, steady: Serving) -> None:
    names = ["birds", "base", "flowers", "birds"]
    images = [picture(seed) for seed in range(4)]
    answer = there.post("/v1/predict", files=files(*images), data={"per_image": names, "top": 1}).json()
    for image, name, found in zip(images, names, answer["images"], strict=True):
        (guess,) = found["answers"].pop(name)["top"]
        assert not found["answers"]
        if name != "base":
            assert close(guess["probability"], max(steady.truth(drafts()[name], image)))


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"tasks": ["nobody"]}, 404),
        ({"tasks": ["flowers@nothing"]}, 404),
        ({"tasks": ["../etc/passwd"]}, 422),
        ({"tasks": ["Flowers"]}, 422),
        ({"tasks": []}, 422),
        ({"tasks": ["flowers"] * 2, "per_image": ["flowers"]}, 422),
        ({"per_image": ["flowers", "birds"]}, 422),
        ({"top": 0}, 422),
        ({"top": "3"}, 422),
        ({"images": []}, 422),
        ({"images": ["!"]}, 422),
        ({"images": [""]}, 422),
        ({"images": [PIXEL] * 65}, 413),
        ({"tasks": [f"t{n}" for n in range(65)]}, 413),
        ({"more": 1}, 422),
    ],
    ids=str,
)
def test_a_question_that_makes_no_sense_is_refused(there: httpx.Client, change: dict[str, Any], status: int) -> None:
    problem = refused(there.post("/v1/predict", json={"images": [PIXEL], **change}), status)
    assert problem["instance"] == "/v1/predict"


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 422),
        (b"x", "text/plain", 415),
        (b"", "", 415),
        (b"x", "multipart/form-data", 400),
        (b"x", "multipart/form-data; boundary=" + "b" * 4000, 400),
        (
            b'--b\r\nContent-Disposition: form-data; name="images"\r\n\r\nx\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            422,
        ),
        (b"\xff" * 100, "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"", "image/png", 422),
        (b"x", "image/jpeg", 422),
        (
            b'--b\r\nContent-Disposition: form-data; name="tasks"; filename="x"\r\n\r\nx\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            422,
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_that_cannot_be_read_is_refused(there: httpx.Client, content: bytes, kind: str, status: int) -> None:
    refused(there.post("/v1/predict", content=content, headers={"content-type": kind}), status)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("?tasks=flowers", "application/json"),
        ("?top=0", "image/png"),
        ("?images=flowers", "image/png"),
        ("?per_image=flowers,birds", "image/png"),
        ("?colour=red", "image/png"),
    ],
)
def test_words_in_the_address_go_with_one_image_and_are_checked(
    there: httpx.Client, image: bytes, address: str, kind: str
) -> None:
    refused(there.post(f"/v1/predict{address}", content=image, headers={"content-type": kind}), 422)


def test_a_broken_image_is_named(there: httpx.Client, image: bytes) -> None:
    problem = refused(there.post("/v1/predict", files=files(image, image[:50]), data={"tasks": "flowers"}), 422)
    assert problem["image"] == 1


def test_bytes_are_counted_as_they_arrive(store: Store) -> None:
    with serving(store, body_bytes=100_000) as server, httpx.Client(base_url=server.url) as http:
        flood = (b"x" * 10_000 for _ in range(10_000))
        refused(http.post("/v1/predict", content=flood, headers={"content-type": "application/json"}), 413)
        said = http.post("/v1/predict", content=b"x" * 100_001, headers={"content-type": "application/json"})
        refused(said, 413)


def test_silence_is_not_waited_for(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question, "SILENCE", 0.2)
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=300) as slow:
        slow.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_what_takes_too_long_ends_at_the_deadline(store: Store, image: bytes) -> None:
    over = threading.Event()
    with serving(store, deadline=0.3) as server, httpx.Client(base_url=server.url, timeout=300) as http:
        whole = server.service.engine.answer
        server.service.engine.answer = lambda *given: (over.wait(300), whole(*given))[1]  # type: ignore
        answer = http.post("/v1/predict", files=files(image), data={"tasks": "flowers"})
        over.set()
        refused(answer, 503)
        assert answer.headers["retry-after"] == "1"


def test_all_leaves_out_what_cannot_be_loaded_and_says_so(store: Store, image: bytes) -> None:
    store.publish("stranger", draft_patch(network(1), LinearProbe()))
    with serving(store) as server, httpx.Client(base_url=server.url) as http:
        answer = http.post("/v1/predict", files=files(image)).json()
        assert answer["images"][0]["answers"].keys() == {"base", *drafts()}
        assert answer["refused"].keys() == {"stranger"}
        assert answer["refused"]["stranger"]["status"] == 409
        refused(http.post("/v1/predict", files=files(image), data={"tasks": "stranger"}), 409)
        listed = {patch["name"]: patch for patch in http.get("/v1/patches").json()["patches"]}
        assert not listed["stranger"]["fits"]
        assert listed["stranger"]["problem"]["status"] == 409


def test_a_tag_does_not_move_to_another_backbone_and_publishing_what_fits_mends_it(
    store: Store,
) -> None:
    store.publish("flowers", draft_patch(network(1), LinearProbe()), tags=("next",), other_backbone=True)
    with serving(store) as server, server.client() as client:
        with pytest.raises(Problem) as raised:
            client.tag("flowers", "latest", "next")
        assert (raised.value.kind, raised.value.status) == ("wrong-backbone", 409)
        store.tag("flowers", "latest", "flowers@next", other_backbone=True)
        client.publish("flowers", drafts()["flowers"])
        assert store.load("flowers").content_hash == drafts()["flowers"].content_hash


def test_of_several_tasks_those_that_can_answer_do(store: Store, image: bytes) -> None:
    store.publish("stranger", draft_patch(network(1), LinearProbe()))
    named = "flowers,stranger,nobody,flowers@latest"
    with serving(store) as server, httpx.Client(base_url=server.url) as http:
        answer = http.post("/v1/predict", files=files(image), data={"tasks": named}).json()
        assert list(answer["images"][0]["answers"]) == ["flowers", "flowers@latest"]
        assert {name: problem["status"] for name, problem in answer["refused"].items()} == {
            "stranger": 409,
            "nobody": 404,
        }
        each = http.post("/v1/predict", files=files(image, image), data={"per_image": "stranger,birds"}).json()
        assert [list(one["answers"]) for one in each["images"]] == [[], ["birds"]]
        plan = http.get("/v1/plan", params={"tasks": named}).json()
        assert plan["tasks"] == ["flowers", "flowers@latest"]
        assert plan["refused"].keys() == {"stranger", "nobody"}
        refused(http.get("/v1/plan", params={"tasks": "stranger,nobody"}), 404)
        with server.client() as client, pytest.raises(Problem, match="backbone"):
            client.predict([image], ["flowers", "stranger"])


def test_a_damaged_copy_is_the_fault_of_its_name_alone(store: Store, image: bytes) -> None:
    for name in ("copy", "zebras"):  # before and behind the healthy name
        store.publish(name, drafts()["flowers"])
        damage(store, name)
    with serving(store) as server, httpx.Client(base_url=server.url) as http:
        problem = refused(http.post("/v1/predict", files=files(image), data={"tasks": "copy"}), 422)
        assert (problem["detail"] + problem["advice"]).count("ublish the patch again") == 1
        listed = {patch["name"]: patch for patch in http.get("/v1/patches").json()["patches"]}
        assert listed["copy"]["problem"]["status"] == 422
        assert listed["flowers"]["problem"] is None
        assert http.post("/v1/predict", files=files(image), data={"tasks": "flowers"}).status_code == 200
    store.remove(store.resolve("flowers"), force=True)
    with serving(store) as server, httpx.Client(base_url=server.url) as http:
        answer = http.post("/v1/predict", files=files(image)).json()
        assert answer["images"][0]["answers"].keys() == {"base", *drafts()} - {"flowers"}
        assert answer["refused"].keys() == {"copy", "zebras"}


def test_a_patch_that_fails_on_an_image_is_left_out_of_all(store: Store, image: bytes) -> None:
    with serving(store) as server, httpx.Client(base_url=server.url) as http:
        whole, bad = server.service.engine.answer, store.resolve("birds").hash

        def spoiled(*given: Any) -> dict[str, torch.Tensor]:
            return {task: logits * float("nan") if task == bad else logits for task, logits in whole(*given).items()}

        server.service.engine.answer = spoiled  # type: ignore
        answer = http.post("/v1/predict", files=files(image)).json()
        assert answer["refused"].keys() == {"birds"}
        assert answer["images"][0]["answers"].keys() == {"base", *drafts()} - {"birds"}


def test_all_is_answered_in_passes_that_fit(store: Store, image: bytes) -> None:
    largest = max(version.nbytes for version in store.list())
    for limits in ({"tasks": 2}, {"cache_bytes": 2 * largest}):
        with serving(store, **limits) as server, server.client() as client:
            (answers,) = client.predict([image], top=1000)
            assert list(answers) == ["base", *sorted(drafts())]
            for name, patch in drafts().items():
                assert close(max(value for _, value in answers[name]), max(server.truth(patch, image)))


def test_one_patch_larger_than_the_cache_is_left_out_of_all(store: Store, image: bytes) -> None:
    largest = max(store.list(), key=lambda version: version.nbytes)
    with serving(store, cache_bytes=largest.nbytes - 1) as server, httpx.Client(base_url=server.url) as http:
        answer = http.post("/v1/predict", files=files(image)).json()
        assert answer["refused"][largest.name]["status"] == 413
        assert answer["images"][0]["answers"].keys() == {"base", *drafts()} - {largest.name}


def test_the_plan_is_that_of_the_engine(http: httpx.Client, server: Serving, image: bytes) -> None:
    names = ["base", "signs", "birds"]
    plan = http.get("/v1/plan", params={"tasks": ",".join(names), "images": 4}).json()
    engine = server.service.engine
    keys = ["base", *(server.store.resolve(name).hash for name in names[1:])]
    expected = engine.plan_for(4, keys)
    assert (plan["flops"], plan["separate_flops"]) == (expected.flops, expected.separate_flops)
    assert plan["shared"] == pytest.approx(expected.shared, abs=1e-6)

    def walk(nodes: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for node in nodes:
            yield node
            yield from walk(node["children"])

    assert sum(node["flops"] for node in walk(plan["tree"])) == expected.flops
    assert sorted(task for node in walk(plan["tree"]) for task in node["tasks"]) == sorted(names)
    assert set(http.get("/v1/plan").json()["tasks"]) == {"base", "signs", "birds"}  # those that are resident


# patches ----------------------------------------------------------------------------------------------------


def test_a_patch_is_published_tagged_and_removed(server: Serving, image: bytes) -> None:
    first, second = (draft_patch(network(), ScaleBias(), classes=3, seed=seed) for seed in (11, 12))
    with server.client() as client:
        old = client.publish("cars", first)
        assert old["resident"]
        assert server.store.resolve("cars").hash == old["version"]
        client.tag("cars", "prod")
        new = client.publish("cars", second)
        found = client.ask([image], ["cars", "cars@prod", f"cars@{old['version'][:12]}"])["images"][0]["answers"]
        assert [answer["version"] for answer in found.values()] == [new["version"], old["version"], old["version"]]
        assert close(found["cars@prod"]["top"][0]["probability"], max(server.truth(first, image)))
        assert len(client.versions("cars")) == 2
        client.tag("cars", "prod", new["version"][:10])
        client.remove(f"cars@{old['version']}")
        assert [version["version"] for version in client.versions("cars")] == [new["version"]]
        client.remove("cars")
        with pytest.raises(Problem, match="no patch"):
            client.predict([image], ["cars"])


def test_removing_one_name_keeps_what_another_has_resident(server: Serving, image: bytes) -> None:
    server.store.publish("copy", drafts()["flowers"])
    with server.client() as client:
        client.predict([image], ["copy"])
        client.remove("copy")
        listed = {patch["name"]: patch["resident"] for patch in client.patches()}
        assert listed["flowers"]
        assert "copy" not in listed
        client.remove("flowers")
        assert not server.service.cache.sizes


def test_an_upload_that_is_no_good_changes_nothing(server: Serving) -> None:
    before = server.store.list()
    good = encode_patch(draft_patch(network(), ScaleBias()))
    uploads = {
        422: good[:-1],
        409: encode_patch(draft_patch(network(1), ScaleBias())),
    }
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=300) as http:
        for status, data in uploads.items():
            refused(http.put("/v1/patches/flowers", content=data), status)
        refused(http.put("/v1/patches/base", content=good), 422)
        refused(http.put("/v1/patches/.hidden", content=good), 422)
        assert http.put("/v1/patches/..%2f..%2fetc", content=good).status_code in (404, 405)
    assert server.store.list() == before


def test_a_patch_larger_than_allowed_is_refused(store: Store) -> None:
    patch = draft_patch(network(), ScaleBias())
    with (
        serving(store, patch_bytes=1000) as server,
        server.client() as client,
        pytest.raises(Problem, match="larger than"),
    ):
        client.publish("cars", patch)


def test_removing_a_tagged_version_needs_force(server: Serving) -> None:
    version = server.store.resolve("flowers")
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        refused(http.delete(f"/v1/patches/flowers@{version.hash}"), 409)
        assert http.delete(f"/v1/patches/flowers@{version.hash}?force=true").status_code == 204
        refused(http.get("/v1/patches/flowers"), 404)


def test_pages_of_the_list_join_up(there: httpx.Client) -> None:
    names: list[str] = []
    after: str | None = ""
    while after is not None:
        page = there.get("/v1/patches", params={"after": after, "limit": 3}).json()
        names, after = names + [patch["name"] for patch in page["patches"]], page["next"]
    assert names == sorted(drafts())


def test_changes_others_make_are_seen(server: Serving, http: httpx.Client, image: bytes) -> None:
    http.post("/v1/predict", files=files(image), data={"tasks": "flowers"})
    newer = server.store.publish("flowers", draft_patch(network(), ScaleBias(), classes=3, seed=99))

    def version() -> str:
        answer = http.post("/v1/predict", files=files(image), data={"tasks": "flowers"}).json()
        return str(answer["images"][0]["answers"]["flowers"]["version"])

    wait_until(lambda: version() == newer.hash)


# tokens -----------------------------------------------------------------------------------------------------


def admin_routes() -> list[tuple[str, str]]:
    """Every route but those that only look, from the application's own table."""
    routers = (application.answers, application.patches, application.admin, application.others)
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    return [
        (method, route.path.replace("{name}", "flowers"))
        for route in routes
        for method in sorted(route.methods or ())
        if method not in ("GET", "HEAD") and route.path != "/v1/predict"
    ]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        (f"Basic {TOKEN}", 401),
        ("Bearer wrong", 403),
        (f"Bearer {TOKEN}x", 403),
        (f"Bearer {TOKEN[:-1]}", 403),
        ("Bearer t\u00f6ken".encode("latin-1"), 403),
    ],
)
def test_every_admin_route_needs_the_token(steady: Serving, header: str | bytes | None, status: int) -> None:
    before = steady.store.list()
    routes = admin_routes()
    assert {method for method, _ in routes} == {"PUT", "POST", "DELETE"}
    with httpx.Client(base_url=steady.url) as http:
        for method, path in routes:
            answer = http.request(method, path, headers={} if header is None else {"Authorization": header})
            refused(answer, status)
    assert steady.store.list() == before


def test_without_a_token_admin_verbs_are_off(store: Store) -> None:
    with serving(store, token=None) as server, httpx.Client(base_url=server.url) as http:
        for method, path in admin_routes():
            refused(http.request(method, path, headers={"Authorization": "Bearer None"}), 403)


ADMIN_HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def test_a_store_that_is_lost_is_told_and_none_is_made_in_its_place(store: Store, tmp_path: Path) -> None:
    place, kept = Path(store.url), tmp_path / "kept"
    data = store.read("flowers@latest")
    with serving(store) as server, httpx.Client(base_url=server.url) as http:
        place.rename(kept)
        wait_until(lambda: http.get("/readyz").status_code == 503)
        answer = http.put("/v1/patches/new", content=data, headers=ADMIN_HEADERS)
        refused(answer, 503)
        assert "makes no new one" in answer.json()["advice"]
        assert not place.exists()
        kept.rename(place)
        wait_until(lambda: http.get("/readyz").status_code == 200)
        assert http.put("/v1/patches/new", content=data, headers=ADMIN_HEADERS).status_code == 201


def test_the_first_patch_makes_a_store_where_there_was_none(store: Store, tmp_path: Path) -> None:
    with serving(Store(str(tmp_path / "none yet"))) as server, httpx.Client(base_url=server.url) as http:
        assert http.get("/readyz").status_code == 200
        assert (
            http.put("/v1/patches/new", content=store.read("flowers@latest"), headers=ADMIN_HEADERS).status_code == 201
        )


def test_admin_verbs_and_wrong_tokens_leave_a_line(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "modelpatch.audit")
    data = store.read("flowers@latest")
    with serving(store) as server, httpx.Client(base_url=server.url) as http:
        for token, status in (("Bearer another", 403), ("", 401), (f"Bearer {TOKEN}", 201)):
            answer = http.put("/v1/patches/new", content=data, headers={"Authorization": token} if token else {})
            assert answer.status_code == status
        refused(http.delete("/v1/patches/nobody", headers=ADMIN_HEADERS), 404)
        http.get("/v1/patches/new%0Aforged", headers=ADMIN_HEADERS)
    assert [record.getMessage() for record in caplog.records if record.name == "modelpatch.audit"] == [
        "PUT /v1/patches/new from 127.0.0.1: wrong-token",
        "PUT /v1/patches/new from 127.0.0.1: no-token",
        "PUT /v1/patches/new from 127.0.0.1: done",
        "DELETE /v1/patches/nobody from 127.0.0.1: unknown-patch",
    ]


# health and the rest ----------------------------------------------------------------------------------------


def test_health_and_counts(http: httpx.Client, image: bytes) -> None:
    assert http.get("/healthz").json() == {"status": "alive"}
    assert http.get("/readyz").json() == {"status": "ready"}
    for _ in range(2):
        http.post("/v1/predict", files=files(image, image), data={"tasks": "flowers,signs"})
    http.post("/v1/predict", files=files(image), data={"tasks": "nobody"})
    lines = http.get("/metrics").text.splitlines()
    counts = dict(line.rpartition(" ")[::2] for line in lines if not line.startswith("#"))
    assert counts["modelpatch_cache_misses_total"] == "2.0"
    assert counts["modelpatch_cache_hits_total"] == "2.0"
    assert counts['modelpatch_loads_total{outcome="loaded"}'] == "2.0"
    assert counts["modelpatch_load_seconds_count"] == "2.0"
    assert counts["modelpatch_evictions_total"] == "0.0"
    assert counts["modelpatch_queue_seconds_count"] == "4.0"
    assert float(counts["modelpatch_batch_images_sum"]) == 4
    assert float(counts["modelpatch_shared_fraction_count"]) == float(counts["modelpatch_batch_images_count"])
    assert counts["modelpatch_resident_patches"] == "2.0"
    assert counts['modelpatch_requests_total{method="POST",route="/v1/predict",status="404"}'] == "1.0"


def test_what_is_not_there_is_a_problem_too(there: httpx.Client) -> None:
    refused(there.get("/nothing"), 404)
    refused(there.get("/page/../app.py"), 404)
    refused(there.get("/page/%2e%2e%2fapp.py"), 404)
    refused(there.patch("/v1/predict"), 405)


def test_errors_nobody_foresaw_tell_strangers_nothing(server: Serving, http: httpx.Client, image: bytes) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError("secret words")

    server.service.engine.answer = fail  # type: ignore
    problem = refused(http.post("/v1/predict", files=files(image), data={"tasks": "flowers"}), 500)
    assert "secret" not in json.dumps(problem)


def test_the_page_asks_nobody_else(there: httpx.Client) -> None:
    page = there.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    sources = page.text + there.get("/page/page.css").text + there.get("/page/page.js").text
    assert "https://" not in sources
    assert sources.count("http://") == sources.count("http://www.w3.org/2000/svg")


def test_the_stores_place_is_not_told(steady: Serving, there: httpx.Client) -> None:
    assert steady.store.url not in there.get("/v1/patches/nobody").text


def test_the_stores_place_is_not_told_where_a_patch_cannot_be_read(store: Store, image: bytes) -> None:
    version = store.resolve("birds")
    (file,) = Path(store.url).rglob(f"birds/{version.hash}.safetensors")
    file.unlink()
    file.mkdir()  # reading it is an error of the file system's
    with serving(store) as server, httpx.Client(base_url=server.url) as http:
        problem = refused(http.post("/v1/predict", files=files(image), data={"tasks": "birds"}), 503)
        assert problem["detail"] == "The store cannot be read or written."
        assert store.url not in json.dumps(problem)
