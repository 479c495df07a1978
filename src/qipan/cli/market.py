"""`qipan market`: clear a book of orders, or verify a published clearing."""

from pathlib import Path
from typing import Annotated

import typer

from qipan.errors import NotFound

app = typer.Typer(no_args_is_help=True, help="Clear a book of orders, or verify a published clearing.")
Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]


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

    clearing = verify_book(read_book(_bytes(book), str(book)), str(book))
    if json_:
        out({"agrees": True, "devices": clearing.devices, "price_micro_cny": clearing.buy_price_micro_cny})
    else:
        print(
            f"agrees: {clearing.devices} devices at {clearing.buy_price_micro_cny} micro-CNY a device-hour ({clearing.method})"
        )


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise NotFound(f"{path}: no such file; name a book of orders (JSON)")
    return path.read_bytes()
