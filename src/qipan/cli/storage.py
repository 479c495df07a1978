"""`qipan storage`: keep a folder in a content-addressed storage, bring it from one, serve one to other sites."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from qipan.cli.options import Json, StoreDir
from qipan.errors import InvalidInput, NotFound, QipanError
from qipan.files import text_in

if TYPE_CHECKING:
    from qipan.transfer import ContentStorage

app = typer.Typer(
    no_args_is_help=True,
    help="Content-addressed storages: keep folders, copy them between sites, serve them.",
)
Options = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--option", help="KEY=VALUE, as under storage.options of a site file; may be given often."),
]


@app.command()
def put(folder: Path, url: str, name: str, option: Options = None, json_: Json = False) -> None:
    """Keep what FOLDER holds as NAME in the storage at URL; what is there already is not written again."""
    import time

    from qipan.cli.app import out
    from qipan.quantities import format_bytes

    if not folder.is_dir():
        raise NotFound(f"{folder} is no folder; name one that holds what is to be kept")
    made = _opened(url, option).publish(folder, name, now_s=time.time())
    if json_:
        out({"name": name, "bytes": made.manifest.size_bytes, "new_bytes": made.new_bytes})
    else:
        whole, new = format_bytes(made.manifest.size_bytes), format_bytes(made.new_bytes)
        print(f"{name}: {whole} in {len(made.manifest.files)} files, {new} of it new")


@app.command()
def get(
    url: str,
    name: str,
    folder: Path,
    option: Options = None,
    rate: Annotated[str, typer.Option(help="At most so fast: 200Mbit/s, 40MB/s.")] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="FOLDER holds something already: what is not kept as NAME goes.")
    ] = False,
    json_: Json = False,
) -> None:
    """FOLDER becomes what the storage at URL keeps as NAME.  Cut off, it goes on where it was when it is called again."""
    import time

    from qipan.cli.app import out
    from qipan.quantities import format_bytes, parse_bytes_per_s
    from qipan.staging import CHUNK_BYTES
    from qipan.transfer import Progress, fetch
    from qipan.transfer.fetch import Pace

    folder = folder.resolve()  # "." has no name to lay the copy beside
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not replace)):
        raise InvalidInput(
            f"{folder} is no empty folder; name another, or say --replace: what is not kept as {name!r} goes from it"
        )
    storage, progress, began_s = _opened(url, option), Progress(), time.monotonic()
    manifest = storage.manifest(name)
    if manifest is None:
        raise NotFound(f"{url} keeps nothing named {name!r}; `qipan storage ls` tells what it keeps")
    pace = Pace(parse_bytes_per_s(rate), CHUNK_BYTES) if rate else None
    try:
        fetch(storage, manifest, folder, progress, pace)
    except QipanError as error:
        raise type(error)(
            f"{error}; {format_bytes(progress.sent_bytes)} came and stay, call again to go on"
        ) from None
    if json_:
        took_s = time.monotonic() - began_s
        sent, here = progress.sent_bytes, progress.here_bytes
        out({"name": name, "sent_bytes": sent, "here_bytes": here, "seconds": took_s})
    else:
        came, were = format_bytes(progress.sent_bytes), format_bytes(progress.here_bytes)
        print(f"{folder}: {came} came and were verified, {were} were here")


@app.command()
def ls(url: str, option: Options = None, json_: Json = False) -> None:
    """What the storage at URL keeps (a folder or S3; one behind HTTP does not list)."""
    from datetime import UTC, datetime

    from qipan.cli.app import out
    from qipan.quantities import format_bytes

    found = _opened(url, option).manifests()
    if json_:
        out(
            [
                {
                    "name": one.name,
                    "attempt": one.attempt,
                    "bytes": one.size_bytes,
                    "written_s": one.written_s,
                }
                for one in found
            ]
        )
        return
    for one in found:
        when = datetime.fromtimestamp(one.written_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
        print(f"{one.name}  attempt {one.attempt}  {format_bytes(one.size_bytes)}  {when} UTC")
    if not found:
        print(f"{url} keeps nothing yet")


@app.command()
def leases(json_: Json = False, store: StoreDir = None) -> None:
    """What tasks hold of each site's storage while they have their leases, and what is left."""
    from qipan.cli.app import client, tell

    boards = client(store).call("GET", "/boards")["boards"]
    found = [{"board": board["board"], **one} for board in boards for one in board["storages"]]
    tell(found, json_, _show_leases)


def _show_leases(found: list[dict[str, Any]]) -> None:
    from qipan.quantities import format_bytes

    def share(used: float, whole: float, unit: str) -> str:
        of = f" of {format_bytes(int(whole))}{unit}" if whole else " (not counted)"
        return f"{format_bytes(int(used))}{unit}{of}"

    for one in found:
        space = sum(lease["space_bytes"] for lease in one["leases"])
        rate = sum(lease["write_bytes_per_s"] for lease in one["leases"])
        print(
            f"{one['storage_id']}: {share(space, one['space_bytes'], '')}, {share(rate, one['write_bytes_per_s'], '/s')}"
        )
        for lease in one["leases"]:
            size, pace = format_bytes(lease["space_bytes"]), format_bytes(int(lease["write_bytes_per_s"]))
            print(f"  {lease['task_id'] or 'of another tenant'}  {size}  {pace}/s")
    if not found:
        print("no board has a storage in its site file")


@app.command()
def serve(
    folder: Path,
    token_file: Annotated[Path, typer.Option(help="Its one line must be known to readers.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT.")] = "127.0.0.1:8970",
    cert: Annotated[Optional[Path], typer.Option(help="PEM; without it plain HTTP.")] = None,  # noqa: UP045
    key: Annotated[Optional[Path], typer.Option(help="PEM of the certificate's key.")] = None,  # noqa: UP045
) -> None:
    """Let other sites read the storage in FOLDER over HTTP, until Ctrl-C."""
    from qipan.api.listen import host_and_port
    from qipan.transfer.serve import server

    host, port = host_and_port(listen)
    missing = "holds no token; write one line that only readers know"
    token = text_in(token_file, missing).strip()
    if not token:
        raise NotFound(f"{token_file}: {missing}")
    try:
        serving = server(folder, host, port, token, cert, key)
    except (OSError, OverflowError) as error:
        raise InvalidInput(
            f"cannot be served at {listen} ({error}); give another --listen, --cert or --key"
        ) from None
    where = f"{'https' if cert else 'http'}://{host}:{serving.server_port}"
    print(f"{folder} is served at {where}", flush=True)
    try:
        serving.serve_forever()
    except KeyboardInterrupt:
        serving.server_close()


def _opened(url: str, options: list[str] | None) -> "ContentStorage":
    from qipan.hardware import BoardId, Storage
    from qipan.transfer import open_storage

    given: Mapping[str, str] = dict(_pair(text) for text in options or [])
    return open_storage(Storage(url, BoardId(""), 0, 0.0, 0.0, url=url, options=dict(given)))


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found:
        raise InvalidInput(f"--option {text[:60]!r} is no KEY=VALUE")
    return name, value
