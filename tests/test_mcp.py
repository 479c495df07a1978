"""`qipan mcp` as an assistant meets it: the real process on standard input and output, the protocol's own client."""

import asyncio
import json
import os
import sys
import threading
from collections.abc import Iterator

import pytest
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

from api_site import TINY, served
from qipan.client import Client
from qipan.host import Host

READS = {"plan", "tasks", "task", "why", "logs", "bill", "boards", "prices", "decisions", "ledger"}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with served(tmp_path_factory.mktemp("m")) as host:
        loop = threading.Thread(target=host.run, daemon=True)
        loop.start()
        yield host
        host.stop()
        loop.join(5)


def talk(host: Host, calls, *flags: str):
    """What the tools are, and what each call answers: (is error, text)."""

    async def conversation():
        command = ["-m", "qipan.cli", "mcp", "--store", str(host.folder), *flags]
        async with (
            stdio_client(StdioServerParameters(command=sys.executable, args=command, env={**os.environ})) as (
                read,
                write,
            ),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            answers = []
            for name, arguments in calls:
                answer = await session.call_tool(name, arguments)
                answers.append((answer.is_error, "".join(part.text for part in answer.content)))
            return {tool.name: tool for tool in tools}, answers

    return asyncio.run(asyncio.wait_for(conversation(), 60))


def test_reading_is_there_and_writing_is_not(host):
    task_id = Client(host.folder).call("POST", "/tasks", {"text": TINY})["task_id"]
    tools, answers = talk(
        host, [("plan", {"task_yaml": TINY}), ("task", {"task_id": task_id}), ("why", {"task_id": task_id}), ("boards", {}),
               ("task", {"task_id": "nobody"}), ("cancel", {"task_id": task_id})],
    )  # fmt: skip
    assert set(tools) == READS
    assert all(tool.annotations.read_only_hint for tool in tools.values())
    plan, task, why, boards, absent, cancel = answers
    assert json.loads(plan[1])["options"][0]["place"] == "dc1"
    assert json.loads(task[1])["cost"]["hold_micro_cny"] == 1_000_000
    assert json.loads(why[1])["decisions"][0]["verdict"] == "placed"
    assert "sim/a" in boards[1]
    assert absent[0]
    assert "no task 'nobody'" in absent[1]
    assert cancel[0], "there is no such tool"
    assert Client(host.folder).task(task_id)["state"] != "cancelled"


def test_a_writing_tool_is_a_dry_run_unless_it_is_told(host):
    client = Client(host.folder)
    before = len(list(client.list("/tasks", "tasks")))
    text = TINY.replace("name: tiny", "name: told")
    tools, answers = talk(
        host,
        [("submit", {"task_yaml": text, "key": "k"}), ("submit", {"task_yaml": text, "key": "k", "dry_run": False}),
         ("cancel", {"task_id": "told-1"}), ("submit", {"task_yaml": text, "key": "k", "dry_run": False}),
         ("cancel", {"task_id": "told-1", "dry_run": False})],
        "--write",
    )  # fmt: skip
    assert set(tools) == READS | {"submit", "cancel"}
    assert not any(tools[name].annotations.read_only_hint for name in ("submit", "cancel"))
    dry, done, dry_cancel, again, cancelled = (json.loads(text) for _, text in answers)
    assert dry["dry_run"]
    assert dry["would_run"]["place"] == "dc1"
    assert done["task_id"] == again["task_id"] == "told-1"
    assert dry_cancel["task"]["state"] != "cancelled"
    assert not cancelled["dry_run"]
    assert client.job("told-1").wait(20)["state"] == "cancelled"
    assert len(list(client.list("/tasks", "tasks"))) == before + 1


def test_a_tenants_token_sees_its_own_only(host):
    made = Client(host.folder).call("POST", "/people/poets/key")["token"]
    _, ((wrong, text),) = talk(host, [("ledger", {})], "--token", made)
    assert not wrong
    assert set(json.loads(text)["balances_micro_cny"]) == {"tenant/poets"}
