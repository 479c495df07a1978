"""The users of a host and their sessions.  Passwords are kept as Argon2id hashes (RFC 9106), refresh tokens as SHA-256.

A session is a family of refresh tokens: each is good once, and gives the next.  Whoever shows one that was used before holds
a copy, or somebody else does: the whole family ends (RFC 9700, section 4.14.2)."""

import hashlib
import hmac
import re
import secrets
import threading
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError

from qipan.errors import InvalidInput, NotAllowed, NotFound
from qipan.events import PersonNoted
from qipan.host import Host
from qipan.login.oidc import Issuer
from qipan.login.roles import ROLES
from qipan.login.tokens import ACCESS_S, Bearer, Signer

SESSION_S, SESSION_OIDC_S = 30 * 86_400.0, 12 * 3600.0
SESSIONS_MAX = 50  # of one user; the oldest goes
PASSWORD_CHARACTERS = (12, 256)
NAME = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}")
REFRESH = re.compile(r"qr_([A-Za-z0-9_-]{22})_([A-Za-z0-9_-]{43})")
HASHES_AT_ONCE = 2  # each takes 64 MiB
USER, SESSION, USED = "user/", "session/", "id-token/"
WRONG = "wrong user or password"


@dataclass(frozen=True, slots=True)
class User:
    """`tenant` "": of all of them.  `issuer` "": a user of this host, with a password here."""

    user: str
    tenant: str
    role: str
    issuer: str = ""


@dataclass(frozen=True, slots=True)
class Session:
    """`session` names it in the log and is no secret."""

    session: str
    who: User
    began_s: float
    until_s: float


@dataclass(frozen=True, slots=True)
class Grant:
    """What a login gives: an access token good until `until_s`, and a refresh token, good once, for the next."""

    access_token: str
    refresh_token: str
    until_s: float
    session_until_s: float
    user: str
    tenant: str
    role: str


@dataclass(frozen=True, slots=True)
class _KeptUser:
    who: User
    password: str  # as Argon2id writes it, with its parameters and salt


@dataclass(frozen=True, slots=True)
class _KeptSession:
    session: Session
    turn: str  # SHA-256 of the secret of the refresh token that is good now


