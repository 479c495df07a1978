"""The word of an OpenID provider: an id_token, checked as OpenID Connect Core 1.0 section 3.1.3.7 says, and rules that make of its
claims a tenant and a role.

login:
  issuer: https://id.example.org
  client_id: qipan
  rules:                       # the first that fits holds; who fits none is refused
    - {claim: groups, has: qipan-operators, role: operator}
    - {claim: groups, has: poets, tenant: poets, role: user}
"""

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt

from qipan.errors import InvalidInput, NotAllowed, QipanError, Unreachable
from qipan.files import text_in
from qipan.login.roles import ROLES
from qipan.quantities import parse_duration_s
from qipan.sessions import url_parts
from qipan.workload.reader import Value, read_yaml

#: signatures with a public key only: a symmetric one would make of the public key a secret that everybody knows
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
ID_TOKEN_CHARACTERS_MAX = 16_384
ANSWER_BYTES_MAX = 1 << 20
LIMIT_S = 10.0
KEYS_GOOD_S, ASK_AGAIN_S = 3600.0, 30.0


@dataclass(frozen=True, slots=True)
class Rule:
    """Fits a person whose `claim` is `has`, or has it among its values."""

    claim: str
    has: str
    tenant: str
    role: str


@dataclass(frozen=True, slots=True)
class Provider:
    """`name` is the claim that becomes the user's name; `leeway_s`: so far the provider's clock may be from ours."""

    issuer: str
    client_id: str
    scope: str
    name: str
    leeway_s: float
    rules: tuple[Rule, ...]


class Issuer:
    """A provider with its keys as they were last heard.  Any thread may use it."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self._lock = threading.Lock()
        self._keys: dict[str, Any] = {}
        self._heard_s = self._asked_s = float("-inf")
        self._away: QipanError | None = None  # why it was not heard when it was asked last

    def person_of(self, id_token: str, now_s: float) -> tuple[str, str, str, float]:
        """(name, tenant, role, when the token is over).  Raises NotAllowed, Unreachable."""
        claims = self.claims_of(id_token, now_s)
        tenant, role = role_of(claims, self.provider.rules)
        name = claims.get(self.provider.name)
        if not isinstance(name, str) or not name:
            raise NotAllowed(f"the id_token has no {self.provider.name}; choose another `name` claim")
        return (
            re.sub(r"[^a-z0-9._@-]", "-", name.lower())[:64].lstrip("._@-"),
            tenant,
            role,
            float(claims["exp"]) + self.provider.leeway_s,
        )

    def claims_of(self, id_token: str, now_s: float) -> dict[str, Any]:
        """Of a token that is the provider's, for us, and good now.  Raises NotAllowed, Unreachable."""
        if len(id_token) > ID_TOKEN_CHARACTERS_MAX:
            raise NotAllowed("the id_token is too long to be one")
        try:
            header = jwt.get_unverified_header(id_token)
            if header.get("alg") not in ALGORITHMS:
                raise NotAllowed(f"the id_token is signed by {str(header.get('alg'))[:20]!r}, not with a public key")  # fmt: skip
            key = self._key(str(header.get("kid", "")), now_s)
            claims: dict[str, Any] = jwt.decode(
                id_token, key, list(ALGORITHMS), audience=self.provider.client_id, issuer=self.provider.issuer,
                options={"require": ["iss", "sub", "aud", "exp", "iat"], "verify_exp": False, "verify_iat": False, "verify_nbf": False},
            )  # fmt: skip
        except jwt.InvalidTokenError as error:
            raise NotAllowed(f"the id_token is refused: {error}") from None
        self._check_party(claims)
        self._check_time(claims, now_s)
        return claims

    def _check_party(self, claims: Mapping[str, Any]) -> None:
        ours = claims.get("azp", self.provider.client_id) == self.provider.client_id
        if not ours or (isinstance(claims["aud"], list) and len(claims["aud"]) > 1 and "azp" not in claims):
            raise NotAllowed("the id_token was given to another client (azp)")

    def _check_time(self, claims: Mapping[str, Any], now_s: float) -> None:
        for name in ("exp", "iat", "nbf"):
            value = claims.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise NotAllowed(f"the id_token's {name} is no time")
        leeway_s = self.provider.leeway_s
        if now_s >= claims["exp"] + leeway_s:
            raise NotAllowed(f"the id_token is over since {now_s - claims['exp']:.0f} s")
        if max(claims["iat"], claims.get("nbf", 0)) > now_s + leeway_s:
            raise NotAllowed(
                "the id_token is from the future; see the clocks of the provider and of this host"
            )

    def _key(self, kid: str, now_s: float) -> Any:
        with self._lock:
            if now_s > self._heard_s + KEYS_GOOD_S:
                self._keys = {}
            if kid not in self._keys and now_s > self._asked_s + ASK_AGAIN_S:
                self._ask(now_s)
            if not kid and len(self._keys) == 1:
                return next(iter(self._keys.values()))
            if kid not in self._keys:
                if self._away is not None:
                    raise type(self._away)(str(self._away))
                raise NotAllowed(f"the provider has no key {kid[:60]!r}")
            return self._keys[kid]

    def _ask(self, now_s: float) -> None:
        """Each login that waits for it holds a thread, so one that does not answer is left alone for a while, too."""
        self._asked_s, self._away = now_s, None
        try:
            self._keys, self._heard_s = self._fetched(), now_s
        except QipanError as error:
            self._away = error

    def _fetched(self) -> dict[str, Any]:
        described = described_by(self.provider.issuer)
        found = {}
        for raw in _json_at(str(described.get("jwks_uri", ""))).get("keys", []):
            try:
                key = jwt.PyJWK(raw)
            except jwt.InvalidTokenError:
                continue  # a kind of key that we do not know: others may be good
            if raw.get("use", "sig") == "sig" and raw.get("kty") != "oct":
                found[str(raw.get("kid", ""))] = key
        return found


