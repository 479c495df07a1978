"""`qipan backup` and `qipan restore`."""

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]
StoreDir = Annotated[Optional[Path], typer.Option("--store", help="The folder of the boards' stores.")]  # noqa: UP045


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
