"""A site file: the tree of boards with pools, links, storage and tariffs, under the key `site:` of `qipan.yaml`."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qipan.errors import InvalidInput
from qipan.files import text_in
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId, Storage
from qipan.network import Link, link_between
from qipan.quantities import parse_bytes, parse_bytes_per_s, parse_duration_s, parse_money_micro_cny
from qipan.workload.reader import Value, read_yaml

LEVELS_MAX = 8
ENGINES = ("local", "simulated", "slurm", "ray", "kubernetes")


@dataclass(frozen=True, slots=True)
class Tenant:
    name: str
    balance_micro_cny: int


@dataclass(frozen=True, slots=True)
class Site:
    """`tariff_version` names the posted prices; `lease_s` is how long a lease lasts without renewal; `address` is where tasks
    on other hosts reach this one, for the rounds of tasks over several sites."""

    root: BoardSpec
    links: tuple[Link, ...] = ()
    tenants: tuple[Tenant, ...] = ()
    tariff_version: str = "1"
    lease_s: float = 60.0
    address: str = "127.0.0.1"
    storages: tuple[Storage, ...] = ()  # of the whole tree, where other sites can reach them
    ways: tuple[Link, ...] = ()  # between the sites of any two of them

    def pools(self) -> list[Pool]:
        return [pool for board in self.root.walk() for pool in board.pools]


def load_site(path: str | Path, *, pools_needed: bool = True) -> Site:
    """Read and check a site file.  Raises NotFound, InvalidInput."""
    path = Path(path)
    text = text_in(
        path, "no such site file; name one with --site, or leave --site out for this machine alone"
    )
    top = read_yaml(text, str(path)).fields(("site",))
    if "site" not in top:
        raise InvalidInput("has no `site:`", str(path))
    return parse_site(top["site"], pools_needed=pools_needed)


def this_machine(cores: int | None = None) -> Site:
    """Without a site file: this machine as one data centre, a device per core but one."""
    count = max(1, (cores or os.cpu_count() or 1) - 1)
    pool = Pool(
        PoolId("here/cpu"), BoardId("here"), ChipClassId("cpu/core"), count, count, 100_000, cpu_share=0.9
    )
    return Site(BoardSpec(BoardId("here"), pools=(pool,)), tenants=(Tenant("me", 1_000_000_000),))


def parse_site(value: Value, *, pools_needed: bool = True) -> Site:
    fields = value.fields(("board", "links", "tenants", "tariff_version", "lease", "address"))
    if "board" not in fields:
        raise value.error("needs `board`, the top of the tree")
    root = _board(fields["board"], "", 1)
    names = [board.board for board in root.walk()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise fields["board"].error(f"board {twice[0]!r} stands twice; names are unique in a tree")
    site = Site(
        root,
        tuple(link for item in fields["links"].items() for link in _links(item, names))
        if "links" in fields
        else (),
        tuple(_tenant(item) for item in fields["tenants"].items()) if "tenants" in fields else (),
        fields["tariff_version"].text() if "tariff_version" in fields else "1",
        fields["lease"].parsed(parse_duration_s) if "lease" in fields else 60.0,
        fields["address"].text() if "address" in fields else "127.0.0.1",
    )
    site = replace(
        site, storages=tuple(store for board in root.walk() for store in board.stores if store.url)
    )
    site = replace(site, ways=tuple(_ways(site)))
    tenants = [tenant.name for tenant in site.tenants]
    if len(set(tenants)) < len(tenants):
        raise fields["tenants"].error(f"a tenant stands twice among {', '.join(tenants)}; keep one of each")
    if site.lease_s <= 0:
        raise fields["lease"].error("must be longer than nothing, such as 60s")
    if pools_needed and not site.pools():
        raise fields["board"].error("has no pool anywhere; give at least one board `pools`")
    return site


def _ways(site: Site) -> Iterator[Link]:
    down = site.root.ways()
    for source in site.storages:
        for target in site.storages:
            link = link_between(site.links, down[source.site], down[target.site])
            if link is not None and source.site != target.site:
                yield replace(link, source=source.site, target=target.site)


def _board(value: Value, region: str, level: int) -> BoardSpec:
    fields = value.fields(
        (
            "name",
            "children",
            "pools",
            "storage",
            "engine",
            "engine_options",
            "region",
            "longitude",
            "latitude",
        )
    )
    if "name" not in fields:
        raise value.error("needs `name`")
    if level > LEVELS_MAX:
        raise value.error(f"is deeper than {LEVELS_MAX} levels")
    name = BoardId(fields["name"].text())
    region = fields["region"].text() if "region" in fields else region
    children = fields["children"].items() if "children" in fields else []
    engine = fields["engine"].choice(ENGINES) if "engine" in fields else "local"
    return BoardSpec(
        name,
        tuple(
            _board(child, region or (_own_name(child) if level == 1 else ""), level + 1) for child in children
        ),
        tuple(_pool(item, name) for item in fields["pools"].items()) if "pools" in fields else (),
        tuple(_storage(item, name) for item in fields["storage"].items()) if "storage" in fields else (),
        engine,
        {key: item.text() for key, item in fields["engine_options"].mapping().items()}
        if "engine_options" in fields
        else {},
        region=region,
        longitude=_degrees(fields.get("longitude")),
        latitude=_degrees(fields.get("latitude")),
    )


CHILD_KEYS = (
    "name",
    "children",
    "pools",
    "storage",
    "engine",
    "engine_options",
    "region",
    "longitude",
    "latitude",
)


def _own_name(value: Value) -> str:
    fields = value.fields(CHILD_KEYS)
    if "name" not in fields:
        raise value.error("needs `name`")
    return fields["name"].text()


def _number(value: Value) -> float:
    text = value.text()
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", text):
        raise value.error(f"{text[:40]!r} is not a number of zero or more, such as 0.3")
    return float(text)


def _degrees(value: Value | None) -> float | None:
    if value is None:
        return None
    try:
        degrees = float(value.text())
    except ValueError:
        raise value.error(f"{value.text()!r} is no number of degrees") from None
    if not -180 <= degrees <= 180:
        raise value.error(f"{degrees} is no number of degrees")
    return degrees


def _pool(value: Value, board: BoardId) -> Pool:
    fields = value.fields(
        (
            "chip",
            "devices",
            "per_node",
            "tariff",
            "core_share",
            "failures_per_node_day",
            "resource",
            "per_block",
        )
    )
    for needed in ("chip", "devices", "tariff"):
        if needed not in fields:
            raise value.error(f"needs `{needed}`")
    chip = ChipClassId(fields["chip"].text())
    if chip.count("/") != 1:
        raise fields["chip"].error(f"{chip!r} is no chip class; write vendor/model")
    devices = fields["devices"].whole(1, 10_000_000)
    share = _number(fields["core_share"]) if "core_share" in fields else 0.0
    if not 0 <= share <= 1:
        raise fields["core_share"].error(f"{share} is no share of a core; give more than 0, at most 1")
    per_node = fields["per_node"].whole(1, 10_000) if "per_node" in fields else devices
    per_block = fields["per_block"].whole(1, 10_000_000) if "per_block" in fields else 0
    if per_block % per_node:
        raise fields["per_block"].error(f"{per_block} is no whole number of nodes of {per_node}")
    return Pool(
        PoolId(f"{board}/{chip}"),
        board,
        chip,
        devices,
        per_node,
        fields["tariff"].parsed(parse_money_micro_cny),
        cpu_share=share,
        failures_per_node_day=_number(fields["failures_per_node_day"])
        if "failures_per_node_day" in fields
        else 0.0,
        resource=fields["resource"].text() if "resource" in fields else "",
        devices_per_block=per_block,
    )


def _storage(value: Value, board: BoardId) -> Storage:
    fields = value.fields(
        ("id", "capacity", "read", "write", "price_per_gib_month", "url", "options", "keep")
    )
    return Storage(
        fields["id"].text() if "id" in fields else f"{board}/storage",
        board,
        fields["capacity"].parsed(parse_bytes) if "capacity" in fields else 0,
        fields["read"].parsed(parse_bytes_per_s) if "read" in fields else 0.0,
        fields["write"].parsed(parse_bytes_per_s) if "write" in fields else 0.0,
        fields["price_per_gib_month"].parsed(parse_money_micro_cny) if "price_per_gib_month" in fields else 0,
        url=fields["url"].text() if "url" in fields else "",
        options={key: item.text() for key, item in fields["options"].mapping().items()}
        if "options" in fields
        else {},
        keep_s=fields["keep"].parsed(parse_duration_s) if "keep" in fields else 30 * 86_400.0,
    )


def _links(value: Value, names: list[BoardId]) -> list[Link]:
    """One entry is a link in both directions."""
    fields = value.fields(("between", "rate", "latency", "egress_per_gib", "share"))
    ends = [BoardId(item.text()) for item in fields["between"].items()] if "between" in fields else []
    if len(ends) != 2 or any(end not in names for end in ends):
        raise value.error(f"`between` names two boards of the tree, found {ends}")
    rate = fields["rate"].parsed(parse_bytes_per_s) if "rate" in fields else 125e6
    latency_s = fields["latency"].parsed(parse_duration_s) if "latency" in fields else 0.0
    price = fields["egress_per_gib"].parsed(parse_money_micro_cny) if "egress_per_gib" in fields else 0
    if rate <= 0:
        raise fields["rate"].error("must be above zero")
    share = _number(fields["share"]) if "share" in fields else 1.0
    if not 0 < share <= 1:
        raise fields["share"].error(f"{share} is no share of a link; give more than 0, at most 1")
    ways = ((ends[0], ends[1]), (ends[1], ends[0]))
    return [Link(source, target, rate, latency_s, price, share) for source, target in ways]


def _tenant(value: Value) -> Tenant:
    fields = value.fields(("name", "balance"))
    if "name" not in fields or "balance" not in fields:
        raise value.error("needs `name` and `balance`")
    return Tenant(fields["name"].text(), fields["balance"].parsed(parse_money_micro_cny))
