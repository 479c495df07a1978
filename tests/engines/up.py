"""`qipan up` as a process, and its command line."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

QIPAN = str(Path(sys.executable).with_name("qipan"))


class Up:
    """`qipan up` and its command line."""

    def __init__(self, folder: Path, site_text: str, environment: Mapping[str, str]) -> None:
        site = folder / "site.yaml"
        site.write_text(site_text)
        self.store = folder / "store"
        self.environment = {**environment, "XDG_CACHE_HOME": str(folder / "cache")}
        self.log = folder / "up.log"
        self.process = subprocess.Popen(
            [QIPAN, "up", "--site", str(site), "--store", str(self.store), "--no-console"], env=self.environment,
            stdout=self.log.open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.until(lambda: "is up" in self.log.read_text(), 200)

    def run(self, *words: str):
        done = subprocess.run(
            [QIPAN, *words, "--store", str(self.store), "--json"],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return json.loads(done.stdout)

    def task(self, task_id: str = "poems-1"):
        return next(task for task in self.run("ps")["tasks"] if task["task_id"] == task_id)

    def losses(self, task_id: str) -> dict[int, float]:
        """step -> loss, of every step of every attempt at every site."""
        found: dict[int, float] = {}
        for path in sorted(self.store.glob(f"engines/*/attempts/{task_id}-*/events.jsonl")):
            for line in path.read_text().splitlines():
                said = json.loads(line)
                if said.get("event") == "progress":
                    found[said["step"]] = said["loss"]
        return found

    def said(self, attempt: str, event: str) -> list[dict]:
        [path] = self.store.glob(f"engines/*/attempts/{attempt}/events.jsonl")
        return [said for said in map(json.loads, path.read_text().splitlines()) if said["event"] == event]

    def until(self, done, limit_s: float):
        end_s = time.monotonic() + limit_s
        while not done():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end_s, f"not in {limit_s} s: {self.log.read_text()[-500:]}"
            time.sleep(0.5)

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
