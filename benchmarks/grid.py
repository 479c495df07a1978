"""What boards across processes cost: python -m benchmarks.grid --json OUT [--children 10,100,1000] [--window 60] [--faults 1]

One parent in a process of its own, with children over real mutual TLS from another: each its own certificate and link, a
heartbeat every 7 to 8 s, a changed ask curve a minute (spread over the minute), leases of 60 s, no task.  CPU share is of one core, over
the window, after all have connected and offered; bytes are those of the websockets, before TLS.

`--faults N`: the six faults at N seeded moments each on five hosts (needs root): tasks lost, run twice, billed twice, and how long after a
fault's end a task at a data centre below it has begun."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks.form import Figure, arguments, write
from qipan.channel.network import Network
from qipan.engines.board import ParentLink
from qipan.events import EngineOffered, TakeCensus, TasksHeld, encode
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.identity import Wallet, expects, make_request
from qipan.identity.wallet import Member, Members, joining_context
from qipan.leases import AskStep, EngineId, Offer

CHIP = ChipClassId("sim/a")
STEPS = 12  # of an ask curve


class Child:
    """A board with nothing to do: it answers the census and changes its asks every minute."""

    def __init__(self, number: int, network: Network, folder: Path, wallet: Wallet, port: int) -> None:
        self.name = f"dc{number:04d}"
        pool = Pool(PoolId(f"{self.name}/{CHIP}"), BoardId(self.name), CHIP, 8, 8, 1_000_000)
        spec = msgspec.json.encode(BoardSpec(BoardId(self.name), pools=(pool,)))
        key, place = ec.generate_private_key(ec.SECP256R1()), ("cn", self.name)
        cert = wallet.authority().board(make_request(key, place), place, time.time())
        path = folder / f"{self.name}.pem"
        path.write_bytes(_pem(cert, key))
        token = wallet.invite("nobody", "", "grid://127.0.0.1:1")
        self._context = joining_context(token)
        self._context.load_cert_chain(path)
        self.carrier = network.carrier()
        self._link, self._reports, self._changed = ParentLink(self.carrier, 1), 0, 0
        self._next_s = time.monotonic() + 60.0 * (number % 997) / 997
        self.dialer = network.dial(
            f"grid://127.0.0.1:{port}", lambda: self._context, expects(("cn",)), lambda: {"board": self.name, "spec": spec},
            self.carrier, lambda *_: None,
        )  # fmt: skip

    def turn(self, now_s: float) -> None:
        for received in self._link.commands():
            if isinstance(received.command, TakeCensus):
                self._say(self._offer())
                self._say(TasksHeld(EngineId(self.name), 0, received.command.asked_lease_s, ()))
        if now_s >= self._next_s:
            self._next_s = now_s + 60.0
            self._changed += 1
            self._say(self._offer())
        self._link.flush(now_s)

    def _offer(self) -> EngineOffered:
        asks = tuple(AskStep(1, 10_000 * (self._changed + i)) for i in range(STEPS))
        offer = Offer(CHIP, STEPS, asks, STEPS, 1_000_000, self.name, "cn-east")
        return EngineOffered(EngineId(self.name), (offer,), chooses=True)

    def _say(self, fact: Any) -> None:
        self._reports += 1
        self._link.report([(self._reports, encode(fact))])


def idle(count: int, window_s: float) -> dict[str, Any]:
    """One parent with `count` children that do nothing, over the window."""
    with tempfile.TemporaryDirectory(prefix="qipan-grid-") as scratch:
        folder = Path(scratch)
        wallet = Wallet.found(folder / "cn" / "identity", "cn", time.time)
        members = tuple(Member(("cn", f"dc{i:04d}"), "") for i in range(count))
        (folder / "cn" / "identity" / "members.json").write_bytes(
            msgspec.json.encode(Members(("cn",), members=members))
        )
        certificates = Wallet.found(
            folder / "spare" / "identity", "cn", time.time
        )  # its file may change; the parent's not
        certificates.folder = wallet.folder
        certificates._keep = lambda kept: None  # type: ignore[method-assign]
        parent = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.grid_parent", str(folder / "cn")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert parent.stdout is not None
        network, ended = Network(), threading.Event()
        children: list[Child] = []
        try:
            port = json.loads(parent.stdout.readline())["port"]
            children = [Child(i, network, folder, certificates, port) for i in range(count)]

            def turn_all() -> None:
                while not ended.wait(0.5):
                    for child in children:
                        child.turn(time.monotonic())

            threading.Thread(target=turn_all, daemon=True).start()
            end_s = time.monotonic() + 180
            while (now := _measure(parent))["offered"] < count or now["connected"] < count:
                assert time.monotonic() < end_s, f"not all came: {now}"
                time.sleep(0.5)
            time.sleep(3)
            begin = _measure(parent)
            time.sleep(window_s)
            end = _measure(parent)
            wall_s = end["at_s"] - begin["at_s"]
            return {
                "children": count, "connected": end["connected"], "window_s": round(wall_s, 1),
                "cpu_share": round((end["cpu_s"] - begin["cpu_s"]) / wall_s, 4),
                "resident_mb": round(end["resident_bytes"] / 1e6, 1),
                "bytes_per_child_minute": round((end["bytes"] - begin["bytes"]) / count * 60 / wall_s),
                "ticks": end["ticks"] - begin["ticks"],
            }  # fmt: skip
        finally:
            ended.set()
            for child in children:
                child.dialer.end()
            parent.kill()
            parent.wait()
            network.close()


def _measure(parent: "subprocess.Popen[str]") -> dict[str, Any]:
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write("measure\n")
    parent.stdin.flush()
    found: dict[str, Any] = json.loads(parent.stdout.readline())
    return found


def _pem(cert: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding = serialization.Encoding.PEM
    return cert.public_bytes(encoding) + key.private_bytes(
        encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def faults(moments: int) -> tuple[list[Figure], list[dict[str, Any]]]:
    """The six faults of tests/test_grid_faults.py at so many seeded moments, on five hosts in network namespaces."""
    sys.path[:0] = ["tests", "tests/grid"]
    from world import World

    from test_grid_faults import SIX

    with tempfile.TemporaryDirectory(prefix="qipan-faults-") as scratch:
        world = World(Path(scratch))
        try:
            first_s = [world.first_step_s(f"quiet-{i}", site) for i, site in enumerate(("dc1", "dc2", "dc1"))]
            trainings = [world.training(f"training-{i}", 250 * moments) for i in (1, 2)]
            rows = [
                {"fault": what, "moment": seed, "recovery_s": round(act(world, seed), 2)}
                for seed in range(moments)
                for what, act in SIX.items()
            ]
            world.finish(300)
            counts = world.check()
            assert all(world.states()[task] == "done" for task in trainings)
        finally:
            world.close()
    slowest = sorted(float(str(row["recovery_s"])) for row in rows)[-max(1, len(rows) // 100)]
    return [
        *(Figure(name, count, "tasks", "<= 0") for name, count in counts.items()),
        Figure("recovery_p99_s", slowest, "s", "<= 10"),
        Figure("submit_to_first_step_s", round(sorted(first_s)[1], 2), "s"),
    ], rows


def main() -> None:
    given = arguments("grid", children="10,100,1000", window=60.0, faults=1)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2
    )
    figures, rows = [], []
    for count in map(int, filter(None, given.children.split(","))):
        row = idle(count, given.window)
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        goals = ("<= 0.10", "<= 500") if count == 1000 else ("", "")
        figures += [
            Figure(f"idle_cpu_share_{count}", row["cpu_share"], "share of a core", goals[0]),
            Figure(f"idle_memory_mb_{count}", row["resident_mb"], "MB", goals[1]),
            Figure(f"idle_bytes_per_child_minute_{count}", row["bytes_per_child_minute"], "bytes"),
        ]
    if given.faults and os.geteuid() == 0:
        found, fault_rows = faults(given.faults)
        figures, rows = figures + found, rows + fault_rows
    elif given.faults:
        print("the faults need root, for network namespaces: left out", file=sys.stderr)
    write(given.json, figures, rows, window_s=given.window, faults=given.faults)


if __name__ == "__main__":
    main()
