"""Outer steps between sites over real sockets: algebra, codecs, unlike layouts, a site that dies and comes back.

Sites of one rank run as threads of this process: torch is imported once."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from qipan.round_server import RoundServer
from qipan.rounds import Commit, Drop, Joined, Rules
from qipan.strategy import Outer, SiteStrategy, Stage, Strategy
from qipan.trainer.session import Session, adamw
from qipan.trainer.sites.codec import BLOCK, BYTES, checksum, decode, encode
from qipan.trainer.sites.desk import Desk
from qipan.trainer.sites.flat import Coordinates, common, ownership, size
from qipan.trainer.sites.mailbox import Mailbox, own_address
from qipan.trainer.sites.outer import Sites
from qipan.workload import Model, Task, Work

SPEC = Model("test", 2, 32, 4, 4, 8, 64, 51, tied_embeddings=True)
SEQ, ROWS = 16, 8


def site(name: str, rows: int, **stage) -> SiteStrategy:
    return SiteStrategy(name, (Stage("cpu", ((0, 2),), rows_per_dp=(rows,), **stage),))


def strategy(rows: dict[str, int], outer: Outer | None) -> Strategy:
    return Strategy(3, SEQ, sum(rows.values()), tuple(site(name, n) for name, n in rows.items()), outer)


def batch(step: int, rows: int) -> torch.Tensor:
    generator = np.random.default_rng(step)
    start, stride = generator.integers(0, 51, (rows, 1)), generator.integers(1, 4, (rows, 1))
    return torch.from_numpy((start + stride * np.arange(SEQ + 1)) % 51)


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def weights(session: Session) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in session.layout.model.parameters()])


class Place:
    """One site as a thread."""

    def __init__(
        self, made: Strategy, name: str, desk: str, steps: int, pause_s: float = 0.0, optimizer=sgd
    ) -> None:
        self.session = Session(SPEC, made, name, optimizer=optimizer, clip=0.0)
        self.said: list[tuple[str, dict]] = []
        total = steps * made.global_batch_rows * SEQ
        self.sites = Sites(
            self.session,
            desk,
            "t",
            "127.0.0.1",
            lambda event, **values: self.said.append((event, values)),
            total,
        )
        self.pause_s = pause_s
        self.killed = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        session = self.session
        finished = self.sites.turn()
        while not finished and not self.killed.is_set():
            first, last = session.own_rows()
            session.train(batch(session.step, session.strategy.global_batch_rows)[first:last], 0.5)
            time.sleep(self.pause_s)
            finished = self.sites.turn(0.01)
        if self.killed.is_set():  # silent at once: no farewell
            self.sites.desk.close()
            self.sites.mailbox.close()
        else:
            self.sites.leave()

    def join(self) -> "Place":
        self.thread.join(120)
        assert not self.thread.is_alive()
        return self

    def digests(self) -> dict[int, str]:
        return {values["n"]: values["digest"] for event, values in self.said if event == "round"}


@contextlib.contextmanager
def coordinator(
    outer: Outer, *names: str, folder: Path | None = None, key: str = ""
) -> Iterator[tuple[RoundServer, list]]:
    commands: list = []
    keys = (lambda _task: key) if key else None
    server = RoundServer("127.0.0.1", folder, lambda _task, command: commands.append(command), key=keys)
    rules = Rules(
        outer.every, outer.grace_s, outer.min_sites, names, 60.0, ramp=outer.ramp, batch_tokens=ROWS * SEQ
    )
    server.open("t", rules)
    try:
        yield server, commands
    finally:
        server.close()


def train(rows: dict[str, int], outer: Outer, steps: int, optimizer=sgd) -> list[Place]:
    with coordinator(outer, *rows) as (server, _):
        made = strategy(rows, outer)
        places = [Place(made, name, server.address, steps, optimizer=optimizer) for name in rows]
        return [place.join() for place in places]


def plain(steps: int, rows: int = ROWS) -> Session:
    session = Session(SPEC, strategy({"one": rows}, None), optimizer=sgd, clip=0.0)
    for step in range(steps):
        session.train(batch(step, rows), 0.5)
    return session


def test_a_round_of_one_plain_step_is_data_parallelism():
    """H = 1, SGD, average weighted by tokens: the gradient of the whole batch."""
    one, other = train({"a": 6, "b": 2}, Outer(1, grace_s=5.0), 6)
    assert (weights(one.session) - weights(plain(6))).abs().max() < 2e-6
    assert (weights(one.session) == weights(other.session)).all()
    assert len(one.digests()) == 6
    assert one.digests() == other.digests()


def test_with_a_ramp_sites_meet_often_at_first():
    """10 steps: four rounds of one, one of 2, one of 3, and what is left."""
    one, other = train({"a": 4, "b": 4}, Outer(10, grace_s=5.0, ramp=2), 10)
    ends = [values["tokens"] // (ROWS * SEQ) for event, values in one.said if event == "round"]
    assert ends == [1, 2, 3, 4, 6, 9, 10]
    assert one.digests() == other.digests()


def moments(session: Session, name: str) -> torch.Tensor:
    found = [session.optimizer.state[p][name].reshape(-1) for p in session.layout.model.parameters()]
    return torch.cat(found)


def test_averaged_moments_are_those_of_the_whole_batch():
    """After one step Adam's first moment is (1 - 0.9) times the gradient: of both sites' rows."""
    one, other = train({"a": 4, "b": 4}, Outer(1, grace_s=5.0, moments=True), 1, adamw)
    whole = Session(SPEC, strategy({"one": ROWS}, None), clip=0.0)
    whole.train(batch(0, ROWS), 0.5)
    assert (moments(one.session, "exp_avg") - moments(whole, "exp_avg")).abs().max() < 1e-7
    for name in ("exp_avg", "exp_avg_sq"):
        assert (moments(one.session, name) == moments(other.session, name)).all()


@pytest.mark.parametrize("overlap", [False, True])
def test_sites_with_averaged_moments_agree_and_a_newcomer_has_them_too(overlap):
    outer = Outer(2, codec="int8", grace_s=1.5, moments=True, overlap=overlap)
    with coordinator(outer, "a", "b") as (server, commands):
        made = strategy({"a": 4, "b": 4}, outer)
        stays = Place(made, "a", server.address, 60, pause_s=0.02, optimizer=adamw)
        dies = Place(made, "b", server.address, 60, pause_s=0.02, optimizer=adamw)
        until(lambda: len([one for one in commands if isinstance(one, Commit)]) >= 3)
        dies.killed.set()
        dies.join()
        until(lambda: any(isinstance(one, Drop) and one.site == "b" for one in commands))
        back = Place(made, "b", server.address, 60, pause_s=0.02, optimizer=adamw)
        stays.join()
        back.join()
    shared = set(back.digests()) & set(stays.digests())
    assert len(shared) > 3
    assert all(back.digests()[n] == stays.digests()[n] for n in shared)
    assert (weights(back.session) == weights(stays.session)).all()
    assert (moments(back.session, "exp_avg_sq") >= 0).all()
    if not overlap:
        assert (moments(back.session, "exp_avg") == moments(stays.session, "exp_avg")).all()


def test_one_site_alone_is_plain_training_to_the_last_bit():
    [alone] = train({"a": ROWS}, Outer(3, codec="int8", grace_s=5.0), 6)
    assert (weights(alone.session) == weights(plain(6))).all()


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_every_codec_gives_all_sites_the_same_bits(codec):
    outer = Outer(
        2, codec=codec, grace_s=5.0, overlap=True, fragments=2, optimizer="nesterov", lr=0.7, momentum=0.9
    )
    one, other = train({"a": 4, "b": 4}, outer, 8)
    assert (weights(one.session) == weights(other.session)).all()
    assert one.digests() == other.digests()


def test_a_killed_site_costs_the_other_one_wait_and_comes_back_over_the_wire():
    outer = Outer(2, codec="int8", grace_s=1.5)
    with coordinator(outer, "a", "b") as (server, commands):
        made = strategy({"a": 4, "b": 4}, outer)
        stays = Place(made, "a", server.address, 200, pause_s=0.02)
        dies = Place(made, "b", server.address, 200, pause_s=0.02)
        until(lambda: len([one for one in commands if isinstance(one, Commit)]) >= 3)
        dies.killed.set()
        dies.join()
        until(lambda: any(isinstance(one, Drop) and one.site == "b" for one in commands))
        alone = len(stays.digests())
        until(lambda: len(stays.digests()) > alone + 2)
        back = Place(made, "b", server.address, 200, pause_s=0.02)
        until(lambda: back.digests())
        stays.join()
        back.join()
    shared = set(back.digests()) & set(stays.digests())
    assert len(shared) > 3
    assert all(back.digests()[n] == stays.digests()[n] for n in shared)
    assert ("joined", True) in [(event, values.get("fresh")) for event, values in back.said]
    assert (weights(back.session) == weights(stays.session)).all()


def test_a_coordinator_that_was_killed_goes_on_from_what_it_wrote(tmp_path):
    outer = Outer(2, grace_s=5.0)
    with coordinator(outer, "a", folder=tmp_path) as (server, _):
        [place] = [Place(strategy({"a": 4}, outer), "a", server.address, 6)]
        place.join()
        before = server.state("t")
    with coordinator(outer, "a", folder=tmp_path) as (server, _):
        after = server.state("t")
        assert (after.round, after.tokens, after.committed) == (3, before.tokens, before.committed)
        assert after.version > before.version


def until(condition, limit_s: float = 90.0) -> None:
    ends_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < ends_s
        time.sleep(0.02)


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", sorted(BYTES))
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_codecs_keep_their_sizes_and_precision(codec, blocks):
    values = torch.randn(blocks, BLOCK, generator=torch.Generator().manual_seed(1))
    data = encode(values, codec)
    assert data.shape == (blocks, BYTES[codec])
    error = (decode(data, codec) - values).abs().max().item() if blocks else 0.0
    assert error <= {"fp32": 0.0, "bf16": 0.02, "int8": 0.02}[codec]


def test_only_who_knows_a_tasks_key_is_answered():
    server = RoundServer("127.0.0.2", key=lambda task: f"key of {task}")
    server.open("t", Rules(10, 5.0, 1, ("a", "b")))
    desks = {
        site: Desk(server.address, "t", site, key) for site, key in (("a", "key of t"), ("b", "key of u"))
    }
    try:
        for site, desk in desks.items():
            desk.tell(Joined(site, 0.0, 0))
        assert [known.site for known in server.state("t").known] == ["a"]
        assert desks["b"].view() is None
        assert own_address(server.address).startswith("127.")
    finally:
        for desk in desks.values():
            desk.close()
        server.close()


def test_what_sites_send_each_other_can_be_read_by_nobody_else():
    """Through a relay that keeps what passes; then a stranger, with another secret and with none."""
    passed = bytearray()
    here, there = Mailbox("127.0.0.1", "k", secret="of t"), Mailbox("127.0.0.1", "k", secret="of t")
    relay = socket.create_server(("127.0.0.1", 0))

    def forward() -> None:
        source = relay.accept()[0]
        host, port = there.address.split(":")
        with source, socket.create_connection((host, int(port))) as target:
            threading.Thread(target=pass_on, args=(target, source), daemon=True).start()
            pass_on(source, target)

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                passed.extend(piece)
                target.sendall(piece)

    threading.Thread(target=forward, daemon=True).start()
    words = torch.frombuffer(bytearray(b"weights of the model " * 500), dtype=torch.uint8)
    head = {"round": 1, "generation": 1, "site": "a", "what": "difference", "blocks": []}
    try:
        here.send(f"127.0.0.1:{relay.getsockname()[1]}", head, words, 5.0)
        [frame] = there.wait(bool, lambda: False) or []
        assert torch.equal(frame.data, words)
        assert len(passed) > len(words)
        assert b"weights" not in passed
        assert b"difference" not in passed
        for secret in ("of u", ""):
            stranger = Mailbox("127.0.0.1", "k", secret=secret)
            with contextlib.suppress(
                OSError
            ):  # a TLS 1.3 client may learn only at its next word that it was refused
                stranger.send(there.address, {**head, "site": "stranger"}, words, 5.0)
            stranger.close()
        time.sleep(0.2)
        assert not there.of((1, 1), "stranger", "difference")
    finally:
        for one in (here, there, relay):
            one.close()


def test_a_checksum_does_not_depend_on_how_blocks_are_split_and_sees_one_bit():
    values = torch.randn(6, BLOCK)
    number = torch.arange(6)
    whole = checksum(values, number)
    assert (checksum(values[:2], number[:2]) + checksum(values[2:], number[2:]) - whole) % 2**64 == 0
    other = values.clone()
    other[3, 7] = -other[3, 7]
    assert (checksum(other, number) - whole) % 2**64 != 0
    assert (checksum(values, number.flip(0)) - whole) % 2**64 != 0


def test_the_ranks_of_any_layout_answer_for_every_block_once():
    coordinates = Coordinates.of(SPEC)
    halves = tuple(Stage("cpu", cut, dp=2, rows_per_dp=(2, 2)) for cut in (((0, 1),), ((1, 2),)))
    layouts = [
        site("a", 4), SiteStrategy("b", (Stage("cpu", ((0, 2),), tp=2, dp=2, rows_per_dp=(2, 2)),)),
        SiteStrategy("c", halves, micro_batches=2, schedule="1f1b"),
    ]  # fmt: skip
    for layout in layouts:
        owned = ownership(layout, SPEC, coordinates)
        assert len(owned) == layout.devices
        assert sum(size(part) for part in owned) == coordinates.blocks
        for i, part in enumerate(owned):
            assert all(not common(part, other) for other in owned[:i])


@pytest.mark.parametrize("codec", BYTES)
def test_the_planner_counts_the_bytes_that_the_codec_makes(codec):
    assert (
        Outer(1, codec=codec).bytes_per_value
        == BYTES[codec] / BLOCK
        == encode(torch.ones(3, BLOCK), codec).numel() / 3 / BLOCK
    )
    assert Outer(1, codec=codec, moments=True).bytes_per_value == 3 * BYTES[codec] / BLOCK


# ---- unlike layouts, real processes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_sites_of_unlike_layouts_agree_on_every_round(tmp_path):
    """One site is a pipeline of two ranks, the other one rank; the built-in trainer runs at both, over encrypted lines."""
    stages = tuple(Stage("sim/a", cut, rows_per_dp=(8,)) for cut in (((0, 1),), ((1, 2),)))
    sites = (
        SiteStrategy("pipe", stages, micro_batches=2, schedule="1f1b"),
        SiteStrategy("one", (Stage("sim/b", ((0, 2),), rows_per_dp=(4,)),)),
    )
    made = Strategy(0, 32, 12, sites, Outer(4, codec="int8", grace_s=10.0, overlap=True, moments=True))
    model = Model("test", 2, 32, 4, 4, 8, 64, 0, tied_embeddings=True)
    task = Task("train", "t", model, ("fortunes:song100",), Work(16 * 12 * 32, 12 * 32, 32))
    with coordinator(made.outer, "one", "pipe", key="secret") as (server, commands):
        runs = []
        for place in sites:
            folder = tmp_path / place.id
            folder.mkdir()
            environment = {
                **os.environ, "QIPAN_TASK": msgspec.json.encode(task).decode(), "QIPAN_STRATEGY": made.to_json(),
                "QIPAN_CHECKPOINT_DIR": str(folder), "QIPAN_EVENTS": str(folder / "events"), "QIPAN_SITE": place.id,
                "QIPAN_ROUNDS": server.address, "QIPAN_ROUNDS_TASK": "t", "QIPAN_ROUND_KEY": "secret", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONWARNINGS": "ignore",
            }  # fmt: skip
            launch = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={place.devices}",
            ]
            command = (
                [*launch, "-m", "qipan.trainer"]
                if place.devices > 1
                else [sys.executable, "-m", "qipan.trainer"]
            )
            runs.append(subprocess.Popen(command, env=environment, stderr=(folder / "err").open("w")))
        for run, place in zip(runs, sites, strict=True):
            assert run.wait(200) == 0, (tmp_path / place.id / "err").read_text()[-2000:]
    commits = [one for one in commands if isinstance(one, Commit)]
    assert len(commits) >= 4
    assert all(one.members == ("one", "pipe") for one in commits)
    events = {
        place.id: [json.loads(line) for line in (tmp_path / place.id / "events").open()] for place in sites
    }
    losses = {
        name: next(e["test_loss"] for e in said if e["event"] == "done") for name, said in events.items()
    }
    assert losses["pipe"] == pytest.approx(losses["one"], abs=2e-4), "one model at both"
