"""Boards in processes of their own: the page docs/grid.md as it stands, and the link between them."""

import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from qipan.channel import Link
from qipan.channel.network import Admitted, Network
from qipan.channel.opening import ask_once
from qipan.clock import named_random
from qipan.errors import Unreachable
from qipan.identity import Wallet
from qipan.identity.wallet import Members, joining_context

BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition, limit_s: float = 60.0, what: object = "") -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, what() if callable(what) else what or condition
        time.sleep(0.02)


@pytest.mark.slow
def test_the_page_on_boards_of_several_hosts_can_be_typed_as_it_stands(tmp_path):
    page = Path("docs/grid.md").read_text().replace("8443", str(free_port()))
    blocks = BLOCK.findall(page)
    assert len(blocks) == 4
    # A person waits for a board to say that it is served before going on; so does the script.
    hosts = ["host1", "../host2", "../host1", "../host2"]  # a folder for each terminal
    script = "set -e\nmkdir host1 host2\n" + "\n".join(
        f"cd {hosts[i]}\n" + "cp ../host1/dc1.invite .\n" * (i == 1) + re.sub(r"^(qipan board serve.*--store (\w+).*) &$", r"\1 > \2.log 2>&1 & echo $! >> ../pids\n"
               r"for i in $(seq 300); do grep -q served \2.log && break; sleep 0.1; done", block, flags=re.MULTILINE)
        + ("for i in $(seq 300); do qipan board --json --store ../host1/cn | grep -q sim/a && break; sleep 0.1; done\n" if i == 1 else "")
        for i, block in enumerate(blocks)
    )  # fmt: skip
    bin_ = Path(".venv/bin").absolute()
    env = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", "PYTHONPATH": str(Path("src").absolute())}
    try:
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )
        logs = "\n".join(path.read_text() for path in tmp_path.glob("*/*.log"))
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
        assert "hello from hello-1 on attempt 1" in done.stdout
        assert "agrees" in done.stdout
        assert "hello-2: done" in done.stdout
        assert re.search(r"dc1 +placed +dc1-local", done.stdout), "the reasons of both boards"
    finally:
        for pid in (tmp_path / "pids").read_text().split():
            os.kill(int(pid), signal.SIGTERM)


# ---- the link over real sockets ------------------------------------------------------------------------------------------


class Ends:
    """Two networks and a link between them over real TLS, through a proxy that can be cut."""

    def __init__(self, folder: Path, name: str = "dc1") -> None:
        self.above = Wallet.found(folder / "above", "cn", time.time)
        token = self.above.invite(name, "", "grid://nowhere:1")
        self.below = Wallet.join(
            folder / "below",
            token,
            lambda token, request, own: self.above.admit(token.secret, token.place, "", request, own),
            time.time,
        )
        self.refused: list[str] = []
        self.server, self.client = Network(lambda _, why: self.refused.append(why)), Network()
        self.at_parent, self.at_child = self.server.carrier(), self.client.carrier()
        admitted = Admitted(self.at_parent, "welcome", lambda name, body: [name, body])
        port = self.server.listen("127.0.0.1", 0, self.above.server_context, lambda *_: admitted)
        self.proxy = Proxy(port)
        self.dialer = self.client.dial(
            f"grid://127.0.0.1:{self.proxy.port}", self.below.client_context, lambda _: None, dict, self.at_child,
            lambda name, body: [name, body],
        )  # fmt: skip

    def close(self) -> None:
        self.dialer.end()
        self.client.close()
        self.server.close()
        self.proxy.close()


