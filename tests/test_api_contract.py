"""The OpenAPI document against the server: every route described, every answer as described, no failure of the
server whatever the parameters."""

import base64
import json
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from api_site import TINY, caller, served, submit
from qipan import money, views
from qipan.api import shapes
from qipan.host import Host
from qipan.ledger.auditor import Audit
from qipan.outcomes import WhatIf
from qipan.planner import Plan
from qipan.queries import TaskView
from qipan.statements import Statement

GETS = {
    "/v1/tasks": shapes.Tasks, "/v1/tasks/{task_id}": TaskView, "/v1/tasks/{task_id}/plan": Plan, "/v1/tasks/{task_id}/why": shapes.Why,
    "/v1/tasks/{task_id}/logs": shapes.Logs, "/v1/tasks/{task_id}/events": shapes.Events, "/v1/tasks/{task_id}/bill": shapes.Bill,
    "/v1/tasks/{task_id}/cost": views.Cost, "/v1/health": shapes.Health, "/v1/boards": shapes.Boards, "/v1/prices": shapes.Prices,
    "/v1/chips": shapes.Chips, "/v1/decisions": shapes.Decisions, "/v1/problems/{name}": shapes.ProblemKind,
    "/v1/ledger/accounts": shapes.Accounts, "/v1/ledger/statement": Statement, "/v1/ledger/check": Audit,
    "/v1/webhooks": shapes.Hooks, "/v1/market/auctions": shapes.Auctions, "/v1/market/orders": shapes.Orders,
    "/v1/tasks/{task_id}/bill/explained": money.Explained,
    "/v1/login": shapes.Door, "/v1/whoami": shapes.WhoAmI, "/v1/users": shapes.Users, "/v1/users/log": shapes.PeopleLog,
    "/v1/tasks/{task_id}/trace": shapes.Trace,
    "/v1/ledger": shapes.Ledger, "/v1/bills": shapes.Bills, "/v1/people": shapes.People, "/v1/whatif": WhatIf,
}  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with served(tmp_path_factory.mktemp("o")) as host:
        with caller(host) as api:
            submit(api)
        host.step()
        yield host


@pytest.fixture(scope="module")
def api(host: Host) -> Iterator[httpx.Client]:
    with caller(host) as client:
        yield client


@pytest.fixture(scope="module")
def document(api: httpx.Client) -> dict:
    return api.get("/openapi.json").json()


