"""The command that asks a model about images, unpruned and pruned."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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

if TYPE_CHECKING:
    from foveate.core.reducer import Positions
    from foveate.engines.settings import Separators


@guarded
def run(
    asked: Annotated[list[str], typer.Argument(metavar="[IMAGE]... QUESTION", help="Image files, and a question.")],
    video: Annotated[
        str | None,
        typer.Option(help="A folder of frames, or an animated GIF, WebP or PNG file."),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of the video to take, spread evenly.")] = 8,
    model: Annotated[str, typer.Option(help="nano, a hub id, or a folder.")] = "nano",
    method: Annotated[str, typer.Option(help="Name of a method, or a JSON file with one.")] = "vispruner",
    keep: Annotated[
        str | None,
        typer.Option(
            help="32: tokens. 0.1: share. coverage:0.9: adaptive. 64,16: one per image.  "
            "\\[default: the method's own, or 0.25]"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Further parameter of the method: name=value, value in JSON.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also run the baselines at the same budget.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the overlay.  \\[default: runs/IMAGE-METHOD]")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers: auto, cpu, cuda:1.")] = None,
    attn: Annotated[str | None, typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2.")] = None,
    prompt_template: Annotated[
        str | None, typer.Option(help="Text with {question}, an <image> per image, and a <video> for a video.")
    ] = None,
    positions: Annotated[str | None, typer.Option(help="original or compact.  \\[default: as in the paper]")] = None,
    separators: Annotated[str, typer.Option(help="Newline and frame tokens: drop, keep or nonempty.")] = "drop",
    rectify: Rectify = 0.0,
    absorb: Absorb = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit on the answer.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs; the median counts.")] = 3,
    as_json: Json = False,
) -> None:
    """Ask a model about one or more images or a video, unpruned and pruned, and measure both."""
    with contextlib.redirect_stdout(sys.stderr):
        reducer = reducer_from(method, keep, set_ or [])
        from foveate.engines.settings import Settings
        from foveate.measure.baselines import baselines
        from foveate.measure.job import prepare
        from foveate.measure.loading import open_image, prompt_for
        from foveate.measure.provenance import machine, versions
        from foveate.measure.run import run_methods
        from foveate.measure.summary import summarize
        from foveate.measure.video import open_video

        where, between = cast("Positions | None", positions), cast("Separators", separators)
        Settings.make(reducer, where, between, rectify=rectify, absorb=absorb)
        *images, question = asked
        if not images and video is None:
            raise InputError(f"one argument, {question!r}: pass an image or --video, and a question")
        pictures = [open_image(path) for path in images]
        clip = open_video(video, frames) if video is not None else []
        if prompt_template is not None:
            prompt_for(None, question, prompt_template, len(images), video is not None)
        loaded, processor = load(model, dtype, device_map, attn)
        job = prepare(loaded, processor, pictures, question, prompt_template, max_new_tokens, clip)
        others = baselines(job, reducer, ERRORS.print) if compare else []
        with ERRORS.status("running") as status:
            arms = [None, reducer, *others]
            unpruned, pruned, *rest = run_methods(job, arms, where, between, repeats, status.update, rectify, absorb)
            data = summarize(job, unpruned, pruned, rest)
            status.update("drawing")
            folder = make_folder(out, f"{Path(images[0] if images else str(video)).stem}-{reducer.name}")
            drawn = all(crop.grid for span in job.spans for crop in span.crops)
            if drawn:
                _draw(folder / "overlay.png", job, pruned, pictures, clip, question, data)
        overlay = str(folder / "overlay.png") if drawn else None
        data = {
            **data, "model": model, "images": images, "video": video, "question": question, "overlay": overlay,
            "dtype": str(loaded.dtype).removeprefix("torch."), "attention": loaded.config._attn_implementation,
            "rectify": rectify, "absorb": absorb, "versions": versions(), "machine": machine(),
        }  # fmt: skip
        write_json(folder / "result.json", data)
    if as_json:
        print_json(data)
    else:
        _show(data, unpruned, pruned)


def _draw(
    path: Path, job: Any, pruned: Any, images: list[Any], clip: list[Any], question: str, data: dict[str, Any]
) -> None:
    from foveate.viz import save

    before, after = data["tokens"]["before"], data["tokens"]["after"]
    same = pruned.answer == data["answer_unpruned"]
    unpruned = "the same unpruned" if same else f"unpruned: {data['answer_unpruned']}"
    try:
        save(
            path, job.views(images, clip), job.spans, pruned.selection, pruned.saliency,
            title=f"{pruned.reducer.name}: {after} of {before} visual tokens ({after / before:.1%})",
            caption=f"{question}  →  {pruned.answer}  ({unpruned})",
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from error


def _show(data: dict[str, Any], unpruned: Any, pruned: Any) -> None:
    console = Console(highlight=False)
    name = pruned.reducer.name
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("", "unpruned", name, "change"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("visual tokens", str(unpruned.kept), str(pruned.kept), _change(unpruned.kept, pruned.kept))
    if pruned.equivalent != pruned.kept:
        table.add_row(*_row("  mean over layers", unpruned.equivalent, pruned.equivalent, "{:.1f}".format), style="dim")
    if unpruned.cost is not None:
        table.add_row(*_row("prefill FLOPs", unpruned.cost.total, pruned.cost.total, show_flops))
        for part in ("vision", "projector", "selection", "prefill", "lm_head"):
            label = {"prefill": "LLM", "lm_head": "LM head"}.get(part, part)
            table.add_row(
                *_row(f"  {label}", getattr(unpruned.cost, part), getattr(pruned.cost, part), show_flops), style="dim"
            )
    table.add_row(*_row("KV cache", unpruned.kv_bytes, pruned.kv_bytes, show_bytes))
    table.add_row(*_row("time", unpruned.seconds["total"], pruned.seconds["total"], show_time))
    for stage in ("vision", "select", "prefill", "decode"):
        table.add_row(*_row(f"  {stage}", unpruned.seconds[stage], pruned.seconds[stage], show_time), style="dim")
    table.add_row("answer tokens", str(unpruned.answer_tokens), str(pruned.answer_tokens), "")
    agrees = "the same" if pruned.answer == unpruned.answer else "differs"
    console.print(f"\n[bold]{escape(data['question'])}[/bold]")
    width = max(len(name), len("unpruned"))
    console.print(f"  {'unpruned':<{width}}  {escape(unpruned.answer)}")
    console.print(f"  {name:<{width}}  {escape(pruned.answer)}  [dim]({agrees})[/dim]\n")
    console.print(table)
    if "compare" in data:
        console.print(_comparison(data["compare"], unpruned.answer))
    overlay = data["overlay"] or "none: it is not known where in the image the tokens are"
    console.print(f"\n[dim]{escape(data['method'])}[/dim]\noverlay  {escape(overlay)}", soft_wrap=True)


def _comparison(rows: list[dict[str, Any]], reference: str) -> Table:
    table = Table(
        box=None, padding=(0, 2, 0, 0), header_style="bold", title="\nat the same budget", title_justify="left"
    )
    for column in ("method", "tokens", "FLOPs", "first token", "total", "answer"):
        table.add_column(column, justify="left" if column in ("method", "answer") else "right")
    for row in rows:
        seconds, mark = row["seconds"], "" if row["answer"] == reference else "  (differs)"
        table.add_row(
            escape(row["method"].partition("(")[0]), f"{row['equivalent_tokens']:g}",
            "unknown" if row["flops"] is None else show_flops(row["flops"]),
            show_time(seconds["total"] - seconds["decode"]), show_time(seconds["total"]), escape(row["answer"]) + mark,
        )  # fmt: skip
    return table


def _row(label: str, before: float, after: float, unit: Callable[[float], str]) -> tuple[str, str, str, str]:
    return label, unit(before), unit(after), _change(before, after)


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""
