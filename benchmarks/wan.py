"""A slow link between network namespaces on one machine, in user space: the kernels at hand have no netem.

`with Wan(2, latency_s, bytes_per_s) as wan: wan.command(0, ...)` runs a program at site 0; its address is `wan.address(0)`.
`python -m benchmarks.wan` is the forwarder itself: one tun device a site, each pair of sites with its own queue.  Root only.
"""

import contextlib
import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType

TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
MTU = 32_000  # large packets: Python forwards few of them
QUEUE_BYTES = 4 << 20


class Wan:
    def __init__(self, sites: int, latency_s: float, bytes_per_s: float) -> None:
        self.sites, self._latency_s, self._bytes_per_s = sites, latency_s, bytes_per_s
        self._prefix = f"qb{os.getpid() % 10_000}n"
        self._forwarder: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Wan":
        for site in range(self.sites):
            _ip("netns", "add", self._name(site))
        self._forwarder = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.wan", self._prefix, str(self.sites), str(self._latency_s), str(self._bytes_per_s)],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._forwarder.stdout is not None
        if self._forwarder.stdout.readline() != b"up\n":
            raise SystemExit("the link could not be made: it needs root and /dev/net/tun")
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        assert self._forwarder is not None
        self._forwarder.kill()
        self._forwarder.wait()
        for site in range(self.sites):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", self._name(site))

    def address(self, site: int) -> str:
        return f"10.78.0.{site + 1}"

    def command(self, site: int, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self._name(site), *command]

    def _name(self, site: int) -> str:
        return f"{self._prefix}{site}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def forward(prefix: str, sites: int, latency_s: float, bytes_per_s: float) -> None:
    """Move packets until killed."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    tuns = []
    for site in range(sites):
        place = os.open(f"/run/netns/{prefix}{site}", os.O_RDONLY)
        assert libc.setns(place, CLONE_NEWNET) == 0
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH14x", b"wan0", IFF_TUN | IFF_NO_PI))
        _ip("link", "set", "lo", "up")
        _ip("addr", "add", f"10.78.0.{site + 1}/24", "dev", "wan0")
        _ip("link", "set", "wan0", "mtu", str(MTU), "txqueuelen", "2000", "up")
        assert libc.setns(home, CLONE_NEWNET) == 0
        tuns.append(tun)
    poll = select.epoll()
    for tun in tuns:
        poll.register(tun, select.EPOLLIN)
    flying: list[tuple[float, int, int, bytes]] = []
    free_s: dict[tuple[int, int], float] = {}
    count = 0
    print("up", flush=True)
    while True:
        now_s = time.monotonic()
        while flying and flying[0][0] <= now_s:
            _, _, target, packet = heapq.heappop(flying)
            with contextlib.suppress(OSError):
                os.write(tuns[target], packet)
        wait_s = max(0.0, min(0.1, flying[0][0] - time.monotonic())) if flying else 0.1
        for tun, _ in poll.poll(wait_s):
            source = tuns.index(tun)
            for _ in range(16):
                try:
                    packet = os.read(tun, 65_536)
                except BlockingIOError:
                    break
                if packet[0] >> 4 != 4 or not 0 < packet[19] <= sites:
                    continue
                target = packet[19] - 1
                begins_s = max(time.monotonic(), free_s.get((source, target), 0.0))
                if (begins_s - time.monotonic()) * bytes_per_s > QUEUE_BYTES:
                    continue  # tail drop
                free_s[source, target] = ends_s = begins_s + len(packet) / bytes_per_s
                count += 1
                heapq.heappush(flying, (ends_s + latency_s, count, target, packet))


def main(words: Sequence[str]) -> None:
    forward(words[0], int(words[1]), float(words[2]), float(words[3]))


if __name__ == "__main__":
    main(sys.argv[1:])
