"""A host on a small site without processes of its own loop: what the tests of the API and the console speak to."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import uvicorn
from argon2 import PasswordHasher

from qipan.api import Server
from qipan.api.listen import Listen
from qipan.client import AsyncClient
from qipan.console import make_console
from qipan.host import Host
from qipan.login import People, Signer
from qipan.login.oidc import Issuer, Provider
from qipan.workload.site import Tenant, load_site

TOKEN = "operator-token"
TINY = "kind: train\nname: tiny\ntenant: poets\nrun: sleep 60\ndevices: 1\nlimits: {time: 12s, max_cost: 1 CNY}\n"

CHEAP_HASHES = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)


@contextmanager
def served(
    folder: Path,
    provider: Provider | None = None,
    listen: Listen | None = None,
    tenants: tuple[Tenant, ...] = (),
) -> Iterator[Host]:
    """A host whose boards step only when told to, behind a real server on `api.sock`; where it listens by HTTPS stands in `url`.
    `tenants`: beside the poets."""
    site = load_site(Path(__file__).parent / "tiny_site.yaml")
    host = Host(replace(site, tenants=(*site.tenants, *tenants)), folder)
    (folder / "token").write_text(TOKEN)
    signer, issuer = Signer(folder / "login.key", host.audience), Issuer(provider) if provider else None
    people = People(host, signer, issuer, CHEAP_HASHES)
    server = Server(host, folder / "api.sock", TOKEN, people, listen)
    (folder / "url").write_text(server.url)
    server.start()
    host.step()
    try:
        yield host
    finally:
        host.park(10)
        server.stop()
        host.close()


@contextmanager
def consoled(host: Host, key: str) -> Iterator[str]:
    """The address of a console of this host."""
    listener = socket.create_server(("127.0.0.1", 0))
    authority = f"127.0.0.1:{listener.getsockname()[1]}"
    app = make_console(AsyncClient(host.folder), key, authority)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://{authority}"
    finally:
        server.should_exit = True
        thread.join(5)


def caller(host: Host, token: str = TOKEN) -> httpx.Client:
    return httpx.Client(
        transport=httpx.HTTPTransport(uds=str(host.folder / "api.sock"), retries=3),
        base_url="http://qipan/v1",
        headers={"authorization": f"Bearer {token}"},
        timeout=60,  # whatif takes seconds on a busy machine
    )


def submit(client: httpx.Client, text: str = TINY, **more: object) -> httpx.Response:
    return client.post("/tasks", json={"text": text, **more})
