"""What boards across processes cost: python -m benchmarks.grid --json OUT [--children 10,100,1000] [--window 60] [--faults 1]
[--leases 1] [--tree 20]

One parent in a process of its own, with children over real mutual TLS from another: each its own certificate and link, a
heartbeat every 7 to 8 s, a changed ask curve a minute (spread over the minute), no task.  CPU share is of one core, over
the window, after all have connected and offered; bytes are those of the websockets, before TLS.

`--leases 1`: the same once more with a task at every child that runs under a lease of 60 s, which the child asks to renew every 10 s, as
boards do; `leases_lapsed_N` counts those that were over on their holder's clock before the answer came.

`--tree N`: a tree of processes (`benchmarks.grid_tree`) with N submissions at each level, tasks per second, lost work.

`--faults N`: all faults of tests/test_grid_faults.py at N seeded moments each on five hosts (needs root): tasks lost, run twice, billed twice, and how long after a
fault's end a task at a data centre below it has begun."""

import json
import os
import random
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
from benchmarks.grid_tree import all_figures
from qipan.channel.network import Network
from qipan.difference import Told, encode_told
from qipan.engines.board import ParentLink
from qipan.events import (
    Command,
    EngineOffered,
    LeaseGranted,
    Renew,
    RenewalAsked,
    Reserve,
    Start,
    TakeCensus,
    TasksHeld,
    TaskStarted,
    encode,
)
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.identity import Wallet, expects, make_request
from qipan.identity.wallet import Member, Members, joining_context
from qipan.leases import AskStep, EngineId, LeaseId, Offer
from qipan.scheduler.state import RENEW_SHARE

CHIP = ChipClassId("sim/a")
STEPS = 12  # of an ask curve
ENDED_HERE = encode_told(Told(0.0, (), {}))  # what a child says that never had a task
LEASE_S = 60.0  # of the parent in grid_parent


class Child:
    """A board with little to do: it answers the census, changes its asks every minute and holds the leases that it is given."""

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
        self._orders: dict[LeaseId, Reserve] = {}  # granted, not started
        self.until_s: dict[LeaseId, float] = {}  # of leases under which a task runs
        self.lapsed = 0
        self._ask_s = 0.0
        self.dialer = network.dial(
            f"grid://127.0.0.1:{port}", lambda: self._context, expects(("cn",)), lambda: {"board": self.name, "spec": spec},
            self.carrier, lambda question, _: ENDED_HERE if question == "ended" else None,
        )  # fmt: skip

    def turn(self, now_s: float) -> None:
        for received in self._link.commands():
            self._obey(received.command, now_s)
        for lease in [lease for lease, until_s in self.until_s.items() if until_s < now_s]:
            del self.until_s[lease]
            self.lapsed += 1
        if self.until_s and now_s >= self._ask_s:
            self._ask_s = now_s + LEASE_S * RENEW_SHARE
            self._say(RenewalAsked(EngineId(self.name), tuple(sorted(self.until_s)), now_s))
        if now_s >= self._next_s:
            self._next_s = now_s + 60.0
            self._changed += 1
            self._say(self._offer())
        self._link.flush(now_s)

    def _obey(self, command: Command, now_s: float) -> None:
        name = EngineId(self.name)
        match command:
            case TakeCensus():
                self._say(self._offer())
                self._say(TasksHeld(name, 0, command.asked_lease_s, ()))
            case Reserve():
                self._orders[command.lease_id] = command
                self._say(
                    LeaseGranted(command.task_id, command.lease_id, name, command.generation, command.needs)
                )
            case Start():
                order, point = self._orders.pop(command.lease_id), command.points[0]
                self.until_s[command.lease_id] = now_s + order.duration_s
                self._ask_s = now_s + random.uniform(0, LEASE_S * RENEW_SHARE)
                self._say(
                    TaskStarted(
                        command.task_id, command.lease_id, name, command.generation, command.attempt, point.point_id,
                        point.needs, self.name,
                    )
                )  # fmt: skip
            case Renew():
                assert command.asked_lease_s is not None
                for lease in self.until_s.keys() & set(command.lease_ids):
                    self.until_s[lease] = max(self.until_s[lease], command.asked_lease_s + command.duration_s)

    def _offer(self) -> EngineOffered:
        asks = tuple(AskStep(1, 10_000 * (self._changed + i)) for i in range(STEPS))
        offer = Offer(CHIP, STEPS, asks, STEPS, 1_000_000, self.name, "cn-east")
        return EngineOffered(EngineId(self.name), (offer,), chooses=True)

    def _say(self, fact: Any) -> None:
        self._reports += 1
        self._link.report([(self._reports, encode(fact))])


