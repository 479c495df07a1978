"""Random books of substitutable products, gangs and blocks."""

import random

from qipan.market.combined import Option, Supply, Want

PRODUCTS = tuple(f"chip{i}@zone{j}" for i in range(4) for j in range(3))


def combined_book(seed: int, orders: int, products=PRODUCTS) -> tuple[list[Want], list[Supply]]:
    rng = random.Random(seed)
    wants: list[Want] = []
    supplies: list[Supply] = []
    for i in range(orders):
        dice = rng.random()
        if dice < 0.5:
            supplies.append(
                Supply(f"s{i}", rng.choice(products), rng.randint(1, 64), rng.randint(500_000, 12_000_000), rng.random() < 0.1)
            )  # fmt: skip
            continue
        chosen = rng.sample(products, rng.randint(1, min(4, len(products))))
        limit = rng.randint(1_000_000, 20_000_000)
        if dice < 0.85:
            devices = rng.randint(1, 32)
            options = tuple(Option(((product, devices),), round(limit * rng.uniform(0.7, 1.3))) for product in chosen)  # fmt: skip
            wants.append(Want(f"w{i}", options))
        else:
            options = []
            for _ in range(rng.randint(1, 2)):
                parts = tuple((product, rng.randint(4, 64)) for product in rng.sample(products, min(len(products), rng.randint(1, 2))))  # fmt: skip
                options.append(Option(parts, round(limit * rng.uniform(0.7, 1.3)) * sum(devices for _, devices in parts)))  # fmt: skip
            wants.append(Want(f"w{i}", tuple(options), gang=True))
    return wants, supplies
