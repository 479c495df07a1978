"""The public API: HTTP over a Unix socket with a token.  Errors are problem details (RFC 9457) that carry the same
code as the command line's exit."""

import hmac
import socket
import threading
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from qipan.errors import InvalidInput, NotAllowed, QipanError
from qipan.host import Host
from qipan.workload.files import read_text

BODY_MAX = 2 << 20
STATUS = {2: 400, 102: 404, 104: 422, 105: 402, 106: 503, 107: 403}


class Submission(msgspec.Struct, forbid_unknown_fields=True):
    """`text` is the task file; `file` and `workdir` say where it stood."""

    text: str
    file: str = "task.yaml"
    workdir: str = ""
    key: str | None = None


def make_app(host: Host, token: str) -> FastAPI:
    app = FastAPI(title="Qipan", version="1", docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return problem(NotAllowed("no or wrong token; send the content of the store's `token` file"))
        if int(request.headers.get("content-length") or 0) > BODY_MAX:
            return problem(InvalidInput(f"the body is larger than {BODY_MAX} bytes"))
        response: Response = await call_next(request)
        return response

    @app.exception_handler(QipanError)
    async def on_error(_request: Request, error: QipanError) -> Response:
        return problem(error)

    async def submission(request: Request) -> Submission:
        try:
            return msgspec.json.decode(await request.body(), type=Submission)
        except msgspec.MsgspecError as error:
            raise InvalidInput(
                f"the body is not a submission: {error}; send {{text, file, workdir}}"
            ) from None

    @app.get("/v1/health")
    async def health() -> Response:
        return answer({"status": "ok", "board": host.site.root.board})

    @app.post("/v1/plan")
    async def plan(request: Request) -> Response:
        body = await submission(request)
        task, _ = read_text(body.text, body.file, body.workdir)
        return answer(await run_in_threadpool(host.plan, task))

    @app.post("/v1/tasks")
    async def submit(request: Request) -> Response:
        body = await submission(request)
        task, directives = read_text(body.text, body.file, body.workdir)
        task_id, chosen = await run_in_threadpool(host.submit, task, body.key)
        return answer({"task_id": task_id, "plan": chosen, "directives": directives}, 201)

    @app.get("/v1/tasks")
    def tasks() -> Response:
        return answer({"tasks": host.tasks()})

    @app.get("/v1/tasks/{task_id}")
    def task(task_id: str) -> Response:
        return answer(host.task(task_id))

    @app.get("/v1/tasks/{task_id}/why")
    def why(task_id: str) -> Response:
        return answer(host.why(task_id))

    @app.get("/v1/tasks/{task_id}/logs")
    def logs(task_id: str, after: int = 0) -> Response:
        return answer(host.logs(task_id, after))

    @app.get("/v1/tasks/{task_id}/events")
    def events(task_id: str, after: int = 0) -> Response:
        return answer({"events": host.events(task_id, after)})

    @app.post("/v1/tasks/{task_id}/cancel")
    def cancel(task_id: str) -> Response:
        host.cancel(task_id, "the user")
        return answer({"task_id": task_id})

    @app.get("/v1/tasks/{task_id}/bill")
    def bill(task_id: str) -> Response:
        return answer({"receipt": host.bill(task_id), "charged_micro_cny": host.charged(task_id)})

    @app.get("/v1/boards")
    def boards() -> Response:
        return answer({"boards": host.boards()})

    @app.get("/v1/ledger")
    def ledger() -> Response:
        return answer({"balances_micro_cny": host.balances(), "sum_micro_cny": host.ledger_sum()})

    return app


def answer(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def problem(error: QipanError) -> Response:
    body = {
        "type": "about:blank",
        "title": type(error).__name__,
        "detail": str(error),
        "code": error.exit_code,
    }
    return Response(
        msgspec.json.encode(body), STATUS.get(error.exit_code, 500), media_type="application/problem+json"
    )


class Server:
    """Serves a host on `path` in a thread of its own."""

    def __init__(self, host: Host, path: Path, token: str) -> None:
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        path.chmod(0o600)
        config = uvicorn.Config(make_app(host, token), log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(5)
        self._socket.close()
