"""Logging in, and the users of a host."""

import time
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as InPath
from starlette.concurrency import run_in_threadpool

from qipan.api import shapes
from qipan.api.gate import Rate, TooMany, Who
from qipan.api.shapes import Answer, read_body
from qipan.errors import InvalidInput, NotAllowed
from qipan.events import PersonNoted
from qipan.login import Grant, People

#: tries to log in, of one user and from one address: one in 10 s on the long run, five at once; of everyone: five a second
TRIES = ((0.1, 5.0), (5.0, 20.0))
#: a refresh token cannot be guessed: it is counted so that nobody keeps the board busy
REFRESHES = ((5.0, 50.0), (100.0, 400.0))
LOG_MAX = 1000
LOGIN_BYTES_MAX = 32_768
NAME_CHARACTERS_MAX = 64


class Password(msgspec.Struct, forbid_unknown_fields=True):
    user: str
    password: str


class IdToken(msgspec.Struct, forbid_unknown_fields=True):
    id_token: str


class RefreshToken(msgspec.Struct, forbid_unknown_fields=True):
    refresh_token: str


class NewUser(msgspec.Struct, forbid_unknown_fields=True):
    user: str
    role: str
    password: str
    tenant: str = ""


class NewPassword(msgspec.Struct, forbid_unknown_fields=True):
    password: str
    old: str | None = None


