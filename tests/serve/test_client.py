"""The client: the server's answers as Python values, its problems as errors, and another try where that helps."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from modelpatch.errors import DataError, ServeError
from modelpatch.serve.client import Client
from modelpatch.serve.problems import Problem
from serving import Serving, close, drafts, picture

pytestmark = pytest.mark.service


def test_paths_bytes_and_pictures_are_the_same_image(
    client: Client, server: Serving, image: bytes, tmp_path: Path
) -> None:
    (tmp_path / "image.png").write_bytes(image)
    given = [tmp_path / "image.png", str(tmp_path / "image.png"), image, Image.open(io.BytesIO(image))]
    answers = client.predict(given, ["flowers"], top=2)
    assert all(answer == answers[0] for answer in answers)
    (name, value), _ = answers[0]["flowers"]
    expected = server.truth(drafts()["flowers"], image)
    assert name == drafts()["flowers"].task.classes[expected.index(max(expected))]
    assert close(value, max(expected))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "PA", "F", "RGBA", "I;16"])
def test_pictures_of_any_mode_can_be_asked_about(client: Client, mode: str) -> None:
    assert client.predict([Image.new(mode, (20, 20))], ["flowers"])[0]["flowers"]


def test_one_task_an_image_and_all_tasks(client: Client) -> None:
    answers = client.predict([picture(1), picture(2)], per_image=["birds", "base"])
    assert [list(answer) for answer in answers] == [["birds"], ["base"]]
    assert client.predict([picture()])[0].keys() == {"base", *drafts()}


def test_the_list_and_the_plan(client: Client) -> None:
    assert [patch["name"] for patch in client.patches()] == sorted(drafts())
    assert client.plan(["base", "signs"])["shared"] == pytest.approx(0.5, abs=0.01)


def test_problems_are_errors_that_say_what_to_do(client: Client, image: bytes) -> None:
    with pytest.raises(Problem, match="nobody") as refusal:
        client.predict([image], ["nobody"])
    assert (refusal.value.status, refusal.value.kind) == (404, "unknown-patch")
    assert refusal.value.advice


def test_mistakes_are_found_before_anything_is_sent() -> None:
    client = Client("http://127.0.0.1:9", retries=0)
    with pytest.raises(ServeError, match="are lists"):
        client.predict("photo.jpg")
    with pytest.raises(ServeError, match="no images"):
        client.predict([])
    with pytest.raises(ServeError, match="no task is named"):
        client.predict([picture()], [])
    with pytest.raises(ServeError, match="no task is named"):
        client.predict([picture()], per_image=[])
    with pytest.raises(ServeError, match="printable ASCII"):
        Client("http://127.0.0.1:9", token="schlüssel")
    for wrong in ("127.0.0.1:8000", "ftp://here", "http://", "http://[1:2"):
        with pytest.raises(ServeError, match="no address of a server"):
            Client(wrong)
    with pytest.raises(DataError, match=r"missing\.jpg"):
        client.predict(["missing.jpg"])
    with pytest.raises(ServeError, match="Is `modelpatch serve` running"):
        client.patches()
    assert not client.ready()


def test_a_busy_server_is_asked_again(server: Serving, image: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, tries = server.service.predict, []

    async def busy(*given: object) -> object:
        tries.append(given)
        if len(tries) < 3:
            raise Problem("too-busy", "Busy.")
        return await whole(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(server.service, "predict", busy)
    with server.client() as client:
        assert client.predict([image], ["flowers"])
    assert len(tries) == 3
    tries.clear()
    with server.client(retries=0) as impatient, pytest.raises(Problem):
        impatient.predict([image], ["flowers"])
