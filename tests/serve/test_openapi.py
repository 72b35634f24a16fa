"""The server does what its own description says, whatever schemathesis sends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from serving import TOKEN, Serving, fill, serving

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402

pytestmark = pytest.mark.service

EXAMPLES = 300 if os.environ.get("MODELPATCH_LONG") == "1" else 12
PATHS = {
    "/v1/predict": ["POST"],
    "/v1/plan": ["GET"],
    "/v1/patches": ["GET"],
    "/v1/patches/{name}": ["GET", "PUT", "DELETE"],
    "/v1/patches/{name}/tag": ["POST"],
    "/healthz": ["GET"],
    "/readyz": ["GET"],
    "/metrics": ["GET"],
}


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(fill(tmp_path_factory.mktemp("described"))) as running:
        yield running


@pytest.fixture(scope="module")
def schema(described: Serving) -> Any:
    return schemathesis.openapi.from_url(f"{described.url}/openapi.json")


def test_the_description_names_every_route(schema: Any) -> None:
    found = {(path, method.upper()) for path, item in schema.raw_schema["paths"].items() for method in item}
    assert found == {(path, method) for path, methods in PATHS.items() for method in methods}


def test_the_description_says_which_verbs_need_the_token_and_how_files_are_sent(schema: Any) -> None:
    description = schema.raw_schema
    ((name, scheme),) = description["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for item in description["paths"].values():
        for operation in item.values():
            admin = "admin" in operation["tags"]
            assert operation.get("security") == ([{name: []}] if admin else None)
    form = description["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]
    for example in form["examples"].values():
        assert set(form["schema"]["required"]) <= set(example["value"]) <= set(form["schema"]["properties"])


@pytest.mark.parametrize(("path", "method"), [(path, method) for path, methods in PATHS.items() for method in methods])
def test_no_request_crashes_and_answers_are_as_described(
    schema: Any, described: Serving, path: str, method: str
) -> None:
    checks = schemathesis.checks
    kept = [
        checks.not_a_server_error,
        checks.CHECKS.get_one("status_code_conformance"),
        checks.CHECKS.get_one("content_type_conformance"),
        checks.CHECKS.get_one("response_schema_conformance"),
    ]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        derandomize=True,
    )
    @given(case=schema[path][method].as_strategy())
    def send(case: Any) -> None:
        case.call_and_validate(checks=kept, headers={"Authorization": f"Bearer {TOKEN}"})

    send()
    with described.client() as client:
        assert client.ready()
