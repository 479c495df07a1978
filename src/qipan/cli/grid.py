"""`qipan grid` makes a grid and joins boards to it; `qipan board` shows the boards and serves one."""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from qipan.cli.options import Api, ApiCert, ApiKey, Json, Login, MetricsAt, finite
from qipan.cli.people import users
from qipan.errors import InvalidInput, NotFound, Unreachable
from qipan.files import text_in

if TYPE_CHECKING:
    from qipan.workload.site import Site

grid = typer.Typer(no_args_is_help=True, help="Connect boards on several hosts to one grid (算力并网).")
board = typer.Typer(help="The tree of boards; serve one.")
grid.add_typer(users, name="user")

StoreDir = Annotated[Optional[Path], typer.Option("--store", help="The folder of the board's store.")]  # noqa: UP045
SiteFile = Annotated[Optional[Path], typer.Option("--site", help="The site file with this board's pools.")]  # noqa: UP045


def folder_of(store: Path | None) -> Path:
    from qipan.client import default_store

    return store or default_store()


def tell(value: dict[str, Any], json_: bool, text: str) -> None:
    print(json.dumps(value, ensure_ascii=False) if json_ else text, flush=True)


@grid.command()
def init(
    name: str = "grid",
    url: Annotated[str, typer.Option(help="Where other hosts reach this board.")] = "grid://127.0.0.1:8443",
    store: StoreDir = None,
    json_: Json = False,
) -> None:
    """Make a new grid with this board at its top."""
    from qipan.channel.opening import address_of
    from qipan.identity import Wallet

    folder = folder_of(store)
    address_of(url)
    if (folder / "identity").exists():
        raise InvalidInput(f"{folder} belongs to a grid already; name another --store")
    folder.mkdir(parents=True, exist_ok=True)
    Wallet.found(folder / "identity", name, time.time)
    (folder / "identity" / "url").write_text(url)
    told = {"board": name, "store": str(folder), "url": url}
    tell(
        told, json_, f"qipan: grid {name} made in {folder}; serve it with: qipan board serve --store {folder}"
    )


@grid.command()
def invite(
    name: Annotated[str, typer.Argument(help="The name that the board will have, such as dc1.")],
    provider: Annotated[str, typer.Option(help="Whose board it is; leave out for your own.")] = "",
    url: Annotated[str, typer.Option(help="Where it reaches this board (default: as at `init`).")] = "",
    may_invite: Annotated[bool, typer.Option("--may-invite", help="It may have boards below it.")] = False,
    standby: Annotated[
        bool,
        typer.Option(
            "--standby", help="A second process for this board itself, on another host (NAME: this board's)."
        ),
    ] = False,
    hours: Annotated[
        float, typer.Option(min=0.001, max=24 * 30, callback=finite, help="How long the token is good.")
    ] = 24.0,
    store: StoreDir = None,
    json_: Json = False,
) -> None:
    """A token with which one board joins below this one, once."""
    from qipan.identity import Wallet

    folder = folder_of(store)
    wallet = Wallet(folder / "identity", time.time)
    at = folder / "identity" / "url"
    url = url or (at.read_text() if at.exists() else "")
    if not url:
        raise InvalidInput("name the address where the new board reaches this one: --url grid://host:8443")
    if standby and name != wallet.place[-1]:
        raise InvalidInput(
            f"a standby has the name of its board: qipan grid invite {wallet.place[-1]} --standby"
        )
    role = "standby" if standby else "board"
    token = wallet.invite(
        name, provider, url, may_invite=may_invite or standby, role=role, life_s=hours * 3600
    )
    tell({"board": name, "place": token.place, "token": token.encode()}, json_, token.encode())


@grid.command(name="join")
def join_(
    token: Annotated[str, typer.Argument(help="What `qipan grid invite` printed, or a file that holds it.")],
    url: Annotated[str, typer.Option(help="Where boards below will reach this one, if it has any.")] = "",
    store: StoreDir = None,
    json_: Json = False,
) -> None:
    """Become the invited board: keys are made here and signed by the inviting board, which must be served."""
    from qipan.grid import join
    from qipan.identity import Token

    file = Path(token)
    text = text_in(file, "no such file") if len(token) < 200 and file.is_file() else token
    folder, read = folder_of(store), Token.decode(text)
    if read.role == "standby" and not url:
        raise InvalidInput("boards below must reach a standby: name its own address, --url grid://HOST:PORT")
    wallet = join(folder, read)
    if url:
        (wallet.folder / "url").write_text(url)
    place = "/".join(wallet.place)
    if read.role == "standby":
        told = {"place": place, "standby_of": wallet.kept.parent, "store": str(folder)}
        words = f"qipan: joined as the standby of {place}; run it with: qipan board standby --store {folder}"
        tell(told, json_, words)
        return
    told = {"place": place, "parent": wallet.kept.parent, "store": str(folder)}
    tell(told, json_, f"qipan: joined as {place}; serve it with: qipan board serve --store {folder}")


