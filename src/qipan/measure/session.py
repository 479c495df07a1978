"""The asking side: workers of a node's devices, what they are asked, all at once, and the record that comes of it."""

import base64
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qipan.errors import QipanError
from qipan.measure.challenge import Challenge, check, weights
from qipan.measure.judge import Claim, Verdict, judge
from qipan.measure.record import VALID_S, Measurement
from qipan.quantities import format_devices

ANSWER_S = 120.0


class Device(Protocol):
    """A place that says it is a device: `send` returns at once, `receive` waits for that answer."""

    def send(self, **command: Any) -> None: ...

    def receive(self) -> dict[str, Any]: ...


class LocalDevice:
    """A worker process on this machine.  `wrap`: words in front of its command (how a site binds a process to a device)."""

    def __init__(
        self, device: str, threads: int, wrap: Sequence[str] = (), environment: dict[str, str] | None = None
    ) -> None:
        self.held = b""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - read when the worker dies, closed with it
        self.process = subprocess.Popen(
            [*wrap, sys.executable, "-W", "ignore", "-m", "qipan.measure.worker", device, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo", **(environment or {})},
        )  # fmt: skip

    def send(self, **command: Any) -> None:
        assert self.process.stdin is not None, "made with pipes"
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise QipanError(self._died()) from None

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None, "made with pipes"
        pipe, until_s = self.process.stdout.fileno(), time.monotonic() + ANSWER_S
        look = select.poll()
        look.register(pipe, select.POLLIN)
        while b"\n" not in self.held:
            if not look.poll(1000 * max(0.0, until_s - time.monotonic())):
                raise QipanError(
                    f"a device gave no answer in {ANSWER_S:g} s; it hangs: take it out of service"
                )
            part = os.read(pipe, 2**20)
            if not part:
                raise QipanError(self._died())
            self.held += part
        line, _, self.held = self.held.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise QipanError(f"the device's worker failed: {answer['failed']}")
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def _died(self) -> str:
        self.log.seek(0)
        tail = self.log.read()[-600:].decode(errors="replace").strip()
        return f"the device's worker ended: {tail or 'without a word'}"


@dataclass(frozen=True, slots=True)
class Asked:
    """Rates in FLOP/s: of device 0 alone, and of each with all at once, round by round; what was wrong with answers."""

    alone: tuple[float, ...]
    together: tuple[tuple[float, ...], ...]
    wrong: tuple[str, ...]


def ask(
    devices: Sequence[Device], size: int, steps: int, precision: str = "fp32", rounds: int = 5,
    chance: np.random.Generator | None = None, clock: Callable[[], float] = time.perf_counter,
) -> Asked:  # fmt: skip
    """Challenge every device alone in turn, then all at once; each round has fresh seeds; answers are checked after the
    time was taken.  Time is the asker's own."""
    chance = chance or np.random.default_rng(secrets.randbits(64))
    challenges = [Challenge(size, steps, precision, int(chance.integers(2**62)), 0) for _ in devices]
    for device, challenge in zip(devices, challenges, strict=True):
        device.send(
            verb="prepare", size=size, steps=steps, precision=precision, weights=challenge.weights, start=0
        )
    for device in devices:
        device.receive()
    made = [weights(challenge) for challenge in challenges]
    wrong: list[str] = []

    def go(chosen: Sequence[int]) -> list[float]:
        seeds = {i: int(chance.integers(2**62)) for i in chosen}
        began_s = clock()
        for i in chosen:
            devices[i].send(verb="go", start_seed=seeds[i])

        def answered(i: int) -> tuple[dict[str, Any], float]:
            return devices[i].receive(), clock() - began_s

        with ThreadPoolExecutor(len(chosen)) as pool:  # each device's time is its own, whoever else is slow
            came = dict(zip(chosen, pool.map(answered, chosen), strict=True))
        for i in chosen:
            raw = np.frombuffer(base64.b64decode(came[i][0]["prints"]), dtype="<f4")
            prints = raw.reshape(steps, -1) if raw.size % steps == 0 else raw.reshape(1, -1)
            fault = check(replace(challenges[i], start=seeds[i]), made[i], prints, chance)
            if fault:
                wrong.append(f"device {i}: {fault}")
        return [challenges[i].flops / came[i][1] for i in chosen]

    every = range(len(devices))
    go(every)  # the first has what is done once in it: threads, kernels, pages
    alone, each = list[float](), list[list[float]]()
    for number in range(rounds):  # turn about, so that a machine that slows down does so for both
        alone += go([number % len(devices)]) if len(devices) > 1 else []
        each.append(go(every))
    together = tuple(tuple(one[i] for one in each) for i in every)
    return Asked(tuple(alone), together, tuple(dict.fromkeys(wrong)))


def examine(
    devices: Sequence[Device], claim: Claim, size: int, steps: int, rounds: int = 8, most: int = 32,
    chance: np.random.Generator | None = None, clock: Callable[[], float] = time.perf_counter,
) -> tuple[Verdict, Asked]:  # fmt: skip
    """Ask, judge, and ask as much again while the verdict is near a border, up to `most` rounds in all; every round counts,
    those of the first time too, so that asking again favours neither side."""
    asked = ask(devices, size, steps, rounds=rounds, chance=chance, clock=clock)
    verdict = judge(claim, asked.alone, asked.together, asked.wrong)
    while verdict.near and len(asked.together[0]) + rounds <= most:
        more = ask(devices, size, steps, rounds=rounds, chance=chance, clock=clock)
        together = tuple(a + b for a, b in zip(asked.together, more.together, strict=True))
        asked = Asked(asked.alone + more.alone, together, asked.wrong + more.wrong)
        verdict = judge(claim, asked.alone, asked.together, asked.wrong)
    return verdict, asked


def measure(
    chip_class: str, torch_device: str, count: int, *, claim_flops_per_s: float = 0.0, storage: Path | None = None,
    quick: bool = False, fill_bytes: int = 2**28, now_s: float, say: Callable[[str], None] = lambda _: None,
) -> Measurement:  # fmt: skip
    """All of it, on `count` devices of this machine.  Raises QipanError when a device does not answer."""
    threads = max(1, (os.cpu_count() or 1) // count) if torch_device == "cpu" else 1
    names = [torch_device if torch_device == "cpu" else f"{torch_device}:{i}" for i in range(count)]
    devices = [LocalDevice(name, threads) for name in names]
    try:
        facts = _all(devices, verb="hello")
        big = torch_device != "cpu"
        sizes = (
            ((1024, 4096) if quick else (1024, 4096, 8192))
            if big
            else ((256, 512) if quick else (256, 512, 1024))
        )
        gemm, unsound = _gemm(devices, sizes, 0.05 if quick else 0.4, say)
        say("memory: bandwidth, then fill and read back")
        band = min(
            a["bytes_per_s"] for a in _all(devices, verb="bandwidth", size_bytes=2**30 if big else 2**26)
        )
        seed = secrets.randbits(20)
        filled = _all(devices, verb="fill", size_bytes=fill_bytes, seed=seed)
        unsound += [f"device {i}: {a['asked_bytes'] - a['bytes']} bytes did not come back" for i, a in enumerate(filled) if a["bytes"] < a["asked_bytes"] // 2**24 * 2**24]  # fmt: skip
        link = _collective(devices, 2**26 if big else 2**22, say) if count > 1 else (0.0, 0.0)
        disc = {"write_bytes_per_s": 0.0, "read_bytes_per_s": 0.0}
        if storage is not None:
            say(f"storage under {storage}")
            devices[0].send(verb="storage", folder=str(storage), size_bytes=2**26 if quick else 2**28)
            disc = devices[0].receive()
        verdict = _challenge(devices, Claim(count, claim_flops_per_s), sizes[-1] if big else 256, quick, say)
    finally:
        for device in devices:
            device.close()
    reasons = (*verdict.reasons, *unsound)
    return Measurement(
        chip_class, torch_device, count, socket.gethostname(), now_s, now_s + VALID_S, gemm, band,
        min(a["bytes"] for a in filled), link[1], link[0], disc["write_bytes_per_s"], disc["read_bytes_per_s"],
        verdict.flops_per_s, verdict.spread, verdict.real_devices, not reasons, reasons,
        {"torch": facts[0]["torch"], "device": facts[0]["name"]},
    )  # fmt: skip


def _all(devices: Sequence[Device], **command: Any) -> list[dict[str, Any]]:
    for device in devices:
        device.send(**command)
    return [device.receive() for device in devices]


def _gemm(
    devices: Sequence[Device], sizes: Sequence[int], limit_s: float, say: Callable[[str], None]
) -> tuple[dict[str, dict[int, float]], list[str]]:
    """The slowest device's rate, all at once; and which products were wrong."""
    found: dict[str, dict[int, float]] = {}
    unsound: list[str] = []
    for precision in ("fp32", "bf16", "fp16", "fp64"):
        say(f"products in {precision}, {', '.join(map(str, sizes))}")
        for size in sizes:
            answers = _all(devices, verb="gemm", precision=precision, size=size, limit_s=limit_s)
            if any("unsupported" in answer for answer in answers):
                break
            found.setdefault(precision, {})[size] = min(answer["flops_per_s"] for answer in answers)
            unsound += [
                f"device {i}: products in {precision} are wrong by {answer['error']:.2g}"
                for i, answer in enumerate(answers) if not answer["right"]
            ]  # fmt: skip
    return found, unsound


def _collective(
    devices: Sequence[Device], size_bytes: int, say: Callable[[str], None]
) -> tuple[float, float]:
    say(f"all-reduce among {format_devices(len(devices))}")
    with tempfile.TemporaryDirectory(prefix="qipan-measure-") as folder:
        for rank, device in enumerate(devices):
            device.send(
                verb="collective", rank=rank, ranks=len(devices), meet=f"{folder}/meet", size_bytes=size_bytes
            )
        answers = [device.receive() for device in devices]
    return max(a["latency_s"] for a in answers), min(a["bytes_per_s"] for a in answers)


def _challenge(
    devices: Sequence[Device], claim: Claim, size: int, quick: bool, say: Callable[[str], None]
) -> Verdict:
    """Steps enough that a round takes a good part of a second; then the rounds that count."""
    say("seeded products, alone and all at once, checked")
    steps, wanted_s = 4, 0.1 if quick else 0.4
    while True:
        tried = ask(devices, size, steps, rounds=1)
        took_s = 2.0 * size**3 * steps / min(tried.together[0])
        if took_s >= wanted_s or steps >= 4096:
            break
        steps = min(4096, max(steps * 2, int(steps * wanted_s / took_s * 1.2)))
    return examine(devices, claim, size, steps, rounds=4 if quick else 8)[0]
