"""Refusals on the wire: problem details (RFC 9457) that carry the code of the command line's exit and its name."""

import math
import re
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from qipan.errors import Infeasible, InvalidInput, NotAllowed, NotFound, OverLimit, QipanError, Unreachable

#: each kind of error with its status and what the caller can do; QipanError stands for everything else
KINDS: dict[type[QipanError], tuple[int, str]] = {
    InvalidInput: (400, "fix the input: file, flag or quantity"),
    OverLimit: (402, "over budget or quota: raise it, or wait"),
    NotAllowed: (403, "ask an administrator"),
    NotFound: (404, "name something that exists"),
    Infeasible: (422, "no place can run it as asked: relax a limit"),
    QipanError: (500, "something failed while running"),
    Unreachable: (503, "a server or link did not answer: start it, or wait"),
}
KIND_OF_STATUS: dict[int, type[QipanError]] = {404: NotFound, 401: NotAllowed, 403: NotAllowed}
MEDIA = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Problem:
    """`type` is the address of a page about this kind of error, `title` its name, `code` the command line's exit
    code for it, `detail` what happened, the values and what to do next."""

    type: str
    title: str
    status: int
    detail: str
    code: int


def name_of(kind: type[QipanError]) -> str:
    """`InvalidInput` -> `invalid-input`."""
    return "failed" if kind is QipanError else re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower()


def problem(error: QipanError, status: int = 0) -> Response:
    """`status` 0: the one of the error's kind."""
    kind = next((known for known in type(error).__mro__ if known in KINDS), QipanError)
    name, status = name_of(kind), status or KINDS[kind][0]
    body = Problem(f"/v1/problems/{name}", type(error).__name__, status, str(error), error.exit_code)
    headers = {"cache-control": "no-store"} | ({"www-authenticate": "Bearer"} if status == 401 else {})
    return Response(msgspec.json.encode(body), status, headers, MEDIA)


def handle_errors(api: FastAPI) -> None:
    """Every error leaves as a problem, whoever raised it."""

    @api.exception_handler(QipanError)
    async def ours(_request: Request, error: QipanError) -> Response:
        told = problem(error, getattr(error, "status", 0))
        if (wait_s := getattr(error, "wait_s", None)) is not None:
            told.headers["retry-after"] = str(math.ceil(wait_s))
        return told

    @api.exception_handler(RequestValidationError)
    async def parameters(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return problem(InvalidInput(f"{first['msg']}; see /v1/openapi.json", where))

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        kind = KIND_OF_STATUS.get(error.status_code, InvalidInput)
        path = request.url.path[:200]
        told = problem(
            kind(f"{request.method} {path}: {error.detail}; see /v1/openapi.json"), error.status_code
        )
        told.headers.update(error.headers or {})
        return told

    @api.exception_handler(Exception)
    async def bug(_request: Request, error: Exception) -> Response:
        return problem(QipanError(f"the server failed ({type(error).__name__}); its log says where"))


def describe_problems(schema: dict[str, Any]) -> None:
    """Writes into an OpenAPI document that every error of every operation is a problem."""
    told = {MEDIA: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for operations in schema["paths"].values():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                if not status.startswith("2") and status != "304":
                    answer["content"] = told
    for unused in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(unused, None)
