"""The public API: HTTP over a Unix socket with a token."""

from qipan.api.app import make_app
from qipan.api.gate import tenant_token
from qipan.api.server import Server

__all__ = ["Server", "make_app", "tenant_token"]
