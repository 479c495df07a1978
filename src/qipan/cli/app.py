"""`qipan`: the commands, each a few lines over the client or the host."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from qipan.cli.balance import balance
from qipan.cli.check import check
from qipan.cli.chips import app as chips
from qipan.cli.forecasts import forecast
from qipan.cli.grid import board, grid
from qipan.cli.ledger import app as ledger
from qipan.cli.market import app as market
from qipan.cli.options import Api, ApiCert, ApiKey, Login, MetricsAt, SiteFile, StoreDir, finite
from qipan.cli.people import login as log_in
from qipan.cli.people import logout, whoami
from qipan.cli.quota import app as quota
from qipan.cli.quota import read_rules, rules_named
from qipan.cli.storage import app as storage
from qipan.cli.store import backup, restore
from qipan.cli.trace import trace
from qipan.cli.webhook import app as webhook
from qipan.errors import InvalidInput, NotFound, QipanError

if TYPE_CHECKING:
    from qipan.planner import Option, Plan

#: what other tools call it -> what it is here
ELSEWHERE = {
    "launch": "submit", "run": "submit", "sbatch": "submit", "apply": "submit", "create": "submit",
    "status": "ps", "queue": "ps", "squeue": "ps", "jobs": "ps", "list": "ps", "get": "ps", "describe": "why",
    "stop": "cancel", "down": "cancel", "scancel": "cancel", "delete": "cancel", "ssh": "exec", "cost-report": "bill",
    "start": "up", "serve": "up", "dashboard": "console",
}  # fmt: skip


class Commands(TyperGroup):
    """Who comes from another tool is told the word for it here."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in ELSEWHERE:
            ctx.fail(f"No such command {args[0]!r}; here it is: qipan {ELSEWHERE[args[0]]}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="棋盘 Qipan: many data centres full of unlike AI chips, as one supply.",
)  # fmt: skip

app.add_typer(market, name="market")
app.add_typer(quota, name="quota")
app.add_typer(ledger, name="ledger")
app.add_typer(storage, name="storage")
app.add_typer(webhook, name="webhook")
app.add_typer(chips, name="chips")
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})(check)
app.add_typer(board, name="board")
app.add_typer(grid, name="grid")
app.command()(backup)
app.command()(balance)
app.command()(restore)
app.command(name="login")(log_in)
app.command()(logout)
app.command()(whoami)
app.command()(trace)
app.command()(forecast)

Json = Annotated[bool, typer.Option("--json", help="One JSON document (a line per event where it streams).")]
OVER = ("done", "failed", "cancelled")


def store_of(store: Path | None) -> Path:
    """Flag, then QIPAN_STORE, then the user's state folder."""
    from qipan.client import default_store

    return store or default_store()


def site_of(path: Path | None) -> Any:
    """Flag, then QIPAN_SITE, then qipan.yaml here, else this machine as one data centre."""
    from qipan.workload.site import load_site, this_machine

    named = path or (Path(os.environ["QIPAN_SITE"]) if "QIPAN_SITE" in os.environ else None)
    if named is not None:
        return load_site(named)
    return load_site("qipan.yaml") if Path("qipan.yaml").exists() else this_machine()


def probed(site: Any, quiet: bool = False) -> Any:
    """The site with its local pools measured; results are kept in the user's cache."""
    from dataclasses import replace

    import platformdirs

    from qipan.engines.probing import probe_tree

    say = (
        (lambda _text: None) if quiet else (lambda text: print(f"qipan: {text}", file=sys.stderr, flush=True))
    )
    cache = Path(platformdirs.user_cache_path("qipan")) / "probes.json"
    return replace(site, root=probe_tree(site.root, cache, time.time(), say))


def client(store: Path | None) -> Any:
    from qipan.client import Client

    return Client(store)


def out(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=None, separators=(", ", ": ")), flush=True)


def tell(value: Any, json_: bool, show: Callable[[Any], None]) -> None:
    """JSON for programs, tables for people."""
    if json_:
        out(value)
    else:
        show(value)


