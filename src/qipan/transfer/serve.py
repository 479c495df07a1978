"""A storage in a folder, served to other sites over HTTP: reading only, with a token, under TLS where a certificate is given."""

import hmac
import os
import re
import ssl
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KNOWN = re.compile(r"/(chunks/[0-9a-f]{2}/[0-9a-f]{64}|manifests/[0-9a-f]{64}\.json)")


def server(
    folder: Path, host: str, port: int, token: str, certificate: Path | None = None, key: Path | None = None
) -> ThreadingHTTPServer:
    """Ready to `serve_forever`.  What is neither a chunk nor a manifest is not found; another token is not let in."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        timeout = 60

        def do_GET(self) -> None:
            given = self.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                self._refuse(401)
                return
            try:
                if not KNOWN.fullmatch(self.path):
                    raise FileNotFoundError
                file = (folder / self.path[1:]).open("rb")
            except FileNotFoundError:
                self._refuse(404)
                return
            with file:
                size = os.fstat(file.fileno()).st_size
                self.send_response(200)
                self.send_header("Content-Type", "application/octet-stream")
                self.send_header("Content-Length", str(size))
                self.send_header("Last-Modified", self.date_time_string(os.fstat(file.fileno()).st_mtime))
                self.end_headers()
                try:
                    self.connection.sendfile(file)  # the kernel's own where there is no TLS
                except OSError:
                    self.close_connection = True  # the reader left; it asks again

        def _refuse(self, code: int) -> None:
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *values: object) -> None:
            return

    made = ThreadingHTTPServer((host, port), Handler)
    made.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(certificate, key)
        made.socket = context.wrap_socket(made.socket, server_side=True, do_handshake_on_connect=False)
    return made
