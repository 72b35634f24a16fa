"""The HTTP routes over a service: requests are read within limits, answers are JSON, errors are problem+json."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import modelpatch
import modelpatch.serve.schemas as schemas
from modelpatch.serve.problems import MEDIA_TYPE, TITLES, Problem, problem_of
from modelpatch.serve.question import BINARY, OCTETS, QUESTION, read_body, read_question
from modelpatch.serve.service import Service

LOG = logging.getLogger("modelpatch.serve")
PAGE = Path(__file__).parent / "page"
FILES = {"page.css": "text/css", "page.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
PatchName = Annotated[str, PathParameter(pattern=schemas.NAME, examples=["flowers"])]
PatchReference = Annotated[str, PathParameter(pattern=schemas.REFERENCE, examples=["flowers", "flowers@9f2c01ab"])]
FILE_BODY = {"required": True, "content": {OCTETS: {"schema": BINARY}}}
Responses = dict[int | str, dict[str, Any]]
ROUTES = "GET /openapi.json lists routes."
PatchTags = Annotated[list[str] | None, Query(description="Tags for the version; latest without any.")]
PlanTasks = Annotated[str | None, Query(description="Names, comma-separated; those that are resident without it.")]


def problems(*kinds: str, always: Sequence[str] = ("bad-request", "invalid-request", "failed")) -> Responses:
    """OpenAPI's responses for what a route may refuse."""
    found = [TITLES[kind] for kind in (*always, *kinds)]
    return {
        code: {"model": schemas.ProblemBody, "description": text, "content": {MEDIA_TYPE: {}}} for code, text in found
    }


BUSY = ("too-busy", "deadline", "too-large", "unknown-patch", "wrong-backbone", "missing-extra")
ADMIN = ("no-token", "wrong-token", "unknown-patch", "store-unreachable")


async def check_token(request: Request) -> None:
    """Check that the request has the server's token. Raises `Problem`, 401 or 403."""
    token = service_of(request).settings.token
    if token is None:
        raise Problem("admin-off", "This server was started without a token.", "Start it with --token.")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise Problem("no-token", "There is no token in the request.", "Send the header Authorization: Bearer TOKEN.")
    if not hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.encode()):
        advice = "Use the token that the server was started with."
        raise Problem("wrong-token", "The token is another than the server's.", advice)


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


TOKEN = HTTPBearer(scheme_name="token", description="What the server was started with: --token.", auto_error=False)
public = APIRouter()
admin = APIRouter(dependencies=[Depends(check_token), Depends(TOKEN)], tags=["admin"])


@public.post(
    "/v1/predict",
    response_model=schemas.Prediction,
    responses=problems(*BUSY, "too-slow", "unknown-kind"),
    openapi_extra=QUESTION,
    tags=["answers"],
)
async def predict(request: Request) -> Response:
    """The answers of patches for images: one image's file with `tasks` and `top` in the address, a multipart form with several
    files, or JSON with the images in base64."""
    service = service_of(request)
    async with service.admit():
        asked, images = await read_question(request, service.settings)
        return JSONResponse(await service.predict(images, asked.tasks, asked.per_image, asked.top))


@public.get("/v1/plan", response_model=schemas.PlanAnswer, responses=problems(*BUSY), tags=["answers"])
async def plan(request: Request, tasks: PlanTasks = None, images: Annotated[int, Query(ge=1, le=1024)] = 1) -> Response:
    """The work that tasks share in one pass: the tree of streams, and the share of the work that is saved."""
    service = service_of(request)
    names = None if tasks is None else [part.strip() for part in tasks.split(",") if part.strip()]
    async with service.admit():
        return JSONResponse(await service.plan(names, images))


