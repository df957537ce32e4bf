"""The command that shows what methods keep, as pictures, as a page and as an app."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.cli.names import check_methods
from foveate.cli.tools import (
    ERRORS,
    Absorb,
    Json,
    Rectify,
    guarded,
    load,
    make_folder,
    print_json,
    reducer_from,
    write_json,
)  # fmt: skip
from foveate.core.errors import InputError
from foveate.measure.units import show_bytes, show_flops, show_time

METHODS, BUDGETS = ("vispruner",), ("0.05", "0.1", "0.25", "0.5")


@guarded
def view(
    image: Annotated[str | None, typer.Argument(help="Image file.")] = None,
    question: Annotated[str | None, typer.Argument(help="What to ask about it.")] = None,
    model: Annotated[str, typer.Option(help="nano, a hub id, or a folder.")] = "nano",
    method: Annotated[
        list[str] | None,
        typer.Option(help="Name of a method, or a JSON file with one; repeatable.  \\[default: vispruner]"),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Budget, as of `run`; repeatable.  \\[default: 0.05, 0.1, 0.25 and 0.5]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures.  \\[default: runs/IMAGE-view]")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers: auto, cpu, cuda:1.")] = None,
    attn: Annotated[str | None, typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2.")] = None,
    prompt_template: Annotated[str | None, typer.Option(help="Text with <image> and {question}.")] = None,
    rectify: Rectify = 0.0,
    absorb: Absorb = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit on the answer.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs; the median counts.")] = 3,
    app: Annotated[bool, typer.Option("--app", help="Choose image, methods and budgets in the browser.")] = False,
    host: Annotated[str, typer.Option(help="Address that the app listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0 takes a free one.")] = 7860,
    as_json: Json = False,
) -> None:
    """Show which tokens methods keep, merge and drop at several budgets, with answers and costs."""
    methods, budgets = tuple(method or METHODS), tuple(keep or BUDGETS)
    check_methods(methods)
    with contextlib.redirect_stdout(sys.stderr):
        if app:
            if as_json:
                raise InputError("--app gives no document to print: leave out --json")
            _serve(image, question, model, methods, budgets, (dtype, device_map, attn), prompt_template,
                   max_new_tokens, repeats, host, port, rectify, absorb)  # fmt: skip
            return
        if image is None or question is None:
            raise InputError("give an image file and a question, or --app to choose them in the browser")
        from foveate.measure.job import prepare
        from foveate.measure.loading import open_image, prompt_for
        from foveate.viz.comparison import compare, reducers
        from foveate.viz.page import write_page
        from foveate.viz.sheet import save_sheet

        made = reducers(methods, budgets, make_reducer)
        picture = open_image(image)
        if prompt_template is not None:
            prompt_for(None, question, prompt_template)
        loaded, processor = load(model, dtype, device_map, attn)
        job = prepare(loaded, processor, picture, question, prompt_template, max_new_tokens)
        with ERRORS.status("running") as status:
            comparison = compare(job, picture, question, model, made, budgets, repeats, status.update, rectify, absorb)
            status.update("drawing")
            folder = make_folder(out, f"{Path(image).stem}-view")
            save_sheet(folder / "view.png", comparison)
            write_page(folder / "view.html", comparison)
        files = {"picture": str(folder / "view.png"), "page": str(folder / "view.html")}
        data = {**comparison.to_dict(), "rectify": rectify, "absorb": absorb, **files}
        write_json(folder / "view.json", data)
    if as_json:
        print_json(data)
    else:
        _show(data)


def make_reducer(method: str, keep: str) -> Any:
    """Build a method from a name or a JSON file and a budget."""
    return reducer_from(method, keep, [])


def _serve(
    image: str | None, question: str | None, model: str, methods: tuple[str, ...], budgets: tuple[str, ...],
    kind: tuple[str, str | None, str | None], template: str | None, max_new_tokens: int, repeats: int,
    host: str, port: int, rectify: float, absorb: bool,
) -> None:  # fmt: skip
    from foveate.measure.loading import open_image, prompt_for
    from foveate.viz.app import build, serve

    if image is not None:
        open_image(image)
    if template is not None:
        prompt_for(None, question or "?", template)
    for name in methods:
        for keep in budgets:
            make_reducer(name, keep)
    loaded, processor = load(model, *kind)
    blocks = build(
        loaded, processor, model, make_reducer, image=image, question=question, methods=methods, budgets=budgets,
        template=template, max_new_tokens=max_new_tokens, repeats=repeats, rectify=rectify, absorb=absorb,
    )  # fmt: skip
    serve(blocks, host, port, lambda address: ERRORS.print(f"open {address} (stop with Ctrl+C)", highlight=False))


def _show(data: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    rows = [("unpruned", "", data["unpruned"])]
    rows += [(method["name"], arm["budget"], arm) for method in data["methods"] for arm in method["arms"]]
    layered = any(arm["equivalent_tokens"] != arm["tokens"] for _, _, arm in rows)
    counts = ("tokens", "mean over layers") if layered else ("tokens",)
    for column in ("method", "budget", *counts, "FLOPs", "KV cache", "total", "answer"):
        table.add_column(column, justify="left" if column in ("method", "answer") else "right")
    for name, budget, arm in rows:
        differs = "" if arm["answer"] == data["unpruned"]["answer"] else "  (differs)"
        table.add_row(
            escape(name), budget, str(arm["tokens"]), *([f"{arm['equivalent_tokens']:.1f}"] if layered else []),
            "unknown" if arm["flops"] is None else show_flops(arm["flops"]),
            show_bytes(arm["kv_bytes"]), show_time(arm["seconds"]["total"]), escape(arm["answer"]) + differs,
        )  # fmt: skip
    console.print(f"\n[bold]{escape(data['question'])}[/bold]\n")
    console.print(table)
    console.print(f"\npicture  {escape(data['picture'])}\npage     {escape(data['page'])}", soft_wrap=True)
