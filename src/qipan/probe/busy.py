"""How much this machine's devices work, as their vendor's tool says: sampled in the background, so that asking costs nothing."""

import threading
import time
from collections.abc import Callable, Iterable

from qipan.probe.tools import Command, run_tools

SAMPLE_S = 5.0
NVIDIA: Command = ("nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits")


class BusyDevices:
    """`ask`: device -> its busy share now; empty where no tool answers."""

    def __init__(self, ask: Callable[[], dict[int, float]] | None = None, sample_s: float = SAMPLE_S) -> None:
        self._ask = ask or ask_nvidia
        self._sample_s = sample_s
        self._sampled_s: float | None = None
        self._busy_s: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    def busy_s(self, devices: Iterable[int]) -> float | None:
        """Device-seconds that they have worked since the first call; None while a tool tells nothing about one of them."""
        due = self._sampled_s is None or time.monotonic() >= self._sampled_s + self._sample_s
        if due and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self.take, name="qipan-busy", daemon=True)
            self._thread.start()
        known = self._busy_s
        if any(device not in known for device in devices):
            return None
        return sum(known[device] for device in devices)

    def take(self) -> None:
        """One sample, taken to hold for the time since the last one."""
        shares, now_s = self._ask(), time.monotonic()
        span_s = now_s - self._sampled_s if self._sampled_s is not None else 0.0
        self._busy_s = {
            device: self._busy_s.get(device, 0.0) + share * span_s for device, share in shares.items()
        }
        self._sampled_s = now_s


def ask_nvidia() -> dict[int, float]:
    return {
        device: share
        for ran in run_tools([NVIDIA]).values()
        if not ran.failure
        for device, share in shares_of(ran.text).items()
    }


def shares_of(text: str) -> dict[int, float]:
    """Of lines "INDEX, PERCENT"; a device that tells no number (`[N/A]`: one in slices) is left out."""
    found = {}
    for line in text.splitlines():
        index, _, percent = (part.strip() for part in line.partition(","))
        if index.isdigit() and percent.isdigit() and int(percent) <= 100:
            found[int(index)] = int(percent) / 100
    return found
