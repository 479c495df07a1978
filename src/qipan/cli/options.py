"""Options that commands share."""

import math
from pathlib import Path
from typing import Annotated, Optional

import typer


def finite(value: float) -> float:
    """A callback for options that are numbers: `nan` passes every bound."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number to count with; give one such as 60")
    return value


Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]
StoreDir = Annotated[Optional[Path], typer.Option("--store", help="The folder of the boards' stores.")]  # noqa: UP045
SiteFile = Annotated[Optional[Path], typer.Option("--site", help="The site file (default: qipan.yaml here).")]  # noqa: UP045
Api = Annotated[
    str, typer.Option("--api", help="HOST:PORT where people on other hosts reach the API, by HTTPS.")
]
ApiCert = Annotated[
    Path | None,
    typer.Option("--api-cert", help="Its certificate (PEM); else api.pem of the store, made here."),
]
ApiKey = Annotated[Optional[Path], typer.Option("--api-key", help="The key of --api-cert.")]  # noqa: UP045
Login = Annotated[
    Path | None, typer.Option("--login", envvar="QIPAN_LOGIN", help="The file that names an OpenID provider.")
]
MetricsAt = Annotated[
    str, typer.Option("--metrics", help="HOST:PORT where Prometheus scrapes without a token; keep it inside.")
]
