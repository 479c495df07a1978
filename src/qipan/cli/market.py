"""`qipan market`: orders for slots of an hour, the published books; clear a book of orders, or verify a clearing."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from qipan.cli.options import Json, StoreDir
from qipan.errors import InvalidInput, NotFound

app = typer.Typer(no_args_is_help=True, help="Orders for slots of an hour, published books, clearings.")
HOUR_S = 3600


@app.command()
def orders(
    product: Annotated[str, typer.Argument(help="to place one: CHIP@ZONE/firm/2026-11-26T03, the hour in UTC")] = "",
    buy: Annotated[int, typer.Option(help="devices")] = 0,
    sell: Annotated[int, typer.Option(help="devices")] = 0,
    limit: Annotated[str, typer.Option(help="a device-hour, at most or at least: '1.5 CNY'")] = "",
    trader: Annotated[str, typer.Option("--as", help="the tenant that buys, the board that sells")] = "",
    order_id: Annotated[str, typer.Option("--id", help="the same id places once")] = "",
    json_: Json = False, store: StoreDir = None,
) -> None:  # fmt: skip
    """Place an order for a slot, or list what was placed."""
    from qipan.cli.app import client, tell

    if not product:
        tell(client(store).call("GET", "/market/orders")["orders"], json_, _show_orders)
        return
    if bool(buy) == bool(sell) or not limit:
        raise InvalidInput("give --buy DEVICES or --sell DEVICES, and --limit 'PRICE CNY' of a device-hour")
    import secrets

    placed = client(store).call(
        "POST", "/market/orders", None, product=product_id(product), side="buy" if buy else "sell", devices=buy or sell,
        limit=limit, trader=trader, order_id=order_id or f"{trader or 'order'}-{secrets.token_hex(4)}",
    )  # fmt: skip
    tell(placed, json_, lambda one: _show_orders([one]))


@app.command()
def book(product: Annotated[str, typer.Argument()] = "", json_: Json = False, store: StoreDir = None) -> None:
    """The auctions; of one that was cleared, its book with seed and clearing (--json: as `verify` reads it)."""
    from qipan.cli.app import client, tell

    if product:
        tell(client(store).call("GET", "/market/book", None, product=product_id(product)), json_, _show_book)
    else:
        tell(client(store).call("GET", "/market/auctions")["auctions"], json_, _show_auctions)


def product_id(text: str) -> str:
    """With its hour counted from 1970.  Raises InvalidInput."""
    from datetime import UTC, datetime

    what, _, hour = text.rpartition("/")
    if re.fullmatch("[0-9]{1,9}", hour):
        return text
    try:
        return f"{what}/{int(datetime.fromisoformat(hour + ':00').replace(tzinfo=UTC).timestamp()) // HOUR_S}"
    except ValueError:
        raise InvalidInput(
            f"{text[:80]!r} is no product; write CHIP@ZONE/firm/2026-11-26T03, the hour in UTC"
        ) from None


def _shown(product: str) -> str:
    from datetime import UTC, datetime

    what, _, hour = product.rpartition("/")
    return f"{what}/{datetime.fromtimestamp(int(hour) * HOUR_S, UTC):%Y-%m-%dT%H}"


def _show_orders(found: Any) -> None:
    from qipan.cli.tables import table
    from qipan.quantities import format_money

    rows = []
    for one in found:
        bid = one["order"]["bid"]
        filled = "" if one["state"] == "open" else str(one["filled"])
        rows.append([bid["order_id"], one["order"]["trader"], bid["side"], str(bid["devices"]), format_money(bid["limit_micro_cny"]), _shown(one["product"]), one["state"], filled])  # fmt: skip
    table("订单 orders", ["order", "trader", "side", "devices", "limit", "product", "state", "filled"], rows)


def _show_auctions(found: Any) -> None:
    from datetime import UTC, datetime

    from qipan.cli.tables import table
    from qipan.quantities import format_money

    rows = [
        [_shown(one["product"]), one["state"], f"{datetime.fromtimestamp(one['gate_s'], UTC):%m-%d %H:%M}", str(one["orders"]),
         str(one["devices"]) if one["devices"] else "", format_money(one["buy_price_micro_cny"]) if one["devices"] else ""]
        for one in found
    ]  # fmt: skip
    table("拍卖 auctions", ["product", "state", "gate (UTC)", "orders", "devices", "price"], rows)


def _show_book(found: Any) -> None:
    from qipan.cli.tables import table
    from qipan.quantities import format_devices, format_money

    cleared = found["clearing"]
    filled = {fill["order_id"]: fill["devices"] for fill in cleared["fills"]}
    rows = [
        [bid["order_id"], bid["side"], str(bid["devices"]), format_money(bid["limit_micro_cny"]), str(filled.get(bid["order_id"], 0))]
        for bid in found["orders"]
    ]  # fmt: skip
    table(f"{_shown(found['product'])}: {format_devices(cleared['devices'])} ({cleared['method']})", ["order", "side", "devices", "limit", "filled"], rows)  # fmt: skip
    print(f"  buyers pay {format_money(cleared['buy_price_micro_cny'])}, sellers get {format_money(cleared['sell_price_micro_cny'])}")  # fmt: skip
    print(f"  seed {found['seed']}, committed to as {found['commitment']}")


@app.command()
def clear(book: Path, json_: Json = False) -> None:
    """Print the book with its clearing, ready to publish."""
    import msgspec

    from qipan.market.book_file import read_book

    read = read_book(_bytes(book), str(book))
    read.clearing = read.clear()
    text = msgspec.json.encode(read)
    print((text if json_ else msgspec.json.format(text, indent=1)).decode())


@app.command()
def verify(book: Path, json_: Json = False) -> None:
    """Recompute a published clearing from its book and seed."""
    from qipan.cli.app import out
    from qipan.market.book_file import read_book, verify_book
    from qipan.quantities import format_devices

    clearing = verify_book(read_book(_bytes(book), str(book)), str(book))
    if json_:
        out({"agrees": True, "devices": clearing.devices, "price_micro_cny": clearing.buy_price_micro_cny})
    else:
        print(
            f"agrees: {format_devices(clearing.devices)} at {clearing.buy_price_micro_cny} micro-CNY a device-hour ({clearing.method})"
        )


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise NotFound(f"{path}: no such file; name a book of orders (JSON)")
    return path.read_bytes()
