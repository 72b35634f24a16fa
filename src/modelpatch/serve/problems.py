"""Errors as the server tells them: problem+json (RFC 9457) with what was given, what was expected and what to do."""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any, Self

import modelpatch.errors as errors

LOG = logging.getLogger("modelpatch.serve")
MEDIA_TYPE = "application/problem+json"
TITLES = {
    "bad-request": (400, "The request cannot be read"),
    "no-token": (401, "An admin verb needs the server's token"),
    "wrong-token": (403, "That is not the server's token"),
    "no-key": (401, "A key is needed"),
    "wrong-key": (403, "That is no tenant's key"),
    "not-signed": (403, "Nobody that this server requires has signed the patch"),
    "admin-off": (403, "Admin verbs are off"),
    "not-found": (404, "There is nothing here"),
    "unknown-patch": (404, "There is no such patch"),
    "not-allowed": (405, "That verb does not apply here"),
    "too-slow": (408, "The request came too slowly"),
    "wrong-backbone": (409, "The patch belongs to another backbone"),
    "tagged": (409, "A tag names that version"),
    "too-large": (413, "That is more than this server takes"),
    "unknown-kind": (415, "The body is of another kind than expected"),
    "invalid-request": (422, "The request asks for something impossible"),
    "unreadable-image": (422, "An image cannot be read"),
    "damaged-patch": (422, "The patch cannot be trusted or does not fit"),
    "too-busy": (429, "The server has too much to do"),
    "over-budget": (429, "The tenant's budget is used up"),
    "head-too-large": (431, "The request's head is too large"),
    "failed": (500, "The server failed"),
    "missing-extra": (501, "The server lacks a library"),
    "deadline": (503, "The answer would come too late"),
    "no-room": (503, "There is no room for the patch now"),
    "store-unreachable": (503, "The store cannot be read"),
    "stopping": (503, "The server is stopping"),
}
DAMAGED = (errors.DamagedPatchError, errors.PatchLengthError, errors.NotAPatchError)
HEADERS = {
    **{kind: {"WWW-Authenticate": 'Bearer realm="modelpatch"'} for kind in ("no-token", "no-key")},
    "too-slow": {"Connection": "close"},
    "too-large": {"Connection": "close"},
    "store-unreachable": {"Retry-After": "5"},
    **{kind: {"Retry-After": "1"} for kind in ("too-busy", "over-budget", "deadline", "no-room", "stopping")},
}
KINDS: dict[Any, tuple[str, str]] = {  # by types of errors, the first that fits; its advice replaces the error's
    errors.UnknownPatchError: ("unknown-patch", "GET /v1/patches lists those there are."),
    errors.WrongBackboneError: ("wrong-backbone", "GET /v1/plan names the server's backbone."),
    (errors.UnsignedPatchError, errors.OtherSignerError): ("not-signed", ""),
    errors.DamagedSignatureError: ("damaged-patch", "Publish the patch again with its signature."),
    DAMAGED: ("damaged-patch", "Publish the patch again from its source."),
    errors.PatchError: ("damaged-patch", ""),
    errors.TaggedVersionError: ("tagged", "Move the tag, or remove with force=true."),
    errors.OtherBackboneError: ("wrong-backbone", "If it is meant: modelpatch store tag --other-backbone."),
    errors.InvalidReferenceError: ("invalid-request", ""),
    errors.StoreError: ("store-unreachable", ""),
    errors.MissingExtraError: ("missing-extra", ""),
    errors.DataError: ("unreadable-image", ""),
    errors.ModelpatchError: ("invalid-request", ""),
    OSError: ("store-unreachable", ""),
}


class Problem(errors.ServeError):
    """The answer of a server instead of a result; the client raises the same. `kind` is a key of `TITLES`.

    `detail` says what was given and expected, `advice` what to do; `facts` are further members, such as the patch's name.
    `about` is the engine's key of the task that is at fault; a server's own, not sent. `headers` are those of HTTP,
    of which `wait` is Retry-After, in seconds.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        advice: str = "",
        *,
        about: str | None = None,
        wait: float | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(detail, advice)
        self.kind, self.about, self.facts = kind, about, facts
        self.status, self.title = TITLES[kind]
        self.headers: Mapping[str, str] = HEADERS.get(kind, {})
        if wait is not None:
            self.headers = {**self.headers, "Retry-After": str(max(1, math.ceil(wait)))}

    @property
    def retry_after(self) -> float | None:
        """Seconds after which another try may do better."""
        wait = self.headers.get("Retry-After", "")
        return float(wait) if wait.isdigit() else None

    def named(self, patch: str) -> "Problem":
        """The problem with the name of the patch that it is about."""
        return Problem(self.kind, self.detail, self.advice, about=self.about, **{**self.facts, "patch": patch})

    def body(self) -> dict[str, Any]:
        """The members of the JSON object."""
        kind, advice = f"urn:modelpatch:{self.kind}", {"advice": self.advice} if self.advice else {}
        return {"type": kind, "title": self.title, "status": self.status, "detail": self.detail, **advice, **self.facts}

    @classmethod
    def read(cls, status: int, said: bytes | Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Self:
        """The problem that a server sent; one that is none of ours keeps its words."""
        try:
            body = json.loads(said) if isinstance(said, bytes) else said
        except ValueError:
            body = None
        body = body if isinstance(body, Mapping) else {}
        kind = str(body.get("type", "")).rpartition(":")[2]
        if kind not in TITLES:
            kind = next((k for k, (code, _) in TITLES.items() if code == status), "failed")
        facts = {k: v for k, v in body.items() if k not in ("type", "title", "status", "detail", "advice")}
        problem = cls(
            kind, str(body.get("detail") or f"The server answered {status}."), str(body.get("advice", "")), **facts
        )
        problem.headers = headers or {}
        return problem


def problem_of(error: BaseException, *, about: str | None = None, **facts: Any) -> Problem:
    """Any error as a problem, `about` a task. The log says more of one that was not foreseen or names the store's place."""
    if isinstance(error, Problem):
        problem = error
    elif found := [answer for known, answer in KINDS.items() if isinstance(error, known)]:
        kind, advice = found[0]
        detail = getattr(error, "detail", "") if advice else str(error)
        if kind == "store-unreachable":
            LOG.warning("%s", error)
            detail = "The store cannot be read or written."
        problem = Problem(kind, detail, advice, **facts)
    else:
        LOG.error("%s failed", about or facts or "a request", exc_info=error)
        problem = Problem("failed", f"{type(error).__name__}.", "The server's log says more.", **facts)
    problem.about = problem.about or about
    return problem
