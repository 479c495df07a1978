"""Who is let in: wrong identities are refused at the handshake or at the first read, and logged; renewal goes unnoticed."""

import contextlib
import json
import re
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID as Eku

from qipan.channel.network import Network
from qipan.channel.opening import ask_once
from qipan.errors import QipanError
from qipan.grid import GridHost, join
from qipan.hardware import BoardId, BoardSpec
from qipan.identity import Authority, Token, Wallet, expects, make_request, peer_of, spiffe_of
from qipan.identity.wallet import joining_context
from qipan.workload.site import Site
from test_grid import until

PLACE = ("cn", "dc1")
MEMBER = spiffe_of(PLACE)


def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


class Grid:
    """The top board `cn` with a member dc1 and a region `east` that may invite, listening on this machine."""

    def __init__(self, folder: Path) -> None:
        from qipan.identity import Wallet

        self.folder = folder
        Wallet.found(folder / "cn" / "identity", "cn", time.time)
        self.host = GridHost(Site(BoardSpec(BoardId("cn"))), folder / "cn")
        self.port = self.host.listen("127.0.0.1", 0)
        self.url = f"grid://127.0.0.1:{self.port}"
        self.root = self.host.wallet.authority()
        self.dc1 = join(folder / "dc1", self.invite("dc1"))
        self.east = join(folder / "east", self.invite("east", may_invite=True)).authority()

    def invite(self, name: str, **more) -> Token:
        return self.host.wallet.invite(name, more.pop("provider", ""), self.url, **more)

    def refusals(self) -> list[str]:
        path = self.folder / "cn" / "refused.jsonl"
        return [json.loads(line)["why"] for line in path.read_text().splitlines()] if path.exists() else []

    def context(self, certs, private) -> ssl.SSLContext:
        path = self.folder / f"shown-{time.monotonic_ns()}.pem"
        body = b"".join(cert.public_bytes(serialization.Encoding.PEM) for cert in certs)
        path.write_bytes(
            body
            + private.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = joining_context(self.invite("nobody"))
        context.load_cert_chain(path)
        return context

    def dial(self, context: ssl.SSLContext, board: str = "dc1") -> None:
        """Connect as a board would, and wait until it was let in or turned away."""
        before, network = len(self.refusals()), Network()
        carrier = network.carrier()
        hello = {"board": board, "spec": msgspec.json.encode(BoardSpec(BoardId(board)))}
        dialer = network.dial(
            self.url, lambda: context, expects(("cn",)), lambda: hello, carrier, lambda *_: None
        )
        until(lambda: carrier.connected or len(self.refusals()) > before, 20, "neither let in nor refused")
        self.let_in = carrier.connected
        dialer.end()
        network.close()

    def ask_to_join(self, token: Token, **changes) -> None:
        hello = {
            "secret": token.secret, "place": token.place, "provider": token.provider,
            "request": make_request(key(), token.place), "authority_request": b"", **changes,
        }  # fmt: skip
        try:
            ask_once(self.url, joining_context(token), expects(("cn",)), hello)
            self.let_in = True
        except QipanError:
            self.let_in = False


def certificate(signer: Authority, private, uris=(MEMBER,), *, ca=False, usage=(Eku.CLIENT_AUTH, Eku.SERVER_AUTH),
                dns=(), levels=None, begin_s=-60.0, life_s=3600.0):  # fmt: skip
    """A certificate with anything in it, signed by `signer` as if by mistake."""
    now = datetime.fromtimestamp(time.time(), UTC)
    names = [*(x509.UniformResourceIdentifier(uri) for uri in uris), *(x509.DNSName(name) for name in dns)]
    built = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"made up {time.monotonic_ns()}")]))
        .issuer_name(signer.chain[0].subject).public_key(private.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(seconds=begin_s)).not_valid_after(now + timedelta(seconds=begin_s + life_s))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=levels), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
    )  # fmt: skip
    if ca:
        flags = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "encipher_only", "decipher_only"), False,
        )  # fmt: skip
        built = built.add_extension(x509.KeyUsage(**flags, key_cert_sign=True, crl_sign=True), critical=True)
    if names:
        built = built.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if usage and not ca:
        built = built.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
    return built.sign(signer.key, hashes.SHA256())


