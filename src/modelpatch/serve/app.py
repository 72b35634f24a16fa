"""The HTTP routes over a service: requests are read within limits, answers are JSON, errors are problem+json."""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import modelpatch.serve.schemas as schemas
from modelpatch.serve.problems import MEDIA_TYPE, TITLES, Problem, problem_of
from modelpatch.serve.question import BINARY, OCTETS, QUESTION, read_body, read_question, read_signature
from modelpatch.serve.service import Service
from modelpatch.serve.tenants import Caller, address_of
from modelpatch.store.version import NAME
from modelpatch.version import __version__

PAGE = Path(__file__).parent / "page"
FILES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
PatchName = Annotated[str, PathParameter(pattern=rf"^{NAME.pattern}$", examples=["flowers"])]
PatchReference = Annotated[str, PathParameter(pattern=schemas.REFERENCE, examples=["flowers", "flowers@9f2c01ab"])]
FILE_BODY = {"required": True, "content": {OCTETS: {"schema": BINARY}}}
MOST_SIGNATURE = 32 * 1024  # characters; sigstore's bundles have about 10,000
ROUTES = "GET /openapi.json lists routes."
PatchTags = Annotated[list[str] | None, Query(description="Tags for the version; latest without any.")]
SignatureHeader = Annotated[
    str | None,
    Header(
        alias="Modelpatch-Signature",
        description="The signature file in base64: base64 -w0 PATCH.sig.",
        max_length=MOST_SIGNATURE,
    ),
]
PlanTasks = Annotated[str | None, Query(description="Names, comma-separated; those that are resident without it.")]
AUDIT = logging.getLogger("modelpatch.audit")
ALWAYS = ("bad-request", "invalid-request", "failed")
BUSY = (
    *ALWAYS,
    "no-key",
    "wrong-key",
    "too-busy",
    "deadline",
    "too-large",
    "unknown-patch",
    "wrong-backbone",
    "missing-extra",
)
ADMIN = (*ALWAYS, "no-token", "wrong-token", "unknown-patch", "store-unreachable")


