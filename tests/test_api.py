"""The public API: pages, tags, keys, tenants, problems."""

import asyncio
import base64
import json
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api_site import TINY, TOKEN, caller, served, submit
from qipan import queries
from qipan.api import tenant_token
from qipan.api.follow import Followed
from qipan.api.shapes import write_cursor
from qipan.client import Client
from qipan.host import Host


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with served(tmp_path_factory.mktemp("s")) as host:
        with caller(host) as client:
            for _ in range(5):
                assert submit(client).status_code == 201
        host.step()
        yield host


@pytest.fixture(scope="module")
def api(host: Host) -> Iterator[httpx.Client]:
    with caller(host) as client:
        yield client


def paged(api: httpx.Client, path: str, what: str, limit: int) -> list[object]:
    found, cursor = [], {}
    while True:
        answer = api.get(path, params={"limit": limit, **cursor}).json()
        found += answer[what]
        assert len(answer[what]) <= limit
        if answer["next"] is None:
            return found
        cursor = {"cursor": answer["next"]}


@pytest.mark.parametrize("what", ["tasks", "bills", "decisions", "chips"])
def test_small_pages_joined_are_the_whole_list(api, what):
    whole = paged(api, f"/{what}", what, 1000)
    assert len(whole) >= 5
    assert paged(api, f"/{what}", what, 2) == whole


def test_a_task_submitted_between_two_pages_moves_nothing(api):
    first = api.get("/tasks", params={"limit": 2}).json()
    submit(api)
    second = api.get("/tasks", params={"limit": 2, "cursor": first["next"]}).json()
    assert [task["task_id"] for task in second["tasks"]] == ["tiny-3", "tiny-4"]


def test_pages_of_a_tasks_events_joined_are_all_of_them(host, api):
    whole = paged(api, "/tasks/tiny-1/events", "events", 1000)
    assert len(whole) >= 2
    assert paged(api, "/tasks/tiny-1/events", "events", 1) == whole
    later = api.get("/tasks/tiny-1/events", params={"after": whole[0]["fact_id"], "limit": 1}).json()
    assert later["events"] == whole[1:2]
    assert api.get("/tasks/tiny-1/events", params={"cursor": write_cursor("tiny-1")}).status_code == 400
    assert list(Client(host.folder, TOKEN).list("/tasks/tiny-1/events", "events", limit=1)) == whole


@pytest.fixture
def log(host) -> Iterator[Path]:
    """What the second attempt of a task printed."""
    attempts = [host.folder / "engines" / "x" / "attempts" / f"tiny-5-{number}" for number in (1, 2)]
    for attempt in attempts:
        attempt.mkdir(parents=True)
    (attempts[0] / "log.txt").write_text("first\n")
    yield attempts[1] / "log.txt"
    shutil.rmtree(host.folder / "engines" / "x")


def test_pages_of_a_log_joined_are_all_of_it_and_no_character_is_cut(host, log, monkeypatch):
    log.write_bytes("棋盘一局".encode() * 20 + b"\xff" + "盘".encode()[:2])
    whole = "--- attempt 1 ---\nfirst\n--- attempt 2 ---\n" + "棋盘一局" * 20 + "\ufffd"
    client = Client(host.folder, TOKEN)
    for most in (7, 50, 10_000):
        monkeypatch.setattr(queries, "LOG_PAGE_BYTES", most)
        assert "".join(page["text"] for page in client.printed("tiny-5")) == whole
        assert "".join(client.job("tiny-5").logs()) == whole
    log.write_bytes(log.read_bytes() + "盘".encode()[2:])
    assert "".join(client.job("tiny-5").logs()) == whole + "盘"


