"""People who log in at the console: what they see is theirs, the board counts the tries, and a session that is over is over."""

import asyncio
import ssl
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api_site import TINY, caller, consoled, served, submit
from qipan.client import AsyncClient, Client
from qipan.console.visitors import IDLE_S, VISITORS_MAX, Session, Visitor, Visitors
from qipan.errors import NotAllowed, OverLimit
from qipan.host import Host
from qipan.workload.site import Tenant

KEY = "the-key"
PASSWORD = "correct horse battery"
PAGES = ("/", "/submit", "/tasks", "/supply", "/prices", "/money", "/decisions", "/people")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with served(tmp_path_factory.mktemp("cl"), tenants=(Tenant("editors", 10**9),)) as host:
        foreign = TINY.replace("name: tiny", "name: foreign").replace("poets", "editors")
        with caller(host) as api:
            assert [submit(api, text).status_code for text in (TINY, foreign)] == [201, 201]
        host.step()
        yield host


@pytest.fixture(scope="module")
def address(host: Host) -> Iterator[str]:
    with consoled(host, KEY) as address:
        yield address


@pytest.fixture
def li(host: Host, request: pytest.FixtureRequest) -> str:
    """A user of the poets, of this test alone."""
    return a_user(host, f"li.{abs(hash(request.node.name))}", "user", "poets")


def a_user(host: Host, name: str, role: str, tenant: str) -> str:
    with caller(host) as api:
        made = {"user": name, "role": role, "tenant": tenant, "password": PASSWORD}
        assert api.post("/users", json=made).status_code == 201
    return name


def browser_of(address: str) -> httpx.Client:
    return httpx.Client(base_url=address, timeout=60)


def log_in(browser: httpx.Client, user: str, password: str = PASSWORD, **headers: str) -> httpx.Response:
    return browser.post("/login", data={"user": user, "password": password}, headers=headers)


@pytest.mark.parametrize("role", ["user", "viewer"])
def test_without_the_key_a_person_sees_every_page_of_their_tenant_and_nothing_of_others(host, address, role):
    user = a_user(host, f"own.{role}", role, "poets")
    with browser_of(address) as browser:
        assert browser.get("/login").status_code == 200
        assert log_in(browser, user).headers["location"] == "/"
        for path in PAGES:
            shown = browser.get(path)
            assert shown.status_code == 200, (path, shown.text)
            assert user in shown.text, "who is logged in"
            assert "foreign-1" not in shown.text
        assert "tiny-1" in browser.get("/tasks").text
        assert browser.get("/tasks/foreign-1").status_code == 404
        submitted = browser.post("/submit", data={"text": TINY.replace("name: tiny", f"name: by-{role}")})
        assert submitted.status_code == {"user": 303, "viewer": 422}[role]
        assert browser.post("/people/poets/key").status_code in (403, 404)


def test_two_people_and_the_owner_at_one_console_share_nothing(host, address, li):
    other = a_user(host, "editor", "user", "editors")
    with browser_of(address) as one, browser_of(address) as two, browser_of(address) as owner:
        log_in(one, li)
        log_in(two, other)
        owner.post("/enter", data={"key": KEY})
        for _ in range(2):  # also what is kept for a second
            assert ("tiny-1" in one.get("/tasks").text, "foreign-1" in one.get("/tasks").text) == (
                True,
                False,
            )
            assert ("tiny-1" in two.get("/tasks").text, "foreign-1" in two.get("/tasks").text) == (
                False,
                True,
            )
            shown = owner.get("/tasks").text
            assert "tiny-1" in shown
            assert "foreign-1" in shown


def test_a_wrong_password_is_told_plainly_and_tries_are_slowed_as_the_board_does(address, li):
    with browser_of(address) as browser:
        browser.cookies.set("language", "en")
        wrong = log_in(browser, li, "not the password")
        assert wrong.status_code == 403
        assert "wrong user or password" in wrong.text
        assert not wrong.cookies
        assert "location" not in wrong.headers
        answers = [log_in(browser, li, "not the password") for _ in range(6)]
        assert answers[-1].status_code == 429
        assert "too many tries" in answers[-1].text
        assert log_in(browser, li).status_code == 429, "the right one, too"
        assert browser.get("/tasks").headers["location"] == "/enter"


