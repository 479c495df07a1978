"""Copies between two sites over a slow link: python -m benchmarks.staging --json OUT [--mib 512] [--mbit 1000] [--ms 20]

Two network namespaces joined by a tun link of its own rate and latency (`benchmarks.wan`); one serves a storage over HTTP, the
other brings a folder from it.  In the same run: what plain TCP moves over that link, eight sockets with sendfile (the most there is to
have on this machine), and rclone where it is installed.  CPU is that of both ends, the forwarder's not.  Root and /dev/net/tun.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.form import Figure, arguments, write
from benchmarks.wan import Wan

QIPAN = str(Path(sys.executable).with_name("qipan"))
PORT, RAW = 8970, 8971
SOCKETS = 8


def main() -> None:
    given = arguments("staging", mib=512, mbit=1000, ms=20, share=1.0)
    size, link_bytes_per_s = given.mib << 20, given.mbit * 125_000
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, Wan(2, given.ms / 1000, link_bytes_per_s) as wan:
        root = Path(folder)
        data = root / "data"
        data.mkdir()
        for number in range(4):
            (data / f"shard-{number}").write_bytes(os.urandom(size // 4))
        (root / "token").write_text("secret")
        began_s = cpu_of_children_s()
        subprocess.run(
            [QIPAN, "storage", "put", str(data), str(root / "kept"), "run"], check=True, capture_output=True
        )
        rows.append({"what": "put", "cpu_s_per_gb": (cpu_of_children_s() - began_s) / size * 1e9})
        rows.append({"what": "plain tcp", **plain_tcp(wan, data, size)})
        serve = [
            QIPAN,
            "storage",
            "serve",
            str(root / "kept"),
            "--listen",
            f"0.0.0.0:{PORT}",
            "--token-file",
            str(root / "token"),
        ]
        with running(wan.command(0, *serve)) as server:
            get = [QIPAN, "storage", "get", f"http://{wan.address(0)}:{PORT}", "run"]
            get_options = ["--option", f"token_file={root / 'token'}", "--json"]
            rate = ["--rate", f"{given.mbit * given.share:g}Mbit/s"]
            start_s = cpu_of(wan.command(1, QIPAN, "storage", "get", "--help"))
            fetched = measured(wan, server, [*get, str(root / "here"), *rate, *get_options], size, start_s)
            rows.append({"what": "qipan", **fetched})
            rows.append(
                {"what": "qipan after a cut", **cut(wan, [*get, str(root / "cut"), *get_options], size)}
            )
            half = ["--rate", f"{given.mbit / 2:g}Mbit/s"]
            rows.append({"what": "qipan, half the link", **measured(wan, server, [*get, str(root / "half"), *half, *get_options], size, start_s)})  # fmt: skip
        same = all(
            (data / name).read_bytes() == (root / "here" / name).read_bytes() for name in os.listdir(data)
        )
        assert same, "what came is not what was sent"
        if shutil.which("rclone"):
            rows.append({"what": "rclone", **rclone(wan, data, root / "rclone", size)})
    by = {row["what"]: row for row in rows}
    figures = [
        Figure("staging_link_share", by["qipan"]["bytes_per_s"] / (link_bytes_per_s * given.share), "share", ">= 0.9"),
        Figure("staging_tcp_share", by["qipan"]["bytes_per_s"] / by["plain tcp"]["bytes_per_s"], "share"),
        Figure("staging_cpu_s_per_gb", by["qipan"]["cpu_s_per_gb"], "CPU s/GB", "<= 2"),
        Figure("staging_floor_cpu_s_per_gb", by["plain tcp"]["cpu_s_per_gb"], "CPU s/GB"),
        Figure("staging_sent_twice_bytes", by["qipan after a cut"]["sent_twice_bytes"], "B", "<= 0"),
        Figure("staging_half_share", by["qipan, half the link"]["bytes_per_s"] / link_bytes_per_s, "share", "<= 0.5"),
    ]  # fmt: skip
    write(given.json, figures, rows, mib=given.mib, mbit=given.mbit, ms=given.ms, share=given.share)


def measured(
    wan: Wan, server: psutil.Process, command: list[str], size: int, start_s: float
) -> dict[str, float]:
    """CPU of the reader, its start apart, and of the server."""
    before, at_server, began_s = cpu_of_children_s(), sum(server.cpu_times()[:2]), time.monotonic()
    done = subprocess.run(wan.command(1, *command), check=True, capture_output=True, text=True)
    wall_s = time.monotonic() - began_s
    cpu_s = cpu_of_children_s() - before + sum(server.cpu_times()[:2]) - at_server - start_s
    said = json.loads(done.stdout)
    assert said["sent_bytes"] == size, done.stdout
    took_s = said["seconds"]
    return {
        "wall_s": took_s,
        "with_start_s": wall_s,
        "bytes_per_s": size / took_s,
        "cpu_s_per_gb": cpu_s / size * 1e9,
    }


def cut(wan: Wan, command: list[str], size: int) -> dict[str, float]:
    """The reader is killed half way, and called again."""
    folder = Path(command[5])
    first = subprocess.Popen(wan.command(1, *command), stdout=subprocess.DEVNULL)
    incoming = folder.with_name(f"{folder.name}.qipan-incoming")
    while first.poll() is None and blocks(incoming) < size // 2:
        time.sleep(0.02)
    for process in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
        process.send_signal(signal.SIGKILL)
    first.wait()
    there = verified_bytes(folder, incoming)
    done = subprocess.run(wan.command(1, *command), check=True, capture_output=True, text=True)
    sent = json.loads(done.stdout)["sent_bytes"]
    return {
        "verified_at_the_cut_bytes": there,
        "sent_after_bytes": sent,
        "sent_twice_bytes": there + sent - size,
    }


def verified_bytes(folder: Path, incoming: Path) -> int:
    """Counted apart from the product: bytes of whole chunks that equal the source's."""
    source, whole = folder.parent / "data", 0
    for path in source.iterdir():
        body, come = path.read_bytes(), (incoming / path.name).read_bytes()
        step = 8 << 20
        whole += sum(
            len(body[at : at + step])
            for at in range(0, len(body), step)
            if body[at : at + step] == come[at : at + step]
        )
    return whole


