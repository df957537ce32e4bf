"""Commands that measure time and memory."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from foveate.cli.names import check_methods
from foveate.cli.tools import (
    ERRORS,
    Absorb,
    Json,
    Rectify,
    command_line,
    fill_page,
    guarded,
    load,
    print_json,
    reducer_from,
    refuse,
    tell,
    write_json,
)  # fmt: skip
from foveate.core.errors import InputError
from foveate.measure.units import show_bytes

LAYERS = 4
"""Layers of the LLM of a shape unless told otherwise."""


class Clocks(str, Enum):
    wall, cpu = "wall", "cpu"


bench_app = typer.Typer(help="Measure time and memory.", no_args_is_help=True)


@bench_app.command()
@guarded
def selection(
    context: typer.Context,
    methods: Annotated[list[str] | None, typer.Argument(help="Names of methods.  \\[default: all]")] = None,
    keep: Annotated[int, typer.Option(min=1, help="Tokens to keep.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs per method.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    growth: Annotated[
        bool, typer.Option("--growth", help="Instead: time and memory of a ninth of 576 to 16,384 tokens.")
    ] = False,
    limit: Annotated[
        float | None, typer.Option(min=1, help="Seconds for a method at a size of --growth.  \\[default: 150]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the result, in JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Time every method's selection on random tokens, and VisPruner against the plain loop of its paper."""
    check_methods(methods or ())
    if growth:
        refuse(context, ("keep", "repeats", "threads"), "--growth keeps a ninth, on one thread")
    else:
        refuse(context, ("limit",), "only --growth has a limit")
    from foveate.bench import growth as growing
    from foveate.bench import selection as bench
    from foveate.bench.inputs import random_codebook
    from foveate.core.reducer import Reducer
    from foveate.registry import get_method, list_methods, load_reducer, parameters_without_default

    known = list_methods()
    left_out = {name: "stage in_llm" for name in known if get_method(name).stage == "in_llm"}
    lacking = {name: more for name in known if (more := parameters_without_default(name)) and name != "codebook"}
    left_out |= {name: f"needs {', '.join(more)}" for name, more in lacking.items()}
    for name in methods or ():
        if name in left_out:
            raise InputError(f"{name} has no selection to time by itself: {left_out[name]}")
    first = () if growth else (bench.REFERENCE,)
    names = dict.fromkeys([*first, *(methods or (name for name in known if name not in left_out))])
    with (
        contextlib.redirect_stdout(sys.stderr), Console(stderr=True).status("starting") as status,
        tempfile.TemporaryDirectory() as folder,
    ):  # fmt: skip
        random_codebook().save(book := f"{folder}/random.safetensors")
        needed = {"codebook": {"codebook": book}}
        budget = growing.SHARE if growth else keep
        loaded = (load_reducer(name, keep=budget, **needed.get(name, {})) for name in names)
        reducers = [reducer for reducer in loaded if isinstance(reducer, Reducer)]
        if growth:
            early = [reducer for reducer in reducers if reducer.stage == "before_llm"]
            result = growing.growth(early, growing.SIDES, limit or growing.LIMIT, status.update)
            left_out |= {r.name: f"stage {r.stage}" for r in reducers if r not in early}
        else:
            result = bench.selection(reducers, bench.GRIDS, repeats=repeats, threads=threads, say=status.update)
        for row in result["rows"]:
            row["reducer"] = row["reducer"].replace(repr(book), "'random.safetensors'")  # where it lay says nothing
    if not methods:
        result["left_out"] = result.get("left_out", {}) | left_out
    tell(result, out, as_json, _show_growth if growth else _show)


