"""Requests that mean harm: each is refused with 4xx, changes nothing, and the server goes on."""

import asyncio
import hashlib
import hmac
import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from api_site import TINY, TOKEN, caller, served, submit
from qipan.api import make_app, tenant_token
from qipan.api.gate import Rate
from qipan.host import Host


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with served(tmp_path_factory.mktemp("h")) as host:
        with caller(host) as api:
            submit(api, key="mine")
        yield host


@pytest.fixture(scope="module")
def api(host: Host) -> Iterator[httpx.Client]:
    with caller(host) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_came_of_it(host: Host, api: httpx.Client) -> Iterator[None]:
    before = host.queries.task_ids(), host.balances()
    yield
    assert api.get("/health").json()["status"] == "ok"
    assert (host.queries.task_ids(), host.balances()) == before


def refused(answer: httpx.Response) -> None:
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["status"] == answer.status_code
    assert body["code"] in (2, 102, 104, 105, 107)
    assert "Traceback" not in body["detail"]
    assert len(answer.content) < 10_000, "a refusal repeats little of what it refuses"


TEXT = json.dumps(TINY)
BODIES = {
    "no JSON": b"kind: train",
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a text": TEXT.encode(),
    "NaN": f'{{"text": {TEXT}, "key": NaN}}'.encode(),
    "infinity": f'{{"text": {TEXT}, "key": -Infinity}}'.encode(),
    "a key twice": f'{{"text": "kind: train", "text": {TEXT}}}'.encode(),
    "an escaped key twice": f'{{"text": "kind: train", "te\\u0078t": {TEXT}}}'.encode(),
    "mass assignment: task_id": f'{{"text": {TEXT}, "task_id": "poems-1"}}'.encode(),
    "mass assignment: tenant": f'{{"text": {TEXT}, "tenant": "rivals"}}'.encode(),
    "mass assignment: hold": f'{{"text": {TEXT}, "hold_micro_cny": 0}}'.encode(),
    "mass assignment: state": f'{{"text": {TEXT}, "state": "done"}}'.encode(),
    "prototype": f'{{"text": {TEXT}, "__proto__": {{"admin": true}}}}'.encode(),
    "a number for the text": b'{"text": 1}',
    "a list for the key": f'{{"text": {TEXT}, "key": ["a"]}}'.encode(),
    "a number for the key": f'{{"text": {TEXT}, "key": 1}}'.encode(),
    "an empty key": f'{{"text": {TEXT}, "key": ""}}'.encode(),
    "a long key": f'{{"text": {TEXT}, "key": "{"k" * 1000}"}}'.encode(),
    "a deep body": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a huge number": b'{"text": ' + b"9" * 10_000 + b"}",
    "no UTF-8": b'{"text": "\xff\xfe"}',
    "half a character": b'{"text": "kind: train\\nname: a\\nrun: \\ud800\\n"}',
    "a zero byte in the text": json.dumps({"text": TINY.replace("sleep", "sl\x00eep")}).encode(),
    "a zero byte in the folder": json.dumps({"text": TINY, "workdir": "/tmp\x00/x"}).encode(),
    "two documents": f'{{"text": {TEXT}}} {{"text": {TEXT}}}'.encode(),
    "larger than allowed": b'{"text": "' + b"x" * (3 << 20) + b'"}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("path", ["/tasks", "/plan"])
def test_a_body_that_is_no_submission(api, body, path):
    refused(api.post(path, content=body, headers={"content-type": "application/json"}))


