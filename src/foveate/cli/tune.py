"""The command that finds method and budget for one's own prompts."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from foveate.cli.names import check_methods
from foveate.cli.tools import ERRORS, Absorb, Json, Rectify, guarded, load, make_folder, print_json, write_json
from foveate.core.errors import InputError

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class By(str, Enum):
    """What cheap means."""

    time, flops = "time", "flops"


class Clocks(str, Enum):
    wall, cpu = "wall", "cpu"


@guarded
def tune(
    prompts: Annotated[
        Path, typer.Argument(help='JSON lines: {"image": "a.png", "question": "...", "answer": "if known"}.')
    ],
    max_loss: Annotated[
        float | None, typer.Option(help="Wish: the cheapest candidate that loses at most this share: 0.01.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Wish: the most loyal candidate that is at least so many times as fast.")
    ] = None,
    by: Annotated[By, typer.Option(help="What cheap means: measured time, or counted FLOPs.")] = By.time,
    model: Annotated[str, typer.Option(help="nano, a hub id, or a folder.")] = "nano",
    methods: Annotated[
        str | None,
        typer.Option("--methods", "--method", help="Names or JSON files, with commas.  \\[default: see the docs]"),
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Budgets, with commas.  \\[default: 0.75,0.5,0.33,0.2,0.1]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts to use, drawn from the file.")] = None,
    start: Annotated[int, typer.Option(min=4, help="Prompts that every candidate is asked.")] = 16,
    confidence: Annotated[float, typer.Option(help="Of every bound.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Order of prompts and candidates.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results; an interrupted search in it goes on.  \\[default: a new one]"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers: auto, cpu, cuda:1.")] = None,
    attn: Annotated[str | None, typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2.")] = None,
    prompt_template: Annotated[str | None, typer.Option(help="Text with {question} and an <image> per image.")] = None,
    rectify: Rectify = 0.0,
    absorb: Absorb = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit on answers.")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.  \\[default: torch's own]")] = None,
    clock: Annotated[Clocks, typer.Option(help="cpu: processor time of one thread, for busy machines.")] = Clocks.wall,
    as_json: Json = False,
) -> None:
    """Find the method and the budget that fulfil a wish on your own images and questions."""
    if methods is not None:
        check_methods(_listed(methods, ()))
    from foveate.measure.timing import check_clock
    from foveate.measure.timing import threads as torch_threads
    from foveate.tune.candidates import BUDGETS, METHODS
    from foveate.tune.journal import Journal
    from foveate.tune.prompts import ordered, read_prompts
    from foveate.tune.search import Wish

    with contextlib.redirect_stdout(sys.stderr), torch_threads(threads or (1 if clock is Clocks.cpu else None)):
        wish = Wish(max_loss, speedup, by.value, confidence)
        asked = ordered(read_prompts(prompts), seed)[:limit]
        wish.check_prompts(asked)
        names, budgets = _listed(methods, METHODS), _listed(keep, BUDGETS)
        if prompt_template is not None:
            _check_template(prompt_template, asked)
        loaded, processor = load(model, dtype, device_map, attn)
        from foveate.families import family_of
        from foveate.tune.asking import Asker
        from foveate.tune.candidates import candidates
        from foveate.tune.findings import findings
        from foveate.tune.search import search

        found, left_out = candidates(family_of(loaded), names, budgets)
        for name, reason in left_out.items():
            ERRORS.print(f"{name} is left out: {reason}", highlight=False, markup=False, soft_wrap=True)
        config = {
            "model": model, "prompts": hashlib.sha256(prompts.read_bytes()).hexdigest(), "limit": limit,
            "start": start, "seed": seed,
            "candidates": {name: repr(reducer) for name, reducer in found.items()},
            "wish": {"max_loss": max_loss, "speedup": speedup, "by": by.value, "confidence": confidence},
            "dtype": str(loaded.dtype).removeprefix("torch."), "device": str(loaded.device),
            "attention": loaded.config._attn_implementation, "prompt_template": prompt_template,
            "max_new_tokens": max_new_tokens, "clock": clock.value, "threads": threads, "rectify": rectify,
            "absorb": absorb,
        }  # fmt: skip
        check_clock(clock.value, loaded.device)
        folder = make_folder(out, f"{prompts.stem}-tune")
        journal = Journal(folder / "rows.jsonl", config)
        ERRORS.print(f"{len(found)} candidates, {len(asked)} prompts; rows go to {folder}", highlight=False)
        if len(journal):
            ERRORS.print(f"going on behind {len(journal)} prompts that were asked before", highlight=False)
        asker = Asker(loaded, processor, prompt_template, max_new_tokens, seed, CLOCKS[clock.value], rectify, absorb)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=ERRORS) as progress:
            bar = progress.add_task("starting", total=None)
            outcome = search(
                asker, asked, found, wish, journal, start=start,
                on_rung=lambda text, runs: progress.reset(bar, description=text, total=runs),
                on_runs=lambda runs: progress.advance(bar, runs),
            )  # fmt: skip
        for name, reason in outcome.failed.items():
            ERRORS.print(f"{name} failed: {reason}", highlight=False, markup=False, soft_wrap=True)
        data = {
            "command": shlex.join(["foveate", *sys.argv[1:]]),
            **findings(outcome, found, left_out, asked, wish), "config": config,
        }  # fmt: skip
        files = _write(folder, data, found)
        data |= {"files": files}
    if as_json:
        print_json(data)
    else:
        _show(data)
    if outcome.winner is None:
        raise typer.Exit(1)


def _listed(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    listed = default if text is None else tuple(part.strip() for part in text.split(",") if part.strip())
    if not listed:
        raise InputError("an empty list: give at least one name or budget")
    return listed


def _check_template(template: str, prompts: list[Any]) -> None:
    from foveate.measure.loading import prompt_for

    for prompt in prompts:
        try:
            prompt_for(None, prompt.question, template, len(prompt.images))
        except InputError as error:
            raise InputError(f"the prompt in line {prompt.line}: {error}") from error


def _write(folder: Path, data: dict[str, Any], found: dict[str, Any]) -> dict[str, str | None]:
    """Write what is worth keeping; returns the names of the files."""
    from foveate.tune.findings import markdown
    from foveate.viz.front import save

    write_json(folder / "report.json", data)
    config = folder / "config.json"
    try:
        (folder / "report.md").write_text(markdown(data) + "\n", encoding="utf-8")
        save(folder / "pareto.png", data)
        if data["winner"]:
            found[data["winner"]].save(config)
        else:
            config.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {str(folder)!r}: {error.strerror}") from error
    names = {"report": "report.json", "table": "report.md", "plot": "pareto.png"}
    return {
        **{key: str(folder / name) for key, name in names.items()},
        "config": str(config) if data["winner"] else None,
    }


def _show(data: dict[str, Any]) -> None:
    from foveate.tune.findings import header, table, verdict

    console = Console(highlight=False)
    shown = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    heads, best = header(data), data["winner"] or data["closest"]
    for head in heads:
        shown.add_column(head, justify="left" if head == heads[0] else "right", no_wrap=True)
    for cells in table(data):
        shown.add_row(*map(escape, cells), style="bold" if cells[0] == best else None)
    console.print(shown)
    console.print()
    for line in verdict(data):
        console.print(escape(line), soft_wrap=True)
    console.print()
    for kind, path in data["files"].items():
        if path:
            console.print(f"[dim]{kind:<7}[/dim] {escape(path)}", soft_wrap=True)
