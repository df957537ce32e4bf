"""The command line. Results go to standard output; progress, logs and errors go to standard error.

Modules of commands import typer and rich at their top and nothing heavier: help and a mistyped word are answered before
torch is loaded, which takes seconds.
"""

from __future__ import annotations

from typing import Annotated

import typer

from foveate import __version__
from foveate.cli import (
    bench,
    calibrate,
    check,
    codebook,
    cost,
    eval,
    families,
    methods,
    nano,
    projectors,
    run,
    scenes,
    table,
    tune,
    view,
)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"foveate {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Keep only the visual tokens that matter, in stock vision-language models."""


app.command()(run.run)
app.command()(view.view)
app.command()(tune.tune)
app.command()(cost.cost)
app.command("eval")(eval.evaluate)
app.add_typer(bench.bench_app, name="bench")
app.command()(check.check)
app.command()(methods.methods)
app.command()(families.families)
app.command()(projectors.projectors)
app.command()(table.table)
app.command()(scenes.scenes)
app.command()(calibrate.calibrate)
app.command()(codebook.codebook)
app.add_typer(nano.nano_app, name="nano")