@bench_app.command()
@guarded
def conditioning(
    methods: Annotated[list[str] | None, typer.Argument(help="Names of methods.  \\[default: all]")] = None,
    keep: Annotated[int, typer.Option(min=1, help="Tokens to keep, of 576.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Random pictures per method.")] = 8,
    out: Annotated[Path | None, typer.Option(help="File for the result, in JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Tell how much of what each method decides stays when nothing but rounding differs, and what float64 costs."""
    from foveate.bench.conditioning import conditioning as measured
    from foveate.core.reducer import Reducer
    from foveate.registry import get_method, list_methods, load_reducer, parameters_without_default

    left_out = {name: f"stage {get_method(name).stage}" for name in list_methods()}
    left_out |= {name: f"needs {', '.join(more)}" for name in left_out if (more := parameters_without_default(name))}
    left_out = {name: why for name, why in left_out.items() if why != "stage before_llm"}
    if refused := [name for name in methods or () if name in left_out]:
        raise InputError(f"{refused[0]} does not decide on given tokens alone: {left_out[refused[0]]}")
    loaded = (load_reducer(n, keep=keep) for n in methods or [n for n in list_methods() if n not in left_out])
    with ERRORS.status("starting") as status:
        result = measured([r for r in loaded if isinstance(r, Reducer)], seeds, status.update)
    if not methods:
        result["left_out"] |= left_out
    tell(result, out, as_json, _show_conditioning)


def _show_conditioning(result: dict[str, Any]) -> None:
    changes = ("channels", "noise", "threads", "batch")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("same decisions, %", *changes):
        table.add_column(column, justify="left" if column not in changes else "right")
    for row in result["rows"]:
        table.add_row(row["method"], *(f"{100 * row[change]['same']:.1f}" for change in changes))
    console = Console(highlight=False)
    console.print(table)
    for row in result["exact_arithmetic_cost"]:
        console.print(
            f"{row['method']}, {row['tokens']} tokens: {row['ratio']} times as long as in float32, which keeps "
            f"{100 * row['same']:.0f} % of the same"
        )


@bench_app.command()
@guarded
def report(
    results: Annotated[list[Path], typer.Argument(help="What `bench model` or `bench selection --growth` wrote.")],
    page: Annotated[Path, typer.Option(help="Markdown page with a pair of marker lines for each, named as its file.")],
    as_json: Json = False,
) -> None:
    """Put the results of `bench model` into a page."""
    from foveate.bench.tables import write_report

    fill_page(page, lambda: write_report(results, page), "not results of `foveate bench`", as_json)


def _show_growth(result: dict[str, Any]) -> None:
    from foveate.bench.growth import growth_table

    print(growth_table(result))


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


@bench_app.command()
@guarded
def model(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="nano, a hub id, a folder, or a shape with random weights: llava-1.5-7b, ...")
    ] = "nano",
    method: Annotated[str, typer.Option(help="Name of a method, or a JSON file with one.")] = "vispruner",
    keep: Annotated[
        str | None, typer.Option(help="Budget, as in `foveate run`.  \\[default: the method's own, or 0.25]")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Further parameter of the method: name=value.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of a shape's LLM; the whole one of 7B has 32.  \\[default: 4]")
    ] = None,
    tied: Annotated[bool, typer.Option(help="Let the layers of a shape's LLM share the weights of one.")] = True,
    text_tokens: Annotated[int, typer.Option(min=2, help="Text tokens of a shape's prompt.")] = 64,
    image: Annotated[
        Path | None, typer.Option(help="Image file for a model with weights.  \\[default: a scene]")
    ] = None,
    question: Annotated[str, typer.Option(help="What to ask a model with weights.")] = "What is in the picture?",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; of shapes, auto is bfloat16.")
    ] = "auto",
    attn: Annotated[str | None, typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2.")] = None,
    rectify: Rectify = 0.0,
    absorb: Absorb = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Turns, in each of which every arm runs once.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.  \\[default: torch's own]")] = None,
    clock: Annotated[Clocks, typer.Option(help="cpu: processor time of one thread, for busy machines.")] = Clocks.wall,
    out: Annotated[Path | None, typer.Option(help="File for the result, in JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a plot, as PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Time a model unpruned, with a method, and with as many tokens for free; measure memory; say when it pays."""
    check_methods([method])
    from foveate.bench import model as bench
    from foveate.bench.random_models import LLAVA_SHAPES
    from foveate.engines.settings import Settings
    from foveate.measure.timing import threads as torch_threads

    with contextlib.redirect_stdout(sys.stderr), torch_threads(threads or (1 if clock is Clocks.cpu else None)):
        reducer = reducer_from(method, keep, set_ or [])
        if model in LLAVA_SHAPES:
            refuse(context, ("image", "question"), f"{model!r} has random weights and no processor")
            job = _shape_job(model, layers or LAYERS, tied, dtype, attn, text_tokens, max_new_tokens)
        else:
            refuse(context, ("layers", "tied", "text_tokens"), f"{model!r} is no shape ({', '.join(LLAVA_SHAPES)})")
            job = _real_job(model, dtype, attn, image, question, max_new_tokens)
        arms = bench.arms_of(job, Settings.make(reducer, family=job.family, rectify=rectify, absorb=absorb))
        with ERRORS.status("starting") as status:
            measured = bench.run_arms(arms, repeats, clock.value, status.update)
        result = {"command": command_line(context), "model": model, **measured}
        if model in LLAVA_SHAPES:
            result["config"]["tied"] = tied
        if out is not None:
            write_json(out, result)
        if plot is not None:
            _plot(plot, result)
    if as_json:
        print_json(result)
    else:
        _show_model(result)


def _shape_job(
    shape: str, layers: int, tied: bool, dtype: str, attn: str | None, text_tokens: int, max_new_tokens: int
) -> Any:
    from foveate.bench.random_models import random_job, random_model

    ERRORS.print(f"making a random {shape} with {layers} layers", highlight=False)
    made = random_model(shape, layers, tied, "bfloat16" if dtype == "auto" else dtype, attn)
    return random_job(made, text_tokens, max_new_tokens)


def _real_job(name: str, dtype: str, attn: str | None, image: Path | None, question: str, max_new_tokens: int) -> Any:
    from foveate.measure.job import prepare
    from foveate.measure.loading import open_image
    from foveate.nano import SAMPLE

    picture = open_image(image or SAMPLE)
    return prepare(*load(name, dtype, None, attn), picture, question, max_new_tokens=max_new_tokens)


def _plot(path: Path, result: dict[str, Any]) -> None:
    from foveate.viz import bars

    config = result["config"]
    title = (
        f"{result['model']}, {config['layers']} layers, {config['dtype']}: {config['visual_tokens']} visual and "
        f"{config['text_tokens']} text tokens, {config['answer_tokens']} of the answer"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        bars.save(path, result, title)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from error


def _show_model(result: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", title="median, ms", title_justify="left")
    stages = ("vision", "select", "prefill", "decode", "first_token")
    for column in ("arm", "tokens", *(s.replace("_", " ") for s in stages), "p90", "peak memory", "KV cache"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for row in result["arms"]:
        times = [row["time"][stage]["median_ms"] for stage in stages] + [row["time"]["first_token"]["p90_ms"]]
        sizes = show_bytes(row["peak_bytes"]["total"]), show_bytes(row["kv_bytes"])
        shown = [f"{ms:.0f}" if ms >= 1e3 else f"{ms:.1f}" for ms in times]
        table.add_row(row["arm"], f"{row['tokens']:g}", *shown, *sizes)
    console = Console(highlight=False)
    console.print(table)
    for line in _told(result["comparisons"]):
        console.print(line, soft_wrap=True)


def _told(found: dict[str, Any]) -> Iterator[str]:
    words = {
        "attached_at_ratio_1": "first token, attached at ratio 1 against unattached",
        "probes": "vision with probes against the same layers without",
        "vision": "vision against the unpruned model's",
        "first_token_of_oracle": "first token against the oracle's",
        "first_token": "first token against the unpruned model's",
        "total": "whole run against the unpruned model's",
    }
    yield from (f"{text:<53}{found[key] - 1:+.1%}" for key, text in words.items() if key in found)
    if "predicted" in found.get("prefill", {}):
        prefill = found["prefill"]
        yield f"prefill saved {prefill['saved']:.1%}; FLOPs predict {prefill['predicted']:.1%}"
    if "naive" in found:
        naive, (theirs, ours) = found["naive"], found["naive"]["peak_bytes"].values()
        yield (
            f"vision and selection {naive['vision_and_select']:.2f} times as fast as the naive way, with a peak of "
            f"{show_bytes(ours)} instead of {show_bytes(theirs)}"
        )
    if "break_even" in found:
        dropped, answer = (found["break_even"][key] for key in ("dropped_tokens", "answer_tokens"))
        yield f"it pays from {'no number of' if dropped is None else f'{dropped:g}'} dropped tokens on" + (
            "" if answer is None else f", and from {answer:g} tokens of the answer on"
        )
