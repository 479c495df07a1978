"""Logging in by an OpenID provider: Authlib's server with its device flow, on a real port."""

import base64
import hashlib
import hmac
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import jwt
import pytest
from joserfc.jwk import RSAKey

from api_site import caller, consoled, served
from oidc_provider import CLIENT
from oidc_provider import Provider as Authlib
from qipan import sessions
from qipan.console.visitors import FLOWS_A_MINUTE
from qipan.errors import InvalidInput, NotAllowed, Unreachable
from qipan.host import Host
from qipan.login.oidc import Issuer, Provider, Rule, described_by, read_provider, role_of

RULES = (
    Rule("groups", "operators", "", "operator"),
    Rule("groups", "poets", "poets", "user"),
    Rule("email", "su@example.org", "", "viewer"),
)


@pytest.fixture(scope="module")
def authlib() -> Iterator[Authlib]:
    made = Authlib()
    made.people = {
        "li": {"preferred_username": "Li Bai", "groups": ["poets", "drinkers"]},
        "su": {"preferred_username": "su", "email": "su@example.org", "email_verified": True},
        "du": {"preferred_username": "du", "email": "su@example.org", "email_verified": False},
    }
    yield made
    made.close()


@pytest.fixture(scope="module")
def provider(authlib: Authlib) -> Provider:
    return Provider(authlib.issuer, CLIENT, "openid profile", "preferred_username", 60.0, RULES)


