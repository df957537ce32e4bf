"""The command that tells whether foveate is right and fast with a model on this machine."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from foveate.cli.tools import ERRORS, Json, command_line, guarded, tell
from foveate.measure.units import show_bytes

STYLES = {"right": "green", "measured": "green", "wrong": "bold red", "slower than unpruned": "yellow"}


@guarded
def check(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="A hub id, a folder, nano, or a shape with random weights: llava-1.5-7b, qwen2.5-vl-7b, "
            "tiny-qwen2.5-vl-7b, ...  \\[default: llava-1.5-7b on a GPU, nano without one]"
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.  \\[default: a GPU if there is one]")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; of shapes, auto is bfloat16 on a GPU.")
    ] = "auto",
    attn: Annotated[str | None, typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2.")] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="Time for all checks, once the model is loaded.")] = 8.0,
    out: Annotated[Path | None, typer.Option(help="File for the result, in JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Check that reduction is right and fast with a model on this machine; exit code 1 if something is wrong."""
    with contextlib.redirect_stdout(sys.stderr), ERRORS.status("loading") as status:
        from foveate.check import run
        from foveate.check.subjects import load_subject
        from foveate.check.verdicts import WRONG, Minutes

        place = run.device_of(device)
        name = model or ("nano" if place == "cpu" else "llava-1.5-7b")
        subject = load_subject(name, place, dtype, attn)
        result = {"command": command_line(context), **run.check(subject, Minutes(minutes), say=status.update)}
    tell(result, out, as_json, _show)
    if any(verdict["verdict"] == WRONG for verdict in result["verdicts"]):
        raise typer.Exit(1)


def _show(result: dict[str, Any]) -> None:
    console, config, versions = Console(highlight=False), result["config"], result["versions"]
    console.print(
        f"{result['model']} ({config['class']}), {config['dtype']} on {result['machine']['device']}, attention "
        f"{config['attention']}; torch {versions['torch']}, transformers {versions['transformers']}",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    for verdict in result["verdicts"]:
        word = verdict["verdict"]
        style = STYLES.get(word, "dim")
        console.print(f"\\[[{style}]{word}[/{style}]]", end=" ")
        console.print(f"{verdict['check']}: {verdict['said']}", markup=False, soft_wrap=True)
    for verdict in result["verdicts"]:
        if "arms" in verdict:
            console.print(_arms(verdict))


def _arms(verdict: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title=verdict["check"], title_justify="left")
    stages = ("first_token", "vision", "select", "prefill", "decode")
    for column in ("ms", *(stage.replace("_", " ") for stage in stages), "memory", "KV cache"):
        table.add_column(column, justify="left" if column == "ms" else "right", no_wrap=True)
    for row in verdict["arms"]:
        times = (f"{row['time'][stage]['median_ms']:.1f}" for stage in stages)
        table.add_row(row["arm"], *times, show_bytes(row["peak_bytes"]["total"]), show_bytes(row["kv_bytes"]))
    return table
