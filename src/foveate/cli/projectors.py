"""The command that lists the trained compressors."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from foveate.cli.tools import Json, guarded, print_json
from foveate.core.errors import UnknownNameError


@guarded
def projectors(
    pattern: Annotated[str, typer.Argument(help="Shell-style pattern.")] = "*", as_json: Json = False
) -> None:
    """List the trained compressors that can stand in for a model's projector, and their parameters."""
    from foveate.projectors import get_projector, list_projectors

    names = list_projectors(pattern)
    if not names:
        raise UnknownNameError.among("no projector matches", pattern, list_projectors())
    rows = [_row(get_projector(name)) for name in names]
    if as_json:
        print_json(rows)
        return
    console = Console(highlight=False)
    for row in rows:
        given = ", ".join(f"{n}={json.dumps(v['default'])}" for n, v in row["parameters"].items())
        facts = ", ".join(filter(None, (row["stage"], row["paper"])))
        console.print(
            f"[bold]{escape(row['name'])}[/bold]({escape(given)})  [dim]{escape(facts)}[/dim]", soft_wrap=True
        )
        asks = "  (asks for the question)" * row["query_aware"]
        console.print(f"    {escape(row['summary'] + asks)}", soft_wrap=True)


def _row(cls: Any) -> dict[str, Any]:
    return {
        "name": cls.name, "stage": cls.stage, "paper": cls.paper, "query_aware": cls.query_aware,
        "parameters": {field.name: {"default": field.default} for field in dataclasses.fields(cls)},
        "summary": (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").replace("``", ""),
    }  # fmt: skip
