"""The SDK as a program uses it, and `up` with its console as a person meets them."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import qipan
import qipan.client
from api_site import TINY, served
from qipan.errors import InvalidInput, NotAllowed, NotFound, Unreachable
from qipan.host import Host

SITE = str(Path(__file__).parent / "tiny_site.yaml")
SHORT = TINY.replace("sleep 60", "echo one; sleep 0.5; echo two")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with served(tmp_path_factory.mktemp("k")) as host:
        loop = threading.Thread(target=host.run, daemon=True)
        loop.start()
        yield host
        host.stop()
        loop.join(5)


def test_a_task_from_a_file_planned_submitted_followed_and_paid(host, tmp_path):
    (tmp_path / "short.yaml").write_text(SHORT)
    task = qipan.Task.from_yaml(tmp_path / "short.yaml")
    client = qipan.Client(host.folder)
    assert client.plan(task).options[0].place == "dc1"
    job = client.submit(task, key="once")
    assert client.submit(task, key="once").task_id == job.task_id == "tiny-1"
    assert "one\ntwo\n" in "".join(job.logs(follow=True))
    assert job.wait(20)["state"] == "done"
    assert job.why()["decisions"][0]["verdict"] == "placed"
    assert job.cost()["spent_micro_cny"] == job.bill()["charged_micro_cny"] > 0
    assert [view["task_id"] for view in client.list("/tasks", "tasks", limit=1)] == ["tiny-1"]


def test_a_job_waited_for_too_briefly_is_told_as_it_is_and_can_be_cancelled(host):
    job = qipan.Client(host.folder).submit(qipan.Task.from_text(TINY))
    assert job.wait(0)["state"] not in ("done", "failed", "cancelled")
    job.cancel()
    assert job.wait(20)["state"] == "cancelled"


def test_the_errors_of_the_server_are_ours(host, tmp_path):
    client = qipan.Client(host.folder)
    with pytest.raises(NotFound, match="nobody"):
        client.job("nobody")
    with pytest.raises(InvalidInput, match=r"task.yaml:2:1.*knd|knd"):
        qipan.Task.from_text("name: a\nknd: train\n")
    with pytest.raises(Unreachable, match="qipan up"):
        qipan.Client(tmp_path).job("a-1")


def test_the_same_for_asyncio(host):
    async def boards():
        client = qipan.AsyncClient(host.folder)
        try:
            return await client.call("GET", "/boards")
        finally:
            await client.close()

    assert [board["board"] for board in asyncio.run(boards())["boards"]] == ["cn", "east", "dc1", "dc2"]


def test_a_job_planned_submitted_followed_and_paid_for_asyncio(host):
    async def whole():
        client = qipan.AsyncClient(host.folder)
        try:
            task = qipan.Task.from_text(SHORT.replace("name: tiny", "name: asynchronous"))
            assert (await client.plan(task)).options[0].place == "dc1"
            job = await client.submit(task, key="asynchronous")
            printed = "".join([piece async for piece in job.logs()])
            view = await job.wait()
            kinds = {kind async for kind, _ in client.follow(job.task_id)}
            names = [one["task_id"] async for one in client.list("/tasks", "tasks", limit=1)]
            with pytest.raises(NotFound):
                await anext(client.follow("nobody"))
            return printed, view, kinds, names, await job.bill(), await job.cost(), await job.why()
        finally:
            await client.close()

    printed, view, kinds, names, bill, cost, why = asyncio.run(whole())
    assert "one\ntwo\n" in printed
    assert view["state"] == "done"
    assert kinds == {"fact", "logs", "task"}
    assert "asynchronous-1" in names
    assert len(names) == len(set(names))
    assert cost["spent_micro_cny"] == bill["charged_micro_cny"] > 0
    assert why["decisions"]


def test_the_client_asks_for_nothing_that_the_document_does_not_describe(host):
    document = qipan.Client(host.folder).call("GET", "/openapi.json")
    known = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    asked = set()
    for source in (
        Path(qipan.client.__file__),
        *Path("src/qipan/cli").glob("*.py"),
        *Path("src/qipan/console").glob("*.py"),
        Path("src/qipan/mcp_server.py"),
    ):
        for method, path in re.findall(r'"(GET|POST)",\s*f?"(/[^"]*)"', source.read_text()):
            asked.add(
                (
                    method,
                    "/v1"
                    + re.sub(
                        r"\{[^}]*tenant[^}]*\}", "{tenant}", re.sub(r"\{[^}]*task[^}]*\}", "{task_id}", path)
                    ),
                )
            )
    assert len(asked) >= 12
    assert asked - known <= {("GET", "/v1/openapi.json")}


def test_a_tenants_token_from_the_command_line_opens_its_own_tasks_only(host):
    command = [sys.executable, "-m", "qipan.cli", "token", "poets", "--store", str(host.folder)]
    token = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    job = qipan.Client(host.folder).submit(qipan.Task.from_text(TINY))
    job.cancel()
    assert qipan.Client(host.folder, token).task(job.task_id)["tenant"] == "poets"
    with pytest.raises(NotAllowed):
        qipan.Client(host.folder, token.replace("poets", "rivals")).task(job.task_id)


def test_importing_qipan_is_light():
    code = "import sys, qipan; sys.exit('httpx' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_example_runs(host, tmp_path):
    (tmp_path / "short.yaml").write_text(SHORT)
    done = subprocess.run(
        [sys.executable, "examples/sdk.py", str(tmp_path / "short.yaml")], capture_output=True, text=True,
        env={**os.environ, "QIPAN_STORE": str(host.folder)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "planned: 1 x sim/a at dc1" in done.stdout
    assert "two" in done.stdout
    assert "is done and cost 0.00" in done.stdout


@pytest.mark.slow
def test_up_prints_one_address_that_opens_the_board_and_ends_with_it(tmp_path):
    up = subprocess.Popen(
        [sys.executable, "-m", "qipan.cli", "up", "--store", str(tmp_path / "s"), "--site", SITE, "--json"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    try:
        assert up.stdout is not None
        address, _, key = json.loads(up.stdout.readline())["console"].partition("/enter#")
        with httpx.Client(base_url=address, timeout=20) as browser:
            assert browser.get("/").status_code == 303
            browser.post("/enter", data={"key": key})
            assert "sim/a" in browser.get("/").text
        up.send_signal(signal.SIGINT)
        assert up.wait(20) == 130
        with pytest.raises(httpx.ConnectError):
            httpx.get(address)
    finally:
        up.kill()
        up.wait()
        up.stdout.close()