def request(private, place=PLACE, extensions=(), uri="", signer=None) -> bytes:
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri or spiffe_of(place))])
    built = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(names, critical=False)
    )
    for extension in extensions:
        built = built.add_extension(extension, critical=False)
    return built.sign(signer or private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def shown(**how):
    """A member's name on a certificate that is wrong in one way."""

    def act(grid: Grid) -> None:
        private = key()
        grid.dial(grid.context((certificate(grid.root, private, **how),), private))

    return act


def foreign_root(grid: Grid) -> None:
    other, private = Authority.root("cn", time.time()), key()
    grid.dial(grid.context((certificate(other, private),), private))


def self_signed(grid: Grid) -> None:
    private = key()
    name = Authority(("cn",), private, Authority.root("cn", time.time()).chain)
    grid.dial(grid.context((certificate(name, private),), private))


def foreign_region(grid: Grid) -> None:
    private = key()
    grid.dial(grid.context((certificate(grid.east, private), *grid.east.chain), private))


def board_as_authority(grid: Grid) -> None:
    first, second = key(), key()
    cert = certificate(grid.root, first)
    grid.dial(grid.context((certificate(Authority(PLACE, first, (cert,)), second), cert), second))


def authority_too_deep(grid: Grid) -> None:
    first, second, private = key(), key(), key()
    one = certificate(grid.root, first, (), ca=True, levels=0)
    two = certificate(Authority(("cn",), first, (one,)), second, (), ca=True)
    grid.dial(grid.context((certificate(Authority(("cn",), second, (two,)), private), two, one), private))


def no_certificate(grid: Grid) -> None:
    grid.dial(joining_context(grid.invite("nobody")))


def old_tls(grid: Grid) -> None:
    private = key()
    context = grid.context((certificate(grid.root, private),), private)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    grid.dial(context)


def no_tls(grid: Grid) -> None:
    before = len(grid.refusals())
    with socket.create_connection(("127.0.0.1", grid.port)) as plain:
        plain.sendall(b"GET /link HTTP/1.1\r\nHost: cn\r\n\r\n")
        until(lambda: len(grid.refusals()) > before)
    grid.let_in = False


def revoked(grid: Grid) -> None:
    grid.host.wallet.revoke("dc1")
    grid.dial(grid.dc1.client_context())


def replaced(grid: Grid) -> None:
    old = grid.dc1.client_context()
    grid.dial(old)
    assert grid.let_in
    grid.dc1.take(grid.host.wallet.renewed(grid.dc1.own(), grid.dc1.request()))
    grid.dial(grid.dc1.client_context())
    assert grid.let_in, "the new one is good"
    grid.dial(old)


def another_boards_name(grid: Grid) -> None:
    grid.dial(grid.dc1.client_context(), "dc2")


def joining(request_of=None, **changes):
    """The join of dc2 with one thing wrong."""

    def act(grid: Grid) -> None:
        token = grid.invite("dc2")
        if request_of is not None:
            changes["request"] = request_of()
        grid.ask_to_join(token, **changes)

    return act


def token_twice(grid: Grid) -> None:
    token = grid.invite("dc2")
    grid.ask_to_join(token)
    assert grid.let_in
    grid.ask_to_join(token)


def token_expired(grid: Grid) -> None:
    grid.ask_to_join(grid.invite("dc2", life_s=-1.0))


def token_of_an_earlier_invite(grid: Grid) -> None:
    first = grid.invite("dc2")
    grid.invite("dc2")
    grid.ask_to_join(first)


def renamed(grid: Grid) -> None:
    token = grid.invite("dc2")
    grid.ask_to_join(token, place=PLACE, request=make_request(key(), PLACE))


def other_provider(grid: Grid) -> None:
    grid.ask_to_join(grid.invite("dc2", provider="acme"), provider="evil")


DC2 = ("cn", "dc2")
WRONG = {
    "another grid's root": (foreign_root, "self.signed|unable to get|signature"),
    "signed by itself": (self_signed, "self.signed|unable to get|signature"),
    "signed by a foreign region": (foreign_region, "permitted subtree"),
    "signed by a board that is no authority": (board_as_authority, "invalid CA|unable to get"),
    "an authority below one that allows none": (authority_too_deep, "path length"),
    "expired": (shown(begin_s=-7200.0), "expired"),
    "not valid yet (a clock far ahead)": (shown(begin_s=7200.0), "not yet valid"),
    "taken out of the grid": (revoked, "taken out"),
    "a certificate that a newer one replaced": (replaced, "newer one had replaced"),
    "an authority's certificate shown as a board's": (shown(ca=True), "authority|purpose"),
    "no name": (shown(uris=()), "no readable name"),
    "two names": (shown(uris=(spiffe_of(PLACE), spiffe_of(("cn", "dc9")))), "one URI"),
    "a DNS name beside": (shown(dns=("dc1",)), "one URI"),
    "no SPIFFE name": (shown(uris=("https://dc1.cn.qipan/board",)), "no board's name|looks like"),
    "a person's name": (shown(uris=("spiffe://dc1.cn.qipan/person",)), "no board's name"),
    "another suffix": (shown(uris=("spiffe://dc1.cn.example/board",)), "permitted subtree|ends in"),
    "a name that never joined": (shown(uris=(spiffe_of(("cn", "dc9")),)), "no member"),
    "a name of another level": (shown(uris=(spiffe_of(("cn", "east", "dc1")),)), "right below"),
    "for servers only": (shown(usage=(Eku.SERVER_AUTH,)), "purpose|both"),
    "for clients only": (shown(usage=(Eku.CLIENT_AUTH,)), "both"),
    "no certificate": (no_certificate, "no certificate"),
    "TLS 1.2": (old_tls, "(?i)unsupported.protocol|version"),
    "no TLS": (no_tls, "(?i)http.request|wrong version"),
    "a board that calls itself another": (another_boards_name, "calls itself dc2"),
    "a token used before": (token_twice, "used before"),
    "an expired token": (token_expired, "expired"),
    "a token that a newer one replaced": (token_of_an_earlier_invite, "not known"),
    "a made-up token": (joining(secret="guess"), "not known"),
    "a token for another place": (renamed, "is for cn/dc2"),
    "a token for another provider": (other_provider, "for provider acme"),
    "CA:TRUE in the request": (
        joining(request_of=lambda: request(key(), DC2, [x509.BasicConstraints(True, None)])), "CA:TRUE"),
    "another name in the request": (joining(request_of=lambda: request(key(), uri=spiffe_of(PLACE))), "names"),
    "a wish in the request": (
        joining(request_of=lambda: request(key(), DC2, [x509.ExtendedKeyUsage([Eku.CODE_SIGNING])])), "no more"),
    "a weak key": (
        joining(request_of=lambda: request(rsa.generate_private_key(65537, 2048), DC2)), "P-256"),
    "an authority that was not offered": (
        joining(authority_request=request(key(), DC2)), "no authority"),
}  # fmt: skip


@pytest.fixture
def grid(tmp_path):
    made = Grid(tmp_path)
    yield made
    made.host.close()


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_identity_is_refused_and_logged(grid, what):
    act, words = WRONG[what]
    act(grid)
    assert not grid.let_in
    assert re.search(words, grid.refusals()[-1]), grid.refusals()


def test_there_are_more_than_25_wrong_identities():
    assert len(WRONG) >= 25


def test_the_right_ones_are_let_in(grid):
    grid.dial(grid.dc1.client_context())
    assert grid.let_in
    private = key()
    grid.dial(grid.context((certificate(grid.root, private),), private))
    assert grid.let_in, "the made-up certificates are wrong in nothing but what each case says"
    assert grid.refusals() == []


def test_a_board_below_a_region_is_let_in_by_the_regions_board_with_its_chain(grid, tmp_path):
    east = join(tmp_path / "far", grid.invite("west", may_invite=True))
    token = east.invite("dc7", "", "grid://nowhere:1")
    private = key()
    chain, _ = east.admit(token.secret, token.place, "", make_request(private, token.place), b"")
    certs = x509.load_pem_x509_certificates(chain)
    assert peer_of(certs[0].public_bytes(serialization.Encoding.DER)).place == ("cn", "west", "dc7")
    assert len(certs) == 2
    before = grid.refusals()
    grid.dial(grid.context(certs, private), "dc7")
    assert "right below" in grid.refusals()[-1], "its chain holds; but its place is below the region"
    assert len(grid.refusals()) == len(before) + 1


def test_a_board_may_come_while_those_below_are_gone_through(tmp_path):
    grid = Grid(tmp_path)
    try:
        grid.dial(grid.dc1.client_context())
        assert grid.let_in
        walk = iter(grid.host.below.items())
        grid.dial(join(tmp_path / "dc2", grid.invite("dc2")).client_context(), "dc2")
        assert grid.let_in
        assert [name for name, _ in walk] == ["dc1"]
        assert sorted(grid.host.below) == ["dc1", "dc2"]
    finally:
        grid.host.close()


def test_a_certificate_is_renewed_at_half_its_life_and_the_link_goes_on(tmp_path):
    grid = Grid(tmp_path)
    life_s = 4.0
    short = grid.root.board(
        grid.dc1.request(), PLACE, time.time() + 1.0, life_s
    )  # began 3 s ago, ends in 5 s
    grid.dc1.take(short.public_bytes(serialization.Encoding.PEM))
    below = GridHost(Site(BoardSpec(BoardId("dc1"))), tmp_path / "dc1")
    try:
        first = below.wallet.own().serial
        below.dial()
        until(lambda: below.connected)

        def renewed() -> bool:
            below._look()
            grid.host._look()
            time.sleep(0.05)
            return below.wallet.own().serial != first and below.connected

        until(renewed, 30)
        grid.host.wallet.flush()
        until(lambda: grid.host.wallet.kept.members[0].serial == f"{below.wallet.own().serial:x}")
        assert below.wallet.due_s() > time.time() + 3600
        assert grid.refusals() == []
    finally:
        below.close()
        grid.host.close()


@pytest.mark.parametrize("place", [("cn",), ("cn", "east")])
def test_what_took_a_board_over_is_known_above_and_below_and_so_is_what_takes_that_over(tmp_path, place):
    def joined(name: str, at: Wallet, role: str = "board", may_invite: bool = True) -> Wallet:
        token = at.invite(
            place[-1] if role == "standby" else name, "", "grid://nowhere:1", role=role, may_invite=may_invite
        )

        def ask(token: Token, request: bytes, own: bytes) -> tuple[bytes, bytes]:
            return at.admit(token.secret, token.place, "", request, own)

        return Wallet.join(tmp_path / name, token, ask, time.time)

    top = Wallet.found(tmp_path / "cn", "cn", time.time)
    leader = top if len(place) == 1 else joined("east", top)
    child = joined("dc1", leader, may_invite=False)
    for number in (1, 2):
        standby = joined(f"standby{number}", leader, "standby")
        folder = tmp_path / f"leader{number}"
        standby.crown(folder, leader.kept, "127.0.0.1:1")
        leader = Wallet(folder, time.time)
        for client, server in ((child, leader), (leader, child), (leader, top), (top, leader)):
            shaken(client.client_context(), server.server_context())


def shaken(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """A handshake in memory.  Raises ssl.SSLError when one does not believe the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert all(end.getpeercert(binary_form=True) for end in ends)


def test_an_invite_beside_the_served_board_is_not_lost_nor_is_what_the_board_writes(tmp_path):
    served, typed = Wallet.found(tmp_path / "cn", "cn", time.time), Wallet(tmp_path / "cn", time.time)

    def follows() -> None:
        for reign in range(1, 200):
            served.follow(reign=reign)

    beside = threading.Thread(target=follows)
    beside.start()
    for number in range(60):
        typed.invite(f"dc{number}", "", "grid://nowhere:1")
    beside.join()
    kept = Wallet(tmp_path / "cn", time.time).kept
    assert (kept.reign, len(kept.invites)) == (199, 60)
