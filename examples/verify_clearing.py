"""Recompute a published clearing from its book and seed, apart from Qipan: `python verify_clearing.py BOOK.json`.

BOOK.json: {"seed": ..., "orders": [{"order_id", "side", "devices", "limit_micro_cny", "bucket"}], "clearing": {...}}, and
"tariff_micro_cny" where the book falls back to a posted price when it does not clear.
It walks device by device and shares no code with the market.
"""

import hashlib
import json
import sys


def recompute(orders, seed, tariff=0):
    found = crossed(orders, seed)
    if found["devices"] or not tariff:
        return found
    able = [o for o in orders if o["side"] == "buy" and o["limit_micro_cny"] >= tariff]
    able += [o for o in orders if o["side"] == "sell" and o["limit_micro_cny"] <= tariff]
    return crossed(able, seed, tariff)


def crossed(orders, seed, tariff=0):
    def place(order):
        digest = hashlib.blake2b(f"{seed}/{order['order_id']}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 2, order["order_id"]

    buys = sorted(
        (o for o in orders if o["side"] == "buy"),
        key=lambda o: (-o["limit_micro_cny"], o["bucket"], *place(o)),
    )
    sells = sorted(
        (o for o in orders if o["side"] == "sell"),
        key=lambda o: (o["limit_micro_cny"], o["bucket"], *place(o)),
    )
    demand = [(o["limit_micro_cny"], o["order_id"]) for o in buys for _ in range(o["devices"])]
    supply = [(o["limit_micro_cny"], o["order_id"]) for o in sells for _ in range(o["devices"])]
    traded = sum(1 for buy, sell in zip(demand, supply, strict=False) if buy[0] >= sell[0])
    if traded == 0:
        return {"devices": 0, "fills": {}}
    low = high = None
    if tariff:
        low = high = tariff
    elif min(len(buys), len(sells)) < 3:  # thin: the marginal orders step back and set the prices
        high, low = demand[traded - 1][0], supply[traded - 1][0]
        last_buyer, last_seller = demand[traded - 1][1], supply[traded - 1][1]
        traded = min(
            [name for _, name in demand].index(last_buyer), [name for _, name in supply].index(last_seller)
        )
    else:
        after_buy = demand[traded][0] if traded < len(demand) else 0
        after_sell = supply[traded][0] if traded < len(supply) else 2**53
        low = high = (max(supply[traded - 1][0], after_buy) + min(demand[traded - 1][0], after_sell)) // 2
    fills = {}
    for _, name in demand[:traded] + supply[:traded]:
        fills[name] = fills.get(name, 0) + 1
    return (
        {"devices": traded, "buy": high, "sell": low, "fills": fills}
        if traded
        else {"devices": 0, "fills": {}}
    )


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        book = json.load(file)
    mine = recompute(book["orders"], book["seed"], book.get("tariff_micro_cny", 0))
    published = book["clearing"]
    theirs = {fill["order_id"]: fill["devices"] for fill in published["fills"]}
    agree = mine["devices"] == published["devices"] and mine["fills"] == theirs
    if mine["devices"]:
        agree = agree and (mine["buy"], mine["sell"]) == (
            published["buy_price_micro_cny"],
            published["sell_price_micro_cny"],
        )
    print("agrees" if agree else f"DOES NOT AGREE: recomputed {mine}")
    sys.exit(0 if agree else 1)
