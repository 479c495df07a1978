"""`qipan login`, `logout`, `whoami`, and `qipan grid user`: the users of a host."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from qipan.cli.options import Json, StoreDir
from qipan.errors import InvalidInput, NotAllowed

users = typer.Typer(no_args_is_help=True, help="Who may log in at this board, and as what.")
LINES_MAX = 1000
Stdin = Annotated[bool, typer.Option("--password-stdin", help="Read the password from standard input.")]


def login(
    server: Annotated[str, typer.Argument(help="https://HOST:PORT of the board (default: the store's own socket).")] = "",
    user: Annotated[str, typer.Option("--user", "-u", help="Your name there.")] = "",
    oidc: Annotated[bool, typer.Option("--oidc", help="With the OpenID provider of the board, in any browser.")] = False,
    ca: Annotated[Path | None, typer.Option(help="The authority, or the certificate itself, of a server that this machine does not trust yet (PEM).")] = None,
    password_stdin: Stdin = False, json_: Json = False, store: StoreDir = None,
) -> None:  # fmt: skip
    """Log in at a board; later commands go there, as you, until `qipan logout`."""
    import httpx

    from qipan import sessions
    from qipan.client import server_of

    at, named = server_of(store, server), str(ca.resolve()) if ca is not None else ""
    if named and not at.url:
        raise InvalidInput(
            "--ca is of a server's certificate; name its address too: qipan login https://HOST:PORT --ca FILE"
        )
    transport = at.transport(httpx.HTTPTransport) if not named else httpx.HTTPTransport(verify=sessions.trust(at.url, named))  # fmt: skip
    base = str(at.settings("none")["base_url"])
    with httpx.Client(transport=transport, base_url=base, timeout=60) as line:
        try:
            if oidc:
                door = sessions.granted(line.get("/login"))
                if door["oidc"] is None:
                    raise NotAllowed("no OpenID provider is configured there; log in with a password: --user NAME")  # fmt: skip
                token = sessions.device_flow(door["oidc"], _say_where)
                made = sessions.granted(line.post("/login/oidc", json={"id_token": token}))
            else:
                name = user or os.environ.get("QIPAN_USER") or _asked("user: ")
                body = {"user": name, "password": _password(password_stdin)}
                made = sessions.granted(line.post("/login", json=body))
        except httpx.TransportError as error:
            raise at.no_answer(error) from None
    with sessions.locked():
        sessions.keep(at.name, {**made, **({"ca": named} if named else {})})
    _tell_who(made, at.name, json_)


def logout(json_: Json = False, store: StoreDir = None) -> None:
    """End your session, here and at the board."""
    import httpx

    from qipan import sessions
    from qipan.client import server_of

    at = server_of(store)
    with sessions.locked():
        session = sessions.kept(at.name)
        if session is None:
            raise NotAllowed(f"you are not logged in at {at.name}; qipan login")
        try:
            with httpx.Client(transport=at.transport(httpx.HTTPTransport), base_url=str(at.settings("none")["base_url"]), timeout=20) as line:  # fmt: skip
                sessions.granted(line.post("/logout", json={"refresh_token": session["refresh_token"]}))
        except httpx.TransportError as error:
            raise at.no_answer(error) from None
        sessions.keep(at.name, None)
    _tell({"server": at.name, "user": session["user"]}, json_, lambda _: print(f"{session['user']}: logged out of {at.name}"))  # fmt: skip


def whoami(json_: Json = False, store: StoreDir = None) -> None:
    """Who you are to the board that commands go to."""
    from qipan.cli.app import client
    from qipan.client import server_of

    answer = {**client(store).call("GET", "/whoami"), "server": server_of(store).name}
    _tell_who(answer, answer["server"], json_)


@users.command()
def add(
    user: str,
    role: Annotated[str, typer.Option(help="viewer (reads), user (of one tenant), operator (everything).")] = "user",
    tenant: Annotated[str, typer.Option(help="Whose tasks and money they are; a viewer of none sees all.")] = "",
    password_stdin: Stdin = False, json_: Json = False, store: StoreDir = None,
) -> None:  # fmt: skip
    """A person who may log in with a password."""
    from qipan.cli.app import client

    body = {"user": user, "role": role, "tenant": tenant, "password": _password(password_stdin, twice=True)}
    made = client(store).call("POST", "/users", body)["users"][0]
    _tell(made, json_, lambda one: print(f"{one['user']}: {one['role']}{' of ' + one['tenant'] if one['tenant'] else ''}"))  # fmt: skip


@users.command()
def remove(user: str, json_: Json = False, store: StoreDir = None) -> None:
    """Take a user away, with every session."""
    from qipan.cli.app import client

    _tell(client(store).call("DELETE", f"/users/{user}"), json_, lambda _: print(f"{user}: removed"))


@users.command(name="list")
def list_(json_: Json = False, store: StoreDir = None) -> None:
    """Users, and who is logged in."""
    from qipan.cli.app import client
    from qipan.cli.tables import table

    def show(found: Any) -> None:
        live: dict[tuple[str, str], int] = {}
        for one in found["sessions"]:
            key = (one["who"]["user"], one["who"]["issuer"])
            live[key] = live.get(key, 0) + 1
        rows = [[one["user"], one["role"], one["tenant"] or "all", "this host", str(live.pop((one["user"], ""), 0))] for one in found["users"]]  # fmt: skip
        rows += [[user, "-", "-", issuer or "removed", str(count)] for (user, issuer), count in sorted(live.items())]  # fmt: skip
        table("用户 users", ["user", "role", "tenant", "known by", "sessions"], rows)

    _tell(client(store).call("GET", "/users"), json_, show)


@users.command()
def password(user: str, password_stdin: Stdin = False, json_: Json = False, store: StoreDir = None) -> None:
    """A new password; every session ends.  `me`: your own."""
    from qipan.cli.app import client

    body = {"old": _password(password_stdin, "old password: ")} if user == "me" else {}
    body["password"] = _password(password_stdin, "new password: ", twice=True)
    _tell(client(store).call("POST", f"/users/{user}/password", body), json_, lambda one: print(f"{one['user']}: has a new password; log in again"))  # fmt: skip


@users.command()
def revoke(
    user: str,
    issuer: Annotated[str, typer.Option(help="For a person who came by an OpenID provider.")] = "",
    json_: Json = False,
    store: StoreDir = None,
) -> None:
    """End all sessions of a user, at once."""
    from qipan.cli.app import client

    answer = client(store).call("DELETE", f"/users/{user}/sessions", None, issuer=issuer)
    _tell(answer, json_, lambda one: print(f"{user}: {one['sessions']} sessions ended"))


@users.command()
def log(
    json_: Json = False,
    store: StoreDir = None,
    after: Annotated[int | None, typer.Option(help="The 1000 lines after the one of this number (default: the newest 1000).")] = None,
) -> None:  # fmt: skip
    """Who logged in, was refused, was added or lost a session; each line with its number."""
    from qipan.cli.app import client

    def show(found: Any) -> None:
        for line in found["log"]:
            fact = line["fact"]
            stamp = time.strftime("%m-%d %H:%M:%S", time.localtime(line["at_s"]))
            who = " ".join(one for one in (fact["user"] or "-", fact["role"], fact["tenant"]) if one)
            print(
                f"{line['fact_id']:8}  {stamp}  {fact['what']:16}  {who:32}  {fact['source']:20}  {fact['why']}".rstrip()
            )

    asked = {"limit": LINES_MAX, **({"after": after} if after is not None else {})}
    _tell(client(store).call("GET", "/users/log", None, **asked), json_, show)


def _tell(value: Any, json_: bool, show: Any) -> None:
    from qipan.cli.app import tell

    tell(value, json_, show)


def _tell_who(found: dict[str, Any], server: str, json_: bool) -> None:
    told = {name: found.get(name, "") for name in ("user", "tenant", "role")} | {"server": server}
    of = f" of {told['tenant']}" if told["tenant"] else ""
    _tell(told, json_, lambda one: print(f"{one['user'] or 'the token of the store'}: {one['role']}{of} at {server}"))  # fmt: skip


def _say_where(address: str, code: str, whole: str) -> None:
    print(f"open {whole or address} and enter the code {code}", file=sys.stderr, flush=True)


def _asked(prompt: str) -> str:
    if not sys.stdin.isatty():
        raise InvalidInput("name the user: --user NAME")
    return input(prompt)


def _password(from_stdin: bool, prompt: str = "password: ", twice: bool = False) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\n")
    if not sys.stdin.isatty():
        raise InvalidInput(
            "no terminal to ask for the password: --password-stdin reads it from standard input"
        )
    import getpass

    found = getpass.getpass(prompt)
    if twice and getpass.getpass(f"again {prompt}") != found:
        raise InvalidInput("the two passwords differ; try again")
    return found
