"""Who a board is, from the first packet: X.509 certificates with SPIFFE names, issued down the tree.

The top board's authority is the root; a board that may have children of its own gets an authority whose name
constraint allows names below its own only.  Board certificates are short-lived and renewed at half their life.
"""

from qipan.identity.authority import Authority, check_request, make_authority_request, make_request
from qipan.identity.names import ROLES, Peer, Unknown, expects, host_of, peer_of, spiffe_of
from qipan.identity.token import Invite, Token
from qipan.identity.wallet import Wallet

__all__ = [
    "ROLES",
    "Authority",
    "Invite",
    "Peer",
    "Token",
    "Unknown",
    "Wallet",
    "check_request",
    "expects",
    "host_of",
    "make_authority_request",
    "make_request",
    "peer_of",
    "spiffe_of",
]