@pytest.fixture(scope="module")
def host(provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with served(tmp_path_factory.mktemp("o"), provider) as host:
        yield host


def log_in(host: Host, id_token: str) -> httpx.Response:
    with caller(host) as api:
        return api.post("/login/oidc", json={"id_token": id_token})


def test_a_person_approves_a_code_in_a_browser_and_is_in(host, authlib):
    with caller(host) as api:
        door = api.get("/login").json()["oidc"]
    assert door == {"issuer": authlib.issuer, "client_id": CLIENT, "scope": "openid profile"}
    shown: list[str] = []
    waited_s: list[float] = []

    def wait(seconds: float) -> None:
        waited_s.append(seconds)
        if len(waited_s) == 3:  # twice nobody had answered yet
            authlib.approve(shown[1], "li")

    token = sessions.device_flow(door, lambda *said: shown.extend(said), wait)
    assert shown[0] == f"{authlib.issuer}/activate"
    assert shown[1] in shown[2]
    assert waited_s == [1.0, 1.0, 1.0]
    grant = log_in(host, token).json()
    assert (grant["user"], grant["tenant"], grant["role"]) == ("li-bai", "poets", "user")
    with caller(host, grant["access_token"]) as poet:
        assert [one["tenant"] for one in poet.get("/people").json()["people"]] == ["poets"]
        again = poet.post("/login/refresh", json={"refresh_token": grant["refresh_token"]}).json()
        assert again["role"] == "user"
    assert again["session_until_s"] - time.time() < 12 * 3600 + 1


def test_a_person_who_refuses_and_a_code_that_is_over_end_the_login(host, authlib):
    door = {"issuer": authlib.issuer, "client_id": CLIENT, "scope": "openid"}
    shown: list[str] = []
    with pytest.raises(NotAllowed, match="denied"):
        sessions.device_flow(door, lambda *said: shown.extend(said), lambda _: authlib.approve(shown[1], "li", yes=False))  # fmt: skip
    with pytest.raises(NotAllowed, match="refuses"):
        sessions.device_flow({**door, "client_id": "stranger"}, lambda *_: None, lambda _: None)


@pytest.fixture(scope="module")
def console(host: Host) -> Iterator[str]:
    with consoled(host, "the-key") as address:
        yield address


def begun_at(browser: httpx.Client) -> str:
    """The code that the console shows."""
    assert browser.post("/login/code").headers["location"] == "/login/code"
    shown = browser.get("/login/code")
    assert 'http-equiv="refresh" content="1"' in shown.text
    code = re.search(r"<strong>(.+)</strong>", shown.text)
    assert code
    assert code[1] in shown.text.split("/activate")[1], "the link brings it along"
    return code[1]


def test_a_person_logs_in_at_the_console_with_the_provider(console, authlib):
    with httpx.Client(base_url=console, timeout=60) as browser, httpx.Client(base_url=console) as other:
        assert authlib.issuer in browser.get("/login").text
        code = begun_at(browser)
        assert browser.get("/login/code").status_code == 200, "nobody has answered yet"
        authlib.approve(code, "li")
        assert other.get("/login/code").status_code == 403, "who has no part in it is not let in by it"
        end_s = time.monotonic() + 20
        while (answer := browser.get("/login/code")).status_code == 200:
            assert time.monotonic() < end_s
            time.sleep(0.2)
        assert answer.headers["location"] == "/"
        assert "li-bai" in browser.get("/tasks").text
        assert browser.get("/login/code").status_code == 403, "the code is used up"
        assert other.get("/tasks").headers["location"] == "/enter"


def test_a_person_who_refuses_the_code_is_told_so_at_the_console(console, authlib):
    with httpx.Client(base_url=console, timeout=60) as browser:
        authlib.approve(begun_at(browser), "li", yes=False)
        time.sleep(1.1)
        refused = browser.get("/login/code")
        assert refused.status_code == 403
        assert "denied" in refused.text
        assert browser.get("/login/code").status_code == 403
        assert browser.get("/tasks").headers["location"] == "/enter"


def test_who_begins_logins_at_the_console_over_and_over_is_told_to_wait(host):
    with consoled(host, "a-key") as address, httpx.Client(base_url=address, timeout=60) as browser:
        answers = [browser.post("/login/code").status_code for _ in range(FLOWS_A_MINUTE + 1)]
    assert answers[0] == 303
    assert answers[-1] == 429


BEGUN = {"device_code": "d", "user_code": "c", "verification_uri": "https://id/activate"}


@pytest.mark.parametrize(
    ("begun", "said"),
    [
        ({"device_code": "d"}, "not as RFC 8628 says"),
        ({**BEGUN, "interval": "soon"}, "not as RFC 8628 says"),
        ({**BEGUN, "verification_uri": "javascript:alert(1)"}, "no web page"),
        ({**BEGUN, "verification_uri_complete": "file:///etc/passwd"}, "no web page"),
        ({**BEGUN, "verification_uri": "https://[::1"}, "no web page"),
        ({**BEGUN, "verification_uri_complete": "https://id:²/activate"}, "no web page"),
    ],
)
def test_a_provider_that_begins_a_login_wrongly_is_told_of(monkeypatch, begun, said):
    with pytest.raises(NotAllowed, match=said):
        flow_of(monkeypatch, begun)


@pytest.mark.parametrize("issuer", ["https://[::1", "https://id:²", "https://id:99999", "https://\udcff"])
def test_a_provider_whose_address_is_malformed_is_told_of(issuer):
    with pytest.raises((NotAllowed, Unreachable), match=r"no address|does not answer"):
        sessions.DeviceFlow({"issuer": issuer, "client_id": "qipan", "scope": "openid"})


def test_looks_are_a_second_to_a_minute_apart_and_further_when_the_provider_says_so(monkeypatch):
    told = [
        flow_of(monkeypatch, {**BEGUN, "interval": stated}).wait_s for stated in (0, 7, 1e9, float("nan"))
    ]
    assert told == [1.0, 7.0, 60.0, 1.0]
    flow = flow_of(monkeypatch, BEGUN)
    monkeypatch.setattr(sessions, "_told", lambda *_: {"error": "slow_down"})
    assert flow.look() is None
    assert flow.wait_s == 10.0


def flow_of(monkeypatch, begun: dict[str, object]) -> sessions.DeviceFlow:
    """Of a provider that answers so."""
    ends = {"device_authorization_endpoint": "https://id/device", "token_endpoint": "https://id/token"}
    described = {"issuer": "https://id", **ends}
    monkeypatch.setattr(sessions, "_told", lambda _, method, *__: described if method == "GET" else begun)
    return sessions.DeviceFlow({"issuer": "https://id", "client_id": "qipan", "scope": "openid"})


def test_an_id_token_is_taken_once(host, authlib):
    token = authlib.id_token_of("li")
    assert log_in(host, token).status_code == 200
    refused = log_in(host, token)
    assert refused.status_code == 401
    assert "used before" in refused.json()["detail"]
    assert log_in(host, f"{token}==").status_code == 401, "the same signature, written otherwise"


def test_who_came_by_a_provider_changes_no_password_of_a_namesake(host, authlib):
    namesake = {"user": "li-bai", "tenant": "poets", "role": "user", "password": "correct horse battery"}
    grant = log_in(host, authlib.id_token_of("li")).json()
    with caller(host) as api, caller(host, grant["access_token"]) as poet:
        assert api.post("/users", json=namesake).status_code == 201
        refused = poet.post("/users/me/password", json={"password": "y" * 12, "old": namesake["password"]})
        assert refused.status_code == 403
        assert authlib.issuer in refused.json()["detail"]
        assert api.post("/login", json={"user": "li-bai", "password": namesake["password"]}).status_code == 200  # fmt: skip


def test_an_address_that_nobody_verified_lets_nobody_in(host, authlib):
    assert log_in(host, authlib.id_token_of("su")).json()["role"] == "viewer"
    refused = log_in(host, authlib.id_token_of("du"))
    assert refused.status_code == 401
    assert "no rule" in refused.json()["detail"]


def test_the_first_rule_that_fits_holds():
    assert role_of({"groups": ["poets", "operators"]}, RULES) == ("", "operator")
    assert role_of({"groups": "poets"}, RULES) == ("poets", "user")
    for claims in ({}, {"groups": None}, {"groups": {"poets": True}}, {"groups": ["Poets"]}, {"email": ["su@example.org"]}):  # fmt: skip
        with pytest.raises(NotAllowed):
            role_of(claims, RULES)


NOW = time.time()  # by the clock of these tests


def made(authlib: Authlib, key: RSAKey | None = None, kid: str = "k1", **changed: object) -> str:
    now_s = int(NOW)
    claims = {"iss": authlib.issuer, "aud": CLIENT, "sub": "li", "preferred_username": "li", "groups": ["poets"],
              "iat": now_s, "exp": now_s + 600, "jti": str(time.time_ns()), **changed}  # fmt: skip
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, (key or authlib.key).as_pem(private=True), "RS256", headers={"kid": kid})


