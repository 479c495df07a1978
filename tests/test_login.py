"""People log in with a password: what a session opens, what ends it, and what is kept of it."""

import asyncio
import base64
import hashlib
import hmac
import json
import os
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from argon2 import PasswordHasher
from cryptography.hazmat.primitives import serialization
from fastapi import FastAPI, Request

from api_site import CHEAP_HASHES, TINY, TOKEN, caller, served, submit
from qipan import sessions
from qipan.api import Server, make_app
from qipan.api.gate import TENANTS_MAX, Gate, Rate
from qipan.api.listen import Listen, certificate_for
from qipan.api.login import TRIES, counted
from qipan.boards import verify_store
from qipan.cli import people as people_commands
from qipan.cli.run import operator_token
from qipan.client import AsyncClient, Client
from qipan.errors import InvalidInput, NotAllowed
from qipan.host import Host
from qipan.login import ACCESS_S, Bearer, People, Signer, allows

PASSWORD = "correct horse battery"
POET = {"user": "li", "role": "user", "tenant": "poets", "password": PASSWORD}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with served(tmp_path_factory.mktemp("l")) as host:
        yield host


@pytest.fixture(scope="module")
def api(host: Host) -> Iterator[httpx.Client]:
    with caller(host) as client:
        yield client


@pytest.fixture
def li(api: httpx.Client, request: pytest.FixtureRequest) -> str:
    """A user of the poets, of this test alone."""
    name = f"li.{abs(hash(request.node.name))}"
    assert api.post("/users", json={**POET, "user": name}).status_code == 201
    return name


#: everyone's tries as the server counts them, with half of its burst: so the tests of this file together never use that up
EVERYONES = Rate(TRIES[0], (TRIES[1][0], TRIES[1][1] / 2))


def log_in(api: httpx.Client, user: str, password: str = PASSWORD) -> httpx.Response:
    while (wait_s := EVERYONES.wait_s("", time.monotonic())) > 0:
        time.sleep(wait_s)
    return api.post("/login", json={"user": user, "password": password})


def refresh(api: httpx.Client, token: str) -> httpx.Response:
    return api.post("/login/refresh", json={"refresh_token": token})


def what_was_noted(host: Host, after: int = 0) -> list[str]:
    return [fact.what for _, _, fact in host.noted(["person_noted"], after, 1000)]


def test_a_session_opens_what_its_role_and_tenant_may_and_no_more(host, api, li):
    submit(api)
    grant = log_in(api, li).json()
    with caller(host, grant["access_token"]) as poet:
        assert poet.get("/whoami").json() == {"user": li, "tenant": "poets", "role": "user", "board": "cn"}
        assert poet.get("/tasks/tiny-1").json()["tenant"] == "poets"
        assert submit(poet, TINY.replace("name: tiny", "name: own")).status_code == 201
        assert poet.post("/tasks/own-1/cancel").status_code == 200
        for method, path in [("GET", "/users"), ("POST", "/users"), ("GET", "/whatif"), ("POST", "/people/poets/key")]:  # fmt: skip
            assert poet.request(method, path, json=POET).status_code == 403, path
    assert host.noted(["cancel_requested"], 0, 10)[0][2].by == li


def test_a_viewer_reads_and_changes_nothing(host, api):
    submit(api, TINY.replace("name: tiny", "name: seen"))
    api.post("/users", json={**POET, "user": "su", "role": "viewer"})
    with caller(host, log_in(api, "su").json()["access_token"]) as viewer:
        assert viewer.get("/tasks/seen-1").status_code == 200
        assert viewer.post("/plan", json={"text": TINY}).status_code == 200
        for path in ("/tasks/seen-1/cancel", "/tasks/seen-1/budget?max_cost=2 CNY", "/webhooks?url=https://a.example/"):  # fmt: skip
            assert viewer.post(path).status_code == 403
        assert submit(viewer).status_code == 403
    assert host.queries.task("seen-1").state != "cancelled"


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_what_no_rule_names_is_refused(method):
    assert allows("operator", method, "/v1/anything")
    assert not allows("", method, "/v1/tasks")
    assert not allows("nobody", method, "/v1/plan")
    assert allows("viewer", method, "/v1/tasks") == (method in ("GET", "HEAD"))
    assert not allows("user", method, "/v1/users/li")