def test_a_page_of_a_log_takes_its_own_memory_only(host, log):
    with log.open("wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    page = host.queries.logs("tiny-5", 8 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(page["text"]) == queries.LOG_PAGE_BYTES
    assert page["size"] > page["next"] == (8 << 20) + queries.LOG_PAGE_BYTES
    assert peak < 4 << 20


def test_a_tag_named_again_saves_the_body(api):
    first = api.get("/chips")
    again = api.get("/chips", headers={"if-none-match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert api.get("/chips", headers={"if-none-match": '"other"'}).status_code == 200


def test_the_same_key_submits_once_and_never_another_task(api):
    first = submit(api, TINY, key="k1")
    again = api.post("/tasks", json={"text": TINY}, headers={"idempotency-key": "k1"})
    assert first.json()["task_id"] == again.json()["task_id"]
    other = submit(api, TINY.replace("sleep 60", "sleep 61"), key="k1")
    assert (other.status_code, other.json()["title"]) == (400, "InvalidInput")


def test_a_tenant_sees_its_own_tasks_and_money_only(host, api):
    mine = submit(api).json()["task_id"]
    with (
        caller(host, tenant_token(TOKEN, "poets")) as poets,
        caller(host, tenant_token(TOKEN, "rivals")) as rivals,
    ):
        assert poets.get(f"/tasks/{mine}").status_code == 200
        assert list(poets.get("/ledger").json()["balances_micro_cny"]) == ["tenant/poets"]
        for path in ("", "/why", "/logs", "/events", "/bill", "/cost", "/plan", "/stream"):
            assert rivals.get(f"/tasks/{mine}{path}").status_code == 404, path
        assert rivals.post(f"/tasks/{mine}/cancel").status_code == 404
        assert rivals.get("/tasks").json()["tasks"] == []
        assert rivals.get("/bills").json()["bills"] == []
        assert rivals.get("/decisions").json()["decisions"] == []
        assert mine not in rivals.get("/boards").text
        assert submit(rivals).status_code == 403, "the file names another tenant"


def test_who_holds_what_is_told_and_adds_up(host, api):
    host.step()
    pools = [pool for board in api.get("/boards").json()["boards"] for pool in board["pools"]]
    assert sum(pool["devices"] - pool["free"] for pool in pools) > 0
    for pool in pools:
        assert pool["devices"] - pool["free"] == sum(holder["devices"] for holder in pool["holders"])


@pytest.mark.parametrize(
    ("request_", "status", "code", "name"),
    [
        (("GET", "/tasks/nobody"), 404, 102, "not-found"),
        (("GET", "/nowhere"), 404, 102, "not-found"),
        (("DELETE", "/tasks"), 405, 2, "invalid-input"),
        (("GET", "/tasks?limit=0"), 400, 2, "invalid-input"),
        (("GET", "/tasks?cursor=!!"), 400, 2, "invalid-input"),
    ],
)
def test_every_error_is_a_problem_with_the_exit_code(api, request_, status, code, name):
    answer = api.request(*request_)
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, body["status"], body["code"]) == (status, status, code)
    assert api.get(body["type"].removeprefix("/v1")).json()["name"] == name


def test_infeasible_and_too_dear_tasks_have_their_own_codes(api):
    nowhere = submit(api, TINY.replace("max_cost", "chips: [sim/zz], max_cost"))
    assert (nowhere.status_code, nowhere.json()["code"]) == (422, 104)
    dear = submit(api, TINY.replace("1 CNY", "5000 CNY"))
    assert (dear.status_code, dear.json()["code"]) == (402, 105)


def test_the_stream_tells_facts_and_ends_with_the_task(host, api):
    name = submit(api).json()["task_id"]
    api.post(f"/tasks/{name}/cancel")
    host.step()
    lines = api.get(f"/tasks/{name}/stream").text.splitlines()
    kinds = [json.loads(line[6:]).get("kind") for line in lines if line.startswith("data: ")]
    assert kinds[0] == "task_submitted"
    assert "cancel_requested" in kinds
    assert '"state":"cancelled"' in lines[-2]
    first = next(line[4:] for line in lines if line.startswith("id: "))
    resumed = api.get(f"/tasks/{name}/stream", headers={"last-event-id": first}).text
    assert "task_submitted" not in resumed
    assert "cancel_requested" in resumed


def test_a_cursor_of_another_list_is_refused(api):
    forged = base64.urlsafe_b64encode(b'["now",1,{}]').decode()
    assert api.get("/decisions", params={"cursor": forged}).status_code == 400
    assert api.get("/tasks", params={"cursor": forged}).status_code == 400


def test_a_thousand_followers_of_a_quiet_task_are_one_look_and_hear_what_comes(host, api):
    """Each is woken only when something is new."""
    name = submit(api, TINY.replace("name: tiny", "name: watched")).json()["task_id"]
    looks = 0

    class Counted:
        def __getattr__(self, what):
            return getattr(host.queries, what)

        def news(self, task_id):
            nonlocal looks
            looks += 1
            return host.queries.news(task_id)

    async def crowd():
        followed = Followed(Counted())
        heard = [0] * 1000

        async def listen(number):
            async for piece in followed.follow(name, 0):
                heard[number] += not piece.startswith(b":")

        listening = [asyncio.create_task(listen(number)) for number in range(1000)]
        quiet: list[int] = []
        while 0 in heard or heard != quiet:  # a thousand hear what there is one after the other
            quiet = list(heard)
            await asyncio.sleep(0.5)
        before = looks
        await asyncio.sleep(2.0)
        assert heard == quiet, "nothing new, nothing said"
        assert 0 < looks - before <= 6
        await asyncio.to_thread(host.intake.cancel, name, "test")
        while not all(task.done() for task in listening):
            await asyncio.to_thread(host.step)
            await asyncio.sleep(0.05)
        assert not followed._watches
        return quiet, heard

    quiet, heard = asyncio.run(asyncio.wait_for(crowd(), 60))
    assert all(more > less for more, less in zip(heard, quiet, strict=True))