@app.command()
def plan(
    task: Path, json_: Json = False, site: SiteFile = None, store: StoreDir = None,
    explain: Annotated[str, typer.Option(help="the number of an option: where each second of its step goes")] = "",
    render: Annotated[str, typer.Option(help="the strategy as arguments of qipan, megatron, mindspeed, torchtitan, deepspeed, accelerate")] = "",
) -> None:  # fmt: skip
    """How a task could run: options, cost, finish, refusals.  Needs no server."""
    import msgspec

    from qipan.cli import tables
    from qipan.planning import plan_on
    from qipan.workload.files import read_file

    checked, directives = read_file(task)
    here = site_of(site)
    scripts = bool(checked.run) or (bool(checked.stages) and all(stage.run for stage in checked.stages))
    made = plan_on(here if scripts else probed(here), checked)
    if render:
        print_rendered(checked, made, render, explain)
    elif explain:
        option = option_of(made, explain)
        tell(msgspec.to_builtins(option), json_, lambda _: tables.print_option(option))
    elif json_:
        out(msgspec.to_builtins(made))
    else:
        tables.print_directives(directives)
        tables.print_plan(made)
    if not made.options:
        raise typer.Exit(104)


def print_rendered(task: Any, made: "Plan", target: str, wanted: str) -> None:
    """The strategy of an option (the chosen one, when none is named) in a trainer's words."""
    from qipan.planner.render import render

    option = option_of(made, wanted or made.chosen or "1")
    point = made.curve.point(option.point_id) if made.curve else None
    if point is None or point.strategy is None or task.model is None:
        raise InvalidInput(
            f"{option.option_id} has no strategy to render: a script without a model plans its own"
        )
    print(render(target, task.model, point.strategy))


def option_of(made: "Plan", wanted: str) -> "Option":
    """By its number in the table, from 1, or by its id.  Raises NotFound."""
    for number, option in enumerate(made.options, 1):
        if wanted in (str(number), option.option_id):
            return option
    raise NotFound(
        f"no option {wanted[:60]!r}: the plan has {len(made.options)}; give 1 to {len(made.options)}, or an option_id of --json"
        if made.options
        else "the plan has no option to explain; `qipan plan` without --explain says why"
    )


@app.command()
def submit(task: Path, json_: Json = False, store: StoreDir = None, key: str = "") -> None:
    """Hand a task to the board; it is durable when this returns."""
    from qipan.cli import tables
    from qipan.client import Task

    checked = Task.from_yaml(task)  # the same check as the server's, so that the error needs no server
    tell(
        client(store).submit(checked, key or None).answer,
        json_,
        lambda answer: tables.print_submitted(answer, store),
    )


@app.command(name="import")
def import_(job: Path, json_: Json = False) -> None:
    """What would become of each directive of another tool's job file (Slurm, Kubernetes, Ray, SkyPilot, ...)."""
    import msgspec

    from qipan.cli import tables
    from qipan.workload.files import read_file

    checked, directives = read_file(job)
    if json_:
        out({"task": msgspec.to_builtins(checked), "directives": msgspec.to_builtins(directives)})
    else:
        tables.print_directives(directives)
        print(f"  a {checked.kind} task {checked.name!r}; submit it with: qipan submit {job}")


@app.command()
def ps(json_: Json = False, store: StoreDir = None) -> None:
    """All tasks of the board."""
    from qipan.cli import tables

    tasks = list(client(store).list("/tasks", "tasks"))
    if json_:
        out({"tasks": tasks})
    else:
        tables.print_tasks(tasks)


@app.command()
def why(task: str, json_: Json = False, store: StoreDir = None) -> None:
    """Every decision about a task, and what it waits for."""
    from qipan.cli import tables

    answer = client(store).call("GET", f"/tasks/{task}/why")
    tell(answer, json_, tables.print_why)


@app.command()
def logs(
    task: str,
    follow: Annotated[bool, typer.Option("--follow", "-f")] = False,
    json_: Json = False,
    store: StoreDir = None,
) -> None:
    """What a task printed.  Ctrl-C detaches and never cancels."""
    board, after = client(store), 0
    try:
        while True:
            over = not follow or board.task(task)["state"] in OVER
            for page in board.printed(task, after):
                after = page["next"]
                if json_:
                    out({"text": page["text"]})
                else:
                    print(page["text"], end="", flush=True)
            if over:
                return
            time.sleep(0.5)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command(name="exec")
