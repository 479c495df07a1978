"""Who may open the console: who has the key from the address printed at the start, or logged in; both are kept in cookies that no
script reads."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qipan.console.visitors import Visitors, cookie_of
from qipan.console.words import spoken, word

#: nothing but what this console serves itself; no inline script or style, no frame around it, no other form target
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
BODY_BYTES_MAX = 4 << 20  # a percent-encoded task file of the largest size
OPEN_PATHS = ("/enter", "/login", "/logout", "/language/", "/static/")
VISITOR = "qipan.visitor"  # of the scope: whose request it is; None on an open path


class Guard:
    """`authority` is this console's own host and port: another name that leads here is refused (DNS rebinding)."""

    def __init__(self, app: ASGIApp, visitors: Visitors, authority: str) -> None:
        self.app, self.visitors, self.authority = app, visitors, authority

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refused = self._refused(scope)
        await (refused or self.app)(scope, receive, with_headers)

    def _refused(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        here = f"http://{self.authority}"

        def no(status: int, key: str, value: object) -> Response:
            return PlainTextResponse(f"{word(key, spoken(cookie_of(headers, 'language')))} {value}\n", status)

        if headers.getlist("host") != [self.authority]:
            return no(421, "other_host", f"{here}/")
        posts = scope["method"] not in ("GET", "HEAD")
        if posts and headers.get("origin", here) != here:
            return no(403, "other_origin", f"{here}/")
        length = headers.get("content-length", "0")
        if posts and not (length.isascii() and length.isdigit() and len(length) < 12):
            return no(400, "no_length", BODY_BYTES_MAX)
        if posts and ("transfer-encoding" in headers or int(length) > BODY_BYTES_MAX):
            return no(413, "no_length", BODY_BYTES_MAX)
        scope[VISITOR] = self.visitors.of(headers)
        if scope["path"].startswith(OPEN_PATHS) or scope[VISITOR] is not None:
            return None
        return no(403, "log_in_first", f"{here}/login") if posts else RedirectResponse("/enter", 303)
