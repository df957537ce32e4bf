"""The command line. Results go to standard output; progress, logs and errors go to standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.errors import FoveateError, InputError

if TYPE_CHECKING:
    from foveate.engines.hf import Separators
    from foveate.reducer import Positions

app = typer.Typer(
    help="Keep only the visual tokens that matter, in stock vision-language models.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
nano_app = typer.Typer(help="The embedded model: train it again, or score it.", no_args_is_help=True)
app.add_typer(nano_app, name="nano")

P = ParamSpec("P")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
_errors = Console(stderr=True)


def _guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn foveate's own errors into one line on standard error and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except FoveateError as error:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            raise typer.Exit(2) from None

    return wrapped


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


@app.command()
@_guarded
def run(
    image: Annotated[str, typer.Argument(help="Image file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[str, typer.Option(help="nano, a hub id, or a folder.")] = "nano",
    method: Annotated[str, typer.Option(help="Name of a method, or a JSON file with one.")] = "vispruner",
    keep: Annotated[
        str | None, typer.Option(help="32: tokens. 0.1: share. 64,16: one per image.  [default: 0.25]")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Further parameter of the method: name=value, value in JSON.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also run the baselines at the same budget.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the overlay.  [default: runs/IMAGE-METHOD]")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers: auto, cpu, cuda:1.")] = None,
    attn: Annotated[str | None, typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2.")] = None,
    prompt_template: Annotated[str | None, typer.Option(help="Text with <image> and {question}.")] = None,
    positions: Annotated[str | None, typer.Option(help="original or compact.  [default: as in the paper]")] = None,
    separators: Annotated[str, typer.Option(help="Newline and frame tokens: drop, keep or nonempty.")] = "drop",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit on the answer.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs; the median counts.")] = 3,
    as_json: Json = False,
) -> None:
    """Ask a model about an image, unpruned and pruned, and measure both."""
    with contextlib.redirect_stdout(sys.stderr):
        reducer = _reducer(method, keep, set_ or [])
        from foveate import run as job_module
        from foveate.engines.hf import Settings
        from foveate.loading import open_image, prompt_for

        where, between = cast("Positions | None", positions), cast("Separators", separators)
        Settings.make(reducer, where, between, {})
        picture = open_image(image)
        if prompt_template is not None:
            prompt_for(None, question, prompt_template)
        loaded, processor = _load(model, dtype, device_map, attn)
        job = job_module.prepare(loaded, processor, picture, question, prompt_template, max_new_tokens)
        others = job_module.baselines(reducer) if compare else []
        with _errors.status("running") as status:
            arms = [None, reducer, *others]
            unpruned, pruned, *rest = job_module.measure(job, arms, where, between, repeats, status.update)
            data = job_module.report(job, unpruned, pruned, rest)
            status.update("drawing")
            folder = _folder(out, f"{Path(image).stem}-{reducer.name}")
            _draw(folder / "overlay.png", job, pruned, picture, question, data)
        data = {**data, "model": model, "question": question, "overlay": str(folder / "overlay.png")}
        _write(folder / "result.json", json.dumps(data, indent=2) + "\n")
    if as_json:
        _print_json(data)
    else:
        _show(data, unpruned, pruned)


def _reducer(method: str, keep: str | None, settings: list[str]) -> Any:
    from foveate.reducer import load_reducer
    from foveate.run import parse_keep

    config: dict[str, Any] = dict(map(_setting, settings))
    if keep is not None or not method.endswith(".json"):
        config["keep"] = parse_keep("0.25" if keep is None else keep)
    try:
        return load_reducer(method, **config)
    except FoveateError:
        raise
    except OSError as error:
        raise InputError(f"cannot read the method from {method!r}: {error.strerror}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{method!r} does not describe a method: {error}") from error


def _setting(text: str) -> tuple[str, Any]:
    """Read ``name=value``; a value that is no JSON is a word."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise InputError(f"--set takes name=value, such as important_ratio=0.3, not {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _load(model: str, dtype: str, device_map: str | None, attn: str | None) -> tuple[Any, Any]:
    from foveate.loading import load_model

    started = time.perf_counter()
    _errors.print(f"loading {escape(model)}", highlight=False)
    loaded, processor = load_model(model, dtype, device_map, attn)
    size, kind = loaded.num_parameters() / 1e6, str(loaded.dtype).removeprefix("torch.")
    _errors.print(
        f"{type(loaded).__name__}, {size:,.1f} M parameters, {kind} on {loaded.device}, attention "
        f"{loaded.config._attn_implementation}, loaded in {time.perf_counter() - started:.1f} s", highlight=False,
    )  # fmt: skip
    return loaded, processor


def _folder(out: Path | None, name: str) -> Path:
    """Make the folder for results: the one asked for, or a fresh one under ``runs``."""
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return out
        number = 1
        while True:
            folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise InputError(f"cannot make the folder {str(out or 'runs')!r}: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from error


def _draw(path: Path, job: Any, pruned: Any, picture: Any, question: str, data: dict[str, Any]) -> None:
    from foveate.loading import encoder_view
    from foveate.viz import save

    before, after = data["tokens"]["before"], data["tokens"]["after"]
    same = pruned.answer == data["answer_unpruned"]
    unpruned = "the same unpruned" if same else f"unpruned: {data['answer_unpruned']}"
    try:
        save(
            path, [[encoder_view(job.processor, picture)]], job.spans, pruned.selection, pruned.saliency,
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
    if unpruned.cost is not None:
        table.add_row(*_row("prefill FLOPs", unpruned.cost.total, pruned.cost.total, _flops))
        for part in ("vision", "projector", "selection", "prefill", "lm_head"):
            label = {"prefill": "LLM", "lm_head": "LM head"}.get(part, part)
            table.add_row(
                *_row(f"  {label}", getattr(unpruned.cost, part), getattr(pruned.cost, part), _flops), style="dim"
            )
    table.add_row(*_row("KV cache", unpruned.kv_bytes, pruned.kv_bytes, _bytes))
    table.add_row(*_row("time", unpruned.seconds["total"], pruned.seconds["total"], _time))
    for stage in ("vision", "select", "prefill", "decode"):
        table.add_row(*_row(f"  {stage}", unpruned.seconds[stage], pruned.seconds[stage], _time), style="dim")
    agrees = "the same" if pruned.answer == unpruned.answer else "differs"
    console.print(f"\n[bold]{escape(data['question'])}[/bold]")
    console.print(f"  unpruned   {escape(unpruned.answer)}")
    console.print(f"  {name:<9}  {escape(pruned.answer)}  [dim]({agrees})[/dim]\n")
    console.print(table)
    if "compare" in data:
        console.print(_comparison(data["compare"], unpruned.answer))
    console.print(f"\n[dim]{escape(data['method'])}[/dim]\noverlay  {escape(data['overlay'])}", soft_wrap=True)


def _comparison(rows: list[dict[str, Any]], reference: str) -> Table:
    table = Table(
        box=None, padding=(0, 2, 0, 0), header_style="bold", title="\nat the same budget", title_justify="left"
    )
    for column in ("method", "tokens", "FLOPs", "first token", "total", "answer"):
        table.add_column(column, justify="left" if column in ("method", "answer") else "right")
    for row in rows:
        seconds, mark = row["seconds"], "" if row["answer"] == reference else "  (differs)"
        table.add_row(
            escape(row["method"].partition("(")[0]), str(row["tokens"]),
            "unknown" if row["flops"] is None else _flops(row["flops"]),
            _time(seconds["total"] - seconds["decode"]), _time(seconds["total"]), escape(row["answer"]) + mark,
        )  # fmt: skip
    return table


def _row(label: str, before: float, after: float, unit: Callable[[float], str]) -> tuple[str, str, str, str]:
    return label, unit(before), unit(after), _change(before, after)


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def _scaled(value: float, units: tuple[str, ...], step: float) -> str:
    power = 0
    while value >= step and power < len(units) - 1:
        value, power = value / step, power + 1
    return f"{value:.3g} {units[power]}" if value < 999.5 else f"{value:.0f} {units[power]}"


def _flops(value: float) -> str:
    return _scaled(value, ("", "k", "M", "G", "T", "P"), 1000)


def _bytes(value: float) -> str:
    return _scaled(value, ("B", "KiB", "MiB", "GiB"), 1024)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


@app.command()
@_guarded
def methods(pattern: Annotated[str, typer.Argument(help="Shell-style pattern.")] = "*", as_json: Json = False) -> None:
    """List the methods and their parameters."""
    from foveate.reducer import get_method, list_methods

    rows = [_method_row(get_method(name)) for name in list_methods(pattern)]
    if as_json:
        _print_json(rows)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("method", "stage", "paper", "parameters", "what it does"):
        table.add_column(column, no_wrap=column == "method")
    for row in rows:
        given = ", ".join(n if v is None else f"{n}={v}" for n, v in row["parameters"].items())
        table.add_row(*map(escape, (row["name"], row["stage"], row["paper"], given, row["summary"])))
    Console(highlight=False).print(table)


def _method_row(cls: Any) -> dict[str, Any]:
    parameters = {
        f.name: None if f.default is dataclasses.MISSING else json.dumps(f.default, default=str)
        for f in dataclasses.fields(cls) if f.init
    }  # fmt: skip
    return {
        "name": cls.name, "stage": cls.stage, "query_aware": cls.query_aware, "trained": cls.trained,
        "merges": isinstance(cls.merges, bool) and cls.merges, "paper": cls.paper, "positions": cls.positions,
        "parameters": parameters, "summary": (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " "),
    }  # fmt: skip


@app.command()
@_guarded
def families(as_json: Json = False) -> None:
    """List the supported families of models."""
    from foveate.families import FAMILIES

    rows: list[dict[str, Any]] = [
        {"name": f.name, "model_types": list(f.model_types), "inputs": dict(f.inputs), "notes": f.notes}
        for f in FAMILIES.values()
    ]
    if as_json:
        _print_json(rows)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("family", "model types", "takes", "notes"):
        table.add_column(column)
    for row in rows:
        takes = ", ".join(dict.fromkeys(row["inputs"].values()))
        table.add_row(row["name"], ", ".join(row["model_types"]), takes, escape(row["notes"]))
    Console(highlight=False).print(table)


@app.command()
@_guarded
def scenes(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("scenes"),
    n: Annotated[int, typer.Option("--n", min=1, help="How many.")] = 8,
    seed: Annotated[int, typer.Option(help="Different seeds give different scenes.")] = 0,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    as_json: Json = False,
) -> None:
    """Write drawn scenes with questions and answers to a folder."""
    try:
        from foveate.nano.scenes import scenes as draw_scenes
    except ImportError as error:
        raise FoveateError(f"this installation has no scenes: {error}") from error

    folder, rows = _folder(out, ""), []
    try:
        for scene in draw_scenes(seed, n, split):
            path = folder / f"{scene.split}-{scene.seed}-{scene.index:05d}.png"
            scene.image.save(path)
            asked = [{"text": q.text, "answer": q.answer, "kind": q.kind} for q in scene.questions]
            objects = [{"kind": o.kind, "color": o.color, "box": list(o.box)} for o in scene.objects]
            rows.append({"image": str(path), "background": scene.background, "objects": objects, "questions": asked})
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    _write(folder / "scenes.json", json.dumps(rows, indent=2) + "\n")
    if as_json:
        _print_json({"folder": str(folder), "scenes": rows})
    else:
        asked_in_all = sum(len(row["questions"]) for row in rows)
        print(f"{len(rows)} scenes with {asked_in_all} questions in {folder}, listed in {folder / 'scenes.json'}")


if __name__ == "__main__":
    app()