def test_a_wrong_password_and_an_unknown_user_are_told_alike_and_take_alike(host, api, li):
    wrong, unknown = log_in(api, li, "x" * 12), log_in(api, "nobody-here")
    assert wrong.status_code == unknown.status_code == 401
    assert wrong.json() == unknown.json()
    people = People(host, Signer(host.folder / "login.key", host.audience))
    people.set_password(li, PASSWORD, "here")

    def cost_s(user: str) -> float:
        began_s = time.process_time()
        with pytest.raises(NotAllowed):
            people.log_in(user, "x" * 12, "here")
        return time.process_time() - began_s

    known = statistics.median(cost_s(li) for _ in range(3))
    assert known / statistics.median(cost_s("nobody-here") for _ in range(3)) == pytest.approx(1.0, abs=0.5)
    assert known > 0.01, "an Argon2 hash costs tens of milliseconds"


def test_passwords_and_refresh_tokens_are_not_in_the_store(host, api, li):
    grant = log_in(api, li).json()
    api.post(f"/users/{li}/password", json={"password": "another battery"})
    host.stores["cn"].db.run("PRAGMA wal_checkpoint(TRUNCATE)")
    kept = b"".join(path.read_bytes() for path in host.folder.iterdir() if path.is_file())
    assert b"$argon2id$v=19$" in kept
    family, turn = grant["refresh_token"].removeprefix("qr_")[:22], grant["refresh_token"][-43:]
    for secret in (PASSWORD, "another battery", family, turn, grant["access_token"]):
        assert secret.encode() not in kept


def test_a_refresh_token_is_good_once_and_its_second_use_ends_the_session(host, api, li):
    first = log_in(api, li).json()
    second = refresh(api, first["refresh_token"]).json()
    assert second["refresh_token"] != first["refresh_token"]
    with caller(host, second["access_token"]) as poet:
        assert poet.get("/whoami").status_code == 200
        stolen = refresh(api, first["refresh_token"])
        assert stolen.status_code == 401
        assert "used before" in stolen.json()["detail"]
        assert refresh(api, second["refresh_token"]).status_code == 401, "the whole family is ended"
        assert poet.get("/whoami").status_code == 401, "and with it the access tokens, at once"
    assert what_was_noted(host)[-1] == "session revoked"


def test_a_forged_refresh_token_ends_nobodys_session_and_writes_nothing(host, api, li):
    grant, before = log_in(api, li).json(), host.store.fact_count()
    assert refresh(api, f"qr_{'A' * 22}_{'B' * 43}").status_code == 401
    assert host.store.fact_count() == before
    assert refresh(api, grant["refresh_token"]).status_code == 200


def test_logging_out_ends_the_session_and_no_other(api, li):
    one, other = log_in(api, li).json(), log_in(api, li).json()
    assert api.post("/logout", json={"refresh_token": one["refresh_token"]}).status_code == 200
    assert refresh(api, one["refresh_token"]).status_code == 401
    assert refresh(api, other["refresh_token"]).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("DELETE", "", None), ("DELETE", "/sessions", None), ("POST", "/password", {"password": "x" * 12})],
)  # fmt: skip
def test_what_ends_all_sessions_of_a_user(host, api, li, method, path, body):
    grant = log_in(api, li).json()
    assert api.request(method, f"/users/{li}{path}", json=body).status_code == 200
    assert refresh(api, grant["refresh_token"]).status_code == 401
    with caller(host, grant["access_token"]) as poet:
        assert poet.get("/whoami").status_code == 401


def test_ones_own_password_is_changed_with_the_old_one(host, api, li):
    with caller(host, log_in(api, li).json()["access_token"]) as poet:
        assert poet.post("/users/me/password", json={"password": "y" * 12, "old": "x" * 12}).status_code == 403  # fmt: skip
        assert poet.post("/users/me/password", json={"password": "y" * 12}).status_code == 400
        assert poet.post("/users/me/password", json={"password": "y" * 12, "old": PASSWORD}).status_code == 200  # fmt: skip
    assert log_in(api, li, "y" * 12).status_code == 200


def test_old_passwords_are_not_guessed_faster_than_logins(host, api, li):
    with caller(host, log_in(api, li).json()["access_token"]) as poet:
        guesses = [poet.post("/users/me/password", json={"password": "y" * 12, "old": f"guess {number:06}"}) for number in range(6)]  # fmt: skip
    assert [guess.status_code for guess in guesses] == [403] * 4 + [429] * 2, (
        "the login was the first of five"
    )
    assert log_in(api, li).status_code == 429


