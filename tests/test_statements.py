import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_site import caller, served, submit
from qipan import statements
from qipan.api import tenant_token
from qipan.errors import InvalidInput
from qipan.leases import EngineId, ReceiptLine, TaskId, Usage
from qipan.ledger.explain import Attempt, Planned, explain
from qipan.ledger.receipt import cost_micro_cny
from qipan.ledger.transfer import move
from qipan.statements import Statement, make_statement, safe, to_csv, to_json, to_pdf

EVIL = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "＝1+1", " =1", "|calc", "%0A"]


def statement(name: str = "tenant/诗人", cause: str = "task-1") -> Statement:
    postings = [
        (1.7e9 + i, name, f"charge/{i}", cause, amount) for i, amount in enumerate((-5, 10**12 + 1, -1))
    ]
    return make_statement(name, "CNY", 7, postings, 1.7e9, 1.8e9)


def test_balances_run_from_the_opening_to_the_closing():
    made = statement()
    assert [line.balance_micro for line in made.lines] == [2, 10**12 + 3, 10**12 + 2]
    assert made.closing_micro == 10**12 + 2


@pytest.mark.parametrize("cell", EVIL)
def test_no_cell_of_a_csv_is_a_formula(cell):
    rows = list(csv.reader(io.StringIO(to_csv(statement(cause=cell)))))
    assert rows[2][3] == "'" + cell
    assert all(row[0][:1] not in "=+-@" for row in rows)


@given(st.text(max_size=30))
def test_any_text_comes_back_from_the_csv_as_it_was_or_quoted(text):
    if "\x00" in text:
        return
    [*_, row] = csv.reader(io.StringIO(to_csv(statement(cause=text)), newline=""))
    cell = list(csv.reader(io.StringIO(to_csv(statement(cause=text)), newline="")))[2][3]
    assert cell in (text, "'" + text)
    assert cell == safe(text)
    assert row[2] == "closing"


@given(st.integers(-(2**62), 2**62))
def test_amounts_are_exact_and_stay_numbers(micro):
    text = statements.decimal(micro)
    whole, _, decimals = text.partition(".")
    assert int(whole + decimals.ljust(6, "0")) == micro
    assert safe(text) == text


def test_json_comes_back():
    assert statements.read_statement(json.loads(to_json(statement()))) == statement()


def test_a_pdf_has_chinese_when_there_is_a_font_and_is_readable_without():
    font = statements.find_font()
    plain = to_pdf(statement(), None)
    assert plain.startswith(b"%PDF")
    if font is not None:
        assert len(to_pdf(statement(), font)) > len(plain), "a part of the font is in it"


def test_a_font_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("QIPAN_FONT", str(tmp_path / "no.ttf"))
    with pytest.raises(Exception, match="QIPAN_FONT"):
        statements.find_font()


def test_a_file_that_is_no_font_is_named(tmp_path):
    (tmp_path / "a.ttf").write_text("no font")
    for file in (tmp_path / "a.ttf", tmp_path / "a"):
        (tmp_path / "a").write_text("no font")
        with pytest.raises(InvalidInput, match="QIPAN_FONT"):
            to_pdf(statement(), (str(file), 0))


# ---- a bill against its plan -----------------------------------------------------------------------------------------


def attempt(number: int, device_s: float, price: int, board: str = "dc1", **more: float) -> Attempt:
    usage = Usage(
        TaskId("a"), number, board, EngineId("e"), "sim/a", 2, "p", 0.0, device_s / 2, device_s, True
    )
    return Attempt(ReceiptLine(usage, "1", price, cost_micro_cny(usage, price)), **more)


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 10**8), st.floats(0, 1e4), st.floats(0, 100)), max_size=5),
    st.integers(0, 10**10), st.integers(0, 10**8),
)  # fmt: skip
def test_the_reasons_sum_to_the_difference_from_the_plan(runs, cost_p50, price):
    planned = Planned("dc1", "sim/a", 2, cost_p50, cost_p50 * 2, price)
    attempts = [
        attempt(i, device_s, tariff, lost_s=lost, idle_s=idle)
        for i, (device_s, tariff, lost, idle) in enumerate(runs)
    ]
    total = sum(one.line.cost_micro_cny for one in attempts)
    assert sum(part.amount_micro_cny for part in explain(planned, attempts)) == total - cost_p50


