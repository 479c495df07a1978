"""What is done with a whole store: `qipan backup`, `qipan restore`, `qipan twin --what-if`."""

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qipan.cli.options import Json, StoreDir


def backup(file: Path, json_: Json = False, store: StoreDir = None) -> None:
    """Write a store whole into one file, while its boards run: FILE.tar, or FILE.tar.gz."""
    from qipan.client import default_store
    from qipan.store.backup import back_up

    _tell(back_up(store or default_store(), file), f"backed up into {file}", json_)


def restore(
    file: Path,
    json_: Json = False,
    store: StoreDir = None,
    database: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="postgresql://USER@HOST:PORT/NAME to keep the boards' stores there."),
    ] = None,
) -> None:
    """Make a store from a backup in a new folder; `qipan up --store DIR` then goes on from there."""
    from qipan.client import default_store
    from qipan.store.backup import restore_into

    folder = store or default_store()
    _tell(
        restore_into(file, folder, database),
        f"restored into {folder}; go on with: qipan up --store {folder}",
        json_,
    )


def _tell(made: dict[str, Any], text: str, json_: bool) -> None:
    if json_:
        print(json.dumps(made))
        return
    boards = ", ".join(f"{name} ({board['ticks']} ticks)" for name, board in made["boards"].items())
    print(f"qipan: {text}; boards {boards}; {made['files']} files, {made['bytes'] / 1e6:.1f} MB")


def ask_what_if(folder: Path, policy: str) -> Any:
    """Raises NotFound, InvalidInput."""
    import msgspec

    from qipan.errors import NotFound
    from qipan.hardware import BoardSpec
    from qipan.scheduler import Settings
    from qipan.store import StoreFolder
    from qipan.twin.fitted import fitted
    from qipan.twin.whatif import what_if

    found = StoreFolder(folder)
    stores = [found.open(board, writer=False) for board in found.boards()]
    try:
        for store in stores:
            site = store.get("site")
            if site is not None:  # the topmost board's store holds it
                spec = msgspec.json.decode(site, type=BoardSpec)
                told = msgspec.json.decode(store.get("settings") or "{}")
                settings = msgspec.convert(told.get("settings", {}), type=Settings)
                return msgspec.to_builtins(what_if(store, spec, settings, policy, fitted(stores)))
    finally:
        for store in stores:
            store.close()
    raise NotFound(f"{folder} holds no site yet; run `qipan up --store {folder}` once with this release")