WRONG = {
    "another audience": {"aud": "other"},
    "another issuer": {"iss": "https://evil.example"},
    "another party": {"azp": "other"},
    "several audiences, no party": {"aud": [CLIENT, "other"]},
    "over": {"exp": NOW - 61, "iat": NOW - 700},
    "from the future": {"iat": NOW + 120},
    "not yet": {"nbf": NOW + 300},
    "no end": {"exp": None},
    "an end that is a word": {"exp": "later"},
    "an end that is true": {"exp": True},
    "nobody": {"sub": None},
    "no name": {"preferred_username": None},
    "of another tenant's group": {"groups": ["editors"]},
}


@pytest.mark.parametrize("changed", WRONG.values(), ids=WRONG)
def test_an_id_token_that_is_not_for_us_or_not_now(authlib, provider, changed):
    issuer = Issuer(provider)
    assert issuer.person_of(made(authlib), NOW)[:3] == ("li", "poets", "user")
    with pytest.raises(NotAllowed):
        issuer.person_of(made(authlib, **changed), NOW)


def test_a_clock_may_differ_by_the_leeway_and_no_more(authlib, provider):
    issuer = Issuer(provider)
    issuer.claims_of(made(authlib, iat=NOW + 55), NOW)
    issuer.claims_of(made(authlib, iat=NOW - 700, exp=NOW - 55), NOW)
    with pytest.raises(NotAllowed):
        Issuer(replace(provider, leeway_s=10.0)).claims_of(made(authlib, iat=NOW + 55), NOW)


def test_signatures_that_are_none_or_anybodys(authlib, provider, host):
    issuer = Issuer(provider)
    stranger = RSAKey.generate_key(2048)
    public = authlib.key.as_pem(private=False)
    body = jwt.decode(made(authlib), options={"verify_signature": False})

    def signed(alg: str, key: bytes) -> str:
        parts = b".".join(base64.urlsafe_b64encode(json.dumps(one).encode()).rstrip(b"=") for one in ({"alg": alg, "kid": "k1"}, body))  # fmt: skip
        mark = hmac.new(key, parts, hashlib.sha256).digest() if key else b""
        return (parts + b"." + base64.urlsafe_b64encode(mark).rstrip(b"=")).decode()

    for token in (made(authlib, stranger), made(authlib, kid="k2"), signed("none", b""), signed("HS256", public), "", "a.b.c", made(authlib)[:-8], "x" * 20_000):  # fmt: skip
        with pytest.raises(NotAllowed):
            issuer.person_of(token, NOW)
        assert log_in(host, token).status_code in (400, 401)