def blocks(folder: Path) -> int:
    """Bytes that the folder's files really take."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir()) if folder.exists() else 0


def plain_tcp(wan: Wan, data: Path, size: int) -> dict[str, float]:
    """What comes is read and dropped: the least that both ends can cost here."""
    module = [sys.executable, "-m", "benchmarks.staging"]
    share = str(size // SOCKETS)
    start_s = cpu_of([*module, "receive", "", "0"])
    with running(wan.command(0, *module, "send", str(next(data.iterdir())), share)) as sender:
        before, at_sender = cpu_of_children_s(), sum(sender.cpu_times()[:2])
        receiver = wan.command(1, *module, "receive", wan.address(0), share)
        done = subprocess.run(receiver, check=True, capture_output=True, text=True)
        cpu_s = cpu_of_children_s() - before + sum(sender.cpu_times()[:2]) - at_sender - start_s
    wall_s = float(done.stdout)
    return {"wall_s": wall_s, "bytes_per_s": size / wall_s, "cpu_s_per_gb": cpu_s / size * 1e9}


def send(path: str, size: int) -> None:
    """To every reader `size` bytes of the file, begun anew at its end."""
    with socket.create_server(("0.0.0.0", RAW)) as door:
        while True:
            link = door.accept()[0]
            threading.Thread(target=_send, args=(link, path, size), daemon=True).start()


def _send(link: socket.socket, path: str, size: int) -> None:
    with link, open(path, "rb") as file:
        while size > 0:
            file.seek(0)
            size -= link.sendfile(file, count=size)


def receive(address: str, size: int) -> None:
    def take() -> None:
        if not size:
            return
        with socket.create_connection((address, RAW)) as link:
            left, room = size, bytearray(1 << 20)
            while left:
                left -= link.recv_into(room)

    began_s = time.monotonic()
    threads = [threading.Thread(target=take) for _ in range(SOCKETS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(time.monotonic() - began_s)


def rclone(wan: Wan, data: Path, target: Path, size: int) -> dict[str, float]:
    serve = ["rclone", "serve", "http", str(data), "--addr", f"0.0.0.0:{PORT + 2}", "--config", "/dev/null"]
    with running(wan.command(0, *serve)) as server:
        copy = ["rclone", "copy", f":http,url='http://{wan.address(0)}:{PORT + 2}/':", str(target), "--config", "/dev/null", "--transfers", "8"]  # fmt: skip
        before, at_server, began_s = cpu_of_children_s(), sum(server.cpu_times()[:2]), time.monotonic()
        subprocess.run(wan.command(1, *copy), check=True, capture_output=True)
        wall_s = time.monotonic() - began_s
        cpu_s = cpu_of_children_s() - before + sum(server.cpu_times()[:2]) - at_server
    return {"wall_s": wall_s, "bytes_per_s": size / wall_s, "cpu_s_per_gb": cpu_s / size * 1e9}


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[psutil.Process]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(2.0)  # it listens by then; a reader that comes too early fails, and the run with it
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def cpu_of_children_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def cpu_of(command: list[str]) -> float:
    before = cpu_of_children_s()
    subprocess.run(command, check=True, capture_output=True)
    return cpu_of_children_s() - before


COMMANDS: dict[str, Callable[..., None]] = {
    "send": lambda path, size: send(path, int(size)),
    "receive": lambda address, size: receive(address, int(size)),
}

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        COMMANDS[sys.argv[1]](*sys.argv[2:])
    else:
        main()
