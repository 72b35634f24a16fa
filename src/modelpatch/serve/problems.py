"""Errors as the server tells them: problem+json (RFC 9457) with what was given, what was expected and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import modelpatch.errors as errors

MEDIA_TYPE = "application/problem+json"
TITLES = {
    "bad-request": (400, "The request cannot be read"),
    "no-token": (401, "An admin verb needs the server's token"),
    "wrong-token": (403, "That is not the server's token"),
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
    "head-too-large": (431, "The request's head is too large"),
    "failed": (500, "The server failed"),
    "missing-extra": (501, "The server lacks a library"),
    "deadline": (503, "The answer would come too late"),
    "no-room": (503, "There is no room for the patch now"),
    "store-unreachable": (503, "The store cannot be read"),
    "stopping": (503, "The server is stopping"),
}
DAMAGED = ("damaged-patch", "Publish the patch again from its source.")
KINDS: dict[type[errors.ModelpatchError], tuple[str, str]] = {  # the first that fits; its advice replaces the error's
    errors.UnknownPatchError: ("unknown-patch", "GET /v1/patches lists those there are."),
    errors.WrongBackboneError: ("wrong-backbone", "GET /v1/plan names the server's backbone."),
    errors.DamagedPatchError: DAMAGED,
    errors.PatchLengthError: DAMAGED,
    errors.NotAPatchError: DAMAGED,
    errors.PatchError: ("damaged-patch", ""),
    errors.TaggedVersionError: ("tagged", "Move the tag, or remove with force=true."),
    errors.InvalidReferenceError: ("invalid-request", ""),
    errors.StoreError: ("store-unreachable", ""),
    errors.MissingExtraError: ("missing-extra", ""),
    errors.DataError: ("unreadable-image", ""),
    errors.ModelpatchError: ("invalid-request", ""),
}


class Problem(errors.ServeError):
    """The answer of a server instead of a result; the client raises the same. `kind` is a key of `TITLES`.

    `detail` says what was given and expected, `advice` what to do; `facts` are further members, such as the patch's name.
    `about` is the engine's key of the task that is at fault; a server's own, not sent.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        advice: str = "",
        *,
        retry_after: float | None = None,
        about: str | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(detail, advice)
        self.kind, self.retry_after, self.about, self.facts = kind, retry_after, about, facts

    def named(self, patch: str) -> Problem:
        """The problem with the name of the patch that it is about."""
        facts = {**self.facts, "patch": patch}
        return Problem(self.kind, self.detail, self.advice, retry_after=self.retry_after, about=self.about, **facts)

    @property
    def status(self) -> int:
        return TITLES[self.kind][0]

    @property
    def headers(self) -> dict[str, str]:
        """Headers that HTTP has for this kind of problem."""
        named = {"Retry-After": str(max(1, round(self.retry_after)))} if self.retry_after is not None else {}
        return {**named, "WWW-Authenticate": 'Bearer realm="modelpatch"'} if self.kind == "no-token" else named

    def body(self) -> dict[str, Any]:
        """The members of the JSON object."""
        status, title = TITLES[self.kind]
        known = {"type": f"urn:modelpatch:{self.kind}", "title": title, "status": status, "detail": self.detail}
        return {**known, **({"advice": self.advice} if self.advice else {}), **self.facts}

    @classmethod
    def read(cls, status: int, said: bytes | Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Problem:
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
        wait = (headers or {}).get("retry-after", "")
        after = float(wait) if wait.isdigit() else None
        detail = str(body.get("detail") or f"The server answered {status}.")
        return cls(kind, detail, str(body.get("advice", "")), retry_after=after, **facts)


def problem_of(error: BaseException, *, about: str | None = None, **facts: Any) -> Problem:
    """Any error as a problem, `about` a task; one that was not foreseen is `failed` and does not show its text."""
    problem = _translate(error, facts)
    problem.about = problem.about or about
    return problem


def _translate(error: BaseException, facts: Mapping[str, Any]) -> Problem:
    if isinstance(error, Problem):
        return error
    said = str(error)
    for known, (kind, advice) in KINDS.items():
        if isinstance(error, known):
            detail = error.detail if advice else said
            return Problem(kind, detail, advice, retry_after=5 if kind == "store-unreachable" else None, **facts)
    if isinstance(error, OSError):
        return Problem("store-unreachable", f"{type(error).__name__}: {said}"[:300], retry_after=5, **facts)
    return Problem("failed", f"{type(error).__name__}.", "The server's log says more.", **facts)
