"""What a hostile or broken caller may try with money.  Every case is refused with a reason that is safe to print, and the ledger is
exactly as it was."""

import math
from dataclasses import replace

import pytest

from qipan.errors import DiskFull, QipanError
from qipan.journal import Journal
from qipan.ledger.requests import CaptureHold, ExpireHold, PlaceHold, Post, Posted, Refused, VoidHold
from qipan.ledger.transfer import AMOUNT_MICRO_MAX, Entry, Transfer, exchange, move
from qipan.market.auction import Auction, close, commit
from qipan.settlement.contracts import Paid, Scheme, Terms, Voucher, redeem
from qipan.settlement.meters import Counters, MeterEvent, Meters
from qipan.settlement.tariffs import Price, check_sheet, rate
from qipan.store.opening import open_database
from settlements import sheet, verified

NOW_S = 1000.0
RICH = AMOUNT_MICRO_MAX - 10
YEAR = {"used_micro": 0, "firm_year_micro": 0, "now_s": NOW_S}


@pytest.fixture
def journal():
    made = Journal(open_database(None))
    outcomes = made.submit(
        [
            Post(move("open-a", "opening", "bank/world", "tenant/a", 1000)),
            Post(move("open-rich", "opening", "bank/rich", "tenant/rich", RICH)),
            PlaceHold("p1", "task-1", "task-1", "tenant/a", 400, expires_s=2000.0),
            PlaceHold("p2", "task-2", "task-2", "tenant/a", 100),
            CaptureHold("c2", "task-2", "task-2", "provider/p", 60, close=True),
            PlaceHold("p3", "payout", "payout-7", "provider/p", 10),  # sent to a bank that has not answered
        ],
        NOW_S,
    )
    assert all(isinstance(outcome, Posted) for outcome in outcomes), outcomes
    return made


def pay(key="k", cause="t", source="tenant/a", target="provider/p", amount=1, currency="CNY"):
    return lambda: Post(move(key, cause, source, target, amount, currency))


def place(**changes):
    good = PlaceHold("k", "task-9", "task-9", "tenant/a", 10, expires_s=2000.0)
    return lambda: replace(good, **changes)


def capture(**changes):
    return lambda: replace(CaptureHold("k", "task-1", "task-1", "provider/p", 10), **changes)