def idle(count: int, window_s: float, leases: bool) -> dict[str, Any]:
    """One parent with `count` children that do nothing, or run a task each under a lease, over the window."""
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
            while (now := _ask(parent, "measure"))["offered"] < count or now["connected"] < count:
                assert time.monotonic() < end_s, f"not all came: {now}"
                time.sleep(0.5)
            if leases:
                began_s = time.monotonic()
                _ask(parent, "submit")
                submitted_s = time.monotonic() - began_s
                while sum(len(child.until_s) for child in children) < count:
                    assert time.monotonic() < end_s + 300, f"not all hold a lease: {_ask(parent, 'measure')}"
                    time.sleep(0.5)
                print(f"{count} tasks submitted in {submitted_s:.1f} s", file=sys.stderr, flush=True)
                time.sleep(LEASE_S * RENEW_SHARE)
            time.sleep(3)
            begin = _ask(parent, "measure")
            time.sleep(window_s)
            end = _ask(parent, "measure")
            wall_s = end["at_s"] - begin["at_s"]
            return {
                "children": count, "connected": end["connected"], "window_s": round(wall_s, 1),
                "cpu_share": round((end["cpu_s"] - begin["cpu_s"]) / wall_s, 4),
                "resident_mb": round(end["resident_bytes"] / 1e6, 1),
                "bytes_per_child_minute": round((end["bytes"] - begin["bytes"]) / count * 60 / wall_s),
                "ticks": end["ticks"] - begin["ticks"],
                "leases": sum(len(child.until_s) for child in children), "lapsed": sum(child.lapsed for child in children),
                "running": end["running"],
            }  # fmt: skip
        finally:
            ended.set()
            for child in children:
                child.dialer.end()
            parent.kill()
            parent.wait()
            network.close()


def _ask(parent: "subprocess.Popen[str]", question: str) -> dict[str, Any]:
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(question + "\n")
    parent.stdin.flush()
    found: dict[str, Any] = json.loads(parent.stdout.readline())
    return found


def _pem(cert: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding = serialization.Encoding.PEM
    return cert.public_bytes(encoding) + key.private_bytes(
        encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def faults(moments: int) -> tuple[list[Figure], list[dict[str, Any]]]:
    """The faults of tests/test_grid_faults.py at so many seeded moments, on five hosts in network namespaces."""
    sys.path[:0] = ["tests", "tests/grid"]
    from world import World

    from test_grid_faults import ALL
    from test_grid_faults import moments as moments_of

    with tempfile.TemporaryDirectory(prefix="qipan-faults-") as scratch:
        world = World(Path(scratch))
        try:
            first_s = [world.first_step_s(f"quiet-{i}", site) for i, site in enumerate(("dc1", "dc2", "dc1"))]
            trainings = [world.training(f"training-{i}", 250 * moments) for i in (1, 2)]
            rows = list(moments_of(world, ALL, range(moments)))
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
    given = arguments("grid", children="10,100,1000", window=60.0, faults=1, leases=1, tree=20)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2
    )
    figures, rows = [], []
    for count in map(int, filter(None, given.children.split(","))):
        for leases in (False, True)[: 1 + bool(given.leases)]:
            row = idle(count, given.window, leases)
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
            goals, what = ("<= 0.10", "<= 500") if count == 1000 else ("", ""), "leases" if leases else "idle"
            figures += [
                Figure(f"{what}_cpu_share_{count}", row["cpu_share"], "share of a core", goals[0]),
                Figure(f"{what}_memory_mb_{count}", row["resident_mb"], "MB", goals[1]),
                Figure(f"{what}_bytes_per_child_minute_{count}", row["bytes_per_child_minute"], "bytes"),
            ]
            if leases:
                lost = count - min(row["leases"], row["running"]) + row["lapsed"]
                figures.append(Figure(f"leases_lapsed_{count}", lost, "leases", "<= 0"))
    if given.tree:
        found, tree_rows = all_figures(given.tree, given.window)
        figures, rows = figures + found, rows + tree_rows
    if given.faults and os.geteuid() == 0:
        found, fault_rows = faults(given.faults)
        figures, rows = figures + found, rows + fault_rows
    elif given.faults:
        print("the faults need root, for network namespaces: left out", file=sys.stderr)
    write(given.json, figures, rows, window_s=given.window, faults=given.faults)


if __name__ == "__main__":
    main()
