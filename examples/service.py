"""One replica of a service: it answers with its number.  A signal to stop ends it once it has answered.  Standard library only."""

import json
import os
import signal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"replica {os.environ.get('QIPAN_REPLICA', '1')} of {os.environ.get('QIPAN_SERVICE', 'none')}\n".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
signal.signal(signal.SIGTERM, lambda _number, _frame: Thread(target=server.shutdown).start())
print(f"serves at http://127.0.0.1:{server.server_port}", flush=True)
with open(os.environ.get("QIPAN_EVENTS", "/dev/stdout"), "a") as file:
    file.write(json.dumps({"event": "ready"}) + "\n")
server.serve_forever()
