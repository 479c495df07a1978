"""What people ask about a task that runs on another host: two boards in processes of their own, the task below, the person above;
and a person below, whose task the board above placed."""

import base64
import json
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families as parse

from qipan.client import Client, Task
from qipan.errors import NotFound, QipanError
from test_grid import free_port, until

pytestmark = pytest.mark.slow
TASK = """
kind: train
name: {name}
tenant: poets
run: |
  echo began; echo {{'"event": "progress", "step": 1, "steps": 2, "at_s": '$(date +%s.%N)'}}' >> $QIPAN_EVENTS
  echo parent $TRACEPARENT
  for i in $(seq 3000); do [ -e enough ] && break; sleep 0.1; done
  echo over; exit 7
devices: 1
limits: {{time: 300s, max_cost: 1 CNY}}
"""


class Boards:
    """cn above, dc1 below with the chips; their stores in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, []
        self.port, self.metrics = free_port(), free_port()
        (folder / "cn.yaml").write_text(
            "site:\n  board: {name: cn}\n  tenants: [{name: poets, balance: 1000 CNY}]\n"
        )
        (folder / "dc1.yaml").write_text(
            "site:\n  board: {name: dc1, region: cn-east, pools: [{chip: sim/a, devices: 2, tariff: 1 CNY}]}\n"
        )
        self.run("grid", "init", "--name", "cn", "--url", f"grid://127.0.0.1:{self.port}", "--store", "cn")
        self.serve("--store", "cn", "--site", "cn.yaml", "--metrics", f"127.0.0.1:{self.metrics}")
        token = self.run("grid", "invite", "dc1", "--store", "cn").stdout.strip()
        self.run("grid", "join", token, "--store", "dc1")
        self.serve("--store", "dc1", "--site", "dc1.yaml", "--no-probe")
        self.above, self.below = Client(folder / "cn"), Client(folder / "dc1")
        until(lambda: "sim/a" in json.dumps(self.above.call("GET", "/boards")), 120, "dc1 did not join")

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "qipan.cli", *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), cwd=self.folder, capture_output=True, text=True, timeout=90
        )

    def serve(self, *words: str) -> None:
        log = (self.folder / f"{words[1]}.log").open("w")
        process = subprocess.Popen(self.command("board", "serve", *words), cwd=self.folder, stdout=log, stderr=log)  # fmt: skip
        self.processes.append(process)
        until(lambda: "served" in Path(log.name).read_text(), 150, "it is not served")

    def begun(self, board: Client, name: str) -> str:
        task_id = board.submit(Task.from_text(TASK.format(name=name))).task_id
        until(lambda: "began" in "".join(board.job(task_id).logs()), 120, f"{task_id} did not begin")
        return task_id

    def end(self, board: Client, task_id: str) -> None:
        self.run("exec", task_id, "--store", str(self.folder / "cn"), "--", "touch", "enough")
        until(lambda: board.task(task_id)["state"] == "failed", 120, f"{task_id} did not end")

    def close(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(20)


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boards]:
    made = Boards(tmp_path_factory.mktemp("e"))
    yield made
    made.close()


@pytest.mark.parametrize("where", ["above", pytest.param("below", marks=pytest.mark.endurance)])
def test_a_task_on_another_host_is_followed_entered_traced_and_its_exit_passed_on(boards, where):
    board, store = getattr(boards, where), str(boards.folder / {"above": "cn", "below": "dc1"}[where])
    task_id = boards.begun(board, where)
    follow = subprocess.Popen(boards.command("logs", "-f", task_id, "--store", store), stdout=subprocess.PIPE, text=True)  # fmt: skip

    inside = boards.run(
        "exec", task_id, "--store", store, "--", "sh", "-c", "echo $QIPAN_TASK_ID; pwd; exit 3"
    )
    assert inside.returncode == 3, inside.stderr
    assert inside.stdout.split()[0] == task_id
    assert inside.stdout.split()[1].endswith(f"dc1/engines/dc1/attempts/{task_id}-1")
    none = boards.run("exec", task_id, "--store", store, "--", "no-such-program")
    assert (none.returncode, none.stdout) == (127, "No such file or directory: no-such-program\n")
    late = boards.run("exec", task_id, "--timeout", "0.3", "--store", store, "--", "sleep", "60")
    assert late.returncode == 101
    assert "ran for 0.3 s" in late.stderr

    boards.end(board, task_id)
    printed = follow.communicate(timeout=20)[0]
    assert "began" in printed
    assert printed.rstrip().endswith("over"), "logs -f goes on to the last line"
    assert boards.run("wait", task_id, "--pass-exit-code", "--store", store).returncode == 7
    kinds = [json.loads(line)["kind"] for line in boards.run("events", task_id, "--json", "--store", store).stdout.splitlines()]  # fmt: skip
    assert kinds[0] == "task_submitted"
    assert {"lease_granted", "task_started", "task_progress", "task_exited"} <= set(kinds)
    gone = boards.run("exec", task_id, "--store", store, "--", "true")
    assert gone.returncode == 102
    assert "does not run now" in gone.stderr

    spans = board.call("GET", f"/tasks/{task_id}/trace")["spans"]
    assert f"parent 00-{spans[0]['trace_id']}-" in printed, "the task sees the trace that it is part of"
    is_one_trace(spans)


def is_one_trace(spans: list[dict]) -> None:
    """One trace, one root, every span's parent in it, each inside the whole, from the command line's call to the first step."""
    assert len({span["trace_id"] for span in spans}) == 1
    ids = {span["span_id"] for span in spans}
    assert len(ids) == len(spans)
    roots = [span for span in spans if span["parent_id"] not in ids]
    assert [span["name"] for span in roots] == ["submit to first step"]
    names = [(span["name"], span["instance"]) for span in spans]
    for wanted in [
        ("qipan submit", ""), ("POST /v1/tasks", "cn"), ("task at cn", "cn"), ("reserve at dc1", "cn"), ("channel cn to dc1", "cn"),
        ("channel dc1 to cn", "dc1"), ("task at dc1", "dc1"), ("reserve at dc1-local", "dc1"), ("start at dc1", "cn"),
        ("attempt 1", "dc1"), ("supervisor start", "dc1"), ("first step", "dc1"),
    ]:  # fmt: skip
        assert wanted in names, (wanted, names)
    whole = roots[0]
    for span in spans:
        assert whole["start_s"] <= span["start_s"] <= span["end_s"], span
    step = next(span for span in spans if span["name"] == "first step")
    assert step["end_s"] == whole["end_s"]


SLOW = """
kind: train
name: dear
tenant: poets
run: exec {python} -S {script}
devices: 1
limits: {{time: 3s, max_cost: 0.0015 CNY}}
env: {{TINY_STEPS: "90"}}
"""


def test_a_budget_that_is_spent_is_raised_at_the_board_below_where_the_task_was_submitted(boards):
    text = SLOW.format(python=sys.executable, script=Path("examples/tiny.py").resolve())
    task_id = boards.below.submit(Task.from_text(text)).task_id
    until(lambda: boards.below.task(task_id)["state"] == "parked", 120, f"{task_id} is not parked")
    assert "its budget" in boards.below.task(task_id)["waiting"]
    words = ("budget", task_id, "--store", str(boards.folder / "dc1"))
    less = boards.run(*words[:2], "0.001 CNY", *words[2:])
    assert less.returncode == 2, less.stderr
    assert "has a budget of 0.0015" in less.stderr, "the words of the board above"
    done = boards.run(*words[:2], "1 CNY", *words[2:])
    assert done.returncode == 0, done.stderr
    until(lambda: boards.below.task(task_id)["state"] == "done", 120, f"{task_id} does not go on")
    told = boards.below.call("GET", f"/tasks/{task_id}/events")["events"]
    assert [event["fact"]["budget_micro_cny"] for event in told if event["kind"] == "budget_raised"] == [
        10**6
    ]
    for what in ("bill", "bill/explained", "cost"):
        told = [board.call("GET", f"/tasks/{task_id}/{what}") for board in (boards.below, boards.above)]
        assert told[0] == told[1], what


def test_a_trace_goes_to_an_opentelemetry_receiver(boards, monkeypatch):
    received: list[tuple[str, ExportTraceServiceRequest]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = json.loads(self.rfile.read(int(self.headers["content-length"])))
            for resource in raw["resourceSpans"]:  # OTLP says hexadecimal where protobuf's JSON says base64
                for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
                    for key in ("traceId", "spanId", "parentSpanId"):
                        if key in span:
                            span[key] = base64.b64encode(bytes.fromhex(span[key])).decode()
            received.append((self.path, json_format.ParseDict(raw, ExportTraceServiceRequest())))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TRACEPARENT", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    task_id = boards.begun(boards.above, "sent")
    boards.end(boards.above, task_id)
    done = boards.run(
        "trace", task_id, "--otlp", f"http://127.0.0.1:{server.server_address[1]}", "--store", "cn"
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert "first step" in done.stdout
    ((path, request),) = received
    assert path == "/v1/traces"
    spans = [
        span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans
    ]
    assert {span.trace_id.hex() for span in spans} == {"0af7651916cd43dd8448eb211c80319c"}, (
        "the caller's own trace"
    )
    root = next(span for span in spans if span.name == "submit to first step")
    assert root.parent_span_id.hex() == "b7ad6b7169203331"
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano > 0 for span in spans)
    names = {attribute.value.string_value for resource in request.resource_spans for attribute in resource.resource.attributes if attribute.key == "service.name"}  # fmt: skip
    assert {"qipan-cli", "qipan-board", "qipan-channel", "qipan-shim", "qipan-trainer"} <= names


def test_metrics_of_a_board_with_another_below_tell_of_the_link(boards):
    text = urllib.request.urlopen(f"http://127.0.0.1:{boards.metrics}/metrics", timeout=10).read().decode()
    found = {(sample.name, sample.labels.get("peer"), sample.labels.get("direction")): sample.value for family in parse(text) for sample in family.samples}  # fmt: skip
    assert found["qipan_channel_connected", "dc1", None] == 1
    assert found["qipan_channel_bytes_total", "dc1", "in"] > 100
    assert found["qipan_channel_bytes_total", "dc1", "out"] > 100
    assert found["qipan_channel_silence_seconds", "dc1", None] < 20
    assert ("qipan_channel_unacknowledged_messages", "dc1", None) in found


def test_a_command_beside_a_task_ends_with_the_attempt_and_is_no_strangers(boards):
    task_id = boards.begun(boards.above, "beside")
    started = boards.above.call("POST", f"/tasks/{task_id}/exec", {"command": ["sh", "-c", "echo $$; sleep 600"]})["exec_id"]  # fmt: skip
    path = f"/tasks/{task_id}/exec/{started}"
    until(lambda: boards.above.call("GET", path, after=0)["text"], 20)
    pid = int(boards.above.call("GET", path, after=0)["text"])
    key = boards.above.call("POST", "/people/poets/key")["token"]
    poets = Client(boards.folder / "cn", key)
    assert poets.call("GET", path, after=0)["text"] == f"{pid}\n"
    for bad in ([], [""], ["x" * 70_000], ["a\x00b"]):
        with pytest.raises(QipanError):
            poets.call("POST", f"/tasks/{task_id}/exec", {"command": bad})
    for name in ("9.9", "..%2F..", "1.x"):
        with pytest.raises(NotFound):
            poets.call("GET", f"/tasks/{task_id}/exec/{name}")
    boards.end(boards.above, task_id)
    until(lambda: boards.above.call("GET", path, after=0)["over"], 20)
    assert boards.above.call("GET", path, after=0)["ended_by"] == "attempt"
    until(lambda: not Path(f"/proc/{pid}").exists(), 5, "it outlived the attempt")
    noted = [line["fact"]["why"] for line in boards.above.call("GET", "/users/log")["log"]]
    assert "sh -c echo $$; sleep 600" in noted, "who ran what is kept"


def test_a_task_submitted_at_a_data_centre_runs_there_and_rises_only_when_that_is_full(boards):
    """dc2 joins, a tenth cheaper than dc1; what is submitted at dc1 stays there until dc1 is full."""
    (boards.folder / "dc2.yaml").write_text(
        "site:\n  board: {name: dc2, region: cn-west, pools: [{chip: sim/a, devices: 2, tariff: 0.9 CNY}]}\n"
    )
    boards.run(
        "grid", "join", boards.run("grid", "invite", "dc2", "--store", "cn").stdout.strip(), "--store", "dc2"
    )
    boards.serve("--store", "dc2", "--site", "dc2.yaml", "--no-probe")
    until(lambda: "dc2" in json.dumps(boards.above.call("GET", "/boards")), 120, "dc2 did not join")
    at_home = [boards.begun(boards.below, f"home-{i}") for i in range(2)]
    rose = boards.begun(boards.below, "rose")
    free = boards.begun(boards.above, "free")
    ran = {task_id: boards.above.task(task_id)["place"].split("/")[1] for task_id in (*at_home, rose, free)}
    assert ran == {at_home[0]: "dc1", at_home[1]: "dc1", rose: "dc2", free: "dc2"}
    decisions = boards.below.call("GET", f"/tasks/{rose}/why")["decisions"]
    [text] = [one["text"] for one in decisions if one["verdict"] == "rose"]
    assert text.startswith("submitted at dc1, goes to dc2, where ")
    assert "dc1 has " in text
    boards.below.call("POST", f"/tasks/{rose}/cancel")
    until(lambda: boards.below.task(rose)["state"] == "cancelled", 60, "it is not cancelled")
    for task_id in (*at_home, free):
        boards.end(boards.above, task_id)
