"""A POST to an address that somebody else named: resolved once, checked, and sent to just that address, so that no name can
lead inside afterwards.  Redirects are not followed."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from qipan.errors import InvalidInput, Unreachable

URL_CHARACTERS_MAX = 500
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def check_url(url: str) -> None:
    """Its form alone.  Raises InvalidInput."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidInput(f"{url[:80]!r} is no address: {error}") from None
    plain = url.isascii() and url.isprintable() and " " not in url and "\\" not in url
    if (
        not plain
        or len(url) > URL_CHARACTERS_MAX
        or parts.scheme not in ("https", "http")
        or not parts.hostname
    ):
        raise InvalidInput(
            f"{url[:80]!r} is no address to send to; give https://HOST/PATH, {URL_CHARACTERS_MAX} characters at most"
        )
    if parts.username is not None or parts.password is not None or parts.fragment or port == 0:
        raise InvalidInput(f"{url[:80]!r} holds a user, password, fragment or port 0; leave them out")


def inside(address: Address) -> bool:
    """Whether it leads to this machine, its networks or nowhere; also when such an address is wrapped in another."""
    wrapped = [address]
    if isinstance(address, ipaddress.IPv6Address):
        wrapped += [
            one
            for one in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ()))
            if one is not None
        ]
        if address in ipaddress.IPv6Network("64:ff9b::/96"):  # NAT64
            wrapped.append(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
    return any(not one.is_global or one.is_multicast for one in wrapped)


def resolve(host: str, port: int, allow_inside: bool) -> str:
    """One address of the host.  Raises InvalidInput when any of its addresses leads inside, Unreachable when it has none."""
    try:
        found = sorted(
            {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        )
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"{host[:80]!r} has no address: {error}") from None
    for text in found:
        if not allow_inside and inside(ipaddress.ip_address(text.partition("%")[0])):
            raise InvalidInput(
                f"{host[:80]!r} leads to {text}, inside this network; the operator may allow it with --allow-private"
            )
    return found[0]


def post(
    url: str, body: bytes, headers: Mapping[str, str], limit_s: float, allow_inside: bool,
    find: Callable[[str, int, bool], str] = resolve,
) -> int:  # fmt: skip
    """The answer's status.  Raises InvalidInput (leads inside), Unreachable (no answer in time)."""
    check_url(url)
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    address = find(host, port, allow_inside)
    connection = http.client.HTTPConnection(host, port, timeout=limit_s)
    clock: threading.Timer | None = None
    try:
        line = socket.create_connection((address, port), limit_s)
        clock = threading.Timer(
            limit_s, end, [line]
        )  # a receiver that drips keeps each read alive, not the whole
        clock.start()
        connection.sock = (
            ssl.create_default_context().wrap_socket(line, server_hostname=host) if secure else line
        )
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", path, body, dict(headers))
        return connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"{host[:80]} at {address}: {type(error).__name__}: {str(error)[:200]}") from None
    finally:
        if clock is not None:
            clock.cancel()
        connection.close()


def end(line: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it was closed meanwhile
        line.shutdown(socket.SHUT_RDWR)
