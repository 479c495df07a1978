"""A wide-area network on one machine: one namespace a host, one tun device in each, this process between them with delay, rate and
cuts.  This kernel has no netem.  Run as root:  python wan.py PREFIX COUNT CONTROL.json

CONTROL: {"0>1": {"latency_s": 0.02, "bytes_per_s": 125e6, "up": true, "jitter_s": 0.0, "twice": 0.0}, ...}, read again when it changes;
a direction that is not named has the defaults.  `jitter_s`: at most so much later, each packet for itself, so that they overtake each
other; `twice`: the share of packets that comes two times.  Host i has the address 10.77.i.2.  Ends, and takes its namespaces away, when standard input closes."""

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
QUEUE_S_MAX = 2.0  # a packet that would wait longer is dropped
DEFAULT = {"latency_s": 0.02, "bytes_per_s": 125e6, "up": True, "jitter_s": 0.0, "twice": 0.0}


def main() -> None:
    prefix, count, control = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    try:
        tuns = [open_tun(f"{prefix}{i}", f"10.77.{i}.2/16") for i in range(count)]
        print("up", flush=True)
        forward(tuns, control)
    finally:
        for i in range(count):
            subprocess.run(["ip", "netns", "del", f"{prefix}{i}"], check=False)


def open_tun(namespace: str, address: str) -> int:
    """A namespace with a tun device `wan0`; returns the device's other end."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    libc = ctypes.CDLL(None, use_errno=True)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    assert libc.setns(there, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    try:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH14x", b"wan0", IFF_TUN | IFF_NO_PI))
        for command in (
            ["ip", "link", "set", "lo", "up"],
            ["ip", "addr", "add", address, "dev", "wan0"],
            ["ip", "link", "set", "wan0", "mtu", "16000", "up"],
        ):
            subprocess.run(command, check=True)
    finally:
        assert libc.setns(home, CLONE_NEWNET) == 0
        os.close(there)
        os.close(home)
    return tun


def forward(tuns: list[int], control: str) -> None:
    poll = select.epoll()
    for tun in tuns:
        poll.register(tun, select.EPOLLIN)
    poll.register(0, select.EPOLLIN | select.EPOLLHUP)
    sources = {tun: i for i, tun in enumerate(tuns)}
    ways: dict[str, dict] = {}
    read_ns, looked_s = 0, 0.0
    free_s: dict[tuple[int, int], float] = {}  # when a direction's line is free again
    late: list[tuple[float, int, int, bytes]] = []
    number, chance = 0, random.Random(1)
    while True:
        now_s = time.monotonic()
        if now_s > looked_s + 0.05:
            looked_s = now_s
            changed = os.stat(control).st_mtime_ns if os.path.exists(control) else 0
            if changed != read_ns:
                read_ns = changed
                with open(control) as file:
                    ways = json.load(file)
        while late and late[0][0] <= now_s:
            _, _, target, packet = heapq.heappop(late)
            try:
                os.write(tuns[target], packet)
            except OSError:
                continue  # its queue is full: dropped
        wait_s = min(0.05, max(0.0, late[0][0] - now_s)) if late else 0.05
        for ready, _ in poll.poll(wait_s):
            if ready == 0:
                return
            for _ in range(32):
                try:
                    packet = os.read(ready, 65536)
                except BlockingIOError:
                    break
                if packet[0] >> 4 != 4 or packet[16:18] != b"\x0a\x4d" or packet[18] >= len(tuns):
                    continue
                source, target = sources[ready], packet[18]
                way = {**DEFAULT, **ways.get(f"{source}>{target}", {})}
                begin_s = max(time.monotonic(), free_s.get((source, target), 0.0))
                if not way["up"] or begin_s > now_s + QUEUE_S_MAX:
                    continue
                free_s[source, target] = end_s = begin_s + len(packet) / way["bytes_per_s"]
                for _ in range(2 if chance.random() < way["twice"] else 1):
                    number += 1
                    at_s = end_s + way["latency_s"] + chance.random() * way["jitter_s"]
                    heapq.heappush(late, (at_s, number, target, packet))


if __name__ == "__main__":
    main()
