"""The sessions of a person, on the person's own side: in `sessions.json` of the user's config folder, readable by nobody else.

A refresh token is good once, so one process at a time uses it: a lock on a file beside it."""

import asyncio
import contextlib
import fcntl
import json
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from qipan.errors import InvalidInput, NotAllowed, NotFound, QipanError, Unreachable
from qipan.files import write_whole

EARLY_S = 10.0  # an access token is renewed so long before its end
LIMIT_S = 20.0
LOOK_S = 0.02  # a coroutine asks for the lock so often
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"


def path() -> Path:
    import platformdirs

    return Path(platformdirs.user_config_path("qipan")) / "sessions.json"


def read() -> dict[str, Any]:
    try:
        found = json.loads(path().read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise InvalidInput(f"{path()} is damaged; remove it and log in again") from None
    return found if isinstance(found, dict) else {}


def kept(server: str) -> dict[str, Any] | None:
    """The session with a server: access_token, until_s, refresh_token, user, tenant, role, and `ca` where one was named."""
    found = read().get("sessions", {}).get(server)
    return found if isinstance(found, dict) else None


def current() -> str:
    """The address of the last login; "" for none, or for a store's own socket."""
    return str(read().get("current", ""))


@contextlib.contextmanager
def locked() -> Iterator[None]:
    path().parent.mkdir(parents=True, exist_ok=True)
    with path().with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.asynccontextmanager
async def locked_while_others_run() -> AsyncIterator[None]:
    """The same lock for a coroutine, which may wait for another of its own loop: so the loop goes on."""
    path().parent.mkdir(parents=True, exist_ok=True)
    with path().with_suffix(".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(LOOK_S)
        yield


def keep(server: str, session: dict[str, Any] | None) -> None:
    """None forgets it.  Called with the lock held."""
    found = read()
    held = dict(found.get("sessions", {}))
    if session is None:
        held.pop(server, None)
    else:
        held[server] = session
    now = found.get("current", "") if session is None else server
    now = "" if now.startswith("unix:") or now not in held else now
    write_whole(path(), json.dumps({"current": now, "sessions": held}).encode())


class SessionAuth(httpx.Auth):
    """Carries the access token of a session, and renews it when it is over."""

    requires_response_body = True

    def __init__(self, server: str, base: str) -> None:
        self._server, self._base = server, base

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        token = self._good_token()
        if token is None:
            with locked():
                token = self._good_token()  # another may have renewed it meanwhile
                if token is None:
                    token = self._renewed((yield self._renewal()))
        request.headers["authorization"] = f"Bearer {token}"
        yield request

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        token = self._good_token()
        if token is None:
            async with locked_while_others_run():
                token = self._good_token()
                if token is None:
                    answer = yield self._renewal()
                    await answer.aread()
                    token = self._renewed(answer)
        request.headers["authorization"] = f"Bearer {token}"
        yield request

    def _good_token(self) -> str | None:
        """Raises NotAllowed without a session."""
        session = kept(self._server)
        if session is None:
            raise NotAllowed(f"you are not logged in at {self._server}; qipan login")
        return str(session["access_token"]) if time.time() <= session["until_s"] - EARLY_S else None

    def _renewal(self) -> httpx.Request:
        session = kept(self._server) or {}
        return httpx.Request("POST", f"{self._base}/login/refresh", json={"refresh_token": session["refresh_token"]})  # fmt: skip

    def _renewed(self, answer: httpx.Response) -> str:
        """The next access token; a session that the server ended is forgotten.  With the lock held."""
        session = kept(self._server) or {}
        if answer.status_code == 401:
            keep(self._server, None)
        session = {**session, **granted(answer)}
        keep(self._server, session)
        return str(session["access_token"])


def granted(answer: httpx.Response) -> dict[str, Any]:
    """Raises NotAllowed with the server's words, QipanError."""
    try:
        value = answer.json()
    except ValueError:
        raise QipanError(f"the server answered {answer.status_code} without JSON") from None
    if answer.is_success:
        return dict(value)
    kind = NotAllowed if answer.status_code in (401, 403) else QipanError
    raise kind(str(value.get("detail", value)))


# ---- who the server is -------------------------------------------------------------------------------------------------


def checked_url(url: str) -> str:
    """Raises InvalidInput."""
    parts = url_parts(url)
    local = parts.hostname in ("127.0.0.1", "::1", "localhost")
    if not parts.hostname or parts.query or parts.fragment or parts.username or parts.path.strip("/") or (parts.scheme != "https" and not (local and parts.scheme == "http")):  # fmt: skip
        raise InvalidInput(f"{url[:100]!r} is no address of a server; give https://HOST:PORT")
    return f"{parts.scheme}://{parts.netloc}"


def url_parts(url: str) -> SplitResult:
    """Those of an address that somebody else wrote; one that is malformed has none."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # read only here
    except ValueError:  # such as a bracket that is not closed, or a port that is no number
        return SplitResult("", "", "", "", "")
    return parts


def trust(url: str, ca: str = "") -> ssl.SSLContext | bool:
    """Of the authority file that was named at login, else of those that this machine trusts."""
    ca = ca or str((kept(url) or {}).get("ca", ""))
    if not ca:
        return True
    if not Path(ca).is_file():
        raise NotFound(f"{ca}: no such file; it holds the authority of {url}: qipan login {url} --ca FILE")
    try:
        return ssl.create_default_context(cafile=ca)
    except ssl.SSLError as error:
        raise InvalidInput(f"{ca} holds no certificate: {error}") from None


# ---- the device flow ---------------------------------------------------------------------------------------------------


WAITS_S = (1.0, 60.0)  # between two looks, whatever the provider says
CODE_S_MAX = 3600.0


class DeviceFlow:
    """A login at an OpenID provider by RFC 8628 that is under way: the person goes to `where` with `code` (`whole`, where the provider
    gives it, has both).  `look` at most every `wait_s`.  Raises NotAllowed, Unreachable."""

    def __init__(self, oidc: dict[str, str]) -> None:
        self._issuer = issuer = oidc["issuer"]
        described = _told(issuer, "GET", issuer.rstrip("/") + "/.well-known/openid-configuration")
        if described.get("issuer") != issuer:
            raise NotAllowed(f"the provider at {issuer} calls itself {str(described.get('issuer'))[:100]!r}")
        ends = [described.get("device_authorization_endpoint"), described.get("token_endpoint")]
        if not all(isinstance(end, str) for end in ends):
            raise NotAllowed(f"the provider {issuer} has no device flow (RFC 8628); log in with a password")
        begun = _told(issuer, "POST", str(ends[0]), {"client_id": oidc["client_id"], "scope": oidc["scope"]})
        if "device_code" not in begun:
            raise NotAllowed(
                f"{issuer} refuses: {str(begun.get('error_description') or begun.get('error'))[:200]}"
            )
        try:
            self.where, self.code = str(begun["verification_uri"]), str(begun["user_code"])
            self.wait_s = min(max(WAITS_S[0], float(begun.get("interval", 5))), WAITS_S[1])
            self.end_s = time.monotonic() + min(CODE_S_MAX, float(begun.get("expires_in", 600)))
        except (KeyError, TypeError, ValueError) as error:
            raise NotAllowed(
                f"the provider {issuer} begins a login not as RFC 8628 says ({error!r:.80}); log in with a password"
            ) from None
        self.whole = str(begun.get("verification_uri_complete", ""))
        for url in (self.where, self.whole or self.where):
            if url_parts(url).scheme not in ("https", "http"):
                raise NotAllowed(f"the provider {issuer} sends people to {url[:100]!r}, which is no web page")
        self._token_end = str(ends[1])
        self._asked = {"grant_type": DEVICE_GRANT, "device_code": begun["device_code"], "client_id": oidc["client_id"]}  # fmt: skip

    def look(self) -> str | None:
        """The id_token; None while the person has not answered.  Raises NotAllowed when they refuse or wait too long, Unreachable."""
        if time.monotonic() > self.end_s:
            raise NotAllowed("the code is over; log in again")
        answer = _told(self._issuer, "POST", self._token_end, self._asked)
        match answer.get("error"):
            case None if isinstance(answer.get("id_token"), str):
                return str(answer["id_token"])
            case "authorization_pending":
                return None
            case "slow_down":
                self.wait_s += 5.0
                return None
            case None:
                raise NotAllowed(f"{self._issuer} gave no id_token; its scope must hold openid")
            case other:
                raise NotAllowed(
                    f"{self._issuer} refuses: {str(answer.get('error_description') or other)[:200]}"
                )


def device_flow(
    oidc: dict[str, str], say: Callable[[str, str, str], None], sleep: Callable[[float], None] = time.sleep
) -> str:
    """An id_token: `say(where, code, whole)` tells the person where to go.  Raises as `DeviceFlow` does."""
    flow = DeviceFlow(oidc)
    say(flow.where, flow.code, flow.whole)
    while True:
        sleep(flow.wait_s)
        if (id_token := flow.look()) is not None:
            return id_token


def _told(issuer: str, method: str, url: str, form: dict[str, str] | None = None) -> dict[str, Any]:
    """What a provider answers; its refusals are answers, too."""
    parts = url_parts(url)
    if not parts.hostname or parts.scheme != url_parts(issuer).scheme:
        raise NotAllowed(
            f"the provider {issuer} leads to {url[:100]!r}, which is no address or has another scheme"
        )
    try:
        answer = httpx.request(method, url, data=form, timeout=LIMIT_S)
        value = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise Unreachable(f"the OpenID provider {issuer} does not answer: {error}") from None
    if not isinstance(value, dict):
        raise Unreachable(f"{url[:200]} answers no JSON object")
    return value