@grid.command()
def leave(
    name: Annotated[str, typer.Argument(help='The board that is to leave; "" for this one.')] = "",
    store: StoreDir = None,
    json_: Json = False,
) -> None:
    """Take a board below out of the grid: its certificates are refused from now on."""
    from qipan.identity import Wallet

    folder = folder_of(store)
    wallet = Wallet(folder / "identity", time.time)
    if name:
        wallet.revoke(name)
    else:
        leave_above(folder, wallet)
    tell({"left": name or wallet.place[-1]}, json_, f"qipan: {name or wallet.place[-1]} left the grid")


def leave_above(folder: Path, wallet: Any) -> None:
    """Tell the parent, then forget the identity.  The board must not be served meanwhile."""
    from qipan.channel.network import Network
    from qipan.identity import expects

    if not wallet.kept.parent:
        raise InvalidInput(f"{wallet.place[0]} is the top of its grid; it cannot leave itself")
    network = Network()
    carrier = network.carrier()
    hello = {"board": wallet.place[-1], "spec": json.dumps({"board": wallet.place[-1]}).encode()}
    dialer = network.dial(
        wallet.kept.parent,
        wallet.client_context,
        expects(wallet.place[:-1]),
        lambda: hello,
        carrier,
        lambda *_: None,
    )
    end_s = time.monotonic() + 10
    while not carrier.connected and time.monotonic() < end_s:
        time.sleep(0.05)
    if not carrier.connected:
        raise Unreachable(f"{wallet.kept.parent} does not answer ({dialer.last_refusal or 'no connection'})")
    carrier.ask("leave", None)
    dialer.end()
    network.close()
    (folder / "identity").rename(folder / f"identity-left-{int(time.time())}")


@grid.command()
def members(store: StoreDir = None, json_: Json = False) -> None:
    """The boards that joined below this one, and the tokens not used yet."""
    from qipan.identity import Wallet

    kept = Wallet(folder_of(store) / "identity", time.time).kept
    rows = [
        {
            "board": "/".join(member.place),
            "provider": member.provider,
            "state": "taken out" if member.revoked else "member",
        }
        for member in kept.members
    ]
    rows += [
        {"board": "/".join(invite.place), "provider": invite.provider, "state": "invited"}
        for invite in kept.invites
        if invite.used_s is None and invite.until_s > time.time()
    ]
    if json_:
        print(json.dumps({"members": rows}))
        return
    for row in rows:
        print(f"{row['board']:30} {row['provider'] or '-':16} {row['state']}")


@grid.command()
def difference(store: StoreDir = None, json_: Json = False) -> None:
    """What boards below know and this board's store does not: after a restore from an old backup, or a takeover."""
    from dataclasses import asdict

    import msgspec

    from qipan.difference import decode_told, prices_of, summed
    from qipan.difference import difference as missing
    from qipan.hardware import BoardSpec
    from qipan.identity import Wallet
    from qipan.quantities import format_money
    from qipan.store import StoreFolder

    folder = folder_of(store)
    name = Wallet(folder / "identity", time.time).place[-1]
    answers = sorted((folder / "told").glob("*.msgpack"))
    told, names = [decode_told(path.read_bytes()) for path in answers], [path.stem for path in answers]
    specs = [
        msgspec.json.decode(p.read_bytes(), type=BoardSpec) for p in (folder / "children").glob("*.json")
    ]
    opened = StoreFolder(folder).open(name, writer=False)
    rows = missing(opened, told, prices_of(specs))
    opened.close()
    by_tenant, by_board = summed(rows, "tenant"), summed(rows, "board")
    if json_:
        print(json.dumps({"told_by": names, "missing": [asdict(row) for row in rows],
                          "by_tenant_micro_cny": by_tenant, "by_board_micro_cny": by_board}))  # fmt: skip
        return
    print(f"{name}: told by {', '.join(names) or 'no board below yet'}")
    for row in rows:
        if row.what == "charge":
            print(f"not charged     {row.task_id} attempt {row.attempt} at {row.board}: {row.device_s:.1f} device-seconds, "
                  f"{format_money(row.cost_micro_cny)} of {row.tenant or 'an unknown tenant'}")  # fmt: skip
        else:
            print(
                f"not submitted   {row.task_id} of {row.tenant}: it runs or ran below, people do not see it here"
            )
    for who, sums in (("owed by tenant", by_tenant), ("owed to board", by_board)):
        for key, amount in sorted(sums.items()):
            print(f"{who:15} {key or 'unknown'}: {format_money(amount)}")
    print("nothing is missing" if not rows else "nothing of this was posted; top-ups, tasks that were never placed, members and tokens"
          " since the backup are known to no board below")  # fmt: skip