def operations(document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_the_document_is_openapi_3_1_and_its_references_lead_somewhere(document):
    assert document["openapi"].startswith("3.1")
    text = json.dumps(document)
    names = {piece.partition('"')[0] for piece in text.split("#/components/schemas/")[1:]}
    assert names <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in text


def test_every_route_has_a_model_and_problems(document):
    seen = list(operations(document))
    assert len(seen) >= 20
    for path, method, operation in seen:
        good = next(answer for status, answer in operation["responses"].items() if status.startswith("2"))
        media = good["content"]
        assert {"text/event-stream", "text/plain"} & set(media) or media["application/json"]["schema"], (
            path,
            method,
        )
        for status in ("400", "401", "404", "422"):
            content = operation["responses"][status]["content"]
            assert list(content) == ["application/problem+json"], (path, status)
        assert (
            method == "get"
            or method == "delete"
            or path.endswith(("/cancel", "/key", "/budget", "/wake", "/orders", "/webhooks"))
            or operation["requestBody"]
        )


def test_every_read_answers_what_its_model_says_and_no_more(api, document):
    reads = {path for path, method, _ in operations(document) if method == "get"}
    assert reads - set(GETS) == {
        "/v1/tasks/{task_id}/stream",
        "/v1/market/book",
        "/metrics",
        "/v1/tasks/{task_id}/exec/{exec_id}",
    }
    for path, model in GETS.items():
        asked = {"account": "tenant/poets"} if path.endswith("/statement") else {}
        body = api.get(
            path.format(task_id="tiny-1", name="not-found").removeprefix("/v1"), params=asked
        ).json()
        adapter = TypeAdapter(model)
        again = json.loads(adapter.dump_json(adapter.validate_python(body)))
        assert again == body, path


def test_the_answer_to_a_submission_is_as_described(api):
    body = submit(api, TINY.replace("name: tiny", "name: described")).json()
    adapter = TypeAdapter(shapes.Submitted)
    assert json.loads(adapter.dump_json(adapter.validate_python(body))) == body


def cursors():
    leaves = st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.just("tiny-1")
    lists = st.lists(leaves, max_size=3)
    values = leaves | lists | st.lists(leaves | lists, max_size=3)
    encoded = values.map(
        lambda value: base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")
    )
    return encoded | st.text(max_size=40)


VALUES = {
    "task_id": st.sampled_from(["tiny-1", "tiny-2"]) | st.text(min_size=1, max_size=120),
    "tenant": st.sampled_from(["poets"]) | st.text(min_size=1, max_size=120),
    "name": st.sampled_from(["not-found", "failed"]) | st.text(min_size=1, max_size=60),
    "cursor": cursors(),
    "idempotency-key": st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=220),
    "traceparent": st.just("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    | st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60),
    "tracestate": st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60),
    "last-event-id": st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30),
}
NEVER_ENDING = ("/stream", "/cancel", "/whatif", "/metrics")  # or they end the tests' task
NAME = st.text(min_size=1, max_size=120)  # without one it is another path
ANYTHING = st.integers().map(str) | st.text(max_size=30) | st.booleans().map(str) | st.floats().map(str)


@st.composite
def requests(draw, document):
    """A call of any described operation: method, path, and what httpx takes besides."""
    described = [one for one in operations(document) if not one[0].endswith(NEVER_ENDING)]
    path, method, operation = draw(st.sampled_from(described))
    query, headers = {}, {}
    for parameter in operation.get("parameters", []):
        name, place = parameter["name"], parameter["in"]
        value = draw(VALUES.get(name, NAME if place == "path" else ANYTHING))
        if place == "path":
            quoted = "".join(f"%{byte:02X}" for byte in value.encode(errors="replace"))
            path = path.replace(f"{{{name}}}", quoted)
        elif draw(st.booleans()):
            (query if place == "query" else headers)[name] = value.encode(errors="replace").decode()
    body = None
    if "requestBody" in operation:
        fields = st.sampled_from(["text", "file", "workdir", "key", "x"])
        body = draw(st.dictionaries(fields, st.none() | st.text(max_size=60) | st.integers()))
    return method, path.removeprefix("/v1"), {"params": query, "headers": headers, "json": body}


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_the_parameters_the_answer_is_one_that_is_described(api, document, data):
    method, path, more = data.draw(requests(document))
    answer = api.request(method, path, **more)
    assert answer.status_code < 500, (method, path, more, answer.text[:200])
    if answer.is_success:
        assert answer.headers["content-type"] == "application/json"
    else:
        problem = answer.json()
        assert answer.headers["content-type"] == "application/problem+json"
        assert set(problem) == {"type", "title", "status", "detail", "code"}
        assert problem["status"] == answer.status_code


@pytest.mark.parametrize("path", ["/tasks/", "/tasks/%2F", "/boards/", "/market/book/"])
def test_a_path_with_a_slash_too_many_is_not_found(api, path):
    answer = api.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_keys_are_given_out_by_the_operator_only(host, api):
    made = api.post("/people/poets/key").json()
    with caller(host, made["token"]) as poets:
        told = poets.get("/people").json()
        assert [person["tenant"] for person in told["people"]] == [told["you"]] == ["poets"]
        assert poets.post("/people/poets/key").status_code == 403
        assert poets.get("/tasks/tiny-1").status_code == 200
    assert api.post("/people/nobody/key").status_code == 404
    assert api.get("/people").json()["you"] == ""