def test_an_address_that_asks_too_often_keeps_no_other_out(host, api, li):
    people = People(host, Signer(host.folder / "login.key", host.audience), None, CHEAP_HASHES)
    app = make_app(host, TOKEN, Rate((1.0, 50.0)), people)

    async def asked() -> None:
        def from_(address: str) -> httpx.AsyncClient:
            line = httpx.ASGITransport(app=app, client=(address, 1))
            return httpx.AsyncClient(transport=line, base_url="http://qipan/v1")

        async with from_("203.0.113.6") as noisy, from_("192.0.2.7") as honest:
            for number in range(40):
                last = await noisy.post("/login", json={"user": f"x{number}", "password": "x" * 12})
            assert last.status_code == 429
            assert (await honest.post("/login", json={"user": li, "password": PASSWORD})).status_code == 200
            for _ in range(20):
                last = await noisy.get("/login")
            assert last.status_code == 429
            assert (await honest.get("/login")).status_code == 200

    asyncio.run(asked())


def test_whoever_tries_too_often_waits_and_others_do_not(api, li):
    api.post("/users", json={**POET, "user": "du"})
    answers = [log_in(api, li, "x" * 12)]
    while answers[-1].status_code == 401 and len(answers) < 12:  # five, and one more for every ten seconds
        answers.append(log_in(api, li, "x" * 12))
    assert answers[-1].status_code == 429
    assert len(answers) >= 6
    assert int(answers[-1].headers["retry-after"]) > 0
    assert log_in(api, li).status_code == 429, "the right password, too: else it could be tried on"
    assert log_in(api, "du").status_code == 200


def test_the_log_tells_who_came_and_the_store_still_replays(host, api, li):
    after = host.store.fact_count()
    grant = log_in(api, li).json()
    log_in(api, li, "x" * 12)
    refresh(api, grant["refresh_token"])
    assert what_was_noted(host, after) == ["logged in", "refused"]
    lines = api.get("/users/log", params={"after": after - 1}).json()["log"]
    assert [line["fact"]["source"] for line in lines] == ["the user", "this machine", "this machine"]
    assert {line["fact"]["user"] for line in lines} == {li}
    assert sum(verify_store(host.folder).values()) > 0


def test_the_log_shows_its_end_and_any_page_of_it(host, api, li, capsys, monkeypatch):
    for _ in range(3):
        log_in(api, li)
    lines = api.get("/users/log", params={"limit": 2}).json()["log"]
    assert lines == api.get("/users/log", params={"after": 0, "limit": 1000}).json()["log"][-2:]
    assert lines[1:] == api.get("/users/log", params={"after": lines[0]["fact_id"]}).json()["log"]
    monkeypatch.setattr(people_commands, "LINES_MAX", 2)
    people_commands.log(store=host.folder)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == [str(line["fact_id"]) for line in lines]


@pytest.mark.parametrize(
    "wrong",
    [
        {"user": "../x"}, {"user": "Li"}, {"user": "me"}, {"user": "a" * 65}, {"role": "root"}, {"tenant": "bank"},
        {"tenant": ""}, {"role": "operator"}, {"password": "short"}, {"password": "x" * 300}, {"admin": "yes"},
    ],
    ids=str,
)  # fmt: skip
def test_a_user_that_cannot_be(api, wrong):
    before = api.get("/users").text
    assert 400 <= api.post("/users", json={**POET, "user": "new", **wrong}).status_code < 500
    assert api.get("/users").text == before


# ---- access tokens -------------------------------------------------------------------------------------------------------

WHO = Bearer("li", "poets", "user", "s1")


def signer(folder: Path, audience: str = "qipan:cn") -> Signer:
    return Signer(folder / "login.key", audience)


def test_an_access_token_is_good_for_five_minutes_at_one_board_that_signed_it(tmp_path):
    here = signer(tmp_path)
    token = here.sign(WHO, 1e9)
    assert ACCESS_S == 300
    assert here.read(token, 1e9 + 299) == WHO
    assert signer(tmp_path).read(token, 1e9) == WHO, "the key is kept"
    (tmp_path / "other").mkdir()
    for reader, now_s in [(here, 1e9 + 300), (here, 1e9 - 60), (signer(tmp_path, "qipan:dc1"), 1e9), (signer(tmp_path / "other"), 1e9)]:  # fmt: skip
        with pytest.raises(NotAllowed):
            reader.read(token, now_s)
    assert (tmp_path / "login.key").stat().st_mode & 0o777 == 0o600