@grid.command()
def status(store: StoreDir = None, json_: Json = False) -> None:
    """Who leads, who follows, and what this process of the grid knows of the others."""
    from qipan.succession import STATUS

    folder = folder_of(store)
    path = folder / STATUS
    if not path.exists():
        raise NotFound(
            f"{folder} has no status yet: serve it first (`qipan board serve`, `qipan board standby`)"
        )
    told = json.loads(path.read_text())
    pid = folder / "pid"
    told["runs"] = pid.exists() and Path(f"/proc/{pid.read_text().strip()}").exists()
    if json_:
        print(json.dumps(told, ensure_ascii=False))
        return
    print("\n".join(status_lines(told)))


def status_lines(told: dict[str, Any]) -> list[str]:
    runs = "" if told["runs"] else "; its process does not run, this is what it knew last"
    if told["role"] == "standby":
        claims = f", claims reign {told['reign']} ({len(told['granted'])} granted)" if told["reign"] else ""
        link = "follows" if told["connected"] else "has lost"
        return [
            f"standby of {told['board']}: {link} {told['of']}, {told['changes']} changes{claims}{runs}",
            f"boards below: {', '.join(told['voters']) or 'none'}; without their parent: {', '.join(told['without']) or 'none'}",
        ]
    leads = "leads" if told["leads"] else "does NOT lead: too few boards below follow it"
    lines = [f"board {told['board']}: {leads}, reign {told['reign']}{runs}"]
    if parent := told.get("parent"):
        link = "connected" if parent["connected"] else "NOT connected"
        lines.append(
            f"parent  {parent['url']}, {link}, reign {parent['reign']}, standbys: {', '.join(parent['standbys']) or 'none'}"
        )
    if standby := told.get("standby"):
        how = (
            "has all"
            if standby["keeps_up"] and not standby["behind"]
            else f"{standby['behind']} changes behind"
        )
        lines.append(f"standby {standby['url']}, {how if standby['connected'] else 'NOT connected'}")
    lines += [
        f"below   {name}, {'connected' if up else 'NOT connected'}" for name, up in told["children"].items()
    ]
    return lines


@board.callback(invoke_without_command=True)
def show(context: typer.Context, json_: Json = False, store: StoreDir = None) -> None:
    """The tree of boards with its pools."""
    if context.invoked_subcommand is not None:
        return
    from qipan.cli import tables
    from qipan.client import Client

    boards = Client(store).call("GET", "/boards")["boards"]
    if json_:
        print(json.dumps({"boards": boards}, ensure_ascii=False))
    else:
        tables.print_boards(boards)


