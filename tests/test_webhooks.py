"""Webhooks with a real receiver: signed, in order, at least once, one id an event; nothing inside the network unless allowed."""

import base64
import hashlib
import hmac
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest

from api_site import TOKEN, caller, served, submit
from qipan.api import tenant_token
from qipan.errors import InvalidInput, Unreachable
from qipan.events import CommandReceived, HeldTask, Reserve, TasksHeld, without_launch
from qipan.leases import EngineId, LeaseId, TaskId
from qipan.outbound import post
from qipan.webhooks import Courier, Webhooks


class Receiver:
    """Answers with the next of `statuses`, then 204; keeps what came."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.got: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
                self.send_header("location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()

            def log_message(self, *_args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook?a=b"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def events(self) -> list[dict[str, object]]:
        return [json.loads(body) for _, body in self.got]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


def drain(hooks: Webhooks, now_s: float) -> None:
    while hooks.send_due(now_s, random.Random(1)):
        pass


def test_facts_arrive_signed_in_order_and_a_retry_keeps_its_id(tmp_path, receiver):
    with served(tmp_path) as host, caller(host) as api:
        submit(api)  # before: not sent
        made = api.post("/webhooks", params={"url": receiver.url, "allow_private": True}).json()
        assert made["secret"] not in api.get("/webhooks").text
        hooks, now_s = Webhooks(host), 1e9
        receiver.statuses = [500, 302]
        submit(api, TINY_OTHER)
        host.intake.cancel("other-1", "test")
        for _ in range(100):
            host.step()
            if host.queries.task("other-1").state == "cancelled":
                break
            time.sleep(0.05)
        for tries in (1, 2):
            assert not hooks.send_due(now_s, random.Random(1))
            (hook,) = hooks.listed("")
            assert hook.tries == tries
            assert now_s + 5 * 2 ** (tries - 1) * 0.8 <= hook.next_s <= now_s + 5 * 2 ** (tries - 1) * 1.2
            assert not hooks.send_due(hook.next_s - 0.1, random.Random(1)), "not before its time"
            assert len(receiver.got) == tries
            now_s = hook.next_s
        drain(hooks, now_s)
        assert len({headers["webhook-id"] for headers, _ in receiver.got[:3]}) == 1, (
            "the same event, the same id"
        )
        assert len({body for _, body in receiver.got[:3]}) == 1
        kept = receiver.events()[2:]
        assert next(event["type"] for event in kept) == "task_submitted"
        assert [event["fact_id"] for event in kept] == sorted({event["fact_id"] for event in kept})
        assert ("task_submitted", "tiny-1") not in {(event["type"], event["task_id"]) for event in kept}
        for headers, body in receiver.got:
            signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
            key = base64.b64decode(made["secret"].removeprefix("whsec_"))
            told = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
            assert headers["webhook-signature"] == f"v1,{told}"
        assert hooks.listed("")[0].error == ""
        seen = len(receiver.got)
        drain(hooks, now_s + 1)
        assert len(receiver.got) == seen, "once it was taken, it does not come again"


TINY_OTHER = "kind: train\nname: other\ntenant: poets\nrun: sleep 60\ndevices: 1\nlimits: {time: 12s, max_cost: 1 CNY}\n"


def test_a_tasks_environment_goes_neither_to_a_webhook_nor_to_who_reads_its_events(tmp_path, receiver):
    with served(tmp_path) as host, caller(host) as api:
        api.post("/webhooks", params={"url": receiver.url, "allow_private": True})
        submit(api, TINY_OTHER + "env: {HF_TOKEN: hf_of_poets}\n")
        drain(Webhooks(host), 1e9)
        order = host.tree.root.state.tasks[TaskId("other-1")].order
        assert b"hf_of_poets" in order.launch, "engines need it"
        read = api.get("/tasks/other-1/events").json()["events"]
        for fact in (receiver.events()[0]["fact"], read[0]["fact"]):
            assert (fact["order"]["name"], fact["order"]["launch"]) == ("other", "")
    held = HeldTask(order, LeaseId("l"), 1, 1, True, "p", (), "east", 0.0, 0.0, 9.0)
    for fact in (
        CommandReceived(Reserve(order.task_id, LeaseId("l"), 1, 1, order, (), 9.0)),
        TasksHeld(EngineId("east"), 1, 0.0, (held,)),
    ):
        assert base64.b64encode(order.launch) in msgspec.json.encode(fact)
        assert base64.b64encode(order.launch) not in msgspec.json.encode(without_launch(fact))


def test_a_tenant_sees_and_removes_its_own_only_and_allows_nothing_inside(tmp_path, receiver):
    with (
        served(tmp_path) as host,
        caller(host) as api,
        caller(host, tenant_token(TOKEN, "poets")) as poets,
        caller(host, tenant_token(TOKEN, "editors")) as editors,
    ):
        assert poets.post("/webhooks", params={"url": receiver.url, "allow_private": True}).status_code == 403
        hook = poets.post("/webhooks", params={"url": receiver.url}).json()["webhook"]["hook_id"]
        editors.post("/webhooks", params={"url": "https://hooks.example/e"})
        assert editors.delete(f"/webhooks/{hook}").status_code == 404
        assert len(editors.get("/webhooks").json()["webhooks"]) == 1
        assert len(api.get("/webhooks").json()["webhooks"]) == 2
        submit(api)
        hooks = Webhooks(host)
        assert not hooks.send_due(1e9, random.Random(1))
        assert receiver.got == [], "a tenant's hook does not lead inside the network"
        by_url = {one.url: one for one in hooks.listed("")}
        assert "inside this network" in by_url[receiver.url].error
        assert by_url["https://hooks.example/e"].tries == 0, "another tenant's task is not told"
        assert poets.delete(f"/webhooks/{hook}").status_code == 200
        for wrong in ({"url": receiver.url, "kinds": "everything"}, {"url": "ftp://a/b"}, {"url": "x" * 501}):
            assert poets.post("/webhooks", params=wrong).status_code == 400, wrong
        for _ in range(20):
            last = poets.post("/webhooks", params={"url": receiver.url})
        assert last.status_code == 201
        assert poets.post("/webhooks", params={"url": receiver.url}).status_code == 402


def test_a_receiver_that_wants_no_more_or_never_answers_is_given_up(tmp_path, receiver):
    with served(tmp_path) as host, caller(host) as api:
        hooks = Webhooks(host)
        hooks.add("", receiver.url, (), True)
        submit(api)
        receiver.statuses = [410]
        hooks.send_due(1e9, random.Random(1))
        assert hooks.listed("")[0].off.startswith("410")
        hooks.remove("", hooks.listed("")[0].hook_id)
        hooks.add("", "http://127.0.0.1:1/", (), True)
        submit(api, TINY_OTHER)
        now_s = 1e9
        for _ in range(40):
            hooks.send_due(now_s, random.Random(1))
            now_s += 5000
        assert hooks.listed("")[0].tries == 30
        assert "30 tries failed" in hooks.listed("")[0].off


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "localhost", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
     "100.64.0.1", "224.0.0.1", "255.255.255.255", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1]",
     "[fd00::1]", "[ff02::1]"],
)  # fmt: skip
def test_addresses_inside_the_network_are_refused(host):
    with pytest.raises((InvalidInput, Unreachable), match=r"inside this network|has no address"):
        post(f"http://{host}:9/", b"", {}, 1.0, allow_inside=False)


@pytest.mark.parametrize(
    "url",
    ["ftp://a.example/", "file:///etc/passwd", "//a.example/", "http://", "http://u:p@a.example/", "http://u@a.example/", "http://a.example/#f",
     "http://a.example:0/", "http://a.example:99999/", "http://a.example/ b", "http://a.example/\r\nx: y", "http://a.example\\@b.example/",
     "http://ä.example/", "http://[::1", "gopher://a.example/", "http://a.example/" + "x" * 500],
)  # fmt: skip
def test_what_is_no_plain_web_address_is_refused(url):
    with pytest.raises(InvalidInput):
        post(url, b"", {}, 1.0, allow_inside=True)


def test_it_is_sent_to_the_address_that_was_checked(receiver):
    """Whatever the name leads to a moment later."""
    port = receiver.server.server_address[1]
    told = post(
        f"http://hooks.example:{port}/x", b"{}", {}, 5.0, False, lambda _host, _port, _allow: "127.0.0.1"
    )
    assert told == 204
    assert receiver.got[0][0]["host"] == f"hooks.example:{port}"


def test_a_receiver_that_drips_does_not_hold_the_courier():
    import socket

    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        line, _ = listener.accept()
        try:
            while True:
                line.sendall(b"H")
                time.sleep(0.1)
        except OSError:
            line.close()

    threading.Thread(target=drip, daemon=True).start()
    began_s = time.monotonic()
    with pytest.raises(Unreachable):
        post(f"http://127.0.0.1:{listener.getsockname()[1]}/", b"", {}, 1.0, allow_inside=True)
    assert time.monotonic() - began_s < 15
    listener.close()


def test_the_commands_and_the_courier(tmp_path, receiver):
    def qipan(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "qipan.cli", "webhook", *command, "--store", str(tmp_path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with served(tmp_path) as host, caller(host) as api:
        courier = Courier(Webhooks(host), host.clock.now_s)
        courier.start()
        made = json.loads(
            qipan("add", receiver.url, "--allow-private", "--kinds", "task_submitted", "--json")
        )
        submit(api)
        end_s = time.monotonic() + 60
        while not receiver.got and time.monotonic() < end_s:
            time.sleep(0.05)
        assert receiver.events()[0]["task_id"] == "tiny-1"
        assert receiver.url in qipan("list")
        qipan("remove", made["webhook"]["hook_id"])
        assert receiver.url not in qipan("list")
        courier.stop()
