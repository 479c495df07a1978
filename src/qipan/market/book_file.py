"""A book of orders as a file: {"seed", "orders": [...], "clearing": {...} once it is published}."""

import msgspec

from qipan.errors import InvalidInput
from qipan.market.clearing import Bid, Clearing, clear


class Book(msgspec.Struct, forbid_unknown_fields=True):
    seed: str
    orders: tuple[Bid, ...]
    clearing: Clearing | None = None


def read_book(text: bytes, file: str) -> Book:
    """Raises InvalidInput."""
    try:
        return msgspec.json.decode(text, type=Book)
    except msgspec.MsgspecError as error:
        raise InvalidInput(
            f"is no book of orders: {error}; give seed, orders and, to verify, clearing", file
        ) from None


def verify_book(book: Book, file: str) -> Clearing:
    """The clearing again.  Raises InvalidInput when the published one is absent or another."""
    again = clear(book.orders, book.seed)
    if book.clearing is None:
        raise InvalidInput("has no published clearing; make one with `qipan market clear`", file)
    if again != book.clearing:
        raise InvalidInput(
            f"its clearing is not what the rules give: published {book.clearing.devices} devices at"
            f" {book.clearing.buy_price_micro_cny}, the rules give {again.devices} at {again.buy_price_micro_cny}",
            file,
        )
    return again
