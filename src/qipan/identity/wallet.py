"""A board's identity on disk: its key and certificate, the grid's root, its authority, whom it invited, who joined.

identity/root.pem            the grid's root, pinned when it joined
         board.key board.pem the board's key, its certificate and the authorities above it
         authority.key .pem  the board's own authority, where it has one
         members.json        invites, members, certificates taken back
"""

import fcntl
import os
import shutil
import ssl
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from qipan.errors import NotFound
from qipan.files import write_whole
from qipan.identity.authority import BOARD_S, Authority, make_authority_request, make_request
from qipan.identity.names import Peer, Unknown, peer_of
from qipan.identity.token import Invite, Token, digest_of, new_secret

INVITE_S = 86400.0


class Member(msgspec.Struct, frozen=True):
    """A board that joined below this one.  `serial` of its newest certificate seen; `retired` those before it."""

    place: tuple[str, ...]
    provider: str
    role: str = "board"
    serial: str = ""
    retired: tuple[str, ...] = ()
    revoked: bool = False
    url: str = ""  # of a standby that has followed: where boards below reach it


class Members(msgspec.Struct, frozen=True):
    """`place`: this board's; `parent` "" at the top.  `reign`: how often a standby took this board over; `parent_reign`: the
    latest one of its parent that it followed; `standbys`: where the parent's standbys are; `lead_s` and `shipped`, the voters that
    its own standby counts: see `leading`."""

    place: tuple[str, ...]
    parent: str = ""
    provider: str = ""
    invites: tuple[Invite, ...] = ()
    members: tuple[Member, ...] = ()
    reign: int = 0
    parent_reign: int = 0
    standbys: tuple[str, ...] = ()
    lead_s: float = 15.0
    shipped: tuple[str, ...] = ()