def problems(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's responses for what a route may refuse."""
    body = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
    return {code: {"description": text, "content": body} for code, text in map(TITLES.__getitem__, kinds)}


async def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Running = Annotated[Service, Depends(service_of)]


async def caller_of(request: Request, service: Running) -> Caller:
    """The caller of a request, by its key or its address. Raises `Problem`, 401 or 403."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    given = key.strip() if kind.lower() == "bearer" else None
    try:
        return service.admission.recognise(address_of_request(request), given)
    except Problem as problem:
        if problem.kind == "wrong-key":
            await refuse_slowly(request, service, problem)
        raise


def address_of_request(request: Request) -> str:
    """The address that a request came from."""
    return address_of(request.client.host) if request.client else ""


async def refuse_slowly(request: Request, service: Service, problem: Problem) -> None:
    """Write a line about a wrong token or key, and keep its sender waiting: longer with each."""
    address = address_of_request(request)
    AUDIT.warning("%s %s from %s: %s", request.method, quote(request.url.path), address or "-", problem.kind)
    await asyncio.sleep(service.admission.wrong_keys.delay(address))


async def audit(request: Request) -> AsyncIterator[None]:
    """Write a line about a request for an admin verb and how it ended."""
    said = "failed"
    try:
        yield
        said = "done"
    except Problem as problem:
        said = problem.kind
        raise
    finally:
        if said not in ("wrong-token", "wrong-key"):  # which have a line already
            AUDIT.info(
                "%s %s from %s: %s", request.method, quote(request.url.path), address_of_request(request) or "-", said
            )


TOKEN = HTTPBearer(scheme_name="token", description="What the server was started with: --token.", auto_error=False)
Asking = Annotated[Caller, Depends(caller_of)]


async def check_host(request: Request, service: Running) -> None:
    """Check that the server is asked for by a name of its own: pages of others cannot have their name mean it (DNS rebinding).

    Raises `Problem`, 400.
    """
    name, hosts = request.url.hostname, service.settings.hosts
    if hosts and name not in hosts:
        said = f"This server does not answer to {str(name)[:80]!r}; expected {' or '.join(hosts)}."
        raise Problem("bad-request", said, "Start it with --allowed-host for each of its names.")


async def check_token(
    request: Request, service: Running, given: Annotated[HTTPAuthorizationCredentials | None, Depends(TOKEN)]
) -> None:
    """Check that the request has the server's token. Raises `Problem`, 401 or 403."""
    token = service.settings.token
    if token is None:
        raise Problem("admin-off", "This server was started without a token.", "Start it with --token.")
    if given is None:
        raise Problem("no-token", "There is no token in the request.", "Send the header Authorization: Bearer TOKEN.")
    if not hmac.compare_digest(given.credentials.strip().encode("utf-8", "surrogateescape"), token.encode()):
        advice = "Use the token that the server was started with."
        problem = Problem("wrong-token", "The token is another than the server's.", advice)
        await refuse_slowly(request, service, problem)
        raise problem


answers = APIRouter(prefix="/v1", tags=["answers"], responses=problems(*BUSY))
patches = APIRouter(prefix="/v1/patches", tags=["patches"], responses=problems(*ALWAYS, "store-unreachable"))
checked = [Depends(audit), Depends(check_token)]
admin = APIRouter(prefix="/v1/patches", tags=["admin"], responses=problems(*ADMIN), dependencies=checked)
others = APIRouter(tags=["health"])


@answers.post(
    "/predict",
    response_model=schemas.Prediction,
    responses=problems("too-slow", "unknown-kind"),
    openapi_extra=QUESTION,
)
async def predict(request: Request, service: Running, caller: Asking) -> Response:
    """The answers of patches for images: one image's file with `tasks` and `top` in the address, a multipart form with several
    files, or JSON with the images in base64."""
    service.batcher.check(caller)  # before the body, which costs work to read
    async with service.admission.receive(caller) as arrival:
        asked, images = await read_question(request, service.settings, arrival.add)
        async with service.admission.answer(caller):
            return JSONResponse(await service.predict(images, asked, caller))


@answers.get("/plan", response_model=schemas.PlanAnswer)
async def plan(
    service: Running, caller: Asking, tasks: PlanTasks = None, images: Annotated[int, Query(ge=1, le=1024)] = 1
) -> Response:
    """The work that tasks share in one pass: the tree of streams, and the share of the work that is saved."""
    names = None if tasks is None else [part.strip() for part in tasks.split(",") if part.strip()]
    async with service.admission.receive(caller), service.admission.answer(caller):
        return JSONResponse(await service.plan(names, images))


@patches.get("", response_model=schemas.PatchList)
async def list_patches(
    service: Running,
    after: Annotated[str, Query(max_length=64, description="Continue behind this name.")] = "",
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> Response:
    """The patches of the store, their latest versions."""
    return JSONResponse(await service.patches(after, limit))


@patches.get("/{name}", response_model=schemas.VersionList, responses=problems("unknown-patch"))
async def list_versions(service: Running, name: PatchName) -> Response:
    """All versions of a patch."""
    return JSONResponse(await service.versions(name))


@admin.put(
    "/{name}",
    response_model=schemas.PatchInfo,
    status_code=201,
    responses=problems(*BUSY, "too-slow", "not-signed"),
    openapi_extra={"requestBody": FILE_BODY},
)
async def publish(
    request: Request,
    service: Running,
    caller: Asking,
    name: PatchName,
    tag: PatchTags = None,
    signature: SignatureHeader = None,
) -> Response:
    """Publish a patch file as the newest version, with its signature where it has one. It is checked against the backbone and
    the server's required signers first, and resident at once."""
    async with service.admission.receive(caller) as arrival:
        signed = read_signature(signature)
        data = await read_body(request, service.settings.patch_bytes, arrival.add)
        async with service.admission.answer(caller):
            return JSONResponse(await service.publish(name, data, tag or ["latest"], signed), 201)


@admin.delete("/{name}", status_code=204, responses=problems("tagged"))
async def remove(
    service: Running,
    name: PatchReference,
    force: Annotated[bool, Query(description="Also the tags of a single version.")] = False,
) -> Response:
    """Remove a patch with all its versions and tags, or one version of it (NAME@HASH) that no tag names."""
    await service.remove(name, force)
    return Response(status_code=204)


@admin.post("/{name}/tag", response_model=schemas.PatchInfo)
async def set_tag(service: Running, name: PatchName, asked: schemas.TagRequest) -> Response:
    """Let a tag name a version. Requests for NAME@TAG get that version from then on."""
    return JSONResponse(await service.tag(name, asked.tag, asked.version))


@others.get("/healthz", response_model=schemas.Health)
async def healthz() -> Response:
    """The process lives."""
    return JSONResponse({"status": "alive"})


@others.get("/readyz", response_model=schemas.Health, responses={503: {"model": schemas.Health}})
async def readyz(service: Running) -> Response:
    """The server takes requests: its backbone is loaded, its store is there, and it is not stopping."""
    ready = service.ready and not await service.catalogue.is_lost()
    return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)


@others.get("/metrics", response_class=Response)
async def metrics(service: Running) -> Response:
    """Counts for Prometheus."""
    return Response(service.metrics.text(), media_type=service.metrics.content_type)


@others.get("/", include_in_schema=False)
@others.get("/page/{name}", include_in_schema=False)
async def page(request: Request) -> Response:
    name = request.path_params.get("name", "index.html")
    if name not in FILES:
        raise HTTPException(404)
    return FileResponse(PAGE / name, media_type=FILES[name], headers=HEADERS)


def create_app(service: Service, ready: Callable[[], object] = lambda: None) -> FastAPI:
    """The ASGI application over a service, which it starts and stops. `ready` is called once it serves."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        ready()
        yield
        await service.stop()

    app = FastAPI(
        title="modelpatch",
        version=__version__,
        summary="One frozen vision backbone, many tasks.",
        lifespan=lifespan,
        redoc_url=None,
        docs_url=None,
        responses=problems("not-allowed"),
        dependencies=[Depends(check_host)],
    )
    app.state.service = service
    for router in (answers, patches, admin, others):
        app.include_router(router)
    app.add_middleware(Counting, service=service)
    for kind in (Problem, HTTPException, RequestValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _tell)
    return app


class Counting:
    """Count requests by their route, so that made-up paths add no labels."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.counts = app, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start = time.perf_counter()
        status = 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.counts.requests.labels(scope["method"] if status != 405 else "other", route, status).inc()
            self.counts.request_seconds.labels(route).observe(time.perf_counter() - start)


async def _tell(request: Request, error: Exception) -> Response:
    path = request.url.path[:200]
    match error:
        case HTTPException(status_code=405):
            problem = Problem("not-allowed", f"{request.method} does not apply to {path}.", ROUTES)
        case HTTPException(status_code=404):
            problem = Problem("not-found", f"There is no {path}.", ROUTES)
        case HTTPException():
            problem = Problem("bad-request", str(error.detail)[:300], "GET /openapi.json shows what is expected.")
        case RequestValidationError():
            first = error.errors()[0]
            kind = "bad-request" if first["type"] == "json_invalid" else "invalid-request"
            where = ".".join(str(part) for part in first["loc"])[:80] or "body"
            problem = Problem(kind, f"{where!r} is not valid: {first['msg'][:300]}.", "GET /openapi.json says more.")
        case ClientDisconnect():
            problem = Problem("bad-request", "The request ended before its body did.")
        case _:
            problem = problem_of(error)
    return JSONResponse({**problem.body(), "instance": path}, problem.status, problem.headers, MEDIA_TYPE)
