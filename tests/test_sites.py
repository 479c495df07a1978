"""Outer steps between sites over real sockets: algebra, codecs, unlike layouts, a site that dies and comes back.

Sites of one rank run as threads of this process: torch is imported once."""

import contextlib
import json
import os
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
from qipan.trainer.session import Session
from qipan.trainer.sites.codec import BLOCK, BYTES, checksum, decode, encode
from qipan.trainer.sites.desk import Desk
from qipan.trainer.sites.flat import Coordinates, common, ownership, size
from qipan.trainer.sites.mailbox import own_address
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

    def __init__(self, made: Strategy, name: str, desk: str, steps: int, pause_s: float = 0.0) -> None:
        self.session = Session(SPEC, made, name, optimizer=sgd, clip=0.0)
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
def coordinator(outer: Outer, *names: str, folder: Path | None = None) -> Iterator[tuple[RoundServer, list]]:
    commands: list = []
    server = RoundServer("127.0.0.1", folder, lambda _task, command: commands.append(command))
    server.open("t", Rules(outer.every, outer.grace_s, outer.min_sites, names, 60.0))
    try:
        yield server, commands
    finally:
        server.close()


def train(rows: dict[str, int], outer: Outer, steps: int) -> list[Place]:
    with coordinator(outer, *rows) as (server, _):
        made = strategy(rows, outer)
        places = [Place(made, name, server.address, steps) for name in rows]
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


# ---- unlike layouts, real processes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_sites_of_unlike_layouts_agree_on_every_round(tmp_path):
    """One site is a pipeline of two ranks, the other one rank; the built-in trainer runs at both."""
    stages = tuple(Stage("sim/a", cut, rows_per_dp=(8,)) for cut in (((0, 1),), ((1, 2),)))
    sites = (
        SiteStrategy("pipe", stages, micro_batches=2, schedule="1f1b"),
        SiteStrategy("one", (Stage("sim/b", ((0, 2),), rows_per_dp=(4,)),)),
    )
    made = Strategy(0, 32, 12, sites, Outer(4, codec="int8", grace_s=10.0, overlap=True))
    model = Model("test", 2, 32, 4, 4, 8, 64, 0, tied_embeddings=True)
    task = Task("train", "t", model, ("fortunes:song100",), Work(16 * 12 * 32, 12 * 32, 32))
    with coordinator(made.outer, "one", "pipe") as (server, commands):
        runs = []
        for place in sites:
            folder = tmp_path / place.id
            folder.mkdir()
            environment = {
                **os.environ, "QIPAN_TASK": msgspec.json.encode(task).decode(), "QIPAN_STRATEGY": made.to_json(),
                "QIPAN_CHECKPOINT_DIR": str(folder), "QIPAN_EVENTS": str(folder / "events"), "QIPAN_SITE": place.id,
                "QIPAN_ROUNDS": server.address, "QIPAN_ROUNDS_TASK": "t", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
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
