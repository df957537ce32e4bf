"""Commands that measure time and memory."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from foveate.cli_tools import Json, guarded, print_json, write_json

bench_app = typer.Typer(help="Measure time and memory.", no_args_is_help=True)


@bench_app.command()
@guarded
def selection(
    methods: Annotated[list[str] | None, typer.Argument(help="Names of methods.  [default: all]")] = None,
    keep: Annotated[int, typer.Option(min=1, help="Tokens to keep.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs per method.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path | None, typer.Option(help="File for the result, in JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Time every method's selection on random tokens, and VisPruner against the plain loop of its paper."""
    from foveate.bench import selection as bench
    from foveate.reducer import list_methods, load_reducer, parameters_without_default

    lacking = {name: more for name in list_methods() if (more := parameters_without_default(name))}
    every = [name for name in list_methods() if name not in lacking]
    names = dict.fromkeys([bench.REFERENCE, *(methods or every)])
    with contextlib.redirect_stdout(sys.stderr), Console(stderr=True).status("starting") as status:
        reducers = [load_reducer(name, keep=keep) for name in names]
        result = bench.selection(reducers, bench.GRIDS, repeats=repeats, threads=threads, say=status.update)
    if not methods:
        result["left_out"] |= {name: f"needs {', '.join(more)}" for name, more in lacking.items()}
    if out is not None:
        write_json(out, result)
    if as_json:
        print_json(result)
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    sizes = list(dict.fromkeys((row["tokens"], row["batch"]) for row in result["rows"]))
    table.add_column("median, ms")
    for tokens, batch in sizes:
        table.add_column(f"{tokens} x {batch}", justify="right")
    for name in dict.fromkeys(row["method"] for row in result["rows"]):
        own = {(r["tokens"], r["batch"]): r for r in result["rows"] if r["method"] == name}
        table.add_row(name, *(f"{own[size]['median_ms']:.1f}" for size in sizes))
    console = Console(highlight=False)
    console.print(table)
    plain = result["vispruner_against_plain_loop"]
    console.print(
        f"vispruner against the plain loop of its paper: {plain['ratio_of_medians']} times as fast, "
        f"the same tokens on {plain['identical']} of {plain['inputs']} inputs"
    )