def exec_(
    task: str,
    command: Annotated[list[str], typer.Argument(help="The command and its words, after `--`.")],
    timeout: Annotated[
        float, typer.Option(min=0.1, callback=finite, help="It is ended after so many seconds.")
    ] = 600.0,
    json_: Json = False,
    store: StoreDir = None,
) -> None:
    """Run a command beside a running task, wherever that runs; exits as the command does.  Ctrl-C ends it."""
    board = client(store)
    path = f"/tasks/{task}/exec"
    at, after = board.call("POST", path, {"command": command, "limit_s": timeout})["exec_id"], 0
    try:
        while True:
            piece = board.call("GET", f"{path}/{at}", after=after)
            after = piece["next"]
            if json_:
                out(piece)
            elif piece["text"]:
                print(piece["text"], end="", flush=True)
            if piece["over"]:
                break
            if not piece["text"]:
                time.sleep(0.2)
    except KeyboardInterrupt:
        board.call("DELETE", f"{path}/{at}")
        raise typer.Exit(130) from None
    if piece["code"] is None:
        why = {
            "limit": f"it ran for {timeout:g} s",
            "attempt": "the task's attempt ended",
            "machine": "its supervisor is gone",
        }
        print(f"qipan: the command was ended: {why.get(piece['ended_by'], 'somebody ended it')}", file=sys.stderr)  # fmt: skip
        raise typer.Exit(101)
    raise typer.Exit(piece["code"] if piece["code"] >= 0 else 128 - piece["code"])


@app.command()
def events(
    task: str,
    follow: Annotated[bool, typer.Option("--follow", "-f")] = False,
    json_: Json = False,
    store: StoreDir = None,
) -> None:
    """The facts about a task, one line each."""
    board, after = client(store), 0
    try:
        while True:
            over = not follow or board.task(task)["state"] in OVER
            for event in board.list(f"/tasks/{task}/events", "events", after=after):
                after = event["fact_id"]
                if json_:
                    out(event)
                else:
                    stamp = time.strftime("%H:%M:%S", time.localtime(event["at_s"]))
                    print(
                        f"{stamp} {event['kind']:16} {event['fact'].get('detail') or event['fact'].get('why') or event['fact'].get('point_id') or ''}",
                        flush=True,
                    )
            if over:
                return
            time.sleep(0.5)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def wait(
    task: str,
    json_: Json = False,
    store: StoreDir = None,
    timeout: Annotated[float, typer.Option(min=0, callback=finite, help="Seconds; 0: without end.")] = 0.0,
    pass_exit_code: Annotated[
        bool, typer.Option("--pass-exit-code", help="Of a failed task: exit as its last attempt did.")
    ] = False,
) -> None:
    """Until a task is over: exit 0 done, 100 failed, 103 cancelled, 101 not finished in --timeout seconds."""
    board, began_s = client(store), time.monotonic()
    try:
        while (view := board.task(task))["state"] not in OVER:
            if timeout and time.monotonic() - began_s > timeout:
                break
            time.sleep(0.3)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if json_:
        out(view)
    else:
        print(f"{task}: {view['state']}")
    if pass_exit_code and view["state"] == "failed":
        events = board.list(f"/tasks/{task}/events", "events")
        codes = [event["fact"]["exit_code"] for event in events if event["kind"] == "task_exited"]
        if codes and codes[-1]:
            raise typer.Exit(codes[-1] if codes[-1] > 0 else 128 - codes[-1])
    raise typer.Exit({"done": 0, "failed": 100, "cancelled": 103}.get(view["state"], 101))


@app.command()
def cancel(task: str, json_: Json = False, store: StoreDir = None) -> None:
    """Stop a task for good."""
    answer = client(store).call("POST", f"/tasks/{task}/cancel")
    if json_:
        out(answer)
    else:
        print(f"{task}: cancelling")