def forged(folder: Path) -> dict[str, str]:
    here = signer(folder)
    good = here.sign(WHO, 1e9)
    head, _, _ = good.split(".")
    claims = jwt.decode(good, options={"verify_signature": False})
    public = here._public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)

    def made(header: dict, changed: dict, key: bytes = b"") -> str:
        parts = [base64.urlsafe_b64encode(json.dumps(one).encode()).rstrip(b"=") for one in (header, {**claims, **changed})]  # fmt: skip
        mark = hmac.new(key, b".".join(parts), hashlib.sha256).digest() if key else b""
        return b".".join([*parts, base64.urlsafe_b64encode(mark).rstrip(b"=")]).decode()

    own = here._key
    return {
        "no signature": made({"alg": "none", "typ": "at+jwt"}, {}),
        "the public key as a secret": made({"alg": "HS256", "typ": "at+jwt"}, {"role": "operator"}, public),
        "another body": f"{head}.{made({}, {'role': 'operator'}).split('.')[1]}.{good.split('.')[2]}",
        "cut": good[:-2],
        "of another type": jwt.encode(claims, own, "EdDSA", headers={"typ": "JWT"}),
        "without end": jwt.encode({k: v for k, v in claims.items() if k != "exp"}, own, "EdDSA", headers={"typ": "at+jwt"}),
        "an end that is a word": jwt.encode({**claims, "exp": "never"}, own, "EdDSA", headers={"typ": "at+jwt"}),
        "two audiences, ours not": jwt.encode({**claims, "aud": ["a", "b"]}, own, "EdDSA", headers={"typ": "at+jwt"}),
        "an unknown role": jwt.encode({**claims, "role": "root"}, own, "EdDSA", headers={"typ": "at+jwt"}),
        "long": good + "A" * 3000,
        "a key by address": made({"alg": "RS256", "typ": "at+jwt", "jku": "https://evil.example/keys"}, {}),
    }  # fmt: skip


def test_forged_access_tokens_are_refused(host):
    for name, token in forged(host.folder).items():
        with pytest.raises(NotAllowed):
            signer(host.folder).read(token, 1e9)
        with caller(host, token) as stranger:
            assert stranger.get("/tasks").status_code == 401, name


# ---- from another host: HTTPS and the command line ---------------------------------------------------------------------------


def test_a_certificate_and_a_key_that_are_no_pair_are_told_before_anything_listens(host, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    here = Listen("127.0.0.1", 0)
    certificate, key = certificate_for(here, tmp_path / "a")
    _, stranger = certificate_for(here, tmp_path / "b")
    assert certificate_for(Listen("127.0.0.1", 0, certificate, key), tmp_path) == (certificate, key)
    locked = tmp_path / "locked.key"
    secret = serialization.BestAvailableEncryption(b"secret")
    plain = serialization.load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(
        plain.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    )
    for wrong in (stranger, certificate, locked):
        with pytest.raises(InvalidInput, match="--api-key"):
            Server(host, tmp_path / "s", TOKEN, None, Listen("127.0.0.1", 0, certificate, wrong))
    assert not (tmp_path / "s").exists()


def test_the_boards_own_certificate_is_made_anew_when_it_cannot_be_read(tmp_path):
    for name, content in [("api.pem", b""), ("api.pem", b"damaged"), ("api.key", b"")]:
        certificate_for(Listen("127.0.0.1", 0), tmp_path)
        (tmp_path / name).write_bytes(content)
        pair = certificate_for(Listen("127.0.0.1", 0), tmp_path)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*pair)


