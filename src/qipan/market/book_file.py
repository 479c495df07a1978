"""A book of orders as a file: {"seed", "orders": [...], "clearing": {...} once it is published}; with `tariff_micro_cny` it falls back to
that posted price, with `commitment` the seed must be the one that was committed to."""

import msgspec

from qipan.errors import InvalidInput
from qipan.market.auction import clear_or_tariff, commit
from qipan.market.clearing import Bid, Clearing
from qipan.quantities import format_devices


class Book(msgspec.Struct, forbid_unknown_fields=True):
    seed: str
    orders: tuple[Bid, ...]
    clearing: Clearing | None = None
    product: str = ""
    tariff_micro_cny: int = 0
    commitment: str = ""

    def clear(self) -> Clearing:
        return clear_or_tariff(self.orders, self.seed, self.tariff_micro_cny)


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
    again = book.clear()
    if book.clearing is None:
        raise InvalidInput("has no published clearing; make one with `qipan market clear`", file)
    if book.commitment and commit(book.seed) != book.commitment:
        raise InvalidInput("its seed is not the one that was committed to before the gate closed", file)
    if again != book.clearing:
        raise InvalidInput(
            f"its clearing is not what the rules give: published {format_devices(book.clearing.devices)} at"
            f" {book.clearing.buy_price_micro_cny}, the rules give {again.devices} at {again.buy_price_micro_cny}",
            file,
        )
    return again