@app.command()
def budget(task: str, amount: str, json_: Json = False, store: StoreDir = None) -> None:
    """Raise a task's limits.max_cost, such as to "12 CNY"; one that was parked for it goes on."""
    from qipan.quantities import format_money

    board = client(store)
    answer = board.call("POST", f"/tasks/{task}/budget", max_cost=amount)
    tell(
        answer, json_, lambda value: print(f"{task}: its budget is {format_money(value['budget_micro_cny'])}")
    )


@app.command()
def wake(task: str, json_: Json = False, store: StoreDir = None) -> None:
    """Take up a task again whose lease is lent, or is about to be, because its devices stood idle."""
    answer = client(store).call("POST", f"/tasks/{task}/wake")
    tell(
        answer, json_, lambda value: print(f"{task}: {value['state']}; it has its devices within the notice")
    )


@app.command()
def bill(task: str, json_: Json = False, store: StoreDir = None) -> None:
    """What a task has cost: a line per attempt, the ledger's own sum, and why it is not what the plan said."""
    from qipan.cli import tables

    board = client(store)
    answer = board.call("GET", f"/tasks/{task}/bill")
    explained = board.call("GET", f"/tasks/{task}/bill/explained")
    if json_:
        out({**answer, "planned": explained["planned"], "differences": explained["differences"]})
    else:
        tables.print_receipt(answer["receipt"], answer["charged_micro_cny"])
        tables.print_explained(explained)


@app.command()
def up(
    store: StoreDir = None,
    site: SiteFile = None,
    json_: Json = False,
    console: Annotated[
        bool, typer.Option("--console/--no-console", help="A console beside it, in its own process.")
    ] = True,
    database: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            envvar="QIPAN_DATABASE",
            help="postgresql://USER@HOST:PORT/NAME for a new store; else SQLite files.",
        ),
    ] = None,
    keep: Annotated[str, typer.Option(help="Forget ticks and progress older than this, such as 90d.")] = "",
    rules: Annotated[Path | None, typer.Option(help="Quota rules of its boards (else QIPAN_RULES).")] = None,
    api: Api = "",
    api_cert: ApiCert = None,
    api_key: ApiKey = None,
    login: Login = None,
    metrics: MetricsAt = "",
) -> None:
    """Run all boards of a site in this process until Ctrl-C, which parks the tasks with a checkpoint."""
    from qipan.cli.run import door_of, run_up
    from qipan.quantities import parse_duration_s

    keep_s, door = parse_duration_s(keep) if keep else None, door_of(api, api_cert, api_key, login, metrics)
    named = rules_named(rules)
    quota_rules = read_rules(named, site_of(site)) if named is not None else None
    here = probed(site_of(site), quiet=json_)
    raise typer.Exit(run_up(here, store_of(store), json_, console, database, keep_s, quota_rules, door))


@app.command()
def console(
    store: StoreDir = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8421,
    json_: Json = False,
    with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """The board, tasks, prices and money as pages for a browser on this machine; open the printed address."""
    from qipan.console import run_console

    def say(url: str) -> None:
        if json_:
            out({"event": "console", "url": url})
        else:
            print(url if with_parent else f"qipan: console: {url}", flush=True)

    run_console(store_of(store), port, say, with_parent=with_parent)


@app.command()
def mcp(
    store: StoreDir = None,
    write: Annotated[
        bool,
        typer.Option("--write", help="Also tools that submit and cancel; each is a dry run unless told."),
    ] = False,
    tenant_token: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--token", envvar="QIPAN_TOKEN", help="A tenant's, instead of the operator's."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", hidden=True)] = False,
) -> None:
    """The boards as tools for assistants (Model Context Protocol on standard input and output)."""
    from qipan.client import Client
    from qipan.mcp_server import run_mcp

    run_mcp(Client(store_of(store), tenant_token), write=write)