def qipan(folder: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config"), "XDG_STATE_HOME": str(folder / "state")}
    for name in ("QIPAN_STORE", "QIPAN_SERVER", "QIPAN_TOKEN"):
        env.pop(name, None)
    command = [sys.executable, "-m", "qipan.cli", *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=env, timeout=60)


@pytest.mark.slow
def test_an_empty_token_opens_nothing_and_is_made_anew(tmp_path):
    (tmp_path / "token").touch(0o600)
    with pytest.raises(InvalidInput, match="empty"):
        Gate(FastAPI(), "", Rate(), lambda _token: Bearer("", "", "", ""))
    made = operator_token(tmp_path)
    assert len(made) > 30
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert operator_token(tmp_path) == made, "made once"
    assert [path.name for path in tmp_path.iterdir()] == ["token"]


def test_a_person_elsewhere_logs_in_works_and_logs_out(tmp_path):
    store = tmp_path / "board"
    store.mkdir()
    with served(store, listen=Listen("127.0.0.1", 0)) as host, caller(host) as api:
        api.post("/users", json=POET)
        url, ca = (store / "url").read_text(), str(store / "api.pem")
        refused = qipan(tmp_path, "login", url, "-u", "li", "--password-stdin", stdin=PASSWORD)
        assert refused.returncode == 106, "a server whose certificate nobody vouches for gets no password"
        assert "certificate" in refused.stderr.lower()
        login = ("login", url, "-u", "li", "--ca", ca, "--password-stdin")
        assert qipan(tmp_path, *login, stdin="x" * 12).returncode == 107
        done = qipan(tmp_path, *login, stdin=PASSWORD)
        assert done.returncode == 0, done.stderr
        kept = tmp_path / "config" / "qipan" / "sessions.json"
        assert kept.stat().st_mode & 0o777 == 0o600
        held = json.loads(kept.read_text())
        held["sessions"][url]["until_s"] = 0  # five minutes later
        kept.write_text(json.dumps(held))
        (tmp_path / "task.yaml").write_text(TINY)
        told = qipan(tmp_path, "submit", str(tmp_path / "task.yaml"), "--json")
        assert json.loads(told.stdout)["task_id"] == "tiny-1", told.stderr
        assert host.queries.task("tiny-1").tenant == "poets"
        assert json.loads(qipan(tmp_path, "whoami", "--json").stdout) == {"user": "li", "tenant": "poets", "role": "user", "server": url}  # fmt: skip
        assert qipan(tmp_path, "logout").returncode == 0
        assert qipan(tmp_path, "ps", "--store", str(store)).returncode == 0, "the owner of the store needs no login"  # fmt: skip
        gone = qipan(tmp_path, "whoami")
        assert gone.returncode == 106, "without a login commands go to one's own store"


def test_many_processes_may_renew_one_session_at_once(host, api, li, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    after, grant = host.store.fact_count(), log_in(api, li).json()
    name = f"unix:{host.folder.resolve()}"
    with sessions.locked():
        sessions.keep(name, {**grant, "until_s": 0})
    seen: list[str] = []

    def ask() -> None:
        seen.append(Client(host.folder).call("GET", "/whoami")["user"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [li] * 4
    assert "session revoked" not in what_was_noted(host, after)


def test_many_requests_of_one_loop_renew_a_session_once(host, api, li, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    grant, seen = log_in(api, li).json(), []
    with sessions.locked():
        sessions.keep(f"unix:{host.folder.resolve()}", {**grant, "until_s": 0})

    async def ask() -> None:
        client = AsyncClient(host.folder)
        answers = await asyncio.gather(*(client.call("GET", "/whoami") for _ in range(3)))
        await client.close()
        seen.extend(answer["user"] for answer in answers)

    loop = threading.Thread(target=lambda: asyncio.run(ask()), daemon=True)
    loop.start()
    loop.join(10)
    assert seen == [li] * 3, "a coroutine that waits for the lock must not stop the one that holds it"


def test_made_up_names_make_nobodys_tries_forgotten():
    rate = Rate(*TRIES)
    while rate.wait_s("user li", 0.0) == 0:
        pass
    for number in range(TENANTS_MAX + 10):
        rate.wait_s(f"user x{number}", 1.0)
    assert rate.wait_s("user li", 1.0) > 0
    assert len(rate._left) <= TENANTS_MAX + 1


def test_a_name_as_long_as_a_body_is_not_kept(api):
    rate, asked = Rate(*TRIES), Request({"type": "http", "client": None})
    counted(rate, asked, "tries to log in", "x" * 30_000)
    assert max(map(len, rate._left)) < 100


def test_who_knew_the_old_password_does_not_undo_the_operators_new_one(host, li):
    """`Meanwhile`: the operator sets a new password while the old one is looked at."""

    class Meanwhile(PasswordHasher):
        def verify(self, hashed: str, password: str) -> Any:
            found = super().verify(hashed, password)
            people.set_password(li, "the operator's own choice", "the operator")
            return found

    people = People(host, Signer(host.folder / "login.key", host.audience), None, Meanwhile(1, 64, 1))
    people.set_password(li, PASSWORD, "the operator")
    with pytest.raises(NotAllowed, match="old password"):
        people.set_password(li, "whoever knew the old one", li, PASSWORD)
    people._hasher = CHEAP_HASHES
    assert people.log_in(li, "the operator's own choice", "here").user == li


def test_a_stream_tells_nothing_more_once_its_session_is_ended(host, api, li):
    with caller(host, log_in(api, li).json()["access_token"]) as poet:
        name = submit(poet).json()["task_id"]
        with poet.stream("GET", f"/tasks/{name}/stream") as answer:
            lines = answer.iter_lines()
            assert "task_submitted" in next(line for line in lines if line.startswith("data: "))
            api.delete(f"/users/{li}/sessions")
            api.post(f"/tasks/{name}/cancel")
            for line in lines:
                assert "cancel_requested" not in line
