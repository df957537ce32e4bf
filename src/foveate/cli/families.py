"""The command that lists the families of models."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.cli.tools import Json, guarded, print_json
from foveate.core.errors import UnknownNameError


@guarded
def families(pattern: Annotated[str, typer.Argument(help="Shell-style pattern.")] = "*", as_json: Json = False) -> None:
    """List the supported families of models."""
    from foveate.families import all_families

    known = all_families()
    names = fnmatch.filter(known, pattern)
    if not names:
        raise UnknownNameError.among("no family matches", pattern, known)
    rows: list[dict[str, Any]] = [
        {
            "name": f.name,
            "model_types": list(f.model_types),
            "inputs": dict(f.inputs),
            "notes": f.notes,
            "refuses": dict(f.refuses),
        }
        for f in map(known.__getitem__, names)
    ]
    if as_json:
        print_json(rows)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("family", "model types", "takes", "notes"):
        table.add_column(column)
    for row in rows:
        takes = ", ".join(dict.fromkeys(row["inputs"].values()))
        table.add_row(row["name"], ", ".join(row["model_types"]) or "any other", takes, escape(row["notes"]))
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        for model_type, reason in row["refuses"].items():
            console.print(f"{row['name']} refuses {model_type}: it {reason}", markup=False)
