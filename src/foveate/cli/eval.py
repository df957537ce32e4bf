"""The command that measures accuracy, and shows published numbers."""

from __future__ import annotations

import contextlib
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from foveate.cli.names import check_methods
from foveate.cli.tools import Json, guarded, print_json, refuse, write_json
from foveate.core.errors import InputError

_errors = Console(stderr=True)
LMMS = "--harness lmms-eval"
OPTIONS = {
    "--harness scenes": (
        "harness", "methods", "keep", "images", "seed", "processes", "out", "page", "rectify", "absorb",
    ),
    "--backbone": ("backbone", "methods", "keep", "images", "seed", "out", "page"),
    "--published": ("published",),
    "--against-paper": ("against_paper",),
    LMMS: (
        "harness", "methods", "keep", "out", "model", "tasks", "batch_size", "limit", "include_path", "samples",
        "dtype", "attn", "device_map", "rectify", "absorb",
    ),
}  # fmt: skip
"""What each way to use the command takes, beside ``--json``."""


class Harness(str, Enum):
    """What asks the questions."""

    scenes = "scenes"
    lmms_eval = "lmms-eval"


class Backbone(str, Enum):
    """Vision towers of other packages."""

    dinov2 = "dinov2"


@guarded
def evaluate(
    context: typer.Context,
    harness: Annotated[Harness, typer.Option(help="Drawn scenes on nano, or public benchmarks.")] = Harness.scenes,
    methods: Annotated[
        str | None, typer.Option("--methods", "--method", help="Names or JSON files, with commas.  \\[default: all]")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Visual tokens to keep, with commas, in place of the budgets of JSON files; by default 64,32,16,8, "
            "and files as they are. lmms-eval: one budget."
        ),
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Scenes.  \\[default: 300, of a backbone 150]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Different seeds give different scenes.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Single-threaded processes.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="File for the result, in JSON.  \\[default: runs/leaderboard.json]")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Markdown page with marker lines for tables; its plot goes beside it.")
    ] = None,
    backbone: Annotated[
        Backbone | None, typer.Option(help="Class recall on a frozen vision tower instead of answers.")
    ] = None,
    published: Annotated[str | None, typer.Option(help="List the published numbers of a method, or of all.")] = None,
    against_paper: Annotated[
        Path | None, typer.Option(help="Results of lmms-eval or a leaderboard to show beside published numbers.")
    ] = None,
    model: Annotated[str, typer.Option(help="lmms-eval: nano, a hub id, or a folder.")] = "nano",
    tasks: Annotated[str | None, typer.Option(help="lmms-eval: names of tasks, with commas.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="lmms-eval: questions at once.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="lmms-eval: questions per task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="lmms-eval: folder with further tasks.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="lmms-eval: file for every question, answer and kept tokens, as JSON lines.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="lmms-eval: auto, float32, bfloat16 or float16.")] = "auto",
    attn: Annotated[str | None, typer.Option(help="lmms-eval: sdpa, eager, flash_attention_2.")] = None,
    device_map: Annotated[str | None, typer.Option(help="lmms-eval: as in transformers.")] = None,
    rectify: Annotated[
        float,
        typer.Option(help="Strength of a bias on attention to kept tokens. Of scenes also with it, in a column."),
    ] = 0.0,
    absorb: Annotated[
        bool,
        typer.Option("--absorb", help="Average dropped tokens into kept ones. Of scenes also with it and rectify 1."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure accuracy: methods by budgets on scenes, a backbone, or public benchmarks; or show published numbers."""
    _check_options(
        context,
        {
            "--backbone": backbone is not None, "--published": published is not None,
            "--against-paper": against_paper is not None, LMMS: harness is Harness.lmms_eval,
        },
    )  # fmt: skip
    if page is not None and not page.is_file():
        raise InputError(f"no page at {str(page)!r}: make one with the marker lines first")
    check_methods(_names(methods))
    options = {
        "batch_size": batch_size, "limit": limit, "out": out, "include_path": include_path, "samples": samples,
        "dtype": dtype, "attn": attn, "device_map": device_map, "rectify": rectify, "absorb": absorb,
    }  # fmt: skip
    if published is not None:
        _list_published(published, as_json)
    elif against_paper is not None:
        _beside_paper(against_paper, as_json)
    elif harness is Harness.lmms_eval:
        _benchmarks(model, tasks, methods, keep, options, as_json)
    elif backbone is not None:
        _backbone(methods, keep, images or 150, seed, out, page, as_json)
    else:
        variants = [(rectify, False)] * (rectify != 0) + [(1.0, True)] * absorb
        out = out or Path("runs/leaderboard.json")
        _scenes(methods, keep, images or 300, seed, processes, out, page, variants, as_json)


def _check_options(context: typer.Context, wanted: dict[str, bool]) -> None:
    """Refuse options that the way in which the command is used would ignore."""
    modes = [mode for mode, given in wanted.items() if given] or ["--harness scenes"]
    if len(modes) > 1:
        raise InputError(f"{' and '.join(modes)} do not go together")
    for name in dict.fromkeys(name for options in OPTIONS.values() for name in options):
        takers = [mode for mode, options in OPTIONS.items() if name in options]
        if modes[0] not in takers:
            refuse(context, (name,), f"this is an option of {' and '.join(takers)}, not of {modes[0]}")


def _scenes(
    methods: str | None, keep: str | None, images: int, seed: int, processes: int, out: Path, page: Path | None,
    variants: list[tuple[float, bool]], as_json: bool,
) -> None:  # fmt: skip
    from foveate.eval import leaderboard
    from foveate.eval.plot import plot

    rows = out.with_suffix(".rows.jsonl")
    with contextlib.redirect_stdout(sys.stderr), _bar("answers") as bar:
        task = bar.add_task("answers", total=None)
        result = leaderboard.leaderboard(
            _names(methods), _budgets(keep), images, seed, rows, processes,
            lambda done, total: bar.update(task, completed=done, total=total), variants,
        )  # fmt: skip
    write_json(out, result)
    if page is not None:
        _fill(page, leaderboard.tables(result))
        plot(result, page.parent / "images" / f"{page.stem}.svg")
    if as_json:
        print_json(result)
        return
    _show(result)
    print(f"\nresults in {out}, answers in {rows}")


def _backbone(
    methods: str | None, keep: str | None, images: int, seed: int, out: Path | None, page: Path | None, as_json: bool
) -> None:
    from foveate.eval import backbone
    from foveate.eval.scenes import BUDGETS

    names = _names(methods)
    if keep is None and (files := [name for name in names if name.endswith(".json")]):
        raise InputError(f"a backbone is run at equal numbers of tokens, which {files[0]} does not name: give --keep")
    with contextlib.redirect_stdout(sys.stderr), _bar("scenes") as bar:
        task = bar.add_task("scenes", total=None)
        result = backbone.recall(
            names, _budgets(keep) or BUDGETS, images, seed,
            lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if out is not None:
        write_json(out, result)
    if page is not None:
        _fill(page, backbone.tables(result))
    if as_json:
        print_json(result)
    else:
        print(backbone.tables(result)["backbone"])


def _benchmarks(
    model: str, tasks: str | None, methods: str | None, keep: str | None, options: dict[str, Any], as_json: bool
) -> None:
    if tasks is None:
        raise InputError("name the benchmarks: --tasks gqa,pope,mme")
    names = _names(methods)
    if len(names) > 1:
        raise InputError(f"lmms-eval runs one method at a time, not {', '.join(names)}")
    if names and keep is None and not names[0].endswith(".json"):
        raise InputError(f"give {names[0]} a budget: --keep 64")
    from foveate.core.budget import parse_keep
    from foveate.eval import lmms

    with contextlib.redirect_stdout(sys.stderr):
        budget = None if keep is None else parse_keep(keep)
        result = lmms.run(model, tasks.split(","), names[0] if names else None, budget, **options)
    if result is None:
        return
    if as_json:
        print_json(result)
    else:
        rows = [[task, *pair] for task, found in result["results"].items() for pair in _metrics(found)]
        _print_table(["task", "metric", "value"], rows)


def _metrics(found: dict[str, Any]) -> list[list[str]]:
    return [[name, f"{value:g}"] for name, value in found.items() if isinstance(value, int | float)]


def _list_published(method: str, as_json: bool) -> None:
    from foveate.eval.published import numbers, of_method

    rows = numbers() if method == "all" else of_method(method)
    if as_json:
        print_json([row.to_dict() for row in rows])
        return
    _print_table(
        ["model", "tokens", "method", "benchmark", "value", "unit", "source", "known from"],
        [
            [r.model, _tokens(r.budget, r.setting), r.method, r.benchmark, f"{r.value:g}", r.unit, r.source, r.known]
            for r in rows
        ],
    )


def _beside_paper(path: Path, as_json: bool) -> None:
    from foveate.eval.published import beside

    pairs = beside(path)
    if as_json:
        print_json(pairs)
        return
    _print_table(
        ["method", "benchmark", "ours", "tokens", "model", "published", "tokens", "model", "source", "known from"],
        [
            [
                p["method"], p["benchmark"], f"{p['ours']:g}", f"{p['budget']:g}", p["model"], f"{p['published']:g}",
                _tokens(p["published_budget"]), p["published_model"], p["source"], p["known"],
            ]
            for p in pairs
        ],
    )  # fmt: skip


def _tokens(budget: float | None, setting: str | None = None) -> str:
    return ", ".join(part for part in (None if budget is None else f"{budget:g}", setting) if part)


def _names(text: str | None) -> list[str]:
    return [] if text is None else [name.strip() for name in text.split(",")]


def _budgets(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        budgets = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--keep takes numbers of tokens with commas, such as 64,32,16, not {text!r}") from error
    if min(budgets) < 1:
        raise InputError(f"at least one token is kept, not {min(budgets)}")
    return list(dict.fromkeys(budgets))


def _fill(page: Path, texts: dict[str, str]) -> None:
    from foveate.measure.pages import fill

    try:
        fill(page, texts)
    except OSError as error:
        raise InputError(f"cannot use the page {str(page)!r}: {error.strerror}") from error


def _bar(what: str) -> Progress:
    return Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=_errors, transient=True
    )


def _show(result: dict[str, Any]) -> None:
    from foveate.eval import leaderboard

    variants = leaderboard.variants_of(result)
    rows = [
        [
            str(row["budget"]), row["method"], f"{row['tokens']:g}",
            f"{row['relative']['average']:.1f} ± {row['relative']['error']:.1f}",
            f"{row['worst']['kind']} {row['worst']['relative']:.0f}", f"{row['loyalty']['agreement']:.1f}",
            leaderboard.cost_share(row, "of_unpruned"), _p(row["against"].get("random")),
            _p(row["against"].get("best")), *(leaderboard.variant_cell(row, v) for v in variants),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["budget", "method", "tokens", "relative average", "worst kind", "loyalty", "FLOPs", "p random", "p best"]
    _print_table([*head, *variants], rows)
    for one in result["left_out"]:
        name = " ".join(filter(None, [one["method"], one.get("variant")]))
        print(f"left out: {name} at {', '.join(map(str, one['budgets']))} tokens: {one['reason']}")


def _p(gap: dict[str, Any] | None) -> str:
    return "" if gap is None else f"{gap['p']:.4f}"


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in head:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