@board.command()
def serve(
    name: Annotated[str, typer.Option(help="The board's name; must be the one it joined as.")] = "",
    parent: Annotated[str, typer.Option(help="The parent's address (default: as in the token).")] = "",
    listen: Annotated[
        str, typer.Option(help="HOST:PORT for boards below (default: the port of its own address).")
    ] = "",
    site: SiteFile = None,
    store: StoreDir = None,
    database: Annotated[
        str | None, typer.Option(envvar="QIPAN_DATABASE", help="PostgreSQL, else SQLite.")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Measure the pools' chips first.")] = True,
    api: Api = "",
    api_cert: ApiCert = None,
    api_key: ApiKey = None,
    login: Login = None,
    metrics: MetricsAt = "",
    json_: Json = False,
) -> None:
    """Serve one board of a grid until Ctrl-C; its running tasks go on and are found again by the next start."""
    from qipan.cli.run import Running, door_of, on_signals, while_disk_is_full
    from qipan.grid import GridHost
    from qipan.identity import Wallet

    folder, door = folder_of(store), door_of(api, api_cert, api_key, login, metrics)
    if (folder / "standby").exists() and not (folder / "identity").exists():
        raise InvalidInput(f"{folder} is a standby; run it with: qipan board standby --store {folder}")
    wallet = Wallet(folder / "identity", time.time)
    if name and name != wallet.place[-1]:
        raise InvalidInput(f"{folder} is the board {wallet.place[-1]}, not {name}")
    ended = on_signals()

    def served() -> int:
        own = own_site_of(folder, wallet, site, probe, json_)
        return serve_until(ended, Running(own, folder, database, None, GridHost, door), parent, listen, json_)

    raise typer.Exit(while_disk_is_full(folder, ended, served))


@board.command()
def standby(
    of: Annotated[str, typer.Option(help="The address of the board (default: as in the token).")] = "",
    listen: Annotated[str, typer.Option(help="HOST:PORT (default: the port of its own address).")] = "",
    store: StoreDir = None,
    json_: Json = False,
) -> None:
    """Follow a board from another host, and lead in its place when most boards below have lost it."""
    from qipan.cli.run import Running, on_signals, while_disk_is_full
    from qipan.grid import GridHost
    from qipan.identity import Wallet
    from qipan.standby import Standby

    folder, ended = folder_of(store), on_signals()
    if (folder / "identity").exists():
        wallet = Wallet(folder / "identity", time.time)
        site = own_site_of(folder, wallet, None, False, json_)
    else:
        if not (folder / "standby").exists():
            raise InvalidInput(
                f"{folder} is no standby; ask the board for one: qipan grid invite BOARD --standby, then join"
            )
        (folder / "pid").write_text(str(os.getpid()))
        follows = Standby(folder, of)
        port = listen_at(follows, folder / "standby", listen)
        follows.dial()
        told = {
            "event": "following",
            "board": "/".join(follows.wallet.place),
            "store": str(folder),
            "port": port,
        }
        tell(told, json_, f"qipan: standby of {told['board']} follows, from {folder}; port {port}")
        turn = follows.run(ended)
        follows.close()
        if not turn:
            raise typer.Exit(130)
        site = follows.crown()

    def served() -> int:
        return serve_until(ended, Running(site, folder, None, None, GridHost), "", listen, json_)

    raise typer.Exit(while_disk_is_full(folder, ended, served))


def serve_until(ended: threading.Event, running: Any, parent: str, listen: str, json_: bool) -> int:
    host, folder = running.host, running.folder
    port = 0
    if (folder / "identity" / "authority.key").exists():
        port = listen_at(host, folder / "identity", listen)
    host.dial(parent)
    running.start()
    place = "/".join(host.wallet.place)
    api = running.server.url
    told = {
        "event": "serving",
        "board": place,
        "store": str(folder),
        "port": port or None,
        "api": api or None,
    }
    at = f", people reach it at {api}" if api else ""
    below = f", boards below connect to port {port}" if port else ""
    tell(told, json_, f"qipan: board {place} is served from {folder}{below}{at}")
    running.wait(ended)
    running.end(park=False)
    print("qipan: stopped; what runs goes on under its supervisors", file=sys.stderr, flush=True)
    return 130


def listen_at(host: Any, folder: Path, listen: str) -> int:
    """The port; 0 where nobody is listened to.  Raises InvalidInput."""
    from qipan.api.listen import host_and_port
    from qipan.channel.opening import address_of

    at = folder / "url"
    if not listen and not at.exists():
        return 0
    address, port = host_and_port(listen) if listen else ("0.0.0.0", address_of(at.read_text())[1])
    try:
        return int(host.listen(address, port))
    except OSError as error:
        raise InvalidInput(f"cannot listen at {address}:{port} ({error}); give another --listen") from None


def own_site_of(folder: Path, wallet: Any, path: Path | None, probe: bool, quiet: bool) -> "Site":
    """A board that was taken over has the site that it had, unless a file is named."""
    kept = folder / "site.json"
    if path is None and kept.exists():
        import msgspec

        from qipan.workload.site import Site

        return msgspec.json.decode(kept.read_bytes(), type=Site)
    return own_site(wallet.place[-1], path, probe, quiet)


def own_site(name: str, path: Path | None, probe: bool, quiet: bool) -> "Site":
    """The part of a site file that is this board's own: its pools, without the children, which have processes of
    their own.  Without a file: this machine."""
    from dataclasses import replace

    from qipan.cli.app import probed, site_of
    from qipan.hardware import BoardId, PoolId
    from qipan.workload.site import load_site, this_machine

    if path is None and not Path("qipan.yaml").exists():
        machine = this_machine()
        pools = tuple(
            replace(pool, site=BoardId(name), pool_id=PoolId(f"{name}/{pool.chip_class}"))
            for pool in machine.root.pools
        )
        found = replace(machine, root=replace(machine.root, board=BoardId(name), pools=pools))
    else:
        found = load_site(path, pools_needed=False) if path is not None else site_of(None)
        own = next((spec for spec in found.root.walk() if spec.board == name), None)
        if own is None:
            names = ", ".join(spec.board for spec in found.root.walk())
            raise NotFound(f"the site file has no board {name!r}; it has: {names}")
        found = replace(found, root=replace(own, children=()), links=())
    if not probe or not found.root.pools:
        return found
    measured: Site = probed(found, quiet=quiet)
    return measured