class Proxy:
    """Passes bytes on; `cut` ends every connection and refuses new ones, `stall` lets nothing through."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: list[socket.socket] = []
        self.down = self.stalled = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            if self.down:
                here.close()
                continue
            there = socket.create_connection(("127.0.0.1", self._target))
            self._pairs += [here, there]
            for source, target in ((here, there), (there, here)):
                threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                while self.stalled:
                    time.sleep(0.01)
                target.sendall(data)
        except OSError:
            pass  # cut
        for end in (source, target):
            end.close()

    def cut(self) -> None:
        for end in self._pairs:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._pairs.clear()

    def close(self) -> None:
        self._listener.close()
        self.down = True
        self.cut()


@pytest.fixture
def ends(tmp_path):
    made = Ends(tmp_path)
    until(lambda: made.at_child.connected)
    yield made
    made.close()


def test_messages_arrive_once_and_in_order_over_tls_while_the_connection_is_cut(ends):
    rng = named_random(1, "cuts")
    here, there = Link(ends.at_child, 1, 0.2), Link(ends.at_parent, 1, 0.2)
    arrived, pushed = [], 0
    end_s = time.monotonic() + 60
    while len(arrived) < 3000:
        assert time.monotonic() < end_s, (len(arrived), pushed)
        for _ in range(min(50, 3000 - pushed)):
            here.push(str(pushed).encode() * rng.randint(1, 40))
            pushed += 1
        here.flush(time.monotonic())
        arrived += [seq for seq, _ in there.receive()]
        there.flush(time.monotonic())
        here.receive()
        if rng.random() < 0.01:
            ends.proxy.cut()
        time.sleep(0.001)
    assert arrived == list(range(1, 3001))


def test_frames_for_a_stalled_link_are_dropped_at_a_bound_and_sent_again(ends):
    ends.proxy.stalled = True
    link = Link(ends.at_child, 1, 0.5, window=1000)
    other = Link(ends.at_parent, 1, 0.5)
    body = b"x" * 20_000
    for _ in range(1000):
        link.push(body)
    link.flush(0.0)
    until(lambda: ends.at_child.dropped > 0 or not link.flush(time.monotonic()))
    assert ends.at_child._out_bytes <= 4 << 20
    ends.proxy.stalled = False
    arrived = 0

    def all_there() -> bool:
        nonlocal arrived
        link.flush(time.monotonic())
        arrived += len(other.receive())
        other.flush(time.monotonic())
        link.receive()
        return arrived == 1000

    until(all_there, 60, "all frames arrive")


def test_a_question_is_answered_from_both_sides_and_fails_when_the_link_is_cut(ends):
    assert ends.at_child.ask("who", 1) == ["who", 1]
    until(lambda: ends.at_parent.connected)
    assert ends.at_parent.ask("what", [2]) == ["what", [2]]
    ends.proxy.down = True
    ends.proxy.cut()
    until(lambda: not ends.at_child.connected)
    with pytest.raises(Exception, match="not connected"):
        ends.at_child.ask("who", 1)
    ends.proxy.down = False
    until(lambda: ends.at_child.connected, what="it connects again by itself")


def test_who_leads_is_answered_while_all_other_questions_wait(ends):
    waiting = threading.Event()
    ends.dialer.answer = lambda name, _: name == "lead" or waiting.wait(20)
    ends.at_parent.connection.drop("from now on it answers so")
    until(lambda: not ends.at_child.connected)
    until(lambda: ends.at_child.connected)
    slow = [threading.Thread(target=ends.at_parent.ask, args=("logs", i)) for i in range(8)]
    try:
        for thread in slow:
            thread.start()
        until(lambda: len(ends.at_parent.connection._asked) == 8)
        assert ends.at_parent.ask("lead", None, 2.0) is True
    finally:
        waiting.set()
        for thread in slow:
            thread.join()


@pytest.mark.parametrize("after", ["nothing", "the handshake"])
def test_a_question_to_a_process_that_says_nothing_more_is_over_in_its_time(tmp_path, after):
    """A host that went away after TLS stood, its connection never closed: the thread that asked is free again."""
    wallet = Wallet.found(tmp_path / "cn", "cn", time.time)
    listener, held, ended = socket.create_server(("127.0.0.1", 0)), [], threading.Event()

    def serve() -> None:
        sock, _ = listener.accept()
        held.append(
            wallet.server_context().wrap_socket(sock, server_side=True) if after == "the handshake" else sock
        )

    def ask() -> None:
        url = f"grid://127.0.0.1:{listener.getsockname()[1]}"
        context = joining_context(wallet.invite("dc1", "", url))
        with pytest.raises(Unreachable):
            ask_once(url, context, lambda _: None, {}, "silence", 1.0)
        ended.set()

    for act in (serve, ask):
        threading.Thread(target=act, daemon=True).start()
    assert ended.wait(5)
    for sock in (*held, listener):
        sock.close()


def test_a_new_board_has_no_members(tmp_path):
    wallet = Wallet.found(tmp_path / "identity", "cn", time.time)
    assert wallet.kept == Members(("cn",))