LOGINS = {
    "no JSON": b"user=li", "a list": b"[]", "a number": b'{"user": 1, "password": "x"}', "no password": b'{"user": "li"}',
    "an empty name": b'{"user": "", "password": "xxxxxxxxxxxx"}', "SQL": b'{"user": "\' OR 1=1 --", "password": "xxxxxxxxxxxx"}',
    "a key of another noun": b'{"user": "../session/x", "password": "xxxxxxxxxxxx"}', "a zero byte": b'{"user": "li\\u0000", "password": "x"}',
    "half a character": b'{"user": "\\ud800", "password": "x"}', "a user twice": b'{"user": "li", "user": "operator", "password": "x"}',
    "mass assignment: role": b'{"user": "li", "password": "xxxxxxxxxxxx", "role": "operator"}', "a list for a password": b'{"user": "li", "password": ["x"]}',
    "an endless password": b'{"user": "li", "password": "' + b"x" * 40_000 + b'"}', "an operator's token": json.dumps({"refresh_token": TOKEN}).encode(),
    "a refresh token of nobody": json.dumps({"refresh_token": f"qr_{'A' * 22}_{'A' * 43}"}).encode(),
    "an id_token of nobody": json.dumps({"id_token": "e30.e30."}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("path", ["/login", "/login/refresh", "/login/oidc"])
def test_a_login_that_is_none(host, path):
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(host.folder / "api.sock")), base_url="http://qipan/v1") as stranger:  # fmt: skip
        for body in LOGINS.values():
            refused(stranger.post(path, content=body, headers={"content-type": "application/json"}))
        assert stranger.get("/users").status_code == 401


