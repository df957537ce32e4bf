"""The command that lists the methods."""

from __future__ import annotations

import fnmatch
import inspect
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from foveate.cli.names import method_names
from foveate.cli.tools import Json, guarded, print_json
from foveate.core.errors import UnknownNameError


@guarded
def methods(pattern: Annotated[str, typer.Argument(help="Shell-style pattern.")] = "*", as_json: Json = False) -> None:
    """List the methods and their parameters."""
    known = method_names()
    if not fnmatch.filter(known, pattern):
        raise UnknownNameError.among("no method matches", pattern, known)
    from foveate.registry import get_method, list_methods

    names = list_methods(pattern)
    rows = [_method_row(get_method(name)) for name in names]
    if as_json:
        print_json(rows)
        return
    console = Console(highlight=False)
    for row in rows:
        given = ", ".join(f"{n}={json.dumps(v['default'])}" if v else n for n, v in row["parameters"].items())
        facts = ", ".join(filter(None, (row["stage"], row["complexity"], row["paper"])))
        console.print(
            f"[bold]{escape(row['name'])}[/bold]({escape(given)})  [dim]{escape(facts)}[/dim]", soft_wrap=True
        )
        console.print(f"    {escape(row['summary'])}", soft_wrap=True)
        flags = ["asks for the question"] * row["query_aware"] + ["merges"] * row["merges"]
        names = row["families"]
        runs_on = f"{len(names)} families (foveate table)" if len(names) > 3 else ", ".join(names) or "no family"
        read = f"reads {', '.join(row['reads']) or 'nothing'}"
        console.print(f"    [dim]{escape('; '.join([read, *flags, f'runs on {runs_on}']))}[/dim]", soft_wrap=True)


def _method_row(cls: Any) -> dict[str, Any]:
    from foveate.cli.compatibility import NO, reads, runs
    from foveate.core.reducer import declared
    from foveate.families import all_families
    from foveate.registry import by_default

    parameters = {
        p.name: {} if p.default is p.empty else {"default": p.default}
        for p in inspect.signature(cls).parameters.values()
    }
    merges = declared(cls, "merges") is not None
    return {
        "name": cls.name, "stage": cls.stage, "query_aware": declared(cls, "query_aware"), "trained": cls.trained,
        "merges": merges, "paper": cls.paper, "complexity": cls.complexity, "reads": reads(by_default(cls.name)),
        "families": [name for name, family in all_families().items() if runs(cls, family) != NO],
        "positions": cls.positions, "parameters": parameters,
        "summary": (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").replace("``", ""),
    }  # fmt: skip
