"""`qipan quota`: check a rules file against a site, and say in sentences what its rules do."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qipan.cli.options import Json, SiteFile
from qipan.files import text_in

if TYPE_CHECKING:
    from qipan.quota import QuotaRule
    from qipan.workload.site import Site

app = typer.Typer(no_args_is_help=True, help="Check quota rules against a site, or say what they do.")


@app.command()
def check(rules: Path, site: SiteFile = None, json_: Json = False) -> None:
    """Whether a rules file can be kept at this site: names, hours, and no more promised than there is."""
    from qipan.cli.app import out, site_of

    found = read_rules(rules, site_of(site))
    if json_:
        out({"holds": True, "rules": len(found)})
    else:
        print(f"{rules}: {len(found)} rules hold at this site")


@app.command()
def explain(
    rules: Path,
    site: SiteFile = None,
    tenant: Annotated[str, typer.Option(help="Of this tenant only.")] = "",
    json_: Json = False,
) -> None:
    """What each rule gives, keeps, lends and takes back, in devices of this site."""
    from qipan.cli.app import out, site_of
    from qipan.rules.explain import explain_rules

    here = site_of(site)
    told = [
        entry
        for entry in explain_rules(read_rules(rules, here), devices_of(here))
        if tenant in ("", entry["tenant"])
    ]
    if json_:
        out(told)
        return
    for entry in told:
        print(f"{entry['board']}  {entry['tenant']}: {entry['text']}")
    if not told:
        print(f"no rule is about {tenant}")


def read_rules(path: Path, site: "Site") -> "tuple[QuotaRule, ...]":
    """Parsed and held against the site.  Raises NotFound, InvalidInput."""
    from qipan.rules import check_rules, parse_rules

    text = text_in(path, "no such rules file; it begins with `quota:`, see docs/quota.md")
    rules = parse_rules(text, str(path))
    check_rules(rules, devices_of(site), tuple(one.name for one in site.tenants), str(path))
    return rules


def rules_named(flag: Path | None) -> Path | None:
    """Flag, then QIPAN_RULES."""
    return flag or (Path(os.environ["QIPAN_RULES"]) if "QIPAN_RULES" in os.environ else None)


def devices_of(site: "Site") -> Mapping[str, Mapping[str, int]]:
    """Board -> chip class -> devices at and below it."""
    found: dict[str, dict[str, int]] = {}
    for board in site.root.walk():
        stock: dict[str, int] = {}
        for below in board.walk():
            for pool in below.pools:
                stock[pool.chip_class] = stock.get(pool.chip_class, 0) + pool.devices
        found[board.board] = stock
    return found
