"""`qipan webhook`: addresses to which facts about tasks are sent, signed."""

from typing import Annotated, Any

import typer

from qipan.cli.options import Json, StoreDir

app = typer.Typer(no_args_is_help=True, help="Addresses to which facts about tasks are sent, signed.")


@app.command()
def add(
    url: str,
    kinds: Annotated[str, typer.Option(help="kinds of facts, by comma (default: submitted, started, exited, budget)")] = "",
    allow_private: Annotated[bool, typer.Option("--allow-private", help="it may lead inside this network")] = False,
    json_: Json = False, store: StoreDir = None,
) -> None:  # fmt: skip
    """Send facts there from now on; prints the secret once (the form is Standard Webhooks)."""
    from qipan.cli.app import client, tell

    made = client(store).call("POST", "/webhooks", None, url=url, kinds=kinds, allow_private=allow_private)
    tell(made, json_, lambda one: print(f"{one['webhook']['hook_id']}: {', '.join(one['webhook']['kinds'])}\n  secret, shown this once: {one['secret']}"))  # fmt: skip


@app.command("list")
def list_(json_: Json = False, store: StoreDir = None) -> None:
    """Where facts are sent, and what came of it."""
    from qipan.cli.app import client, tell

    tell(client(store).call("GET", "/webhooks")["webhooks"], json_, _show)


@app.command()
def remove(hook_id: str, json_: Json = False, store: StoreDir = None) -> None:
    """Send nothing there any more."""
    from qipan.cli.app import client, tell

    tell(
        client(store).call("DELETE", f"/webhooks/{hook_id}"),
        json_,
        lambda one: print(f"{one['hook_id']} is removed"),
    )


def _show(found: Any) -> None:
    from qipan.cli.tables import table

    rows = [
        [one["hook_id"], one["tenant"] or "the operator", one["url"], ", ".join(one["kinds"]),
         f"off: {one['off']}" if one["off"] else f"tries again: {one['error']}" if one["error"] else "well"]
        for one in found
    ]  # fmt: skip
    table("通知 webhooks", ["id", "of", "url", "facts", "state"], rows)
