"""Makes the pictures of the docs: python docs/screenshots.py [FOLDER]

The demo's boards are started with `qipan up`, its two tasks are submitted, and Chromium looks on: nothing in the
pictures is made up.  Takes about three minutes."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from qipan.client import Client, Task

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
WAIT_S = 240


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    store = Path(tempfile.mkdtemp(prefix="qipan-pictures-"))
    command = ["up", "--store", str(store), "--site", str(HERE.parent / "qipan.yaml"), "--json"]
    up = subprocess.Popen([sys.executable, "-m", "qipan.cli", *command], stdout=subprocess.PIPE, text=True)
    assert up.stdout is not None
    address = json.loads(up.stdout.readline())["console"]
    try:
        client = Client(store)
        poems = client.submit(Task.from_yaml(EXAMPLES / "train-poems.yaml")).task_id
        until(lambda: client.task(poems)["progress"] > 0.2)
        urgent = client.submit(Task.from_yaml(EXAMPLES / "poems-urgent.yaml")).task_id
        until(lambda: client.task(urgent)["progress"] > 0.2)
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(
                executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
            take(chromium, address, folder, "board", "/", "zh", "light", 1440, 1000)
            take(chromium, address, folder, "board-dark", "/", "en", "dark", 1440, 1000)
            take(chromium, address, folder, "phone", "/", "zh", "dark", 390, 844)
            take(chromium, address, folder, "task", f"/tasks/{poems}", "en", "light", 1440, 1300)
            take(chromium, address, folder, "submit", "/submit", "zh", "light", 1440, 1150)
            chromium.close()
    finally:
        up.send_signal(signal.SIGINT)
        up.wait(60)


def until(holds) -> None:
    end_s = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > end_s:
            raise SystemExit("the tasks did not get there in time; is the machine busy?")
        time.sleep(0.5)


def take(
    chromium: Browser, address: str, folder: Path, name: str, path: str, language: str, scheme: str, width: int, height: int
) -> None:  # fmt: skip
    context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    root = address.partition("/enter")[0]
    page.wait_for_url(f"{root}/")
    page.goto(f"{root}/language/{language}")
    page.goto(f"{root}{path}")
    page.wait_for_timeout(3000)
    page.screenshot(path=str(folder / f"{name}.png"))
    context.close()


if __name__ == "__main__":
    main()
