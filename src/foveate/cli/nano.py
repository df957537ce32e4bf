"""Commands that train, judge and report on the embedded model, for those who have the repository."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from foveate.cli.repository import training_of_nano
from foveate.cli.tools import Json, fill_page, guarded, make_folder, print_json, tell, write_json
from foveate.core.errors import FoveateError, InputError

nano_app = typer.Typer(
    help="The embedded model: train it again, score it, report on it. Needs a clone of the repository.",
    no_args_is_help=True,
)

Folder = Annotated[Path | None, typer.Option("--model", help="Model folder.  \\[default: the shipped one]")]
Images = Annotated[int, typer.Option(min=1, help="How many scenes.")]
Seed = Annotated[int, typer.Option(help="Different seeds give different scenes.")]
Processes = Annotated[int, typer.Option(min=1, help="Single-threaded processes.")]
Result = Annotated[Path | None, typer.Option(help="File for the result, in JSON.")]


@nano_app.command()
@guarded
def train(
    out: Annotated[Path, typer.Option(help="Folder for images, checkpoints, log and weights.")] = Path("runs/nano"),
    recipe: Annotated[Path | None, typer.Option(help="Recipe file.  \\[default: that of the shipped weights]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints in the folder.")] = False,
    processes: Processes = 2,
    as_json: Json = False,
) -> None:
    """Train the model from nothing."""
    recipes, training = training_of_nano("recipe"), training_of_nano("train")
    path = recipe or recipes.DEFAULT_PATH
    try:
        wanted = recipes.Recipe.load(path)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise InputError(f"cannot read the recipe {str(path)!r}: {error}") from error
    make_folder(out, "")
    with contextlib.redirect_stdout(sys.stderr):
        folder = training.train(wanted, out, resume, processes)
    if as_json:
        print_json({"weights": str(folder), "recipe": wanted.to_dict()})
    else:
        print(f"the model is in {folder}")


@nano_app.command("eval")
@guarded
def evaluate(
    model: Folder = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    images: Images = 1000,
    seed: Seed = 0,
    processes: Processes = 2,
    log: Annotated[Path | None, typer.Option(help="log.jsonl of the training run, to include its curve.")] = None,
    out: Result = None,
    as_json: Json = False,
) -> None:
    """Score the model on scenes and judge its gates; exit code 1 if one is missed."""
    acceptance, folder = training_of_nano("acceptance"), _weights(model)
    from foveate.nano.scenes import BUCKETS

    if split not in BUCKETS:
        raise InputError(f"a split is {', '.join(BUCKETS)}, not {split!r}")
    if log is not None and not log.is_file():
        raise InputError(f"no training log at {str(log)!r}")
    with contextlib.redirect_stdout(sys.stderr):
        result = acceptance.measure(folder, split, seed, images, processes, log)
    tell(result, out, as_json, _show_scores)
    if acceptance.failed(result["gates"]):
        raise typer.Exit(1)


@nano_app.command()
@guarded
def inside(
    images: Images = 200,
    seed: Seed = 0,
    training_images: Annotated[int, typer.Option(min=1, help="Scenes on which gates are trained.")] = 200,
    out: Result = None,
    page: Annotated[Path | None, typer.Option(help="Markdown page that has the tables' marker lines.")] = None,
    as_json: Json = False,
) -> None:
    """Score nano guiding itself and a deeper copy (SGL), and gates trained for it (DyVTE) beside exits by rule."""
    from foveate.measure.pages import fill

    guiding = training_of_nano("guiding")
    if page is not None and not page.is_file():
        raise InputError(f"no page at {str(page)!r}: it has the marker lines between which the tables go")

    with contextlib.redirect_stdout(sys.stderr), Console(stderr=True).status("starting") as status:
        result = guiding.measure(images, seed, training_images, status.update)
        if page is not None:
            fill_page(page, lambda: fill(page, guiding.tables(result)), "not a result of `foveate nano inside`", False)
    if out is not None:
        write_json(out, result)
    if as_json:
        print_json(result)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("condition", "accuracy in %", "layers' share of the tokens"):
        table.add_column(column)
    for name, row in {**result["accuracy"], **result["exits"]}.items():
        table.add_row(name, f"{row['accuracy']:.1f} ± {row['error']:.1f}", str(row.get("mean_share", "")))
    Console(highlight=False).print(table)


@nano_app.command()
@guarded
def report(
    result: Annotated[Path, typer.Argument(help="What `foveate eval --out` wrote.")],
    page: Annotated[
        Path, typer.Argument(help="Markdown page that has the marker lines of the README's or of Gaze's table.")
    ],
    as_json: Json = False,
) -> None:
    """Put a few rows of the leaderboard into a page."""
    write_table = training_of_nano("excerpt").write_table
    fill_page(page, lambda: write_table(result, page), f"{str(result)!r} is no leaderboard with these methods", as_json)


@nano_app.command()
@guarded
def card(
    results: Annotated[list[Path], typer.Argument(help="What `eval --out` wrote: shipped weights first, other seeds.")],
    page: Annotated[Path, typer.Option(help="Markdown page that has the tables' marker lines.")],
    as_json: Json = False,
) -> None:
    """Put the tables of the model card into a page."""
    write_card = training_of_nano("card").write_card
    fill_page(page, lambda: write_card(results, page), "not results of `foveate nano eval`", as_json)


def _weights(model: Path | None) -> Path:
    from foveate.nano import WEIGHTS

    folder = model or WEIGHTS
    if not (folder / "config.json").is_file():
        raise FoveateError(f"no model in {str(folder)!r}: train one with `foveate nano train`, then pass its folder")
    return folder


def _show_scores(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    scores = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    kinds = list(next(iter(result["accuracy"].values())))
    for column in ("accuracy in %", *kinds):
        scores.add_column(column, justify="left" if column == "accuracy in %" else "right")
    for name, row in result["accuracy"].items():
        scores.add_row(name, *(f"{row[kind]['accuracy']:.1f}" for kind in kinds))
    console.print(scores)
    for name, gate in result["gates"].items():
        console.print(f"{'passed' if gate['passed'] else 'MISSED'}  {name}: {gate}", markup=False, soft_wrap=True)
