"""A store directory in one file, written while its boards run, and made into a store again, on this host or another.

The boards' stores are all read as of one moment, parents first: what a parent then does not know yet, its child still
tells it.  Then what the engines keep: leases before journals, since a journal only grows; checkpoints last."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from qipan.errors import InvalidInput, NotFound
from qipan.release import RELEASE
from qipan.store.board import Store
from qipan.store.copying import copy_frozen
from qipan.store.database import Sqlite
from qipan.store.folder import DATABASE, StoreFolder
from qipan.store.opening import SCHEMA, create

FORMAT = 1
MANIFEST = "manifest.json"
#: of this host and process only
LEFT_OUT = ("pid", "api.sock", DATABASE)
PIECE = 1 << 20


def back_up(folder: Path, file: Path) -> dict[str, Any]:
    """Returns the manifest's summary.  Raises NotFound when there is no store, InvalidInput when the file is there."""
    if file.exists():
        raise InvalidInput(f"{file} is there already; name a new file")
    stores = StoreFolder(folder)
    names = stores.boards()
    part = file.with_name(file.name + ".part")
    mode = "w:gz" if file.name.endswith(".gz") else "w"
    with tempfile.TemporaryDirectory(prefix="qipan-backup-") as scratch, ExitStack() as held:
        opened = {name: stores.open(name, writer=False) for name in names}
        for store in opened.values():
            held.callback(store.close)
        for store in sorted(opened.values(), key=lambda store: int(store.get("order") or 0)):
            held.enter_context(store.db.frozen())
        with tarfile.open(part, mode) as archive:  # type: ignore[call-overload]
            part.chmod(0o600)
            writer = _Writer(archive)
            for path in _files(folder):
                writer.add(path, f"files/{path.relative_to(folder)}")
            boards = {}
            for name, store in opened.items():
                copy = Path(scratch) / "copy.db"
                boards[name] = _copy(store, copy)
                writer.add(copy, f"stores/{name}.db")
                copy.unlink()
            writer.manifest(boards)
    part.rename(file)
    return {"boards": boards, "files": len(writer.sums), "bytes": file.stat().st_size}


def restore_into(file: Path, folder: Path, database: str | None = None) -> dict[str, Any]:
    """Whole or not at all.  `database`: the boards' stores go there.  Raises NotFound, InvalidInput."""
    if not file.is_file():
        raise NotFound(f"{file}: no such backup")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"{folder} is not an empty folder; name another --store, or move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        manifest = _unpack(file, scratch)
        target = scratch / "files"
        target.mkdir(exist_ok=True)
        target.chmod(0o700)
        if database is not None:
            stores = StoreFolder(target, database)
            for name in manifest["boards"]:
                source = Store(scratch / "stores" / f"{name}.db")
                source.copy_to(stores.place(name)).close()
                source.close()
        else:
            for name in manifest["boards"]:
                (scratch / "stores" / f"{name}.db").rename(target / f"{name}.db")
                Store(target / f"{name}.db").close()  # an earlier schema is brought here now
        if folder.exists():
            folder.rmdir()
        target.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {"boards": manifest["boards"], "files": len(manifest["sums"]), "bytes": file.stat().st_size}


def _copy(store: Store, path: Path) -> dict[str, int]:
    target = Sqlite(path)
    create(target)
    copy_frozen(store.db, target)
    row = target.row("SELECT count(*), (SELECT count(*) FROM facts) FROM ticks")
    assert row is not None
    target.script("PRAGMA journal_mode=DELETE;")
    target.close()
    return {"ticks": row[0], "facts": row[1]}


def _files(folder: Path) -> Iterator[Path]:
    """Regular files, leases first, checkpoints last; whatever is not a board's store or of this process only."""
    found = [
        Path(above) / name
        for above, _, names in os.walk(folder)
        for name in names
        if not (Path(above) == folder and (name in LEFT_OUT or ".db" in name))
    ]

    def order(path: Path) -> tuple[int, str]:
        inside = path.relative_to(folder)
        place = 2 if inside.parts[0] == "checkpoints" else 0 if path.name == "held.json" else 1
        return place, str(inside)

    yield from (path for path in sorted(found, key=order) if path.is_file() and not path.is_symlink())


class _Writer:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self.archive = archive
        self.sums: dict[str, str] = {}

    def add(self, path: Path, name: str) -> None:
        """As long as the file was when it was opened; one that has gone meanwhile is left out."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return
        with file:
            info = self.archive.gettarinfo(arcname=name, fileobj=file)
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            summed = _Summed(file)
            self.archive.addfile(info, summed)  # type: ignore[arg-type]
            self.sums[name] = summed.sum.hexdigest()

    def manifest(self, boards: dict[str, dict[str, int]]) -> None:
        body = json.dumps(
            {"format": FORMAT, "release": RELEASE, "schema": SCHEMA, "boards": boards, "sums": self.sums},
            indent=1,
        ).encode()
        info = tarfile.TarInfo(MANIFEST)
        info.size, info.mode = len(body), 0o600
        self.archive.addfile(info, io.BytesIO(body))


class _Summed:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sum = hashlib.blake2b(digest_size=16)

    def read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self.sum.update(piece)
        return piece


def _unpack(file: Path, scratch: Path) -> dict[str, Any]:
    try:
        with tarfile.open(file) as archive:
            archive.extractall(scratch, filter="data")
        manifest: dict[str, Any] = json.loads((scratch / MANIFEST).read_text())
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InvalidInput(f"{file} is no whole backup ({error}); take another") from None
    if manifest.get("format") != FORMAT or manifest["schema"] > SCHEMA:
        raise InvalidInput(
            f"{file} was written by release {manifest.get('release')}; restore it with that one"
        )
    for name, told in manifest["sums"].items():
        path = scratch / name
        if not path.is_file() or _sum(path) != told:
            raise InvalidInput(f"{file}: {name} is missing or not what was written; take another backup")
    return manifest


def _sum(path: Path) -> str:
    total = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            total.update(piece)
    return total.hexdigest()
