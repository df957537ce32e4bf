"""The command that counts costs from a configuration."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.cli.tools import Json, guarded, reducer_from, refuse, tell
from foveate.core.errors import InputError
from foveate.measure.units import show_bytes, show_flops

PARTS = {
    "vision": "vision", "projector": "projector", "selection": "selection", "prefill": "LLM prefill",
    "lm_head": "LM head", "total": "prefill, total", "decode_per_token": "decode, per token",
}  # fmt: skip


@guarded
def cost(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A built-in shape such as llava-1.5-7b, a hub id, or a folder.")],
    method: Annotated[str, typer.Option(help="Name of a method, or a JSON file with one.")] = "vispruner",
    keep: Annotated[
        str | None,
        typer.Option(help="32: tokens. 0.1: share. 64,16: one per image.  \\[default: the method's own, or 0.25]"),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Further parameter of the method: name=value, value in JSON.")
    ] = None,
    visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="Visual tokens of the prompt.  \\[default: what the images come to]")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=0, help="Other tokens of the prompt.")] = 40,
    images: Annotated[
        int | None, typer.Option(min=0, help="Images of the prompt.  \\[default: 1, or 0 beside frames]")
    ] = None,
    frames: Annotated[int, typer.Option(min=0, help="Frames of a video in the prompt.")] = 0,
    image_size: Annotated[str, typer.Option(help="Width and height in pixels.")] = "672x672",
    dtype: Annotated[str, typer.Option(help="Of the KV cache: bfloat16, float16, float32.")] = "bfloat16",
    formula: Annotated[str, typer.Option(help="true, or the paper's that is shown: fastv, pyramiddrop.")] = "true",
    out: Annotated[Path | None, typer.Option(help="File for the result, in JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Count FLOPs, KV cache and equivalent tokens from a model's configuration; no weights are needed."""
    if visual_tokens is not None:
        refuse(context, ("image_size",), "the number of visual tokens is given, whatever the size of the images")
    with contextlib.redirect_stdout(sys.stderr), Console(stderr=True).status("counting"):
        reducer, size = reducer_from(method, keep, set_ or []), _size(image_size)
        from foveate.cost import anatomy_of
        from foveate.cost.figures import deciding, report
        from foveate.cost.imagined import imagine
        from foveate.cost.shapes import load_shape
        from foveate.measure.provenance import versions

        config, processor = load_shape(model)
        anatomy = anatomy_of(config)
        count = (0 if frames else 1) if images is None else images
        work = imagine(anatomy, size, count, frames, visual_tokens, processor)
        data = {
            "model": model, "images": count, "frames": frames,
            "image_size": list(size) if visual_tokens is None else None,
            **report(anatomy, work, reducer, text_tokens, dtype, formula), "versions": versions(),
        }  # fmt: skip
    tell(data, out, as_json, lambda shown: _show(shown, deciding(reducer)))


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", text.strip())
    if found is None:
        raise InputError(f"an image size is WIDTHxHEIGHT in pixels, such as 1024x768, not {text!r}")
    return int(found[1]), int(found[2])


def _show(data: dict[str, Any], deciding: list[str]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("", "unpruned", data["method"].partition("(")[0], "change"):
        table.add_column(column, justify="left" if not column else "right")
    before, after, change = data["before"], data["after"], data["change"]
    table.add_row("visual tokens", f"{before['visual_tokens']:,}", f"{after['visual_tokens']:,}")
    if "visual_tokens_per_layer" in after:
        for counted in ("input", "output"):
            was, now = (arm["equivalent_tokens"][counted] for arm in (before, after))
            table.add_row(f"  mean over layers, {counted}", f"{was:,.1f}", f"{now:,.1f}")
    if data["formula"] == "true":
        for part, label in PARTS.items():
            style = None if part in ("total", "decode_per_token") else "dim"
            was, now = before["flops"][part], after["flops"][part]
            table.add_row(
                f"{label}, FLOPs", show_flops(was), show_flops(now), _percent(change["flops"][part]), style=style
            )
    else:
        name = data["formula"]
        was, now = before["macs"][name], after["macs"][name]
        table.add_row(
            f"multiply-accumulates ({name})", show_flops(was), show_flops(now), _percent(change["macs"][name])
        )
    table.add_row(
        f"KV cache ({data['dtype']})", show_bytes(before["kv_bytes"]), show_bytes(after["kv_bytes"]),
        _percent(change["kv_bytes"]),
    )  # fmt: skip
    console = Console(highlight=False)
    console.print(f"[bold]{escape(data['model'])}[/bold]  {escape(data['method'])}", soft_wrap=True)
    console.print(f"[dim]{data['text_tokens']} text tokens; selection costs {escape(data['complexity'])}[/dim]\n")
    console.print(table)
    if data["guided"]:
        console.print("\nwithout the small model that guides it, whose cost comes on top", soft_wrap=True)
    if data["upper_bound"]:
        verb = "decides while it runs" if len(deciding) == 1 else "decide while they run"
        console.print(f"\nat most: {' and '.join(deciding)} {verb}", soft_wrap=True)


def _percent(change: float | None) -> str:
    return "" if change is None else f"{change:+.1%}"
