"""The console in Chromium, as a person meets it: the address that `qipan up` prints, a task from the form, the board that
moves, the reasons, the receipt; in both languages."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from api_site import caller, consoled, served, submit
from qipan.client import Client
from qipan.host import Host

HERE = Path(__file__).parent
WAIT_MS = 180_000
expect.set_options(timeout=WAIT_MS)
SITE = """site:
  lease: 30s
  board:
    name: cn
    children:
      - name: east
        children: [{name: shanghai, region: cn-east, longitude: 121.5, latitude: 31.2, pools: [{chip: sim/yan-1, devices: 2, tariff: 1 CNY}]}]
      - name: west
        children: [{name: guizhou, region: cn-west, longitude: 106.7, latitude: 26.6, pools: [{chip: sim/heng-2, devices: 1, tariff: 2 CNY}]}]
  links: [{between: [shanghai, guizhou], rate: 1Gbit/s, latency: 28ms, egress_per_gib: 0.10 CNY}]
  tenants: [{name: poets, balance: 1000 CNY}, {name: editors, balance: 1000 CNY}]
"""
TRAINING = """\
kind: train
name: draft
tenant: poets
model: {layers: 2, hidden: 64, heads: 4, ffn_hidden: 192, tied_embeddings: true}
data: fortunes:tang300
work: {tokens: 500k, global_batch: 2048, seq: 64}
elastic: true
limits: {deadline: 30m, max_cost: 0.25 CNY, regions: [cn-east]}
checkpoint: {every: 20s}
"""
DEARER = """\
kind: train
name: urgent
tenant: editors
model: {layers: 1, hidden: 32, heads: 2, ffn_hidden: 96, tied_embeddings: true}
data: fortunes:tang300
work: {tokens: 10k, global_batch: 2048, seq: 64}
devices: 1
limits: {deadline: 10m, max_cost: 5 CNY, regions: [cn-east]}
"""


@pytest.fixture(scope="module")  # not longer: its event loop is in the way of other tests
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


class Watched:
    """A page that remembers what the browser complained about, such as a breach of the content policy."""

    def __init__(self, browser: Browser, **context: object) -> None:
        self.context = browser.new_context(**context)  # type: ignore[arg-type]
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type != "info" else None
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.set_default_timeout(WAIT_MS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_task_is_submitted_watched_explained_and_paid_in_both_languages(chromium, tmp_path):
    (tmp_path / "site.yaml").write_text(SITE)
    command = ["up", "--store", str(tmp_path / "s"), "--site", str(tmp_path / "site.yaml")]
    up = subprocess.Popen(
        [sys.executable, "-m", "qipan.cli", *command], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    try:
        assert up.stdout is not None
        printed = up.stdout.readline() + up.stdout.readline()
        (address,) = re.findall(r"http://\S+", printed)
        chinese = Watched(chromium, viewport={"width": 1440, "height": 900})
        page = chinese.page
        page.goto(address)
        expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
        expect(page.locator("#pulse")).to_have_text("实时")
        assert "#" not in page.url, "the key does not stay in the address"
        expect(page.locator(".map .hub")).to_have_count(2)
        expect(page.locator(".liberty")).to_have_count(3)

        # 提交: the form and the task file are one text, the plan is there before anything starts
        page.get_by_role("link", name="提交", exact=True).click()
        page.locator("#text").fill(TRAINING)
        expect(page.locator("#f-name")).to_have_value("draft")
        page.locator("#f-name").fill("poems")
        page.locator("#f-name").blur()
        expect(page.locator("#text")).to_have_value(re.compile("name: poems"))
        expect(page.locator("#plan tr.chosen")).to_contain_text("shanghai")
        page.get_by_role("button", name="落子").click()
        page.wait_for_url("**/tasks/poems-1")
        state = page.locator("h1 .state")
        expect(state).to_have_text("运行中")
        devices = page.locator("#devices")
        expect(devices).to_have_text("2")
        expect(page.locator(".charts section").first).to_contain_text("损失")

        # English, another person: a dearer task comes
        english = Watched(chromium, viewport={"width": 1440, "height": 900}, color_scheme="dark")
        other = english.page
        other.goto(address)
        other.get_by_role("link", name="English").click()
        expect(other.locator("html")).to_have_attribute("lang", "en")
        other.get_by_role("link", name="Submit", exact=True).click()
        other.locator("#text").fill(DEARER)
        expect(other.locator("#plan tr.chosen")).to_contain_text("shanghai")
        other.get_by_role("button", name="Place the stone").click()
        other.wait_for_url("**/tasks/urgent-1")

        # it shrinks, and grows again, and the page says why
        expect(devices).to_have_text("1")
        other.goto(address.partition("/enter")[0])
        expect(other.locator(".stone")).to_have_count(2)
        expect(devices).to_have_text("2")
        expect(page.locator("#why")).to_contain_text("缩小")
        expect(page.locator("#why")).to_contain_text("长大")
        assert [row.inner_text() for row in page.locator("#attempts tbody tr td:nth-child(3)").all()][:3] == [
            "2",
            "1",
            "2",
        ]

        # it ends; the receipt is the bill
        expect(state).to_have_text("完成")
        with page.expect_download() as downloading:
            page.get_by_role("link", name="下载凭据").click()
        receipt = json.loads(Path(downloading.value.path()).read_text())
        told = Client(tmp_path / "s").job("poems-1").bill()
        assert receipt == told["receipt"]
        assert receipt["cost_micro_cny"] == told["charged_micro_cny"] > 0
        assert [line["usage"]["devices"] for line in receipt["lines"]] == [2, 1, 2]

        # and the same in English
        other.goto(address.partition("/enter")[0] + "/tasks/poems-1")
        for word in ("shrunk", "grown"):
            expect(other.locator("#why")).to_contain_text(word)
        expect(other.locator("h1 .state")).to_have_text("done")
        with other.expect_download() as downloading:
            other.get_by_role("link", name="download the receipt").click()
        assert json.loads(Path(downloading.value.path()).read_text()) == receipt
        other.get_by_role("link", name="Money").click()
        expect(other.locator("#ledger-check")).to_contain_text("is zero")
        assert chinese.complaints + english.complaints == []
        up.send_signal(signal.SIGINT)
        assert up.wait(30) == 130
    finally:
        up.kill()
        up.wait()


# ---- pages, on a host that steps when told to ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with served(tmp_path_factory.mktemp("b")) as host:
        with caller(host) as api:
            for _ in range(3):
                submit(api)
        host.step()
        yield host


@pytest.fixture(scope="module")
def address(host: Host) -> Iterator[str]:
    with consoled(host, "k") as address:
        yield address


PATHS = ("/", "/submit", "/tasks", "/tasks/tiny-1", "/supply", "/prices", "/money", "/decisions", "/people")


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_its_window_and_breaks_no_policy(chromium, address, width, scheme):
    watched = Watched(chromium, viewport={"width": width, "height": 844}, color_scheme=scheme)
    watched.page.goto(f"{address}/enter#k")
    watched.page.wait_for_url(f"{address}/")
    for path in PATHS:
        watched.page.goto(address + path)
        wide = watched.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{path} is {wide} wide in a window of {width}"
    assert watched.complaints == []
    watched.context.close()


def test_the_pages_are_reached_and_used_by_the_keyboard_alone(chromium, address):
    watched = Watched(chromium)
    page = watched.page
    page.goto(f"{address}/enter#k")
    page.wait_for_url(f"{address}/")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"
    page.goto(f"{address}/")
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url(f"{address}/submit")
    page.locator("#f-name").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("typed")
    page.keyboard.press("Tab")
    expect(page.locator("#text")).to_have_value(re.compile("name: typed"))
    watched.context.close()


def test_a_person_logs_in_sees_their_own_and_logs_out_in_both_languages(chromium, host, address):
    password = "correct horse battery"
    with caller(host) as api:
        made = {"user": "li", "role": "user", "tenant": "poets", "password": password}
        assert api.post("/users", json=made).status_code == 201
    watched = Watched(chromium, viewport={"width": 390, "height": 844})
    page = watched.page
    page.goto(address)
    page.get_by_role("link", name="用用户名登录").click()
    page.wait_for_url(f"{address}/login")
    page.get_by_label("用户名").fill("li")
    page.get_by_label("密码").fill("a wrong password")
    page.get_by_role("button", name="登录").click()
    expect(page.get_by_role("alert")).to_contain_text("用户名或密码不对")
    expect(page.get_by_label("用户名")).to_have_value("li")
    page.get_by_role("link", name="English").click()
    page.wait_for_url(f"{address}/login")
    page.get_by_label("user").fill("li")
    page.get_by_label("password").fill(password)
    page.keyboard.press("Enter")
    page.wait_for_url(f"{address}/")
    expect(page.locator(".person")).to_contain_text("li")
    expect(page.locator("#pulse")).to_have_text("live")
    for path in PATHS[:-2]:
        page.goto(address + path)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 390, f"{path} is {wide} wide"
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url(f"{address}/login")
    page.goto(f"{address}/money")
    page.wait_for_url(f"{address}/enter")
    complaints = [
        said for said in watched.complaints if "403" not in said
    ]  # the browser tells of the wrong password, too
    assert complaints == []
    watched.context.close()