def taken(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Its place in the OpenAPI document."""
    fields = msgspec.structs.fields(kind)
    properties = {
        field.name: {"type": "string" if field.required else ["string", "null"]} for field in fields
    }
    required = [field.name for field in fields if field.required]
    schema = {"type": "object", "required": required, "additionalProperties": False, "properties": properties}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def body_of(kind: type[Any]) -> Callable[[Request], Any]:
    async def read(request: Request) -> Any:
        return read_body(await request.body(), kind, LOGIN_BYTES_MAX)

    return read


Name = Annotated[str, InPath(max_length=NAME_CHARACTERS_MAX)]


def counted(rate: Rate, request: Request, what: str, user: str = "") -> str:
    """The address that asks.  Its own bucket comes first and everyone's last: who asks too often uses up nobody else's.  Raises
    TooMany."""
    source = request.client.host if request.client else ""
    keys = [f"from {source}"] if source else []  # without one: the owner's socket
    keys += [f"user {user[:NAME_CHARACTERS_MAX]}"] if user else []
    for key in (*keys, ""):
        if (wait_s := rate.wait_s(key, time.monotonic())) > 0:
            raise TooMany(f"too many {what}; wait {wait_s:.0f} s", wait_s)
    return source or "this machine"


def about_login(people: People, tries: Rate, refreshes: Rate) -> APIRouter:
    """Nobody needs a token here: the gate lets these through."""
    routes = APIRouter()

    def admitted(request: Request, user: str = "") -> str:
        people.host.must_lead()
        return counted(tries, request, "tries to log in", user)

    def admitted_with_session(request: Request) -> str:
        people.host.must_lead()
        return counted(refreshes, request, "refresh tokens")

    @routes.get("/login", response_model=shapes.Door)
    async def door() -> Answer:
        """How people log in here: with a password, and with an OpenID provider where one is named."""
        provider = people.issuer.provider if people.issuer else None
        oidc = shapes.Oidc(provider.issuer, provider.client_id, provider.scope) if provider else None
        return Answer(shapes.Door(people.host.site.root.board, people.signer.audience, oidc))

    @routes.post("/login", response_model=Grant, openapi_extra=taken(Password))
    async def log_in(request: Request, body: Annotated[Password, Depends(body_of(Password))]) -> Answer:
        source = admitted(request, body.user)
        return Answer(
            await run_in_threadpool(refused_as_401, people.log_in, body.user, body.password, source)
        )

    @routes.post("/login/oidc", response_model=Grant, openapi_extra=taken(IdToken))
    async def log_in_with(request: Request, body: Annotated[IdToken, Depends(body_of(IdToken))]) -> Answer:
        source = admitted(request)
        return Answer(await run_in_threadpool(refused_as_401, people.log_in_with, body.id_token, source))

    @routes.post("/login/refresh", response_model=Grant, openapi_extra=taken(RefreshToken))
    async def refresh(request: Request, body: Annotated[RefreshToken, Depends(body_of(RefreshToken))]) -> Answer:  # fmt: skip
        source = admitted_with_session(request)
        return Answer(await run_in_threadpool(refused_as_401, people.refresh, body.refresh_token, source))

    @routes.post("/logout", response_model=shapes.LoggedOut, openapi_extra=taken(RefreshToken))
    async def log_out(request: Request, body: Annotated[RefreshToken, Depends(body_of(RefreshToken))]) -> Answer:  # fmt: skip
        source = admitted_with_session(request)
        await run_in_threadpool(refused_as_401, people.log_out, body.refresh_token, source)
        return Answer(shapes.LoggedOut("over"))

    return routes


def refused_as_401(act: Callable[..., Any], *given: str) -> Any:
    try:
        return act(*given)
    except NotAllowed as error:
        raise Unknown(str(error)) from None


class Unknown(NotAllowed):
    """Nobody knows who this is: 401 rather than 403."""

    status = 401


def about_users(people: People, tries: Rate) -> APIRouter:
    routes = APIRouter()

    @routes.get("/whoami", response_model=shapes.WhoAmI)
    async def whoami(who: Who) -> Answer:
        return Answer(shapes.WhoAmI(who.user, who.tenant, who.role, people.host.site.root.board))

    @routes.get("/users", response_model=shapes.Users)
    def users() -> Answer:
        """Of this host; their roles and tenants, and who has a session."""
        return Answer(shapes.Users(tuple(people.users()), tuple(people.sessions())))

    @routes.post("/users", status_code=201, response_model=shapes.Users, openapi_extra=taken(NewUser))
    async def add(who: Who, body: Annotated[NewUser, Depends(body_of(NewUser))]) -> Answer:
        people.host.must_lead()
        made = await run_in_threadpool(people.add, body.user, body.tenant, body.role, body.password, who.name)
        return Answer(shapes.Users((made,), ()), 201)

    @routes.get("/users/log", response_model=shapes.PeopleLog)
    def log(
        after: Annotated[int | None, Query(ge=0, le=2**53)] = None,
        limit: Annotated[int, Query(ge=1, le=LOG_MAX)] = 200,
    ) -> Answer:
        """Who logged in, was refused, was added or lost a session, oldest first: the first lines after a `fact_id`, without one
        the newest."""
        found = people.host.noted(["person_noted"], after, limit)
        lines = [shapes.LogLine(fact_id, at_s, fact) for fact_id, at_s, fact in found if isinstance(fact, PersonNoted)]  # fmt: skip
        return Answer(shapes.PeopleLog(tuple(lines)))

    @routes.delete("/users/{user}", response_model=shapes.UserName)
    def remove(who: Who, user: Name) -> Answer:
        people.host.must_lead()
        people.remove(user, who.name)
        return Answer(shapes.UserName(user))

    @routes.delete("/users/{user}/sessions", response_model=shapes.Ended)
    def revoke(who: Who, user: Name, issuer: Annotated[str, Query(max_length=300)] = "") -> Answer:
        """Ends them all, at once; `issuer` for one who came by an OpenID provider."""
        people.host.must_lead()
        return Answer(shapes.Ended(user, people.revoke(user, who.name, issuer)))

    @routes.post("/users/{user}/password", response_model=shapes.UserName, openapi_extra=taken(NewPassword))
    async def password(request: Request, who: Who, user: Name, body: Annotated[NewPassword, Depends(body_of(NewPassword))]) -> Answer:  # fmt: skip
        """`me` for one's own, with the old one: a try to log in, and counted as one."""
        people.host.must_lead()
        if user != "me":
            await run_in_threadpool(people.set_password, user, body.password, who.name)
            return Answer(shapes.UserName(user))
        if not who.user or body.old is None:
            raise InvalidInput("your own password is changed with the old one, by a user who logged in")
        if who.issuer:
            raise NotAllowed(f"you came by {who.issuer}; your password is changed there")
        counted(tries, request, "tries to log in", who.user)
        await run_in_threadpool(people.set_password, who.user, body.password, who.name, body.old)
        return Answer(shapes.UserName(who.user))

    return routes