class People:
    """Those of a host.  Any thread may use it.  `issuer`: an OpenID provider whose word is taken, too.  `hasher`: None for the
    library's own parameters."""

    def __init__(
        self, host: Host, signer: Signer, issuer: Issuer | None = None, hasher: PasswordHasher | None = None
    ) -> None:
        self.host, self.signer, self.issuer = host, signer, issuer
        self._hasher = hasher or PasswordHasher()
        self._nobody = self._hasher.hash(secrets.token_hex(16))
        self._hashing = threading.Semaphore(HASHES_AT_ONCE)
        #: sessions that ended while access tokens of theirs may still be good, until when
        self._ended: dict[str, float] = {}

    # ---- users -----------------------------------------------------------------------------------------------------

    def users(self) -> list[User]:
        with self.host.lock:
            return [kept.who for kept in self._users()]

    def add(self, user: str, tenant: str, role: str, password: str, by: str) -> User:
        """Raises InvalidInput, NotFound."""
        who = self._checked(User(user, tenant, role))
        hashed = self._hashed(password)
        with self.host.lock:
            if self._user(user) is not None:
                raise InvalidInput(f"there is a user {user!r} already; `qipan grid user password {user}` gives a new password")  # fmt: skip
            self._keep(_KeptUser(who, hashed))
            self._note("user added", who, by)
        return who

    def remove(self, user: str, by: str) -> None:
        """With all sessions.  Raises NotFound."""
        with self.host.lock:
            kept = self._known(user)
            self.host.store.drop(USER + user)
            self._end_all(user, "")
            self._note("user removed", kept.who, by)

    def set_password(self, user: str, password: str, by: str, old: str | None = None) -> None:
        """Ends all sessions.  `old` None: the operator needs none.  Raises NotFound, NotAllowed, InvalidInput."""
        with self.host.lock:
            kept = self._known(user)
        if old is not None and not self._fits(kept.password, old):
            self._note("refused", kept.who, by, why="the old password is wrong")
            raise NotAllowed("the old password is wrong")
        hashed = self._hashed(password)
        with self.host.lock:
            now = self._known(user)
            if old is not None and now.password != kept.password:  # changed while we looked
                raise NotAllowed("the old password is wrong")
            self._keep(replace(now, password=hashed))
            self._end_all(user, "")
            self._note("password set", kept.who, by)

    def revoke(self, user: str, by: str, issuer: str = "") -> int:
        """Ends all sessions of a user; returns how many."""
        with self.host.lock:
            ended = self._end_all(user, issuer)
            self._note("sessions revoked", User(user, "", "", issuer), by, why=f"{ended} sessions")
        return ended

    def sessions(self) -> list[Session]:
        with self.host.lock:
            return [kept.session for _, kept in self._sessions()]

    # ---- logging in ------------------------------------------------------------------------------------------------

    def log_in(self, user: str, password: str, source: str) -> Grant:
        """Whether the user is unknown or the password wrong is not told, and takes as long.  Raises NotAllowed."""
        with self.host.lock:
            kept = self._user(user)
        fits = self._fits(kept.password if kept is not None else self._nobody, password)
        if kept is None or not fits:
            who = kept.who if kept is not None else User(user if NAME.fullmatch(user) else "", "", "")
            self._note("refused", who, source, why=WRONG)
            raise NotAllowed(WRONG)
        fresh = self._hasher.hash(password) if self._hasher.check_needs_rehash(kept.password) else ""
        with self.host.lock:
            now = self._user(user)
            if now is None or now.password != kept.password:  # changed while we looked
                raise NotAllowed(WRONG)
            if fresh:
                self._keep(replace(now, password=fresh))
            return self._begin(now.who, SESSION_S, source)

    def log_in_with(self, id_token: str, source: str) -> Grant:
        """By the word of the OpenID provider; each of its tokens is good once.  Raises NotAllowed, Unreachable."""
        if self.issuer is None:
            raise NotAllowed("no OpenID provider is configured here; log in with a password")
        now_s = self.host.clock.now_s()
        try:
            name, tenant, role, until_s = self.issuer.person_of(id_token, now_s)
            who = self._checked(User(name, tenant, role, self.issuer.provider.issuer))
        except NotAllowed as error:
            self._note("refused", User("", "", "", self.issuer.provider.issuer), source, why=str(error)[:300])
            raise
        signed, _, _ = id_token.rpartition(".")  # one signature can be written in several ways
        key = USED + _hash(signed)
        with self.host.lock:
            if self.host.store.get(key) is not None:
                self._note("refused", who, source, why="its id_token was used before")
                raise NotAllowed("this id_token was used before; log in anew")
            for old, value in self.host.store.items(USED):
                if float(value) < now_s:
                    self.host.store.drop(old)
            self.host.store.put(key, str(until_s))
            return self._begin(who, SESSION_OIDC_S, source)

    def refresh(self, token: str, source: str) -> Grant:
        """The next access and refresh token of a session.  One of no session is not noted: it costs nothing to make one up.  Raises
        NotAllowed."""
        family, turn = _parts(token)
        now_s = self.host.clock.now_s()
        with self.host.lock:
            kept = self._session(family)
            if kept is None or kept.session.until_s <= now_s:
                raise NotAllowed("your session is over; log in again with `qipan login`")
            session = kept.session
            if not hmac.compare_digest(kept.turn, _hash(turn)):
                self._end(family, session)
                self._note("session revoked", session.who, source, session.session, "a refresh token was used twice")  # fmt: skip
                raise NotAllowed("this refresh token was used before, so its session is ended; log in again with `qipan login`")  # fmt: skip
            return self._give(family, session)

    def log_out(self, token: str, source: str) -> None:
        """Ends the session of any of its refresh tokens; one that is over already is no error."""
        family, _ = _parts(token)
        with self.host.lock:
            kept = self._session(family)
            if kept is not None:
                self._end(family, kept.session)
                self._note("logged out", kept.session.who, source, kept.session.session)

    def bearer(self, access_token: str) -> Bearer:
        """Whom an access token stands for.  Raises NotAllowed."""
        who = self.signer.read(access_token, self.host.clock.now_s())
        if self.ended(who.session):
            raise NotAllowed("the session of this access token was ended; log in again with `qipan login`")
        return who

    def ended(self, session: str) -> bool:
        """Whether a session was ended within the life of its access tokens."""
        return session in self._ended

    # ---- kept ------------------------------------------------------------------------------------------------------

    def _begin(self, who: User, life_s: float, source: str) -> Grant:
        now_s = self.host.clock.now_s()
        mine = []
        for key, kept in self._sessions():
            if kept.session.until_s <= now_s:
                self.host.store.drop(key)
            elif (kept.session.who.user, kept.session.who.issuer) == (who.user, who.issuer):
                mine.append((kept.session.began_s, key, kept.session))
        for _, key, session in sorted(mine)[: len(mine) + 1 - SESSIONS_MAX]:
            self._end_at(key, session)
        family = secrets.token_urlsafe(16)
        session = Session(_hash(family)[:16], who, now_s, now_s + life_s)
        self._note("logged in", who, source, session.session)
        return self._give(family, session)

    def _give(self, family: str, session: Session) -> Grant:
        turn, now_s, who = secrets.token_urlsafe(32), self.host.clock.now_s(), session.who
        kept = _KeptSession(session, _hash(turn))
        self.host.store.put(SESSION + _hash(family), msgspec.json.encode(kept).decode())
        access = self.signer.sign(Bearer(who.user, who.tenant, who.role, session.session, who.issuer), now_s)
        return Grant(
            access, f"qr_{family}_{turn}", now_s + ACCESS_S, session.until_s, who.user, who.tenant, who.role
        )

    def _end_all(self, user: str, issuer: str) -> int:
        found = [
            (key, kept.session)
            for key, kept in self._sessions()
            if (kept.session.who.user, kept.session.who.issuer) == (user, issuer)
        ]
        for key, session in found:
            self._end_at(key, session)
        return len(found)

    def _end(self, family: str, session: Session) -> None:
        self._end_at(SESSION + _hash(family), session)

    def _end_at(self, key: str, session: Session) -> None:
        now_s = self.host.clock.now_s()
        self.host.store.drop(key)
        left = {name: until_s for name, until_s in self._ended.items() if until_s > now_s}
        self._ended = {**left, session.session: now_s + ACCESS_S}

    def _session(self, family: str) -> _KeptSession | None:
        body = self.host.store.get(SESSION + _hash(family))
        return msgspec.json.decode(body, type=_KeptSession) if body is not None else None

    def _sessions(self) -> list[tuple[str, _KeptSession]]:
        return [
            (key, msgspec.json.decode(body, type=_KeptSession))
            for key, body in self.host.store.items(SESSION)
        ]

    def _users(self) -> list[_KeptUser]:
        return [msgspec.json.decode(body, type=_KeptUser) for _, body in self.host.store.items(USER)]

    def _user(self, user: str) -> _KeptUser | None:
        body = self.host.store.get(USER + user)
        return msgspec.json.decode(body, type=_KeptUser) if body is not None else None

    def _known(self, user: str) -> _KeptUser:
        kept = self._user(user)
        if kept is None:
            raise NotFound(f"no user {user[:64]!r}; `qipan grid user list` shows them")
        return kept

    def _keep(self, kept: _KeptUser) -> None:
        self.host.store.put(USER + kept.who.user, msgspec.json.encode(kept).decode())

    def _checked(self, who: User) -> User:
        if not NAME.fullmatch(who.user):
            raise InvalidInput(f"{who.user[:64]!r} is no user's name: small letters, digits and ._@- after a letter or digit, 64 at most")  # fmt: skip
        if who.user in ("me", "log"):
            raise InvalidInput(f"{who.user!r} means something else here; choose another name")
        if who.role not in ROLES:
            raise InvalidInput(f"no role {who.role[:40]!r}; there are: {', '.join(ROLES)}")
        if who.role == "user" and not who.tenant:
            raise InvalidInput(f"{who.user}: a user is of one tenant; name it, or give the role viewer or operator")  # fmt: skip
        if who.role == "operator" and who.tenant:
            raise InvalidInput(f"{who.user}: an operator is of no tenant; leave the tenant out")
        tenants = [tenant.name for tenant in self.host.site.tenants]
        if who.tenant and who.tenant not in tenants:
            raise NotFound(f"no tenant {who.tenant[:60]!r}; the site file names {', '.join(tenants) or 'none'}")  # fmt: skip
        return who

    def _hashed(self, password: str) -> str:
        least, most = PASSWORD_CHARACTERS
        if not least <= len(password) <= most:
            raise InvalidInput(f"the password has {len(password)} characters; give {least} to {most}")
        with self._hashing:
            return self._hasher.hash(password)

    def _fits(self, hashed: str, password: str) -> bool:
        with self._hashing:
            try:
                return self._hasher.verify(hashed, password[: PASSWORD_CHARACTERS[1] + 1])
            except (VerifyMismatchError, InvalidHashError):
                return False

    def _note(self, what: "What", who: User, source: str, session: str = "", why: str = "") -> None:
        """Into the fact log, where what was decided and by whom is read."""
        self.host.note(
            PersonNoted(what, who.user, who.tenant, who.role, who.issuer, session, source[:100], why)
        )


What = Literal[
    "logged in", "logged out", "refused", "session revoked", "sessions revoked", "user added", "user removed", "password set"
]  # fmt: skip


def _parts(refresh_token: str) -> tuple[str, str]:
    """(the secret of the family, the secret of this turn).  Raises NotAllowed."""
    found = REFRESH.fullmatch(refresh_token)
    if found is None:
        raise NotAllowed("this is no refresh token; log in with `qipan login`")
    return found[1], found[2]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
