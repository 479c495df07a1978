"""The client of the public API: what the command line uses."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import httpx

from qipan.errors import Infeasible, InvalidInput, NotAllowed, NotFound, OverLimit, QipanError, Unreachable

ERRORS: dict[int, type[QipanError]] = {
    2: InvalidInput, 102: NotFound, 104: Infeasible, 105: OverLimit, 106: Unreachable, 107: NotAllowed,
}  # fmt: skip


def socket_path(folder: Path) -> Path:
    """Where a store's server listens.  Unix sockets allow about 100 bytes, so a long folder gets one elsewhere."""
    path = folder.resolve() / "api.sock"
    if len(str(path)) < 100:
        return path
    name = hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()
    return Path(tempfile.gettempdir()) / f"qipan-{name}.sock"


class Client:
    """Speaks to the server of the store in `folder`.  Raises the errors the server names, Unreachable when there is
    none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        token = folder / "token"
        headers = {"authorization": f"Bearer {token.read_text().strip()}"} if token.exists() else {}
        transport = httpx.HTTPTransport(uds=str(socket_path(folder)))
        self._http = httpx.Client(
            transport=transport, base_url="http://qipan/v1", headers=headers, timeout=60.0
        )

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, **query: Any) -> Any:
        try:
            response = self._http.request(method, path, json=body, params=query or None)
        except httpx.TransportError as error:
            raise Unreachable(
                f"no server answers for the store {self._folder} ({error}); start one with `qipan up --store {self._folder}`"
            ) from None
        value = response.json()
        if response.is_success:
            return value
        kind = ERRORS.get(value.get("code", 100), QipanError)
        raise kind(str(value.get("detail", value)))

    def submit(self, text: str, file: str, workdir: str, key: str | None = None) -> Any:
        return self.call("POST", "/tasks", {"text": text, "file": file, "workdir": workdir, "key": key})

    def task(self, task_id: str) -> Any:
        return self.call("GET", f"/tasks/{task_id}")