TEXTS = {
    "HTML in the name": TINY.replace("name: tiny", "name: <script>alert(1)</script>"),
    "a path as the name": TINY.replace("name: tiny", "name: ../../etc/cron.d/x"),
    "an option as the name": TINY.replace("name: tiny", "name: --help"),
    "another tenant": TINY.replace("poets", "nobody"),
    "an account as the tenant": TINY.replace("poets", "bank"),
    "HTML as the tenant": TINY.replace("poets", "<img src=x>"),
    "an object of Python": TINY.replace("sleep 60", "!!python/object/apply:os.system ['id']"),
    "aliases that grow": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nkind: *c\nname: tiny\n",
    "a deep text": "kind: " + "[" * 5000 + "]" * 5000,
    "a key twice": TINY + "run: sleep 61\n",
    "an unknown key": TINY + "priority: 9999\n",
    "money that is no number": TINY.replace("1 CNY", ".nan CNY"),
    "negative money": TINY.replace("1 CNY", "-1 CNY"),
    "more money than there is": TINY.replace("1 CNY", "999999999 CNY"),
    "devices beyond counting": TINY.replace("devices: 1", "devices: 99999999999999999999"),
    "a negative deadline": TINY.replace("time: 12s", "time: 12s, deadline: -1s"),
    "a model from inside the network": (
        "kind: train\nname: a\nmodel: http://169.254.169.254/latest/meta-data\ndata: file:x\n"
        "work: {tokens: 4096, global_batch: 2048, seq: 64}\n"
    ),
    "a model from a device": (
        "kind: train\nname: a\nmodel: /dev/zero\ndata: file:x\nwork: {tokens: 4096, global_batch: 2048, seq: 64}\n"
    ),
    "zero bytes by escape": TINY.replace("sleep 60", '"sleep\\0 60"'),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_that_is_no_honest_task(api, text):
    refused(submit(api, text))


PATHS = [
    "/tasks?limit=-1", "/tasks?limit=1e30", "/tasks?limit=99999999999999999999", "/tasks?limit=NaN", "/tasks?limit=",
    "/tasks?cursor=' OR 1=1 --", "/tasks?cursor=bnVsbA", "/tasks?cursor=" + "A" * 299, "/tasks?cursor=" + "A" * 5000,
    "/tasks?newest_first=perhaps", "/tasks?state=" + "x" * 100, "/decisions?cursor=W05hTiwiYSIsMV0",
    "/decisions?cursor=WzFlOTk5LCJhIiwxXQ", "/decisions?cursor=WzEsImEiLDk5OTk5OTk5OTk5OTk5OTk5OTk5XQ", "/tasks/tiny-1/logs?after=-1",
    "/tasks/tiny-1/events?after=99999999999999999999", "/tasks/' OR '1'='1", "/whatif?policy=%00", "/whatif?policy=--json", "/tasks/%00", "/tasks/tiny-1%00",
    "/tasks/..%2f..%2fetc%2fpasswd", "/tasks/%2e%2e/health", "/tasks/" + "x" * 3000, "/tasks/tiny-*", "/tasks/tiny-1/%2e%2e/bill",
    "/problems/" + "x" * 41, "/problems/%3Cscript%3E", "/..%2f..%2ftoken", "/tasks/%F0%28%8C%28", "//etc/passwd",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_or_query_that_names_nothing(api, path):
    refused(api.get(path))


def test_refusals_hold_no_markup_of_the_caller(api):
    answer = api.get("/tasks/<script>alert(1)</script>")
    refused(answer)
    assert answer.headers["content-type"] == "application/problem+json"


POETS = tenant_token(TOKEN, "poets")
TOKENS = {
    "none": [],
    "empty": [("authorization", "")],
    "bearer of nothing": [("authorization", "Bearer")],
    "a guess": [("authorization", "Bearer guess")],
    "a part": [("authorization", f"Bearer {TOKEN[:-1]}")],
    "longer": [("authorization", f"Bearer {TOKEN}x")],
    "basic": [("authorization", f"Basic {TOKEN}")],
    "no kind": [("authorization", TOKEN)],
    "twice": [("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer x")],
    "another tenant's signature": [("authorization", f"Bearer rivals:{POETS.partition(':')[2]}")],
    "a tenant of no name": [("authorization", "Bearer :" + hmac.new(b"", b"tenant/", hashlib.sha256).hexdigest())],
    "a tenant without signature": [("authorization", "Bearer poets:")],
    "a signature of nothing": [("authorization", "Bearer eyJhbGciOiJub25lIiwidHlwIjoiYXQrand0In0.eyJyb2xlIjoib3BlcmF0b3IifQ.")],
    "dots": [("authorization", "Bearer ..")],
    "no ASCII": [("authorization", "Bearer \u00fc".encode("latin-1"))],
    "in a cookie": [("cookie", f"token={TOKEN}")],
    "forwarded by nobody": [("x-forwarded-user", "admin"), ("x-original-url", "/v1/health")],
}  # fmt: skip


@pytest.mark.parametrize("headers", TOKENS.values(), ids=TOKENS)
def test_a_caller_without_a_token_of_his_own(host, headers):
    transport = httpx.HTTPTransport(uds=str(host.folder / "api.sock"))
    with httpx.Client(transport=transport, base_url="http://qipan/v1") as stranger:
        for path in ("/tasks", "/health", "/nothing", f"/tasks?token={TOKEN}"):
            answer = stranger.get(path, headers=headers)
            refused(answer)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"


def test_a_tenant_reaches_nothing_of_another(host):
    with caller(host, tenant_token(TOKEN, "editors")) as editors:
        for method, path in [("GET", "/tasks/tiny-1"), ("GET", "/tasks/tiny-1/logs"), ("GET", "/tasks/tiny-1/stream"),
                             ("POST", "/tasks/tiny-1/cancel"), ("GET", "/tasks/tiny-1/cost")]:  # fmt: skip
            answer = editors.request(method, path)
            refused(answer)
            assert answer.status_code == 404
            absent = editors.request(method, path.replace("tiny-1", "tiny-9"))
            assert answer.text.replace("tiny-1", "tiny-9") == absent.text, (
                "a foreign task reads as an absent one"
            )
        refused(submit(editors, TINY))
        own = submit(editors, TINY.replace("tenant: poets\n", ""), key="mine")
        refused(own)  # the tenant has no account here, and the key never shows another tenant's task
        assert "tiny-1" not in own.text


AUTH = f"Authorization: Bearer {TOKEN}\r\n"
POST = f"POST /v1/tasks HTTP/1.1\r\nHost: qipan\r\n{AUTH}"
BODY = json.dumps({"text": TINY})
LONG = f"{len(BODY):x}\r\n{BODY}\r\n0\r\n\r\n"
RAW = {
    "length and chunks": f"{POST}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n{LONG}",
    "two lengths": f"{POST}Content-Length: 0\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}",
    "two lengths in one": f"{POST}Content-Length: 0, {len(BODY)}\r\n\r\n{BODY}",
    "a negative length": f"{POST}Content-Length: -1\r\n\r\n{BODY}",
    "a signed length": f"{POST}Content-Length: +{len(BODY)}\r\n\r\n{BODY}",
    "a length in hex": f"{POST}Content-Length: 0x10\r\n\r\n{BODY}",
    "unknown coding": f"{POST}Transfer-Encoding: xchunked\r\n\r\n{LONG}",
    "a coding after chunked": f"{POST}Transfer-Encoding: chunked, identity\r\n\r\n{LONG}",
    "a space before the colon": f"{POST}Transfer-Encoding : chunked\r\n\r\n{LONG}",
    "a bad chunk size": f"{POST}Transfer-Encoding: chunked\r\n\r\nzz\r\n{BODY}\r\n0\r\n\r\n",
    "a folded header": f"POST /v1/tasks HTTP/1.1\r\nHost: qipan\r\nX: a\r\n {AUTH}\r\n",
    "a zero byte in a header": f"{POST}X: a\x00b\r\n\r\n",
    "no version": "GET /v1/tasks\r\n\r\n",
    "another protocol": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a tunnel": f"CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: qipan\r\n{AUTH}\r\n",
    "a trace": f"TRACE /v1/tasks HTTP/1.1\r\nHost: qipan\r\n{AUTH}\r\n",
    "too much header": f"{POST}X: {'a' * 200_000}\r\n\r\n",
    "chunks without end": f"{POST}Transfer-Encoding: chunked\r\n\r\n" + f"100000\r\n{'x' * 0x100000}\r\n" * 3,
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
def test_a_request_that_two_readers_would_read_differently(host, raw):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(3)
        line.connect(str(host.folder / "api.sock"))
        try:
            line.sendall(raw.encode("latin-1"))
            answer = line.recv(65536)
        except (ConnectionError, TimeoutError):
            answer = b""
    assert answer == b"" or answer.split(b" ")[1][:1] == b"4", answer[:300]
    assert answer.count(b"HTTP/1.1 2") == 0


def test_there_are_at_least_forty():
    assert 2 * len(BODIES) + len(TEXTS) + len(PATHS) + len(TOKENS) + len(RAW) + 3 * len(LOGINS) >= 40


def test_a_caller_who_asks_too_often_is_told_to_wait_and_nobody_else_is():
    rate = Rate(tenant=(10.0, 3.0), operator=(1.0, 1.0))
    assert [rate.wait_s("poets", 0.0) for _ in range(4)] == [0.0, 0.0, 0.0, pytest.approx(0.1)]
    assert rate.wait_s("editors", 0.0) == 0.0
    assert rate.wait_s("", 0.0) == 0.0
    assert rate.wait_s("", 0.0) == pytest.approx(1.0)
    assert rate.wait_s("poets", 0.1) == 0.0
    assert rate.wait_s("poets", 0.1) > 0
    assert [rate.wait_s("poets", 100.0) for _ in range(4)].count(0.0) == 3, (
        "it never holds more than its most"
    )


def test_too_many_requests_are_a_problem_with_the_time_to_wait(host):
    app = make_app(host, TOKEN, Rate(operator=(1e-9, 2.0)))

    async def ask():
        transport = httpx.ASGITransport(app)
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://qipan/v1", headers=headers
        ) as client:
            return [await client.get("/health") for _ in range(3)]

    *good, refusal = asyncio.run(ask())
    assert [answer.status_code for answer in good] == [200, 200]
    refused(refusal)
    assert refusal.status_code == 429
    assert refusal.json()["code"] == 105
    assert int(refusal.headers["retry-after"]) > 0
