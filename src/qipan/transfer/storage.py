"""One content-addressed storage: `chunks/ab/abcd...` by their BLAKE3, `manifests/ab....json` by that of the name, the newest of
each."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from qipan.errors import InvalidInput, NotAllowed, OverLimit, Unreachable
from qipan.files import text_in
from qipan.hardware import Storage
from qipan.staging import CHUNK_BYTES, ChunkId, Manifest, StagedFile, checked, outdated, unnamed
from qipan.transfer.parallel import in_parallel
from qipan.transfer.reading import HttpReader

WORKERS = 8
LIMIT_S = 30.0
PIECE_BYTES = 2**18
Answer = TypeVar("Answer")


def open_storage(storage: Storage) -> "ContentStorage":
    """`storage.url`: a folder, s3://BUCKET/PATH or http(s)://.  `storage.options`: `endpoint`, `region` and `credentials` (a file
    with access_key_id and secret_access_key) of S3; `token_file` and `ca_file` of HTTP.  Raises InvalidInput."""
    from obstore.exceptions import BaseError

    url, options = storage.url, dict(storage.options)
    scheme = url.partition("://")[0] if "://" in url else "file"
    known = {"file": (), "s3": ("endpoint", "region", "credentials"), "http": ("token_file", "ca_file")}
    allowed = known.get("http" if scheme == "https" else scheme)
    if allowed is None:
        raise InvalidInput(
            f"storage {storage.storage_id}: {url[:80]!r} is neither a folder, nor s3://, http:// or https://"
        )
    if unknown := sorted(set(options) - set(allowed)):
        raise InvalidInput(
            f"storage {storage.storage_id}: no option {unknown[0]!r} for {scheme}; there are {', '.join(allowed) or 'none'}"
        )
    try:
        store, reader = _store(storage, scheme, options)
    except (OSError, ValueError, BaseError) as error:
        said = str(error).partition("\n")[0]
        raise InvalidInput(f"storage {storage.storage_id}: {url[:80]!r} cannot be opened: {said}") from None
    return ContentStorage(storage.storage_id, store, storage.capacity_bytes, reader)


def _store(storage: Storage, scheme: str, options: dict[str, str]) -> tuple[Any, HttpReader | None]:
    """Raises InvalidInput, and what obstore does."""
    from obstore.store import HTTPStore, LocalStore, S3Store

    url = storage.url
    retry = {"max_retries": 3, "retry_timeout": timedelta(seconds=LIMIT_S)}
    client: dict[str, Any] = {"timeout": timedelta(seconds=LIMIT_S), "connect_timeout": timedelta(seconds=5)}
    store: Any
    reader = None
    if scheme == "file":
        folder = Path(url.removeprefix("file://"))
        if not folder.is_absolute():
            raise InvalidInput(
                f"storage {storage.storage_id}: {url[:80]!r} is no absolute path; begin it with /"
            )
        store = LocalStore(folder, mkdir=True)
    elif scheme == "s3":
        config: dict[str, Any] = {"region": options.get("region", "us-east-1")}
        if "endpoint" in options:
            config |= {"endpoint": options["endpoint"], "virtual_hosted_style_request": False}
            client["allow_http"] = options["endpoint"].startswith("http://")
        if "credentials" in options:
            config |= _credentials(Path(options["credentials"]))
        store = S3Store.from_url(url, config=config, client_options=client, retry_config=retry)  # type: ignore[arg-type]
    else:
        client["allow_http"] = scheme == "http"
        if "token_file" in options:
            token = text_in(Path(options["token_file"]), "no such token_file").strip()
            client["default_headers"] = {"authorization": f"Bearer {token}"}
        if "ca_file" in options:
            client["root_certificate"] = text_in(Path(options["ca_file"]), "no such ca_file")
        store = HTTPStore.from_url(url, client_options=client, retry_config=retry)  # type: ignore[arg-type]
        reader = HttpReader(
            storage.storage_id,
            url,
            client.get("default_headers", {}),
            Path(options["ca_file"]) if "ca_file" in options else None,
            LIMIT_S,
        )
    return store, reader


def _credentials(path: Path) -> dict[str, str]:
    lines = [line.partition("=") for line in text_in(path, "no such credentials").splitlines() if "=" in line]
    return {key.strip(): value.strip() for key, _, value in lines}


@dataclass(frozen=True, slots=True)
class Published:
    """`new_bytes`: of chunks that were not there before."""

    manifest: Manifest
    new_bytes: int


class ContentStorage:
    """Calls raise Unreachable, NotAllowed.  One process writes to a storage; many read."""

    def __init__(
        self, storage_id: str, store: Any, capacity_bytes: int = 0, reader: HttpReader | None = None
    ) -> None:
        self.storage_id, self._store, self._capacity_bytes = storage_id, store, capacity_bytes
        self._reader = reader

    def manifest(self, name: str) -> Manifest | None:
        """Raises InvalidInput when it would write outside its folder."""
        body = self._get(_manifest_path(name))
        return _read(body) if body is not None else None

    def pieces(self, chunk: ChunkId) -> Iterator[memoryview]:
        """The chunk's bytes, a little at a time: what is hashed and written while it is in the processor's cache costs half."""
        import obstore

        try:
            if self._reader is not None:
                yield from self._reader.pieces(_path(chunk))
                return
            found = self._calling(lambda: obstore.get(self._store, _path(chunk)))
        except FileNotFoundError:
            raise Unreachable(
                f"storage {self.storage_id} has lost the chunk {chunk[:12]}; write the data there anew"
            ) from None
        stream = iter(found.stream(min_chunk_size=PIECE_BYTES))
        while (piece := self._calling(lambda: next(stream, None))) is not None:
            yield memoryview(piece)

    def publish(
        self, folder: Path, name: str, attempt: int = 0, saved_s: float = 0.0, now_s: float = 0.0
    ) -> Published:
        """Keep what the folder holds now.  What is already here is not written again.  Raises OverLimit when it is full,
        InvalidInput for a file whose name no reader would take."""
        import obstore
        from blake3 import blake3

        sizes = {ChunkId(meta["path"].rpartition("/")[2]): meta["size"] for meta in self._list("chunks/")}
        room = self._capacity_bytes - sum(sizes.values()) if self._capacity_bytes else float("inf")
        files, new_bytes, counting = [], 0, threading.Lock()

        def keep(chunk: tuple[Path, int, int]) -> ChunkId:
            nonlocal new_bytes
            path, offset, length = chunk
            with path.open("rb") as file:
                body = os.pread(file.fileno(), length, offset)
            made = ChunkId(blake3(body).hexdigest())
            with counting:  # before it is written: others write beside it
                if made in sizes:
                    return made
                if new_bytes + len(body) > room:
                    raise OverLimit(
                        f"storage {self.storage_id} is full: {self._capacity_bytes} bytes; give it more, or keep less long"
                    )
                sizes[made] = len(body)
                new_bytes += len(body)
            self._calling(lambda: obstore.put(self._store, _path(made), body, use_multipart=False))
            return made

        for path in sorted(_files(folder)):
            try:
                size = path.stat().st_size
                cut = [(path, at, min(CHUNK_BYTES, size - at)) for at in range(0, size, CHUNK_BYTES)]
                made = in_parallel(cut, keep, WORKERS // 2)
            except FileNotFoundError:
                continue  # its task removed it while we looked; what took its place is kept next time
            files.append(StagedFile(path.relative_to(folder).as_posix(), size, tuple(made)))
        manifest = checked(Manifest(name, attempt, saved_s, now_s, CHUNK_BYTES, tuple(files)))
        self._calling(lambda: obstore.put(self._store, _manifest_path(name), msgspec.json.encode(manifest)))
        return Published(manifest, new_bytes)

    def manifests(self) -> list[Manifest]:
        bodies = [self._get(meta["path"]) for meta in self._list("manifests/")]
        return sorted((_read(body) for body in bodies if body is not None), key=lambda found: found.name)

    def release(self, now_s: float, keep_s: float) -> int:
        """Let go of manifests older than `keep_s` and of chunks that none names any more.  Returns the bytes freed."""
        import obstore

        written = {meta["path"]: meta["last_modified"].timestamp() for meta in self._list("manifests/")}
        for path in outdated(written, now_s, keep_s):
            self._calling(lambda path=path: obstore.delete(self._store, path))  # type: ignore[misc]
        named = {chunk for found in self.manifests() for file in found.files for chunk in file.chunks}
        chunks = {ChunkId(meta["path"].rpartition("/")[2]): meta for meta in self._list("chunks/")}
        ages = {chunk: meta["last_modified"].timestamp() for chunk, meta in chunks.items()}
        gone = unnamed(ages, named, now_s)
        for chunk in gone:
            self._calling(lambda chunk=chunk: obstore.delete(self._store, _path(chunk)))  # type: ignore[misc]
        return sum(chunks[chunk]["size"] for chunk in gone)

    def _list(self, prefix: str) -> Iterator[Mapping[str, Any]]:
        import obstore

        for batch in self._calling(lambda: list(obstore.list(self._store, prefix))):
            yield from batch

    def _get(self, path: str) -> Any:
        """The object's bytes; None when there is none."""
        import obstore

        try:
            return self._calling(lambda: obstore.get(self._store, path).bytes())
        except FileNotFoundError:
            return None

    def _calling(self, call: Callable[[], Answer]) -> Answer:
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            return call()
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise NotAllowed(
                f"storage {self.storage_id} refuses us ({_short(error)}); look at its token or keys"
            ) from None
        except (BaseError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise Unreachable(f"storage {self.storage_id} does not answer ({_short(error)})") from None


def _read(body: Any) -> Manifest:
    """Raises InvalidInput."""
    try:
        return checked(msgspec.json.decode(bytes(body), type=Manifest))
    except msgspec.DecodeError as error:
        raise InvalidInput(f"a manifest cannot be read ({error}); write the data there anew") from None


def _manifest_path(name: str) -> str:
    from blake3 import blake3

    return f"manifests/{blake3(name.encode()).hexdigest()}.json"


def _path(chunk: ChunkId) -> str:
    return f"chunks/{chunk[:2]}/{chunk}"


def _files(folder: Path) -> Iterator[Path]:
    for above, _, names in os.walk(folder):
        yield from (
            Path(above, name)
            for name in names
            if not name.endswith(".part") and not Path(above, name).is_symlink()
        )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
