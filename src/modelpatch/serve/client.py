"""A client for the server."""

import json
import random
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode

from PIL import Image

from modelpatch.backbone.preprocessing import image_bytes, open_image
from modelpatch.errors import DataError, ServeError, require
from modelpatch.patch.contents import Patch, encode_patch
from modelpatch.patch.envelope import read_beside
from modelpatch.plain_files import read_plain
from modelpatch.serve.problems import Problem
from modelpatch.tasks.drawing import encode_png

ImageFile = str | Path | bytes | Image.Image
Names = Sequence[str] | None
Answers = dict[str, list[tuple[str, float]]]
CONNECTIONS = 64  # kept open for threads that ask at the same time
PREDICT = "/v1/predict"
SIGNATURE = "Modelpatch-Signature"
AGAIN = ("too-busy", "over-budget", "no-room", "deadline", "stopping")
OCTETS = "application/octet-stream"  # any image; the server looks at its bytes
MODEL = "serve_multiplexed_model_id"  # where Ray Serve looks for a hint which replica has the patch


class Client:
    """A server at `url`. `token` is for admin verbs, or a tenant's key. Questions are asked again up to `retries` times
    where the server is busy or the connection breaks; admin verbs are not. Safe to share between threads.

    Methods raise `Problem` with the server's message, `ServeError` if it cannot be reached.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 60.0, retries: int = 3) -> None:
        urllib3 = require("urllib3", "serve", "asking a server")
        self.url, self.retries = url.rstrip("/"), retries
        self._broken: tuple[type[Exception], ...] = (urllib3.exceptions.HTTPError,)
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ServeError("the token has characters other than printable ASCII. Make one: openssl rand -hex 16")
        try:
            address = urllib3.util.parse_url(self.url)
        except urllib3.exceptions.LocationParseError as error:
            raise ServeError(f"{url!r} is no address of a server: {error}.") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise ServeError(f"{url!r} is no address of a server. Expected http://HOST:PORT.")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = urllib3.PoolManager(maxsize=CONNECTIONS, timeout=timeout, retries=False, headers=headers)

    def predict(
        self, images: Sequence[ImageFile], tasks: Names = None, *, per_image: Names = None, top: int = 3
    ) -> list[Answers]:
        """For every image (a path, encoded bytes, a picture) the `top` classes with probabilities, by task: for `tasks`, for
        one task an image, or for all. Of a segmentation the classes with the shares of the image that they cover, of a
        detection all objects, of several labels those that the image has, of a regression the names with their numbers;
        `ask` has pictures and places as well.

        Raises `DataError` for files that cannot be read, and `Problem` if a task that was named cannot be answered; of all,
        those are left out."""
        said = self.ask(images, tasks, per_image=per_image, top=top)
        if said["refused"] and (tasks is not None or per_image is not None):
            problem = next(iter(said["refused"].values()))
            raise Problem.read(problem["status"], problem)
        return [{task: _pairs(answer, top) for task, answer in image["answers"].items()} for image in said["images"]]

    def ask(
        self, images: Sequence[ImageFile], tasks: Names = None, *, per_image: Names = None, top: int = 3
    ) -> dict[str, Any]:
        """The whole answer behind `predict`: versions, indices, patches that were left out."""
        if isinstance(images, str | Path | bytes | Image.Image) or isinstance(tasks, str) or isinstance(per_image, str):
            raise ServeError("images, tasks and per_image are lists: predict(['photo.jpg'], tasks=['flowers']).")
        if not images:
            raise ServeError("there are no images to ask about: predict(['photo.jpg']).")
        if (tasks is not None and not tasks) or (per_image is not None and not per_image):
            raise ServeError("no task is named. Name some, or leave tasks out to ask all.")
        chosen = {"tasks": tasks, "per_image": per_image}
        words = {"top": str(top), **{name: ",".join(said) for name, said in chosen.items() if said is not None}}
        only = set(tasks or per_image or ())
        headers = {**self._http.headers, **({MODEL: next(iter(only))} if len(only) == 1 else {})}
        files = [_encode(image) for image in images]
        if len(files) == 1:
            return self._send("POST", PREDICT, words, body=files[0], headers={**headers, "Content-Type": OCTETS})
        parts = [("images", (f"image {place}", data)) for place, data in enumerate(files)]
        return self._send("POST", PREDICT, fields=[*parts, *words.items()], headers=headers)

    def patches(self) -> list[dict[str, Any]]:
        """All patches of the store, with their latest versions."""
        found: list[dict[str, Any]] = []
        after: str | None = ""
        while after is not None:
            page = self._send("GET", "/v1/patches", {"after": after})
            found, after = found + page["patches"], page["next"]
        return found

    def versions(self, name: str) -> list[dict[str, Any]]:
        """All versions of a patch."""
        return list(self._send("GET", f"/v1/patches/{quote(name, '@')}")["versions"])

    def plan(self, tasks: Names = None, images: int = 1) -> dict[str, Any]:
        """The work that tasks share in one pass, see `GET /v1/plan`."""
        chosen = {} if tasks is None else {"tasks": ",".join(tasks)}
        return self._send("GET", "/v1/plan", {"images": images, **chosen})

    def publish(
        self,
        name: str,
        patch: Patch | str | Path,
        tags: Sequence[str] = ("latest",),
        *,
        signature: bytes | None = None,
    ) -> dict[str, Any]:
        """Publish a patch or its file as the newest version, with the signature beside the file or the one given. Needs the
        token."""
        if signature is None and not isinstance(patch, Patch):
            signature = read_beside(patch)
        try:
            data = encode_patch(patch) if isinstance(patch, Patch) else read_plain(patch)
        except OSError as error:
            raise DataError(f"{patch} cannot be read: {error.strerror}.") from error
        said = {SIGNATURE: b64encode(signature).decode()} if signature is not None else {}
        headers = {**self._http.headers, **said}
        return self._send("PUT", f"/v1/patches/{quote(name, '@')}", {"tag": list(tags)}, body=data, headers=headers)

    def tag(self, name: str, tag: str, version: str = "latest") -> dict[str, Any]:
        """Let a tag name a version. Needs the token."""
        return self._send("POST", f"/v1/patches/{quote(name, '@')}/tag", json={"tag": tag, "version": version})

    def remove(self, reference: str) -> None:
        """Remove a patch, or one version of it. Needs the token."""
        self._send("DELETE", f"/v1/patches/{quote(reference, '@')}")

    def ready(self) -> bool:
        """Return True if the server answers and is ready."""
        try:
            return bool(self._http.request("GET", f"{self.url}/readyz").status == 200)
        except self._broken:
            return False

    def close(self) -> None:
        self._http.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _send(self, verb: str, path: str, params: Mapping[str, Any] | None = None, **rest: Any) -> dict[str, Any]:
        url = f"{self.url}{path}" + (f"?{urlencode(params, doseq=True)}" if params else "")
        for left in range(self.retries if verb == "GET" or path == PREDICT else 0, -1, -1):
            wait = 0.1 * 2 ** (self.retries - left) * (1 + random.random())
            try:
                answer = self._http.request(verb, url, **rest)
            except self._broken as error:
                if not left:
                    advice = "Is `modelpatch serve` running?"
                    raise ServeError(f"{self.url} cannot be reached: {error}.", advice) from error
            else:
                if 200 <= answer.status < 300:
                    return dict(json.loads(answer.data)) if answer.data else {}
                problem = Problem.read(answer.status, answer.data, answer.headers)
                if not left or problem.kind not in AGAIN:
                    raise problem
                wait = max(wait, problem.retry_after or 0)
            time.sleep(wait)
        raise AssertionError("the last trial returns or raises")


def _pairs(answer: dict[str, Any], top: int) -> list[tuple[str, float]]:
    """Classes with their probabilities, or with the shares of the image that they cover; objects, labels or numbers."""
    if answer.get("areas") is not None:
        return [(area["class"], area["share"]) for area in answer["areas"]][:top]
    if answer.get("values") is not None:
        return [(one["name"], one["value"]) for one in answer["values"]]
    found = next(answer[name] for name in ("boxes", "labels", "top") if answer.get(name) is not None)
    return [(one["class"], one["probability"]) for one in found]


def _encode(image: ImageFile) -> bytes:
    if not isinstance(image, Image.Image):
        return image_bytes(image)
    writable = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")  # PNG has no CMYK, YCbCr or floats
    return encode_png(image if writable else open_image(image))
