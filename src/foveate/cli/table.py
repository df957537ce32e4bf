"""The command that prints which methods run on which families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.tools import Json, guarded, print_json


@guarded
def table(
    callers: Annotated[
        Path | None, typer.Option(help="What tests/record_compatibility.py wrote, for a section on callers.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print which methods run on which families, as the markdown page docs/compatibility.md."""
    from foveate.cli import compatibility

    measured = None if callers is None else json.loads(callers.read_text(encoding="utf-8"))
    if as_json:
        print_json(compatibility.table() | ({} if measured is None else {"callers": measured}))
    else:
        print(compatibility.page(measured), end="")
