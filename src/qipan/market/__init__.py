"""The market: sealed call auctions of device-hours, cleared at one price; pure."""

from qipan.market.clearing import Bid, Clearing, Fill, clear, tie_hash

__all__ = ["Bid", "Clearing", "Fill", "clear", "tie_hash"]