@app.command()
def token(tenant: str, json_: Json = False, store: StoreDir = None) -> None:
    """A token with which the API shows and takes one tenant's tasks and money only."""
    from qipan.api import tenant_token

    path = store_of(store) / "token"
    operators = path.read_text().strip() if path.exists() else ""
    if not operators:
        raise NotFound(f"{path} is not there or empty; `qipan up --store {store_of(store)}` makes it")
    made = tenant_token(operators, tenant)
    tell({"tenant": tenant, "token": made}, json_, lambda value: print(value["token"]))


@app.command()
def demo(store: StoreDir = None, site: SiteFile = None, json_: Json = False) -> None:
    """The main job, live: train, shrink, lose a worker, grow, finish, and a receipt that adds up."""
    from qipan.cli.demo import run_demo

    raise typer.Exit(run_demo(site_of(site), store, json_))


@app.command()
def twin(
    scenario: Annotated[Optional[Path], typer.Argument()] = None,  # noqa: UP045
    verify: Annotated[
        Path | None, typer.Option("--verify", help="Replay a store and compare every command.")
    ] = None,
    seed: int = 0,
    json_: Json = False,
    what_if: Annotated[
        Path | None,
        typer.Option("--from-store", "--what-if", help="Play a store's causes again under another --policy."),
    ] = None,
    policy: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What the boards maximise: revenue, jct, fair, deadline, fifo, gavel, sia, kueue."),
    ] = None,
    out_: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Write report.json, tasks.csv and a page of pictures there; the snapshot, with --snapshot-at.",
        ),
    ] = None,
    snapshot_at: Annotated[
        str | None,
        typer.Option("--snapshot-at", help="Write the scenario as it is at that time, as 6h, to --out FILE."),
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Start from a snapshot of this scenario, perhaps with other faults from then on."
        ),
    ] = None,
    why_: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--why", help="A task of the scenario: why it is where it is, at the time --at."),
    ] = None,
    at: Annotated[
        str | None, typer.Option(help="For --why: time since the start, as 6h; the end without.")
    ] = None,
    hold_peaks: Annotated[
        bool,
        typer.Option(
            "--hold-peaks", help="Services lend nothing: each holds what its forecast asks for at most."
        ),
    ] = False,
) -> None:
    """Run a scenario on simulated engines, replay a store, or ask it what if."""
    from qipan.cli import tables

    if what_if is not None:
        from qipan.cli.store import ask_what_if

        tell(ask_what_if(what_if, policy or "rigid"), json_, tables.print_what_if)
        return

    if verify is not None:
        from qipan.boards import verify_store

        counts = verify_store(verify)
        if json_:
            out({"verified_ticks": counts})
        else:
            print(
                f"verified: {sum(counts.values())} ticks of {len(counts)} boards gave the same commands, byte for byte"
            )
        return
    if scenario is None:
        raise InvalidInput("name a scenario such as examples/day.yaml, or --verify STORE")
    from qipan.quantities import parse_duration_s
    from qipan.twin.scenario import run_scenario, why_in_scenario

    if why_ is not None:
        if start_from is not None or snapshot_at is not None:
            raise InvalidInput(
                "--why tells of a scenario from its beginning; leave --from and --snapshot-at out"
            )
        at_s = parse_duration_s(at) if at is not None else None
        tell(why_in_scenario(scenario, seed, policy, why_, at_s), json_, tables.print_why)
        return
    if snapshot_at is not None:
        if out_ is None:
            raise InvalidInput("where shall the snapshot go? add --out FILE")
        if out_.is_dir() or not out_.parent.is_dir():
            raise InvalidInput(f"--out {out_}: a snapshot is one file, in a folder that is there")
        at_s, written = parse_duration_s(snapshot_at), out_
        report = run_scenario(
            scenario, seed, policy, start_from=start_from, snapshot_at_s=at_s, snapshot=written,
            lends=not hold_peaks,
        )  # fmt: skip
        report["files"], out_ = [str(written)], None
    else:
        report = run_scenario(scenario, seed, policy, start_from=start_from, lends=not hold_peaks)
    if out_ is not None:
        from qipan.twin.picture import write_files

        report["files"] = [str(path) for path in write_files(report, out_)]
    tell(report, json_, tables.print_twin)


__all__ = ["NotFound", "QipanError", "app"]
