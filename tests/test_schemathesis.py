"""The whole OpenAPI document by schemathesis: no failure of the server, every answer as described, wrong input refused."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from api_site import TINY, TOKEN, caller, served, submit
from qipan.api import make_app, tenant_token

AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}
EXAMPLES = 25
#: a cursor and a task file are texts to the document, and more to the server: a well-formed text may be refused
BEYOND_A_SCHEMA = [positive_data_acceptance]


@pytest.fixture(scope="module")
def schema() -> Iterator[schemathesis.BaseSchema]:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qipan-schemathesis-"))
        host = stack.enter_context(served(Path(folder)))
        with caller(host) as api:
            over = submit(api).json()["task_id"]
            host.intake.cancel(over, "test")
            submit(api, TINY.replace("name: tiny", "name: other"))
        host.step()
        yield schemathesis.openapi.from_asgi("/v1/openapi.json", make_app(host, TOKEN), headers=AUTHORIZED)


def put_to_the_test(schema, headers: dict[str, str], examples: int) -> int:
    """Every operation with `examples` made-up requests, right and wrong ones; returns the number of operations."""
    seen = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        few = examples if operation.path != "/v1/whatif" else 3  # each starts a process

        @settings(max_examples=few, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def ask(case):
            case.call_and_validate(headers=headers, excluded_checks=BEYOND_A_SCHEMA)

        ask()
        seen += 1
    return seen


def test_every_operation_for_the_operator(schema):
    assert put_to_the_test(schema, AUTHORIZED, EXAMPLES) >= 20


def test_every_operation_for_a_tenant(schema):
    tenant = {"authorization": f"Bearer {tenant_token(TOKEN, 'poets')}"}
    assert put_to_the_test(schema, tenant, 8) >= 20


@pytest.mark.endurance
def test_every_operation_a_thousand_times(schema):
    assert put_to_the_test(schema, AUTHORIZED, 1000) >= 20