def test_what_was_typed_stands_in_the_page_as_text(address):
    with browser_of(address) as browser:
        answer = log_in(browser, '"><script>x</script>')
        assert answer.status_code in (400, 403)
        assert "<script>x" not in answer.text


@pytest.mark.parametrize(
    "headers", [{"origin": "http://evil.example"}, {"origin": "null"}, {"host": "evil.example"}]
)
@pytest.mark.parametrize("path", ["/login", "/logout"])
def test_a_form_of_another_origin_logs_nobody_in_or_out(address, li, path, headers):
    with browser_of(address) as browser:
        log_in(browser, li)
        answer = browser.post(path, data={"user": li, "password": PASSWORD}, headers=headers)
        assert answer.status_code in (403, 421)
        assert "set-cookie" not in answer.headers
        assert browser.get("/tasks").status_code == 200, "the session is as it was"


def test_logging_out_ends_the_session_here_and_at_the_board(host, address, li):
    with browser_of(address) as browser:
        browser.post("/enter", data={"key": KEY})
        made = log_in(browser, li).headers.get_list("set-cookie")
        assert all({"httponly", "samesite=strict"} <= set(one.lower().split("; ")) for one in made)
        cookies = dict(browser.cookies)
        with caller(host) as api:
            assert li in [session["who"]["user"] for session in api.get("/users").json()["sessions"]]
            assert browser.post("/logout").headers["location"] == "/login"
            assert li not in [session["who"]["user"] for session in api.get("/users").json()["sessions"]]
        assert browser.get("/tasks").headers["location"] == "/enter"
    with httpx.Client(base_url=address, cookies=cookies) as copied:
        assert copied.get("/tasks").headers["location"] == "/enter", "a copy of the cookie opens nothing"


def test_a_session_that_an_operator_ends_leads_to_the_login_page(host, address, li):
    with browser_of(address) as browser, caller(host) as api:
        log_in(browser, li)
        assert browser.get("/tasks").status_code == 200
        assert api.delete(f"/users/{li}/sessions").status_code == 200
        time.sleep(1.0)  # what was read a moment ago is shown again for so long
        assert browser.get("/tasks").headers["location"] == "/login"
        assert browser.get("/tasks").headers["location"] == "/enter"


def test_who_logged_in_where_the_owner_was_is_not_the_owner_once_their_session_is_over(host, address, li):
    with browser_of(address) as browser, caller(host) as api:
        browser.post("/enter", data={"key": KEY})
        log_in(browser, li)
        assert api.delete(f"/users/{li}/sessions").status_code == 200
        time.sleep(1.0)
        assert [browser.get("/tasks").headers.get("location") for _ in range(3)] == [
            "/login",
            "/enter",
            "/enter",
        ]


def test_who_enters_with_the_key_is_the_owner_whoever_was_logged_in(host, address, li):
    with browser_of(address) as browser, caller(host) as api:
        log_in(browser, li)
        assert browser.post("/enter", data={"key": KEY}).headers["location"] == "/"
        shown = browser.get("/tasks").text
        assert "foreign-1" in shown
        assert li not in shown
        assert li not in [session["who"]["user"] for session in api.get("/users").json()["sessions"]]


def test_a_token_is_renewed_from_the_session_once_for_all_who_wait(host, li):
    async def act() -> tuple[list[str], Session]:
        client = AsyncClient(host.folder)
        nobody = client.under(httpx.Auth())
        grant = await nobody.call("POST", "/login", {"user": li, "password": PASSWORD})
        session = Session({**grant, "until_s": time.time()}, nobody)
        under = client.under(session)
        told = await asyncio.gather(*(under.call("GET", "/whoami") for _ in range(20)))
        assert session.grant["refresh_token"] != grant["refresh_token"]
        return [one["user"] for one in told], session

    told, session = asyncio.run(act())
    assert told == [li] * 20, "a refresh token used twice would have ended the session"
    assert not session.over


