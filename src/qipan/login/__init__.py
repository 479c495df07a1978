"""People: who they are, how they log in, and what their role lets them do."""

from qipan.login.people import Grant, People, Session, User
from qipan.login.roles import ROLES, allows
from qipan.login.tokens import ACCESS_S, Bearer, Signer

__all__ = ["ACCESS_S", "ROLES", "Bearer", "Grant", "People", "Session", "Signer", "User", "allows"]