def test_a_bill_names_other_chips_lost_work_and_time():
    planned = Planned("dc1", "sim/a", 2, 1_000_000, 1_200_000, 1_000_000)
    texts = [
        part.text
        for part in explain(
            planned,
            [attempt(1, 3600.0, 1_000_000, lost_s=100.0), attempt(2, 1800.0, 3_000_000, "dc2", idle_s=20.0)],
        )
    ]
    assert "planned was sim/a at dc1" in texts[0]
    assert "100.0 s of work were lost" in texts[1]
    assert "1 more attempts" in texts[2]
    assert "beyond the plan's p90" in texts[3]


# ---- on a host -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with served(tmp_path_factory.mktemp("m")) as host:
        with caller(host) as api:
            assert submit(api).status_code == 201
        host.store.post(move("=evil", "=HYPERLINK(1)", "bank", "tenant/poets", 3), host.clock.now_s())
        host.store.post(move("paid", "t", "bank", "provider/dc1", 5), host.clock.now_s())
        host.step()
        yield host


def qipan(host, *words, **env):
    return subprocess.run(
        [sys.executable, "-m", "qipan.cli", *words, "--store", str(host.folder)],
        capture_output=True,
        env={**os.environ, **env},
    )


def test_the_command_prints_accounts_statements_and_the_check(host, tmp_path):
    assert b"tenant/poets" in qipan(host, "ledger", "accounts", "tenant/").stdout
    shown = qipan(host, "ledger", "statement", "tenant/poets").stdout.decode()
    assert "opening 0.00, closing 999.000003 CNY" in shown
    found = list(
        csv.reader(
            io.StringIO(qipan(host, "ledger", "statement", "tenant/poets", "--format", "csv").stdout.decode())
        )
    )
    assert ["'=evil", "'=HYPERLINK(1)"] in [row[2:4] for row in found]
    pdf = tmp_path / "a.pdf"
    done = qipan(host, "ledger", "statement", "region/cn-east", "--format", "pdf", "--out", str(pdf))
    assert done.returncode == 0, done.stderr
    assert pdf.read_bytes().startswith(b"%PDF")
    assert b"every balance, hold and body" in qipan(host, "ledger", "check").stdout
    assert b"sum to 0.00" in qipan(host, "ledger").stdout
    assert qipan(host, "ledger", "statement", "tenant/nobody").returncode == 102
    assert qipan(host, "ledger", "statement", "region/mars").returncode == 102
    assert qipan(host, "ledger", "statement", "tenant/poets", "--from", "yesterday").returncode == 2


def test_a_bill_is_held_against_its_plan_by_the_command(host):
    shown = qipan(host, "bill", "tiny-1").stdout.decode()
    assert "planned 0.0" in shown


def test_a_tenant_sees_its_own_account_only(host):
    with caller(host, tenant_token("operator-token", "editors")) as editors:
        assert editors.get("/ledger/accounts").json() == {"accounts": []}
        assert editors.get("/ledger/statement", params={"account": "tenant/poets"}).status_code == 404
        assert editors.get("/ledger/check").status_code == 403


def test_the_check_fails_aloud(host):
    host.store.db.run("UPDATE balances SET balance_micro = balance_micro + 1 WHERE account = 'provider/dc1'")
    try:
        done = qipan(host, "ledger", "check")
        assert done.returncode == 100
        assert b"provider/dc1" in done.stdout
    finally:
        host.store.db.run(
            "UPDATE balances SET balance_micro = balance_micro - 1 WHERE account = 'provider/dc1'"
        )
    assert Path(host.folder).exists()