#: asked of the journal at NOW_S
REQUESTS = {
    "more than there is": pay(amount=541),
    "all of it twice in one batch": lambda: [pay("x1", amount=500)(), pay("x2", amount=500)()],
    "a negative amount, which would take from the provider": pay(amount=-5),
    "an amount beyond the bound": pay(amount=AMOUNT_MICRO_MAX + 1),
    "an amount beyond 64 bits": pay(amount=2**70),
    "a balance that would overflow": pay(source="bank/world", target="tenant/rich", amount=100),
    "the far side of an overflow": pay(source="bank/rich", target="tenant/new", amount=AMOUNT_MICRO_MAX),
    "money out of a hold by a plain posting": pay(source="hold/task-1"),
    "money into a hold by a plain posting": pay(target="hold/task-1"),
    "an account of no class": pay(target="friend/me"),
    "an account without a class": pay(target="me"),
    "an empty account": pay(target=""),
    "a line break in an account (log injection)": pay(target="provider/p\n2026 INFO paid tenant/evil 1000"),
    "a terminal escape in a cause": pay(cause="task\x1b[2Jx"),
    "a carriage return in a key": pay(key="k\rOK"),
    "a zero byte in a cause": pay(cause="a\x00b"),
    "a text turned round in a cause": pay(cause="a\u202egpj.exe"),
    "an account of 10,000 characters": pay(target="provider/" + "p" * 10_000),
    "spaces at the end of an account, which look like another": pay(target="provider/p "),
    "a currency that is none": pay(currency="cny"),
    "a formula as currency": pay(currency="=1+"),
    "a currency in wide letters": pay(currency="ＣＮＹ"),
    "one currency given, another got": lambda: Post(Transfer("k", "t", (Entry("tenant/a", -5), Entry("tenant/a", 5, "USD")))),
    "a currency that the tenant does not have": pay(currency="USD"),
    "entries that do not sum to zero": lambda: Post(Transfer("k", "t", (Entry("tenant/a", -5), Entry("provider/p", 6)))),
    "a transfer of one entry": lambda: Post(Transfer("k", "t", (Entry("tenant/a", 0),))),
    "a transfer of no entries": lambda: Post(Transfer("k", "t", ())),
    "an old key with more money": pay(key="open-a", source="bank/world", target="tenant/a", amount=2000),
    "an old key for another account": pay(key="open-a", source="bank/world", target="tenant/b", amount=1000),
    "an old key with another cause": pay(key="open-a", cause="gift", source="bank/world", target="tenant/a", amount=1000),
    "a hold's key used for a posting": pay(key="p1"),
    "a hold of nothing": place(amount_micro=0),
    "a hold of a negative amount": place(amount_micro=-10),
    "a hold of more than there is": place(amount_micro=541),
    "a hold that exists": place(hold_id="task-1"),
    "a hold that was closed": place(hold_id="task-2"),
    "a hold upon a hold": place(account="hold/task-1"),
    "a hold that ran out before it was placed": place(expires_s=999.0),
    "a hold for ever and a day": place(expires_s=1e12),
    "a hold until no number": place(expires_s=math.nan),
    "a hold until infinity": place(expires_s=math.inf),
    "a hold with a line break": place(hold_id="task\nx"),
    "a capture of more than the hold has": capture(amount_micro=401),
    "a capture of nothing": capture(amount_micro=0),
    "a capture of a negative amount": capture(amount_micro=-1),
    "a capture into another hold": capture(target="hold/payout-7"),
    "a capture of a hold that is not": capture(hold_id="task-77"),
    "a capture of a closed hold": capture(hold_id="task-2"),
    "a second charge under the first one's key": capture(key="c2", hold_id="task-1"),
    "a void of a closed hold": lambda: VoidHold("k", "t", "task-2"),
    "a void of a hold that is not": lambda: VoidHold("k", "t", "task-77"),
    "an expiry before its time": lambda: ExpireHold("task-1"),
    "the expiry of a payment whose fate is unknown": lambda: ExpireHold("payout-7"),
    "a payment sent again while the first one's fate is unknown": place(key="p3", hold_id="payout-7", account="provider/p"),
    "the same money paid out under a new name": place(hold_id="payout-8", account="provider/p", amount_micro=51),
    "an exchange at a negative rate": lambda: Post(exchange("k", "t", "tenant/a", Entry("tenant/a", 10), "USD", (-1, 1))),
    "an exchange by zero": lambda: Post(exchange("k", "t", "tenant/a", Entry("tenant/a", 10), "USD", (1, 0))),
    "an exchange of a negative amount": lambda: Post(exchange("k", "t", "tenant/a", Entry("tenant/a", -10), "USD", (1, 1))),
    "an exchange into the same currency": lambda: Post(exchange("k", "t", "tenant/a", Entry("tenant/a", 10), "CNY", (2, 1))),
    "an exchange of more than there is": lambda: Post(exchange("k", "t", "tenant/a", Entry("tenant/a", 541), "USD", (1, 1))),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_a_hostile_request_is_refused_and_the_ledger_is_as_it_was(journal, name):
    before = everything(journal)
    why, refused = [], 0
    try:
        asked = REQUESTS[name]()
    except QipanError as error:
        why.append(str(error))
    else:
        requests = asked if isinstance(asked, list) else [asked]
        outcomes = journal.submit(requests, NOW_S)
        refused = sum(isinstance(outcome, Refused) for outcome in outcomes)
        why += [outcome.why for outcome in outcomes if isinstance(outcome, Refused)]
        if len(requests) > 1:
            assert refused == 1, "one of the two is good"
            assert not journal.check().problems
    assert why
    assert all(len(text) > 10 and text.isprintable() for text in why), why
    if refused < 2 and not isinstance(locals().get("asked"), list):
        assert everything(journal) == before


CLOCKS = {"a clock a day behind": -86400.0, "no number": math.nan, "infinity": math.inf}


@pytest.mark.parametrize("name", CLOCKS)
def test_a_wrong_clock_posts_nothing(journal, name):
    before = everything(journal)
    [outcome] = journal.submit([pay()()], CLOCKS[name])
    assert isinstance(outcome, Refused)
    assert outcome.clause == "L-9"
    assert everything(journal) == before


def test_a_charge_in_the_moment_its_hold_runs_out_is_refused_whoever_sweeps_first(journal):
    [outcome] = journal.submit([capture()()], 2000.0)
    assert isinstance(outcome, Refused)
    assert "ran out" in outcome.why


@pytest.mark.parametrize("statement", [1, 2, 3, 4])
def test_a_crash_between_claim_and_write_leaves_nothing(journal, statement):
    """The process ends after its n-th write; a new one opens what is there and asks again."""

    class Gone(Exception):
        pass

    before, run_many, count = everything(journal), journal.db.run_many, 0

    def dying(sql, rows):
        nonlocal count
        count += 1
        run_many(sql, rows)
        if count == statement:
            raise Gone

    journal.db.run_many = dying
    with pytest.raises(Gone):
        journal.submit([capture()()], NOW_S)
    journal.db.run_many = run_many
    assert everything(journal) == before
    again = [journal.submit([capture()()], NOW_S)[0] for _ in range(3)]
    assert [outcome.repeated for outcome in again] == [False, True, True]
    assert not journal.check().problems


def test_a_full_disk_posts_nothing(tmp_path):
    journal = Journal(open_database(tmp_path / "a.db"))
    journal.submit([pay(source="bank/world", target="tenant/a")()], NOW_S)
    pages = journal.db.rows("PRAGMA page_count")[0][0]
    journal.db.run(f"PRAGMA max_page_count = {pages}")
    before = everything(journal)
    with pytest.raises(DiskFull, match=r"a\.db: no room was left, though .* are free"):
        journal.submit([pay(f"k{i}", "c" * 150, "bank/world", f"tenant/{i}")() for i in range(500)], NOW_S)
    assert everything(journal) == before


# ---- vouchers ------------------------------------------------------------------------------------------------------

SCHEME = Scheme("2026", (("domestic", 300_000), ("imported", 100_000)), 5000)
VOUCHER = Voucher("v1", "2026", "a", 2000, 5000.0)
PAID = Paid("c2", "a", 1000, "domestic")

VOUCHERS = {
    "without a payment": lambda: redeem(VOUCHER, SCHEME, None, **YEAR),
    "another firm's payment": lambda: redeem(VOUCHER, SCHEME, replace(PAID, tenant="b"), **YEAR),
    "another scheme's voucher": lambda: redeem(replace(VOUCHER, scheme_id="2025"), SCHEME, PAID, **YEAR),
    "run out": lambda: redeem(VOUCHER, SCHEME, PAID, **{**YEAR, "now_s": 5000.0}),
    "used up": lambda: redeem(VOUCHER, SCHEME, PAID, **{**YEAR, "used_micro": 2000}),
    "beyond the firm's year": lambda: redeem(VOUCHER, SCHEME, PAID, **{**YEAR, "firm_year_micro": 5000}),
    "an origin that the scheme does not know": lambda: redeem(VOUCHER, SCHEME, replace(PAID, origin="none"), **YEAR),
    "a payment of less than nothing": lambda: redeem(VOUCHER, SCHEME, replace(PAID, amount_micro=-9), **YEAR),
}  # fmt: skip


@pytest.mark.parametrize("name", VOUCHERS)
def test_a_voucher_that_does_not_hold_gives_nothing(name):
    refused = VOUCHERS[name]()
    assert isinstance(refused, Refused)
    assert refused.clause.startswith("C-")


def test_a_payment_is_subsidised_once_whatever_voucher_is_shown(journal):
    journal.submit([Post(move("fund", "2026", "bank/world", "subsidy/2026", 10_000))], NOW_S)
    first = redeem(VOUCHER, SCHEME, PAID, **YEAR)
    second = redeem(replace(VOUCHER, voucher_id="v2"), SCHEME, PAID, **YEAR)
    assert isinstance(journal.submit([Post(first)], NOW_S)[0], Posted)
    before = everything(journal)
    repeated, refused = journal.submit([Post(first), Post(second)], NOW_S)
    assert repeated.repeated
    assert isinstance(refused, Refused)
    assert everything(journal) == before


# ---- meters --------------------------------------------------------------------------------------------------------

EVENT = MeterEvent(
    "node-1", "lease-1", "boot-1", 2, 900.0, 0.0, 2, Counters(device_us=1_000_000_000, moved_bytes=50)
)

METERS = {
    "the same number with other counters": ("M-1", replace(EVENT, counters=Counters(device_us=999_000_000, moved_bytes=50))),
    "a counter that goes back": ("M-2", replace(EVENT, sequence=3, counters=Counters(device_us=999, moved_bytes=50))),
    "a late event with more than the newest": ("M-2", replace(EVENT, sequence=1, counters=Counters(device_us=1_000_000_001))),
    "a counter below zero": ("M-2", replace(EVENT, sequence=3, counters=Counters(device_us=-1))),
    "a counter beyond 2^62": ("M-2", replace(EVENT, sequence=3, counters=Counters(moved_bytes=2**63))),
    "a number of zero": ("M-2", replace(EVENT, sequence=0)),
    "no devices": ("M-2", replace(EVENT, sequence=3, devices=0)),
    "a clock an hour ahead": ("M-3", replace(EVENT, sequence=3, at_s=NOW_S + 3600)),
    "a clock of no number": ("M-3", replace(EVENT, sequence=3, at_s=math.nan)),
    "an end before its beginning": ("M-3", replace(EVENT, sequence=3, at_s=1.0, started_s=2.0)),
    "more device-seconds than there were": ("M-4", replace(EVENT, sequence=3, at_s=910.0, counters=Counters(device_us=1_100_000_000, moved_bytes=50))),
}  # fmt: skip


@pytest.mark.parametrize("name", METERS)
def test_a_meter_that_lies_is_refused_and_nothing_is_counted(name):
    meters = Meters()
    assert meters.absorb(EVENT, NOW_S) == EVENT.counters
    clause, event = METERS[name]
    refused = meters.absorb(event, NOW_S)
    assert isinstance(refused, Refused), refused
    assert refused.clause == clause
    assert meters.total("lease-1") == EVENT.counters


def test_lost_and_repeated_and_late_events_count_once():
    meters, events = Meters(), [
        replace(EVENT, sequence=i, at_s=100.0 * i, counters=Counters(device_us=i * 10**8)) for i in range(1, 8)
    ]  # fmt: skip
    for i in (0, 2, 2, 6, 3, 6, 1):  # 4 and 5 are lost
        meters.absorb(events[i], NOW_S)
    again = replace(EVENT, boot="boot-2", sequence=1, started_s=800.0, counters=Counters(device_us=5))
    assert meters.absorb(again, NOW_S) == Counters(device_us=5)
    assert meters.total("lease-1") == Counters(device_us=7 * 10**8 + 5)


# ---- tariffs, contracts, auctions -----------------------------------------------------------------------------------

TARIFFS = {
    "changed after it was signed": lambda: check_sheet(replace(sheet(), prices=(Price("energy", "dc1", 5),)), verified, NOW_S),
    "without a signature": lambda: check_sheet(replace(sheet(), signature=""), verified, NOW_S),
    "not yet in force": lambda: check_sheet(sheet(valid_from_s=2000.0), verified, NOW_S),
    "no longer in force": lambda: check_sheet(sheet(valid_until_s=500.0), verified, NOW_S),
    "issued in the future": lambda: check_sheet(sheet(issued_s=5000.0), verified, NOW_S),
    "older than 400 days": lambda: check_sheet(sheet(issued_s=-400 * 86400.0, valid_until_s=1e9), verified, NOW_S),
    "a price of 0 that is not declared free": lambda: check_sheet(sheet(prices=(Price("transfer", "dc1", 0),)), verified, NOW_S),
    "declared free at a price": lambda: check_sheet(sheet(prices=(Price("transfer", "dc1", 5, free=True),)), verified, NOW_S),
    "a negative price": lambda: check_sheet(sheet(prices=(Price("transfer", "dc1", -5),)), verified, NOW_S),
    "a price beyond all reason": lambda: check_sheet(sheet(prices=(Price("transfer", "dc1", 10**15),)), verified, NOW_S),
    "two prices for one thing": lambda: check_sheet(sheet(prices=(Price("transfer", "dc1", 5), Price("transfer", "dc1", 6))), verified, NOW_S),
    "a meter that is none": lambda: check_sheet(sheet(prices=(Price("goodwill", "dc1", 5),)), verified, NOW_S),
    "something delivered that has no price": lambda: rate(Counters(device_us=5), "dc9", "sim/fast", sheet()),
    "a fee of more than all": lambda: Terms(fee_ppm=1_000_001),
    "a negative discount": lambda: Terms(discounts=(("a", -1),)),
    "a seed that was chosen afterwards": lambda: close(Auction("p", 0.0, 500.0, commit("seed")), "other", NOW_S),
}  # fmt: skip


@pytest.mark.parametrize("name", TARIFFS)
def test_a_tariff_contract_or_seed_that_does_not_hold_is_refused(name):
    with pytest.raises(QipanError) as refused:
        TARIFFS[name]()
    assert str(refused.value).isprintable()


def test_there_are_at_least_sixty_cases():
    assert sum(map(len, (REQUESTS, CLOCKS, VOUCHERS, METERS, TARIFFS))) >= 60


def everything(journal):
    return [
        journal.db.rows(f"SELECT * FROM {table} ORDER BY 1, 2")
        for table in ("transfers", "entries", "balances", "holds")
    ]
