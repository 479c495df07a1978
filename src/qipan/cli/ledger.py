"""`qipan ledger`: accounts, statements, and the auditor's answer."""

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qipan.cli.options import Json, StoreDir
from qipan.errors import InvalidInput, QipanError

app = typer.Typer(help="Accounts, statements, and everything recomputed.")
FORMATS = ("table", "csv", "json", "pdf")


@app.callback(invoke_without_command=True)
def ledger(context: typer.Context, json_: Json = False, store: StoreDir = None) -> None:
    """All accounts; they sum to zero."""
    from qipan.cli.app import client, tell
    from qipan.cli.tables import print_ledger

    if context.invoked_subcommand is None:
        answer = client(store).call("GET", "/ledger")
        tell(answer, json_, lambda value: print_ledger(value["balances_micro_cny"]))


@app.command()
def accounts(
    prefix: Annotated[str, typer.Argument()] = "", json_: Json = False, store: StoreDir = None
) -> None:
    """Accounts with their balances, by currency; those that begin with PREFIX, such as provider/."""
    from qipan.cli.app import client, tell
    from qipan.cli.tables import table
    from qipan.statements import decimal

    found = [one for one in client(store).call("GET", "/ledger/accounts")["accounts"] if one["account"].startswith(prefix)]  # fmt: skip

    def show(accounts: Any) -> None:
        rows = [[one["account"], decimal(one["balance_micro"]), one["currency"]] for one in accounts]
        table("账户 accounts", ["account", "balance", "currency"], rows)

    tell(found, json_, show)


@app.command()
def statement(
    account: str, json_: Json = False, store: StoreDir = None,
    format_: Annotated[str, typer.Option("--format", help="table, csv, json or pdf")] = "table",
    out_file: Annotated[Optional[Path], typer.Option("--out", help="a file; standard output without it")] = None,  # noqa: UP045
    since: Annotated[str, typer.Option("--from", help="2026-11-01, UTC")] = "",
    until: Annotated[str, typer.Option("--until", help="2026-12-01, UTC, not included")] = "",
    currency: str = "CNY",
) -> None:  # fmt: skip
    """What was posted to an account: tenant/NAME, provider/NAME, or region/NAME for all providers there."""
    from qipan import statements
    from qipan.cli.app import client

    format_ = "json" if json_ else format_
    if format_ not in FORMATS:
        raise InvalidInput(f"--format {format_[:20]!r}; give one of {', '.join(FORMATS)}")
    made = statements.read_statement(
        client(store).call(
            "GET", "/ledger/statement", account=account, currency=currency, from_s=_time_s(since, 0.0), until_s=_time_s(until, 1e11)
        )
    )  # fmt: skip
    if format_ == "table":
        _show(made, out_file)
        return
    if format_ == "pdf":
        body = statements.to_pdf(made, statements.find_font())
    else:
        body = (statements.to_csv(made) if format_ == "csv" else statements.to_json(made) + "\n").encode()
    if out_file is not None:
        out_file.write_bytes(body)
        print(f"{out_file}: {len(made.lines)} postings, closing {statements.decimal(made.closing_micro)} {made.currency}")  # fmt: skip
    elif format_ == "pdf" and sys.stdout.isatty():
        raise InvalidInput("a PDF is not for a terminal; give --out FILE")
    else:
        sys.stdout.buffer.write(body)


def _show(made: Any, out_file: Path | None) -> None:
    from qipan import statements
    from qipan.cli.tables import table

    if out_file is not None:
        raise InvalidInput("--out goes with --format csv, json or pdf")
    table(f"对账单 statement of {made.name}", list(statements.COLUMNS[:-1]), statements.rows(made))
    print(f"  opening {statements.decimal(made.opening_micro)}, closing {statements.decimal(made.closing_micro)} {made.currency}")  # fmt: skip


def _time_s(text: str, default_s: float) -> float:
    from datetime import UTC, datetime

    if not text:
        return default_s
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise InvalidInput(f"{text[:40]!r} is no date; write 2026-11-01 or 2026-11-01T12:00:00") from None


@app.command()
def check(json_: Json = False, store: StoreDir = None) -> None:
    """Recompute every balance, hold and transfer from the entries; exit 100 when something is wrong."""
    from qipan.cli.app import client, tell

    found = client(store).call("GET", "/ledger/check")

    def show(audit: Any) -> None:
        for problem in audit["problems"]:
            print(f"  {problem}")
        sums = ", ".join(f"{total} micro-{currency}" for currency, total in sorted(audit["sums"].items()))
        print(
            f"{audit['transfers']} transfers, {audit['entries']} entries, {audit['holds_open']} open holds; sum {sums or 0}"
        )

    tell(found, json_, show)
    if found["problems"]:
        raise QipanError(
            f"the ledger has {len(found['problems'])} problems; restore it from a backup, or correct by new entries"
        )
    if not json_:
        print("  every balance, hold and body is what its entries say")