def described_by(issuer: str) -> dict[str, Any]:
    """What a provider says of itself (OpenID Connect Discovery 1.0).  Raises Unreachable, NotAllowed."""
    told = _json_at(issuer.rstrip("/") + "/.well-known/openid-configuration")
    if told.get("issuer") != issuer:
        raise NotAllowed(f"the provider at {issuer} calls itself {str(told.get('issuer'))[:100]!r}; configure that name")  # fmt: skip
    return told


def check_issuer(url: str) -> None:
    """Raises InvalidInput."""
    parts = url_parts(url)
    local = parts.hostname in ("127.0.0.1", "::1", "localhost")
    if not parts.hostname or parts.query or parts.fragment or (parts.scheme != "https" and not (local and parts.scheme == "http")):  # fmt: skip
        raise InvalidInput(f"{url[:100]!r} is no address of a provider; give https://HOST[/PATH]")


def _json_at(url: str) -> dict[str, Any]:
    try:
        check_issuer(url)
        with httpx.stream("GET", url, timeout=LIMIT_S, follow_redirects=False) as answer:
            body = b""
            for piece in answer.iter_bytes():
                body += piece
                if len(body) > ANSWER_BYTES_MAX:
                    raise Unreachable(f"{url} answers more than {ANSWER_BYTES_MAX} bytes")
        if answer.status_code != 200:
            raise Unreachable(f"{url} answers {answer.status_code}")
        value = json.loads(body)
    except (httpx.HTTPError, ValueError, InvalidInput) as error:
        raise Unreachable(f"the OpenID provider does not answer at {url[:200]}: {error}") from None
    if not isinstance(value, dict):
        raise Unreachable(f"{url} answers no JSON object")
    return value


def role_of(claims: Mapping[str, Any], rules: tuple[Rule, ...]) -> tuple[str, str]:
    """(tenant, role) by the first rule that fits.  An address that the provider did not verify fits nothing.  Raises NotAllowed."""
    for rule in rules:
        value = claims.get(rule.claim)
        values = value if isinstance(value, list) else [value]
        if rule.claim == "email" and claims.get("email_verified") is not True:
            continue
        if rule.has in [one for one in values if isinstance(one, str)]:
            return rule.tenant, rule.role
    raise NotAllowed("you are known to the provider, and no rule of this host lets you in; ask its operator")


def read_provider(path: Path) -> Provider:
    """Raises NotFound, InvalidInput with the position."""
    text = text_in(path, "no such file; it says whose word is taken at login")
    top = read_yaml(text, str(path)).fields(("login",))
    if "login" not in top:
        raise InvalidInput("has no `login:`", str(path))
    fields = top["login"].fields(("issuer", "client_id", "scope", "name", "leeway", "rules"))
    for needed in ("issuer", "client_id", "rules"):
        if needed not in fields:
            raise top["login"].error(f"needs `{needed}`")
    return Provider(
        fields["issuer"].parsed(_checked_issuer),
        fields["client_id"].text(),
        fields["scope"].text() if "scope" in fields else "openid profile email",
        fields["name"].text() if "name" in fields else "sub",
        fields["leeway"].parsed(parse_duration_s) if "leeway" in fields else 60.0,
        tuple(_rule(item) for item in fields["rules"].items()),
    )


def _checked_issuer(text: str) -> str:
    check_issuer(text)
    return text


def _rule(value: Value) -> Rule:
    fields = value.fields(("claim", "has", "tenant", "role"))
    for needed in ("claim", "has", "role"):
        if needed not in fields:
            raise value.error(f"needs `{needed}`")
    role, tenant = fields["role"].choice(ROLES), fields["tenant"].text() if "tenant" in fields else ""
    if (role == "user") != bool(tenant) and role != "viewer":
        raise value.error("a user is of one tenant, an operator of none")
    return Rule(fields["claim"].text(), fields["has"].text(), tenant, role)