def test_a_new_key_of_the_provider_is_asked_for_and_not_for_every_guess(authlib, provider, monkeypatch):
    issuer, asked = Issuer(provider), []
    fetch = issuer._fetched
    monkeypatch.setattr(issuer, "_fetched", lambda: asked.append(1) or fetch())
    issuer.claims_of(made(authlib), NOW)
    for _ in range(5):
        with pytest.raises(NotAllowed):
            issuer.claims_of(made(authlib, kid="guess"), NOW + 1)
    assert len(asked) == 1
    old, authlib.key = authlib.key, RSAKey.generate_key(2048, {"kid": "k2", "use": "sig", "alg": "RS256"})
    try:
        assert issuer.claims_of(made(authlib, kid="k2"), NOW + 31)["sub"] == "li"
        assert len(asked) == 2
    finally:
        authlib.key = old


def test_a_provider_that_is_another_or_away(authlib, provider):
    with pytest.raises(NotAllowed, match="calls itself"):
        described_by(authlib.issuer.replace("127.0.0.1", "localhost"))
    with pytest.raises(Unreachable):
        Issuer(replace(provider, issuer="http://127.0.0.1:1")).claims_of(made(authlib), NOW)


def test_a_provider_that_is_away_is_not_asked_for_every_login(authlib, provider, monkeypatch):
    """Each who waits for it holds a thread of the board."""
    issuer, asked = Issuer(provider), []

    def away() -> dict[str, object]:
        asked.append(1)
        raise Unreachable("the OpenID provider does not answer")

    back = issuer._fetched
    monkeypatch.setattr(issuer, "_fetched", away)
    for _ in range(5):
        with pytest.raises(Unreachable, match="does not answer"):
            issuer.claims_of(made(authlib), NOW)
    assert len(asked) == 1
    monkeypatch.setattr(issuer, "_fetched", back)
    with pytest.raises(Unreachable):
        issuer.claims_of(made(authlib), NOW + 29)
    assert issuer.claims_of(made(authlib), NOW + 31)["sub"] == "li"


FILE = """login:
  issuer: https://id.example.org
  client_id: qipan
  leeway: 30s
  rules:
    - {claim: groups, has: poets, tenant: poets, role: user}
"""


def test_the_file_is_read_and_its_mistakes_are_told_with_their_place(tmp_path):
    path = tmp_path / "login.yaml"
    path.write_text(FILE)
    assert read_provider(path) == Provider("https://id.example.org", "qipan", "openid profile email", "sub", 30.0, (Rule("groups", "poets", "poets", "user"),))  # fmt: skip
    for old, new in [("https", "http"), ("role: user", "role: root"), ("tenant: poets, ", ""), ("client_id", "clientid"), ("  rules", "  rule")]:  # fmt: skip
        path.write_text(FILE.replace(old, new))
        with pytest.raises(InvalidInput, match=r"login.yaml:\d+"):
            read_provider(path)


def test_a_key_that_is_no_secret_is_not_taken_as_one(authlib, provider, monkeypatch):
    """A provider that publishes a symmetric key: whoever reads it could sign."""
    issuer = Issuer(provider)
    keys = {"keys": [{"kty": "oct", "kid": "k1", "k": "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0", "alg": "HS256"}]}
    monkeypatch.setattr("qipan.login.oidc._json_at", lambda url: keys if url.endswith("/keys") else {"issuer": provider.issuer, "jwks_uri": f"{provider.issuer}/keys"})  # fmt: skip
    with pytest.raises(NotAllowed, match="no key"):
        issuer.claims_of(made(authlib), NOW)


def test_the_docs_file_is_one_that_is_read(tmp_path):
    block = Path("docs/people.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "login.yaml").write_text(block)
    assert len(read_provider(tmp_path / "login.yaml").rules) == 3