class Wallet:
    """`now_s` is asked for the time at each use."""

    def __init__(self, folder: Path, now_s: Callable[[], float]) -> None:
        self.folder = folder
        self._now_s = now_s
        self._lock = _OneWriter(folder / "lock")
        self._served: tuple[int, ssl.SSLContext] | None = None
        self._read_ns = 0
        self._fresh: dict[tuple[tuple[str, ...], str], Member] = {}
        path = folder / "members.json"
        if not path.exists():
            raise NotFound(
                f"{folder.parent} belongs to no grid; make one with `qipan grid init`, or join one with `qipan grid join`"
            )
        self.kept = msgspec.json.decode(path.read_bytes(), type=Members)

    @property
    def place(self) -> tuple[str, ...]:
        return self.kept.place

    # ---- made --------------------------------------------------------------------------------------------------------

    @classmethod
    def found(cls, folder: Path, name: str, now_s: Callable[[], float], life_s: float = BOARD_S) -> "Wallet":
        """A new grid with this board at its top."""
        folder.mkdir(parents=True, mode=0o700)
        authority = Authority.root(name, now_s())
        key = ec.generate_private_key(ec.SECP256R1())
        cert = authority.board(make_request(key, (name,)), (name,), now_s(), life_s)
        _write_key(folder / "authority.key", authority.key)
        write_whole(folder / "authority.pem", _pem(authority.chain))
        write_whole(folder / "root.pem", _pem(authority.chain))
        _write_key(folder / "board.key", key)
        write_whole(folder / "board.pem", _pem((cert,)))
        write_whole(folder / "members.json", msgspec.json.encode(Members((name,))))
        return cls(folder, now_s)

    @classmethod
    def join(
        cls,
        folder: Path,
        token: Token,
        ask: Callable[[Token, bytes, bytes], tuple[bytes, bytes]],
        now_s: Callable[[], float],
    ) -> "Wallet":
        """Make keys, have them signed by the inviting board (`ask` sends the requests), keep what came back."""
        key, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        wanted = make_authority_request(own, token.place) if token.may_invite else b""
        chain, authority = ask(token, make_request(key, token.place, token.role), wanted)
        folder.mkdir(parents=True, mode=0o700)
        write_whole(folder / "root.pem", _pem((x509.load_der_x509_certificate(token.root),)))
        _write_key(folder / "board.key", key)
        write_whole(folder / "board.pem", chain)
        if token.may_invite:
            _write_key(folder / "authority.key", own)
            write_whole(folder / "authority.pem", authority)
        kept = Members(token.place, token.url, token.provider)
        write_whole(folder / "members.json", msgspec.json.encode(kept))
        return cls(folder, now_s)

    # ---- below -------------------------------------------------------------------------------------------------------

    def authority(self) -> Authority:
        path = self.folder / "authority.key"
        if not path.exists():
            raise Unknown(
                f"{'/'.join(self.place)} may not invite boards; its own invite must be made with --may-invite"
            )
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        chain = x509.load_pem_x509_certificates((self.folder / "authority.pem").read_bytes())
        return Authority(self.place, key, tuple(chain))

    def invite(
        self,
        name: str,
        provider: str,
        url: str,
        *,
        may_invite: bool = False,
        role: str = "board",
        life_s: float = INVITE_S,
    ) -> Token:
        """A token for one board at one place, for one use.  An unused earlier one for the same place ends."""
        with self._lock:
            self._reload()
            place = (*self.place, name) if role == "board" else self.place
            self.authority()
            root = x509.load_pem_x509_certificate((self.folder / "root.pem").read_bytes())
            secret = new_secret()
            token = Token(
                url, root.public_bytes(serialization.Encoding.DER), place, provider, secret, role, may_invite
            )
            invite = Invite(digest_of(secret), place, provider, self._now_s() + life_s, role, may_invite)
            kept = tuple(
                other
                for other in self.kept.invites
                if other.used_s is not None or other.place != place or other.role != role
            )
            self._keep(msgspec.structs.replace(self.kept, invites=(*kept, invite)))
            return token

    def admit(
        self, secret: str, place: tuple[str, ...], provider: str, request: bytes, authority_request: bytes
    ) -> tuple[bytes, bytes]:
        """What a joining board gets: its certificate with those above it, and its authority's.  Raises Unknown."""
        with self._lock:
            self._reload()
            invite = next((known for known in self.kept.invites if known.digest == digest_of(secret)), None)
            if invite is None:
                raise Unknown("the join token is not known here; ask for a new one")
            if invite.used_s is not None:
                raise Unknown(
                    f"the join token for {'/'.join(invite.place)} was used before; ask for a new one"
                )
            if self._now_s() >= invite.until_s:
                raise Unknown(f"the join token for {'/'.join(invite.place)} has expired; ask for a new one")
            if place != invite.place:
                raise Unknown(
                    f"the join token is for {'/'.join(invite.place)}, not for {'/'.join(place)[:200]}"
                )
            if provider != invite.provider:
                raise Unknown(f"the join token is for provider {invite.provider}, not for {provider[:80]}")
            if authority_request and not invite.may_invite:
                raise Unknown(
                    "the invite gives no authority over boards below; ask for one made with --may-invite"
                )
            signer = self.authority()
            cert = signer.board(request, place, self._now_s(), role=invite.role)
            above = signer.above
            own = b""
            if invite.may_invite:
                own = _pem((signer.below(authority_request, place, self._now_s()), *above))
            used = tuple(
                replace(known, used_s=self._now_s()) if known is invite else known
                for known in self.kept.invites
            )
            member = Member(place, provider, invite.role)
            others = tuple(
                known for known in self.kept.members if (known.place, known.role) != (place, invite.role)
            )
            self._keep(msgspec.structs.replace(self.kept, invites=used, members=(*others, member)))
            return _pem((cert, *above)), own

    def check_member(self, peer: Peer) -> Member:
        """The member that a verified peer is.  Its newest certificate retires those before.  Raises Unknown."""
        with self._lock:
            self._reload()
            member = next(
                (
                    known
                    for known in self.kept.members
                    if (known.place, known.role) == (peer.place, peer.role)
                ),
                None,
            )
            serial = f"{peer.serial:x}"
            member = self._seen(member) if member is not None else None
            if peer.place[:-1] != self.place and not (peer.role == "standby" and peer.place == self.place):
                raise Unknown(f"{'/'.join(peer.place)} is not a board right below {'/'.join(self.place)}")
            if member is None:
                raise Unknown(f"{'/'.join(peer.place)} is no member here; it never joined, or it left")
            if member.revoked:
                raise Unknown(f"{'/'.join(peer.place)} was taken out of the grid")
            if serial in member.retired:
                raise Unknown(f"{'/'.join(peer.place)} showed a certificate that a newer one had replaced")
            if serial != member.serial:
                retired = (*member.retired, member.serial)[-20:] if member.serial else member.retired
                member = msgspec.structs.replace(member, serial=serial, retired=retired)
                self._fresh[member.place, member.role] = member
            return member

    def flush(self) -> None:
        """Write down whose newest certificates were seen: once for many, when a thousand boards come at one time."""
        with self._lock:
            if self._fresh:
                self._reload()
                members = tuple(self._seen(known) for known in self.kept.members)
                self._fresh.clear()
                self._keep(msgspec.structs.replace(self.kept, members=members))

    def _seen(self, member: Member) -> Member:
        """With what was seen since the file was written."""
        fresh = self._fresh.get((member.place, member.role))
        if fresh is None:
            return member
        return msgspec.structs.replace(member, serial=fresh.serial, retired=fresh.retired)

    def revoke(self, name: str) -> None:
        """Raises NotFound."""
        with self._lock:
            self._reload()
            member = next((known for known in self.kept.members if known.place[-1] == name), None)
            if member is None:
                known = ", ".join(member.place[-1] for member in self.kept.members) or "none"
                raise NotFound(f"no member {name[:60]!r}; there are: {known}")
            self._keep_member(msgspec.structs.replace(member, revoked=True))

    def renewed(self, peer: Peer, request: bytes) -> bytes:
        """A new certificate for a member; the one it has is good until the new one is seen."""
        signer = self.authority()
        cert = signer.board(request, peer.place, self._now_s(), role=peer.role)
        return _pem((cert, *signer.above))

    # ---- own certificate -----------------------------------------------------------------------------------------------

    def own(self) -> Peer:
        cert = x509.load_pem_x509_certificate((self.folder / "board.pem").read_bytes())
        return peer_of(cert.public_bytes(serialization.Encoding.DER))

    def due_s(self) -> float:
        """When the board's certificate is at half its life."""
        cert = x509.load_pem_x509_certificate((self.folder / "board.pem").read_bytes())
        began_s, until_s = cert.not_valid_before_utc.timestamp(), cert.not_valid_after_utc.timestamp()
        return (began_s + until_s) / 2

    def request(self) -> bytes:
        """A signing request for a new key, kept apart until `take` gets the certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        _write_key(self.folder / "next.key", key)
        own = self.own()
        return make_request(key, own.place, own.role)

    def take(self, chain: bytes) -> None:
        """The renewed certificate becomes the board's own."""
        write_whole(self.folder / "board.pem", chain)
        os.replace(self.folder / "next.key", self.folder / "board.key")

    def renew_own(self) -> None:
        """The top board signs for itself."""
        request = self.request()
        signer = self.authority()
        self.take(_pem((signer.board(request, self.place, self._now_s()), *signer.above)))

    def follow(self, **changed: Any) -> None:
        """Note whom this board follows: `parent`, `parent_reign`, `standbys`, `lead_s`; or its own `reign`, `shipped`."""
        with self._lock:
            self._reload()
            kept = msgspec.structs.replace(self.kept, **changed)
            if kept != self.kept:
                self._keep(kept)

    def standby_follows(self, url: str) -> None:
        """From now on it may claim this board."""
        with self._lock:
            self._reload()
            for member in self.kept.members:
                if member.role == "standby" and member.url != url:
                    self._keep_member(msgspec.structs.replace(member, url=url))

    def voters(self) -> tuple[str, ...]:
        """The boards right below that are members."""
        with self._lock:
            self._reload()
            kept = self.kept
        return tuple(sorted(m.place[-1] for m in kept.members if m.role == "board" and not m.revoked))

    def standbys(self) -> tuple[Member, ...]:
        with self._lock:
            self._reload()
            kept = self.kept
        return tuple(m for m in kept.members if m.role == "standby" and not m.revoked)

    def standby_urls(self) -> tuple[str, ...]:
        """Of those that have followed."""
        return tuple(member.url for member in self.standbys() if member.url)

    def crown(self, folder: Path, kept: Members, url: str) -> None:
        """Of a standby: make the identity of the board itself, reached at `url`, in `folder`: whole or not at all, signed by the
        standby's own authority."""
        signer, key = self.authority(), ec.generate_private_key(ec.SECP256R1())
        cert = signer.board(make_request(key, self.place), self.place, self._now_s())
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700)
        for name in ("root.pem", "authority.key", "authority.pem"):
            write_whole(part / name, (self.folder / name).read_bytes())
        _write_key(part / "board.key", key)
        write_whole(part / "board.pem", _pem((cert, *signer.above)))
        members = tuple(
            msgspec.structs.replace(member, revoked=True) if member.role == "standby" else member
            for member in kept.members
        )
        kept = msgspec.structs.replace(kept, members=members, shipped=())
        write_whole(part / "members.json", msgspec.json.encode(kept))
        write_whole(part / "url", url.encode())
        part.rename(folder)

    # ---- TLS -----------------------------------------------------------------------------------------------------------

    def server_context(self) -> ssl.SSLContext:
        """A client that shows a certificate must show a good one; who shows none may only join.  Made once for each
        certificate: reading the files takes longer than a handshake."""
        changed = (self.folder / "board.pem").stat().st_mtime_ns
        if self._served is None or self._served[0] != changed:
            self._served = (changed, self._server_context())
        return self._served[1]

    def _server_context(self) -> ssl.SSLContext:
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_OPTIONAL
        context.num_tickets = 0  # every connection shows its certificate
        return context

    def client_context(self) -> ssl.SSLContext:
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # the SPIFFE name is checked instead
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.folder / "board.pem", self.folder / "board.key")
        context.load_verify_locations(self.folder / "root.pem")
        return context

    # ---- kept ----------------------------------------------------------------------------------------------------------

    def _reload(self) -> None:
        """Another process (`qipan grid invite`) may have written meanwhile."""
        changed = (self.folder / "members.json").stat().st_mtime_ns
        if changed == self._read_ns:
            return
        self.kept = msgspec.json.decode((self.folder / "members.json").read_bytes(), type=Members)
        self._read_ns = changed

    def _keep_member(self, member: Member) -> None:
        members = tuple(
            member if (known.place, known.role) == (member.place, member.role) else known
            for known in self.kept.members
        )
        self._keep(msgspec.structs.replace(self.kept, members=members))

    def _keep(self, kept: Members) -> None:
        write_whole(self.folder / "members.json", msgspec.json.encode(kept))
        self.kept = kept
        self._read_ns = (self.folder / "members.json").stat().st_mtime_ns


class _OneWriter:
    """Of threads and of processes: `qipan grid invite` beside the served board.  Its holder may enter it again."""

    def __init__(self, path: Path) -> None:
        self._path, self._threads, self._depth = path, threading.RLock(), 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> None:
        self._threads.acquire()
        if self._depth == 0:
            try:
                self._file = self._path.open("ab")
                fcntl.flock(self._file, fcntl.LOCK_EX)
            except BaseException:
                self._threads.release()
                raise
        self._depth += 1

    def __exit__(self, *_error: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._file is not None:
            self._file.close()
        self._threads.release()


def joining_context(token: Token) -> ssl.SSLContext:
    """For a board that has no certificate yet: it trusts the token's root and shows nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    root = x509.load_der_x509_certificate(token.root)
    context.load_verify_locations(cadata=root.public_bytes(serialization.Encoding.PEM).decode())
    return context


def _pem(certs: tuple[x509.Certificate, ...]) -> bytes:
    return b"".join(cert.public_bytes(serialization.Encoding.PEM) for cert in certs)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    write_whole(
        path,
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )
