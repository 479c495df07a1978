"""Recompute a published clearing, apart from Qipan and device by device: python verify_clearing.py BOOK.json"""

import json
import sys
from collections import Counter
from hashlib import blake2b


def served(orders, seed, side, sign):
    """(limit, order) of each device of a side: best limit first, then the earliest, then by lot."""
    mine = [o for o in orders if o["side"] == side]
    lots = {o["order_id"]: blake2b(f"{seed}/{o['order_id']}".encode(), digest_size=8).digest() for o in mine}
    mine.sort(key=lambda o: (sign * o["limit_micro_cny"], o["bucket"], lots[o["order_id"]]))
    return [(o["limit_micro_cny"], o["order_id"]) for o in mine for _ in range(o["devices"])]


def recompute(orders, seed, tariff=0, posted=0):
    """(devices, the buyers' price, the sellers' price, {order: devices}); a book that does not clear trades at the tariff."""
    demand, supply = served(orders, seed, "buy", -1), served(orders, seed, "sell", 1)
    traded = sum(buy >= sell for (buy, _), (sell, _) in zip(demand, supply, strict=False))
    (buy, buyer), (next_buy, _) = [(0, ""), *demand, (0, "")][traded : traded + 2]  # marginal, next in line
    (sell, seller), (next_sell, _) = [(0, ""), *supply, (2**53, "")][traded : traded + 2]
    thin = traded and not posted and min(len(set(demand)), len(set(supply))) < 3
    if thin:  # the marginal orders step back, at their prices
        traded = min(demand.index((buy, buyer)), supply.index((sell, seller)))
    else:  # between the marginal orders, and no worse than the next in line would have it
        buy = sell = posted or (max(sell, next_buy) + min(buy, next_sell)) // 2
    if traded:
        return traded, buy, sell, Counter(name for _, name in demand[:traded] + supply[:traded])
    able = [o for o in orders if (o["limit_micro_cny"] - tariff) * (1 if o["side"] == "buy" else -1) >= 0]
    return recompute(able, seed, 0, tariff) if tariff else (0, 0, 0, {})


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        book = json.load(file)
    said, mine = book["clearing"], recompute(book["orders"], book["seed"], book.get("tariff_micro_cny", 0))
    fills = {fill["order_id"]: fill["devices"] for fill in said["fills"]}
    told = said["devices"], said["buy_price_micro_cny"], said["sell_price_micro_cny"], fills
    sys.exit(print("agrees") if mine == told else f"DOES NOT AGREE: recomputed {mine}")
