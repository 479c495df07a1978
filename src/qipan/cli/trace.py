"""`qipan trace`: where the time went from a task's submission to its first step."""

from typing import Annotated, Any

import typer

from qipan.cli.options import Json, StoreDir
from qipan.errors import QipanError, Unreachable

WIDTH = 48


def trace(
    task: str,
    otlp: Annotated[str, typer.Option(help="Send the spans to this OpenTelemetry receiver, such as http://127.0.0.1:4318.")] = "",
    json_: Json = False, store: StoreDir = None,
) -> None:  # fmt: skip
    """One trace from submit to first step: API, boards, channels, supervisor, trainer."""
    from qipan.cli.app import client, tell

    spans = client(store).call("GET", f"/tasks/{task}/trace")["spans"]
    if otlp:
        send(otlp, spans)
    tell({"spans": spans}, json_, lambda _: show(spans))


def show(spans: list[dict[str, Any]]) -> None:
    from qipan.cli.tables import table

    began_s = min((span["start_s"] for span in spans), default=0.0)
    whole_s = max((span["end_s"] for span in spans), default=0.0) - began_s
    below: dict[str, list[dict[str, Any]]] = {}
    known = {span["span_id"] for span in spans}
    for span in spans:
        below.setdefault(span["parent_id"] if span["parent_id"] in known else "", []).append(span)
    rows: list[list[str]] = []

    def add(span: dict[str, Any], depth: int) -> None:
        from_s, took_s = span["start_s"] - began_s, span["end_s"] - span["start_s"]
        where = " ".join(one for one in (span["service"].removeprefix("qipan-"), span["instance"]) if one)
        rows.append(["  " * depth + span["name"], where, f"{from_s:.3f}", f"{took_s:.3f}", bar(from_s, took_s, whole_s)])  # fmt: skip
        for inner in below.get(span["span_id"], []):
            add(inner, depth + 1)

    for span in below.get("", []):
        add(span, 0)
    table(f"踪迹 trace {spans[0]['trace_id'] if spans else ''}", ["span", "at", "from s", "took s", ""], rows)


def bar(from_s: float, took_s: float, whole_s: float) -> str:
    if whole_s <= 0:
        return ""
    left = round(from_s / whole_s * WIDTH)
    return " " * left + "#" * max(1, min(WIDTH - left, round(took_s / whole_s * WIDTH)))


def send(url: str, spans: list[dict[str, Any]]) -> None:
    """By OTLP/HTTP.  Raises Unreachable, QipanError with the receiver's words."""
    import httpx
    import msgspec

    from qipan import __version__
    from qipan.tracing import Span
    from qipan.tracing import otlp as body_of

    at = url.rstrip("/") if url.rstrip("/").endswith("/v1/traces") else f"{url.rstrip('/')}/v1/traces"
    try:
        answer = httpx.post(
            at, json=body_of(msgspec.convert(spans, type=list[Span]), __version__), timeout=20
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreachable(f"no OpenTelemetry receiver answers at {at}: {error}") from None
    if not answer.is_success:
        raise QipanError(f"{at} answers {answer.status_code}: {answer.text[:300]}")