@public.get("/v1/patches", response_model=schemas.PatchList, responses=problems("store-unreachable"), tags=["patches"])
async def list_patches(
    request: Request,
    after: Annotated[str, Query(max_length=64, description="Continue behind this name.")] = "",
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> Response:
    """The patches of the store, their latest versions."""
    return JSONResponse(await service_of(request).patches(after, limit))


@public.get(
    "/v1/patches/{name}",
    response_model=schemas.VersionList,
    responses=problems("unknown-patch", "store-unreachable"),
    tags=["patches"],
)
async def list_versions(request: Request, name: PatchName) -> Response:
    """All versions of a patch."""
    return JSONResponse(await service_of(request).versions(name))


@admin.put(
    "/v1/patches/{name}",
    response_model=schemas.PatchInfo,
    status_code=201,
    responses=problems(*ADMIN, *BUSY, "too-slow"),
    openapi_extra={"requestBody": FILE_BODY},
)
async def publish(request: Request, name: PatchName, tag: PatchTags = None) -> Response:
    """Publish a patch file as the newest version. It is checked against the backbone first, and resident at once."""
    service = service_of(request)
    async with service.admit():
        data = await read_body(request, service.settings.patch_bytes)
        return JSONResponse(await service.publish(name, data, tag or ["latest"]), 201)


@admin.delete("/v1/patches/{name}", status_code=204, responses=problems(*ADMIN, "tagged"))
async def remove(
    request: Request,
    name: PatchReference,
    force: Annotated[bool, Query(description="Also the tags of a single version.")] = False,
) -> Response:
    """Remove a patch with all its versions and tags, or one version of it (NAME@HASH) that no tag names."""
    await service_of(request).remove(name, force)
    return Response(status_code=204)


@admin.post("/v1/patches/{name}/tag", response_model=schemas.PatchInfo, responses=problems(*ADMIN))
async def set_tag(request: Request, name: PatchName, asked: schemas.TagRequest) -> Response:
    """Let a tag name a version. Requests for NAME@TAG get that version from then on."""
    return JSONResponse(await service_of(request).tag(name, asked.tag, asked.version))


@public.get("/healthz", response_model=schemas.Health, tags=["health"])
async def healthz() -> Response:
    """The process lives."""
    return JSONResponse({"status": "alive"})


@public.get("/readyz", response_model=schemas.Health, responses={503: {"model": schemas.Health}}, tags=["health"])
async def readyz(request: Request) -> Response:
    """The server takes requests: its backbone is loaded, and it is not stopping."""
    ready = service_of(request).ready
    return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)


@public.get("/metrics", response_class=Response, tags=["health"])
async def metrics(request: Request) -> Response:
    """Counts for Prometheus."""
    counts = service_of(request).metrics
    return Response(counts.text(), media_type=counts.content_type)


@public.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(PAGE / "index.html", headers=HEADERS)


@public.get("/page/{name}", include_in_schema=False)
async def page_file(name: str) -> Response:
    if name not in FILES:
        raise HTTPException(404)
    return FileResponse(PAGE / name, media_type=FILES[name], headers=HEADERS)


def create_app(service: Service, ready: Callable[[], None] = lambda: None) -> FastAPI:
    """The ASGI application over a service, which it starts and stops. `ready` is called once it serves."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        ready()
        yield
        await service.stop()

    app = FastAPI(
        title="modelpatch",
        version=modelpatch.__version__,
        summary="One frozen vision backbone, many tasks.",
        lifespan=lifespan,
        redoc_url=None,
        docs_url=None,
        responses=problems("not-allowed", always=()),
    )
    app.state.service = service
    app.include_router(public)
    app.include_router(admin)
    app.add_middleware(Counting, service=service)
    for kind in (Problem, HTTPException, RequestValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _tell)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description with the schema that only `openapi_extra` names, and problems as problem+json alone."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        models = schema["components"]["schemas"]
        models["PredictRequest"] = schemas.PredictRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        for unused in ("HTTPValidationError", "ValidationError"):
            models.pop(unused, None)
        for operations in schema["paths"].values():
            for operation in operations.values():
                for answer in operation["responses"].values():
                    content = answer.get("content", {})
                    if MEDIA_TYPE in content:
                        content[MEDIA_TYPE] = content.pop("application/json", content[MEDIA_TYPE])
    assert app.openapi_schema is not None
    return app.openapi_schema


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
            where = ".".join(str(part) for part in first["loc"])[:80]
            problem = Problem(kind, f"{where!r} is not valid: {first['msg'][:300]}.", "GET /openapi.json says more.")
        case ClientDisconnect():
            problem = Problem("bad-request", "The request ended before its body did.")
        case _:
            problem = problem_of(error)
            if problem.kind == "failed":
                LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    headers = problem.headers | ({"Connection": "close"} if problem.kind in ("too-large", "too-slow") else {})
    return JSONResponse({**problem.body(), "instance": path}, problem.status, headers, MEDIA_TYPE)