class Late(AsyncClient):
    """Hands over the board's answer when it is told to."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.folder, auth=httpx.Auth())
        self.answered, self.told = asyncio.Event(), asyncio.Event()

    async def call(self, *given: Any, **more: Any) -> Any:
        answer = await super().call(*given, **more)
        self.answered.set()
        await self.told.wait()
        return answer


def test_a_page_that_is_closed_while_its_token_is_renewed_does_not_cost_the_session(host, li):
    async def act() -> tuple[str, Session]:
        client, late = AsyncClient(host.folder), Late(host)
        grant = await client.under(httpx.Auth()).call("POST", "/login", {"user": li, "password": PASSWORD})
        session = Session({**grant, "until_s": 0.0}, late)
        under = client.under(session)
        page = asyncio.create_task(under.call("GET", "/whoami"))
        await late.answered.wait()
        page.cancel()
        await asyncio.wait([page])
        late.told.set()
        return (await under.call("GET", "/whoami"))["user"], session

    told, session = asyncio.run(act())
    assert told == li, "the refresh token is used up: what it was answered must be kept"
    assert not session.over


def test_a_session_that_ended_meanwhile_is_over(host, li):
    async def act() -> Session:
        client = AsyncClient(host.folder)
        nobody = client.under(httpx.Auth())
        grant = await nobody.call("POST", "/login", {"user": li, "password": PASSWORD})
        session = Session({**grant, "until_s": 0.0}, nobody)
        with caller(host) as api:
            api.delete(f"/users/{li}/sessions")
        with pytest.raises(NotAllowed):
            await client.under(session).call("GET", "/whoami")
        return session

    assert asyncio.run(act()).over


def test_a_client_of_a_socket_reads_no_authorities_of_tls(host, monkeypatch):
    def read(*_given: object, **_more: object) -> None:
        raise AssertionError("it takes 20 ms of the loop that serves everybody")

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", read)
    assert Client(host.folder).call("GET", "/whoami")["role"] == "operator"
    AsyncClient(host.folder).under(httpx.Auth())


def visitors_of(host: Host) -> Visitors:
    return Visitors(AsyncClient(host.folder), KEY, "127.0.0.1:1", lambda api: Visitor(api, None, None))  # type: ignore[arg-type]


def shows(secret: str) -> httpx.Headers:
    return httpx.Headers({"cookie": f"qipan_login_1={secret}"})


def test_only_so_many_are_kept_the_longest_unused_goes(host, li):
    visitors = visitors_of(host)
    secret = asyncio.run(visitors.log_in(li, PASSWORD))
    mark, one = next(iter(visitors._people.items()))
    for number in range(VISITORS_MAX - 1):
        visitors._people[str(number).encode()] = one[0], Session({}, None)  # type: ignore[arg-type]
    assert visitors.of(shows(secret)) is one[0], "and now it was used last"
    asyncio.run(visitors.log_in(li, PASSWORD))
    assert mark in visitors._people
    assert b"0" not in visitors._people


@pytest.mark.parametrize("how", ["idle", "logged out", "too many others"])
def test_a_page_that_still_stands_open_when_the_session_is_over_here_reads_nothing_more(host, li, how):
    async def act() -> None:
        visitors = visitors_of(host)
        secret = await visitors.log_in(li, PASSWORD)
        visitor = visitors.of(shows(secret))
        assert visitor is not None
        assert visitor.session is not None
        assert (await visitor.api.call("GET", "/whoami"))["user"] == li
        if how == "idle":
            visitor.session.used_s -= IDLE_S + 1
        elif how == "logged out":
            await visitors.log_out(shows(secret))
        else:
            for number in range(VISITORS_MAX):
                visitors._people[str(number).encode()] = visitor, Session({}, None)  # type: ignore[arg-type]
        assert visitors.of(shows("another's")) is None
        with pytest.raises(NotAllowed, match="at this console is over"):
            await visitor.api.call("GET", "/whoami")
        assert visitor.session not in [session for _, session in visitors._people.values()], (
            "nor is its token kept"
        )
        assert visitors.of(shows(secret)) is None

    asyncio.run(act())


@pytest.mark.parametrize("other", ['theme={"a": 1}', "bad,name=3", "a=b c", "flag", 'x="un'])
def test_a_cookie_of_another_program_of_this_machine_keeps_nobody_out(host, other):
    """Cookies know no ports: every console and notebook at 127.0.0.1 sends its own along."""
    assert visitors_of(host).of(httpx.Headers({"cookie": f"{other}; qipan_1={KEY}"})) is not None


def test_a_login_that_the_provider_approved_is_not_lost_when_the_board_has_no_time_for_it(host, li):
    """`Busy` is a board that answers so once; the flow, one whose person said yes."""

    class Busy(AsyncClient):
        asked = 0

        async def call(self, method: str, path: str, *given: Any, **more: Any) -> Any:
            if path != "/login/oidc":
                return await super().call(method, path, *given, **more)
            Busy.asked += 1
            if Busy.asked == 1:
                raise OverLimit("too many tries to log in; wait 1 s")
            return await super().call("POST", "/login", {"user": li, "password": PASSWORD})

        def under(self, auth: httpx.Auth) -> AsyncClient:
            return Busy(host.folder, auth=auth)

    class Approved:
        wait_s, end_s, looks = 0.0, time.monotonic() + 60, 0

        def look(self) -> str:
            Approved.looks += 1
            return "the id_token"

    async def act() -> str:
        visitors = Visitors(Busy(host.folder), KEY, "127.0.0.1:1", lambda api: Visitor(api, None, None))  # type: ignore[arg-type]
        shown = httpx.Headers({"cookie": f"qipan_code_1={visitors.keep_flow(Approved())}"})  # type: ignore[arg-type]
        with pytest.raises(OverLimit):
            await visitors.look_at_flow(shown)
        secret = await visitors.look_at_flow(shown)
        assert isinstance(secret, str)
        assert visitors.of(shows(secret)) is not None
        with pytest.raises(NotAllowed, match="no login"):
            await visitors.look_at_flow(shown)
        return secret

    asyncio.run(act())
    assert Approved.looks == 1, "a provider gives its id_token once"


@pytest.mark.parametrize(("language", "said"), [("zh", "用户名或密码不对"), ("en", "wrong user or password")])
def test_a_refused_login_is_told_in_the_language_of_the_page(address, li, language, said):
    with browser_of(address) as browser:
        browser.cookies.set("language", language)
        assert said in log_in(browser, li, "not the password").text


@pytest.mark.parametrize(("language", "said"), [("zh", "不是这个控制台的钥匙"), ("en", "not this console")])
def test_a_wrong_key_is_told(address, language, said):
    with browser_of(address) as browser:
        browser.cookies.set("language", language)
        assert said not in browser.get("/enter").text
        refused = browser.post("/enter", data={"key": "of yesterday"})
        assert refused.status_code == 403
        assert said in refused.text


@pytest.mark.parametrize("language", ["zh", "en"])
def test_who_is_let_in_nowhere_is_told_the_way(address, language):
    with browser_of(address) as browser:
        browser.cookies.set("language", language)
        other, form = (
            browser.get("/", headers={"host": "localhost:1"}),
            browser.post("/submit", data={"text": TINY}),
        )
        assert (other.status_code, form.status_code) == (421, 403)
        assert f"{address}/" in other.text
        assert f"{address}/login" in form.text
        for answer in (other, form):
            assert answer.headers["content-type"].startswith("text/plain")
            assert (max(answer.text) > "\u2fff") == (language == "zh")
