"""A host on a small site without processes of its own loop: what the tests of the API and the console speak to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from qipan.api import Server
from qipan.host import Host
from qipan.workload.site import load_site

TOKEN = "operator-token"
TINY = "kind: train\nname: tiny\ntenant: poets\nrun: sleep 60\ndevices: 1\nlimits: {time: 12s, max_cost: 1 CNY}\n"


@contextmanager
def served(folder: Path) -> Iterator[Host]:
    """A host whose boards step only when told to, behind a real server on `api.sock`."""
    host = Host(load_site(Path(__file__).parent / "tiny_site.yaml"), folder)
    (folder / "token").write_text(TOKEN)
    server = Server(host, folder / "api.sock", TOKEN)
    server.start()
    host.step()
    try:
        yield host
    finally:
        host.park(10)
        server.stop()
        host.close()


def caller(host: Host, token: str = TOKEN) -> httpx.Client:
    return httpx.Client(
        transport=httpx.HTTPTransport(uds=str(host.folder / "api.sock"), retries=3),
        base_url="http://qipan/v1",
        headers={"authorization": f"Bearer {token}"},
        timeout=20,
    )


def submit(client: httpx.Client, text: str = TINY, **more: object) -> httpx.Response:
    return client.post("/tasks", json={"text": text, **more})
