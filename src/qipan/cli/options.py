"""Options that commands share."""

from pathlib import Path
from typing import Annotated, Optional

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]
StoreDir = Annotated[Optional[Path], typer.Option("--store", help="The folder of the boards' stores.")]  # noqa: UP045
SiteFile = Annotated[Optional[Path], typer.Option("--site", help="The site file (default: qipan.yaml here).")]  # noqa: UP045
